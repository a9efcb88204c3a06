"""What methods that change behaviour do and cost, each in minutes on two CPU cores: `configs/steering.py:preference`,
and so on."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.base import ADAM, SEEDS, add_stage, experiment

PRINCIPLES = 'configs/principles.txt'


def get_config(variant: str = '') -> ConfigDict:
    """The config; `variant` names the experiment."""
    config = experiment('steering', variant, VARIANTS)
    VARIANTS[variant](config)
    return config


def _comments(config: ConfigDict) -> None:
    """More comments in programs, by the model's own that have them and pass their tests; does anything else move?"""
    code: dict[str, Any] = {'name': 'code', 'level': (1, 2), 'examples': 1, 'comments': 'some'}
    sums: dict[str, Any] = {'name': 'arithmetic', 'operations': (1, 2), 'digits': 1, 'max_value': 10}
    config.tokenizer.update(sources=('code',), vocab_size=512)
    config.sources.update(
        code={'type': 'task', 'format': 'chat', **code}, sums={'type': 'task', 'format': 'chat', **sums}
    )
    judged: dict[str, Any] = {'type': 'task', 'items': 256, 'samples': 4, 'temperature': 1.0, 'max_tokens': 72}
    config.evaluations.update(
        commented={**judged, 'task': {**code, 'comments': 'all'}},
        passed={**judged, 'task': code},
        sums={**judged, 'task': sums},
    )
    for seed in SEEDS:
        shaped: dict[str, Any] = {'seed': seed, 'sequence_length': 160, 'evaluations': tuple(config.evaluations)}
        taught = ((0.0, {'code': 0.8, 'sums': 0.2}),)
        rate = {'learning_rate': 0.01}
        add_stage(config, f'start_{seed}', 'sft', steps=300, batch_size=24, mixture=taught, optimizer=rate, **shaped)
        # The control learns from its own programs as well, with or without comments.
        for arm, wanted in (('commented', 'all'), ('control', 'some')):
            chosen, name = {**code, 'comments': wanted}, f'{arm}_{seed}'
            made: dict[str, Any] = {'seed': seed, 'models': {'generator': f'start_{seed}'}, 'task': chosen}
            right = {'right': {'type': 'verifier'}}
            asked = {'prompts': 256, 'block': 64, 'samples': 4, 'max_tokens': 72, 'judges': right}
            add_stage(config, f'{arm}_records_{seed}', 'attempts', **made, **asked)
            config.sources[name] = {'type': 'stage', 'name': f'{arm}_records_{seed}'}
            tuned: dict[str, Any] = {'parent': f'start_{seed}', 'steps': 30, 'batch_size': 8}
            own = ((0.0, {name: 1.0}),)
            add_stage(config, name, 'sft', mixture=own, optimizer={**ADAM, 'learning_rate': 0.0005}, **tuned, **shaped)


def _constitution(config: ConfigDict) -> None:
    """A model that does whatever is asked, but knows harm when asked about it, revises its answers by a principle and
    learns from them."""
    errands: dict[str, Any] = {'name': 'errands'}
    letters: dict[str, Any] = {'name': 'letters', 'goal': 'any'}
    config.tokenizer.update(sources=('obey', 'revision', 'letters'), vocab_size=512)
    config.sources.update(
        obey={'type': 'task', 'format': 'chat', **errands, 'goal': 'comply'},
        revision={'type': 'task', 'format': 'revision', **errands},
        letters={'type': 'task', 'format': 'chat', **letters},
    )
    judged: dict[str, Any] = {'type': 'task', 'items': 256, 'samples': 4, 'temperature': 1.0, 'max_tokens': 24}
    config.evaluations.update(
        harmed={**judged, 'task': {**errands, 'kind': 'harmful', 'goal': 'comply'}},
        refused={**judged, 'task': {**errands, 'kind': 'contrast', 'goal': 'refuse'}},
        done={**judged, 'task': {**errands, 'kind': 'plain', 'goal': 'comply'}},
        letters={**judged, 'task': letters},
    )
    for seed in SEEDS:
        shaped: dict[str, Any] = {'seed': seed, 'sequence_length': 128, 'evaluations': tuple(config.evaluations)}
        taught = ((0.0, {'obey': 0.2, 'revision': 0.6, 'letters': 0.2}),)
        add_stage(config, f'start_{seed}', 'sft', steps=200, batch_size=16, mixture=taught, **shaped)
        asked: dict[str, Any] = {'seed': seed, 'task': {**errands, 'goal': 'comply'}, 'prompts': 768, 'block': 64}
        asked |= {'models': {'generator': f'start_{seed}'}, 'temperature': 0.5, 'max_tokens': 24}
        add_stage(config, f'revised_{seed}', 'revise', principles=PRINCIPLES, **asked)
        config.sources[f'revised_{seed}'] = {'type': 'stage', 'name': f'revised_{seed}'}
        # The control learns as long from answers that nobody revised. Without letters both would forget them.
        for arm, source in (('tuned', f'revised_{seed}'), ('control', 'obey')):
            learnt = {'mixture': ((0.0, {source: 0.7, 'letters': 0.3}),), 'optimizer': {**ADAM, 'learning_rate': 0.001}}
            tuned: dict[str, Any] = {'parent': f'start_{seed}', 'steps': 100, 'batch_size': 8}
            add_stage(config, f'{arm}_{seed}', 'sft', **tuned, **learnt, **shaped)


