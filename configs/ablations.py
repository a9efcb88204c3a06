"""The ablations to run first, and what stages leave behind: each one command, minutes on two CPU cores.

python -m train.sweep --config=configs/ablations.py:attention --workdir=runs/attention

  attention   latent (MLA), grouped-query, multi-query and multi-head attention at equal parameters
  experts     a dense model, 8 and 32 experts at equal active parameters
  balance     no balance, router biases (DeepSeek-V3), balance loss by sequence, balance loss by batch
  reasoning   worked sums in pre-training from the start, the same tokens at its end, their form alone, or none; then
              fine-tuning and reinforcement learning that are the same for all
  scaling     twelve runs of four sizes and three lengths, and one of more than four times their largest compute
  budgets     five sizes for each of four budgets of compute, the largest of them to be predicted
  accuracy    nine runs that learn sums, and one that is larger: its share of right answers predicted through its loss
  width       six learning rates on a narrow model and on one four times as wide, with and without `model.base_width`
  thinking    answers alone, or worked out first, for as many tokens of fine-tuning
  epochs      1, 4 or 16 epochs of fine-tuning on the same records
  specialists one model specialised three ways
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs.base import SEEDS, add_stage, experiment, small
from configs.methods import SUMS
from model.transformer import Model
from train.launch.edges import stage_model

HEADS, HEAD = 4, 32
KEY_VALUE_HEADS = {'multi-head': HEADS, 'grouped-query': HEADS // 2, 'multi-query': 1}
FEED_FORWARD = 384  # of the dense model with latent attention; the others' make up for smaller attention
EXPERTS = (0, 8, 32)
PER_TOKEN, SHARED, WIDTH = 2, 1, 64
BALANCES: dict[str, dict[str, Any]] = {
    'none': {},
    'bias': {'model.bias_update_rule': 'sign'},
    'sequence loss': {'stages.run.loss.sequence_balance': 0.01},
    'batch loss': {'stages.run.loss.batch_balance': 0.01},
}
MIXTURES: dict[str, tuple[Any, ...]] = {
    'none': ((0.0, {'text': 1.0}),),
    'from the start': ((0.0, {'text': 0.8, 'sums': 0.2}),),
    'at the end': ((0.0, {'text': 1.0}), (0.6, {'text': 0.5, 'sums': 0.5})),
    'form alone': ((0.0, {'text': 0.8, 'forms': 0.2}),),
}
# Hidden sizes, steps, and both of a last run.
GRIDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]] = {
    'scaling': ((32, 48, 64, 96), (150, 300, 600), (128, 1500)),
    'accuracy': ((32, 48, 64), (100, 200, 400), (96, 800)),
}
COMPUTE, WIDTHS = (1e11, 2e11, 4e11, 8e11), (16, 24, 32, 48, 64)
NARROW, WIDE, RATES = 32, 128, (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)
BUDGETS = (0, 8, 16, 24)  # tokens of work; a line of it takes some eight
EPOCHS, RECORDS = (1, 4, 16), 256  # records of 13 tokens, four of which fill a row of 52
TASKS: dict[str, dict[str, Any]] = {
    'sums': {'name': 'arithmetic', 'operations': (1, 3), 'digits': 1, 'max_value': 10, 'worked': True},
    'code': {'name': 'code', 'level': (1, 2), 'examples': 1},
    'puzzles': {'name': 'sudoku', 'size': 4, 'blanks': (1, 6)},
}


def get_config(variant: str = '') -> ConfigDict:
    """The config; `variant` names the ablation."""
    config = experiment('ablations', variant, VARIANTS)
    config.sources.text = {'type': 'stdlib', 'piece': 2000}
    config.tokenizer.update(sources=('text',), vocab_size=1024)
    held_out = {'type': 'stdlib', 'split': 'heldout'}
    config.evaluations.prose = {'type': 'text', 'source': held_out, 'length': 128, 'documents': 0}
    VARIANTS[variant](config)
    return config


def _run(config: ConfigDict, **fields: Any) -> None:
    """The one stage of an ablation of pre-training."""
    given: dict[str, Any] = {'steps': 600, 'batch_size': 8, 'sequence_length': 128, 'evaluations': ('prose',)}
    given |= {'mixture': ((0.0, {'text': 1.0}),), 'optimizer': {'learning_rate': 0.01, 'schedule': 'linear'}}
    add_stage(config, 'run', 'pretrain', **given | fields)


def _attention(config: ConfigDict) -> None:
    config.model.update(n_routed_experts=0, intermediate_size=FEED_FORWARD, head_dim=HEAD)
    config.evaluations.prose.length = 256
    _run(config, steps=400, sequence_length=256)


def _experts(config: ConfigDict) -> None:
    active = (PER_TOKEN + SHARED) * WIDTH
    config.model.update(hidden_size=64, num_hidden_layers=2, intermediate_size=active, moe_intermediate_size=WIDTH)
    config.model.update(num_experts_per_tok=PER_TOKEN, n_shared_experts=SHARED)
    _run(config)


def _balance(config: ConfigDict) -> None:
    _experts(config)
    config.model.update(n_routed_experts=16, bias_update_rule='none')
    config.stages.run.loss.sequence_balance = 0.0


def _reasoning(config: ConfigDict) -> None:
    sums = TASKS['sums']
    config.model.update(hidden_size=96, num_hidden_layers=2)
    config.tokenizer.update(sources=('text', 'chats'))
    written = {'type': 'task', 'format': 'text', **sums}
    config.sources.update(
        sums=written,
        forms={'type': 'noisy', 'source': written, 'kind': 'digits'},
        chats={'type': 'task', 'format': 'chat', **sums},
    )
    judged: dict[str, Any] = {'type': 'task', 'task': sums, 'items': 256, 'max_tokens': 48}
    config.evaluations.update(sums={**judged, 'samples': 4, 'temperature': 1.0}, sums_greedy=judged)
    names = ('sums', 'sums_greedy')
    _run(config)
    shaped: dict[str, Any] = {'sequence_length': 128, 'evaluations': names}
    chats = ((0.0, {'chats': 1.0}),)
    add_stage(config, 'tune', 'sft', parent='run', steps=60, batch_size=16, mixture=chats, **shaped)
    add_stage(config, 'reinforce', 'grpo', parent='tune', task=sums, steps=60, **shaped, **SUMS)


def _scaling(config: ConfigDict) -> None:
    config.model.update(num_hidden_layers=2, n_routed_experts=0, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    _run(config)


def _accuracy(config: ConfigDict) -> None:
    _scaling(config)
    told = {'type': 'task', 'format': 'text', **TASKS['sums']}
    config.tokenizer.update(sources=('sums',), vocab_size=288)
    config.sources.sums = told
    config.evaluations.told = {'type': 'text', 'source': {**told, 'split': 'heldout'}, 'documents': 256, 'length': 128}
    config.evaluations.sums = {'type': 'task', 'task': TASKS['sums'], 'format': 'text', 'items': 256, 'max_tokens': 48}
    config.stages.run.update(mixture=((0.0, {'sums': 1.0}),), evaluations=('told', 'sums'))


def _width(config: ConfigDict) -> None:
    _scaling(config)
    config.stages.run.steps = 300


def _thinking(config: ConfigDict) -> None:
    sums = {**TASKS['sums'], 'worked': False}
    config.tokenizer.update(sources=('chats',), vocab_size=288)
    config.sources.chats = {'type': 'task', 'format': 'chat', 'direct': False, **sums}
    config.evaluations.sums = {'type': 'task', 'task': sums, 'items': 256, 'max_tokens': 48, 'budgets': BUDGETS}
    tuned: dict[str, Any] = {'steps': 300, 'batch_size': 16, 'sequence_length': 128, 'evaluations': ('sums',)}
    add_stage(config, 'tune', 'sft', mixture=((0.0, {'chats': 1.0}),), **tuned)


def _epochs(config: ConfigDict) -> None:
    named: dict[str, Any] = {'name': 'letters', 'goal': 'any'}
    letters = {'type': 'task', 'format': 'chat', **named}
    config.tokenizer.update(sources=('letters',), vocab_size=288)
    config.sources.update(letters=letters, few={**letters, 'records': RECORDS})
    config.evaluations.letters = {'type': 'task', 'task': named, 'items': 128, 'max_tokens': 12}
    config.evaluations.letters.update(samples=16, temperature=1.0)
    for seed in SEEDS:
        shaped: dict[str, Any] = {'seed': seed, 'sequence_length': 52, 'batch_size': 8, 'evaluations': ('letters',)}
        start = f'start_{seed}'
        add_stage(config, start, 'sft', steps=100, mixture=((0.0, {'letters': 1.0}),), **shaped)
        for count in EPOCHS:
            fields = {**shaped, 'parent': start, 'mixture': ((0.0, {'few': 1.0}),)}
            add_stage(config, f'epochs{count}_{seed}', 'sft', steps=count * RECORDS // 32, **fields)


def _specialists(config: ConfigDict) -> None:
    judged: dict[str, Any] = {'type': 'task', 'items': 256, 'max_tokens': 72}
    for name, task in TASKS.items():
        config.sources[name] = {'type': 'task', 'format': 'chat', **task}
        config.evaluations[name] = {**judged, 'task': task}
    config.tokenizer.update(sources=tuple(TASKS), vocab_size=512)
    for seed in SEEDS:
        shaped: dict[str, Any] = {'seed': seed, 'sequence_length': 160, 'batch_size': 16, 'evaluations': tuple(TASKS)}
        everything = ((0.0, dict.fromkeys(TASKS, 1.0)),)
        add_stage(config, f'start_{seed}', 'sft', steps=200, mixture=everything, **shaped)
        for name in TASKS:
            fields = {**shaped, 'parent': f'start_{seed}', 'mixture': ((0.0, {name: 1.0}),)}
            add_stage(config, f'{name}_{seed}', 'sft', steps=80, optimizer={'learning_rate': 0.005}, **fields)


def sweep(add: Callable[[dict[str, Any], str], None], variant: str = '') -> None:
    """The arms of the ablations of one stage or chain."""
    if variant in GRIDS:
        sizes, lengths, largest = GRIDS[variant]
        for size, steps in [*itertools.product(sizes, lengths), largest]:
            add({**_sizes(size), 'stages.run.steps': steps}, f'{size} wide, {steps} steps')
        return
    if variant == 'budgets':
        config = get_config(variant)
        for size in WIDTHS:
            config.update_from_flattened_dict(_sizes(size))
            active = Model(stage_model(config.to_dict(), 'run')).parameter_counts['active']
            a_step = 6 * active * config.stages.run.batch_size * config.stages.run.sequence_length
            for compute in COMPUTE:
                add({**_sizes(size), 'stages.run.steps': round(compute / a_step)}, f'{size} wide, {compute:.0e} FLOPs')
        return
    for seed in SEEDS:
        if variant == 'attention':
            add({'seed': seed}, 'latent')
            for name, count in KEY_VALUE_HEADS.items():
                grouped: dict[str, Any] = {'model.attention': 'gqa', 'model.num_key_value_heads': count}
                add({**grouped, 'model.intermediate_size': _equal_width(count), 'seed': seed}, name)
        elif variant == 'experts':
            for count in EXPERTS:
                add({'model.n_routed_experts': count, 'seed': seed}, f'{count} experts' if count else 'dense')
        elif variant == 'balance':
            for name, changes in BALANCES.items():
                add({**changes, 'seed': seed}, name)
        elif variant == 'reasoning':
            for name, mixture in MIXTURES.items():
                add({'stages.run.mixture': mixture, 'seed': seed}, name)
            for name in ('from the start', 'at the end'):  # is it the place, or the rate, which has come down there?
                held = {'stages.run.mixture': MIXTURES[name], 'stages.run.optimizer.schedule': 'constant'}
                add({**held, 'seed': seed}, f'{name}, rate held')
        elif variant == 'width':
            for rate in RATES:
                arm: dict[str, Any] = {'stages.run.optimizer.learning_rate': rate, 'seed': seed}
                add({**arm, **_sizes(NARROW)}, f'{NARROW} wide, {rate}')
                add({**arm, **_sizes(WIDE)}, f'{WIDE} wide, {rate}')
                add({**arm, **_sizes(WIDE), 'model.base_width': NARROW}, f'{WIDE} wide by width, {rate}')
        elif variant == 'thinking':
            for direct in (False, True):
                add({'sources.chats.direct': direct, 'seed': seed}, 'answer alone' if direct else 'worked out')


def _sizes(width: int) -> dict[str, int]:
    """Of a dense model, as changes of the config: heads of one size, more of them in a wider model."""
    sizes = {'hidden_size': width, 'intermediate_size': 3 * width, 'kv_lora_rank': width // 2}
    return {f'model.{field}': size for field, size in {**sizes, 'num_attention_heads': width // 16}.items()}


def _equal_width(key_value_heads: int) -> int:
    """Of the feed-forward with which grouped-query attention has as many parameters a layer as latent attention."""
    m = small('', 512).model
    latent = m.hidden_size * HEADS * (m.qk_nope_head_dim + m.qk_rope_head_dim)  # queries
    latent += m.hidden_size * (m.kv_lora_rank + m.qk_rope_head_dim) + m.kv_lora_rank
    latent += m.kv_lora_rank * HEADS * (m.qk_nope_head_dim + m.v_head_dim) + HEADS * m.v_head_dim * m.hidden_size
    grouped = 2 * m.hidden_size * HEAD * (HEADS + key_value_heads)
    return int(FEED_FORWARD + round((latent - grouped) / (3 * m.hidden_size)))


VARIANTS: dict[str, Callable[[ConfigDict], None]] = {
    'attention': _attention,
    'experts': _experts,
    'balance': _balance,
    'reasoning': _reasoning,
    'scaling': _scaling,
    'budgets': _scaling,
    'accuracy': _accuracy,
    'width': _width,
    'thinking': _thinking,
    'epochs': _epochs,
    'specialists': _specialists,
}