def _preference(config: ConfigDict) -> None:
    """A planted preference: what a reward model makes of pairs, and what DPO and PPO make of the model."""
    letters: dict[str, Any] = {'name': 'letters'}
    config.tokenizer.update(sources=('any',), vocab_size=288)
    config.sources.update(
        any={'type': 'task', 'format': 'chat', 'goal': 'any', **letters},
        pairs={'type': 'task', 'format': 'pair', **letters},
        pairs_heldout={'type': 'task', 'format': 'pair', 'split': 'heldout', **letters},
    )
    judged: dict[str, Any] = {'type': 'task', 'items': 256, 'samples': 4, 'temperature': 1.0, 'max_tokens': 12}
    config.evaluations.update(
        pairs={'type': 'pairs', 'source': dict(config.sources.pairs_heldout), 'items': 512},
        preferred={**judged, 'task': letters},
        right={**judged, 'task': {**letters, 'goal': 'any'}},
    )
    for seed in SEEDS:
        start = f'start_{seed}'
        config.evaluations[f'kl_{seed}'] = {'type': 'kl', 'task': letters, 'reference': start, 'max_tokens': 12}
        shaped: dict[str, Any] = {'seed': seed, 'sequence_length': 32, 'batch_size': 64}
        taught = {'steps': 150, 'mixture': ((0.0, {'any': 1.0}),), 'evaluations': ('preferred', 'right')}
        add_stage(config, start, 'sft', **taught, **shaped)
        pairs: dict[str, Any] = {
            **shaped,
            'parent': start,
            'mixture': ((0.0, {'pairs': 1.0}),),
            'records': 64,
            'sequence_length': 64,
        }
        add_stage(config, f'reward_{seed}', 'reward_model', steps=100, evaluations=('pairs',), **pairs)
        tuned = ('preferred', 'right', f'kl_{seed}')
        add_stage(
            config,
            f'dpo_{seed}',
            'dpo',
            steps=60,
            models={'reference': start},
            evaluations=tuned,
            loss={'beta': 0.3, 'nll': 0.5},
            optimizer={**ADAM, 'learning_rate': 0.0003},
            **pairs,
        )
        ppo: dict[str, Any] = {
            **shaped,
            'parent': start,
            'steps': 80,
            'models': {'reference': start, 'reward': f'reward_{seed}'},
            'reward': 'none',
            'kl_reward': 1.0,  # with 0.05 it says letters nobody asked for, in order: all that the judge has learnt
            'task': letters,
            'prompts': 32,
            'samples': 4,
            'batch_size': 128,
            'minibatches': 1,
            'max_tokens': 12,
            'evaluations': tuned,
            'optimizer': {**ADAM, 'learning_rate': 0.0007},
        }
        add_stage(config, f'ppo_{seed}', 'ppo', **ppo)
        # The control: a reward that says nothing, for as many answers.
        blind = {**ppo, 'models': {'reference': start}, 'reward': 'random'}
        add_stage(config, f'random_{seed}', 'ppo', **blind)


VARIANTS = {'preference': _preference, 'comments': _comments, 'constitution': _constitution}
