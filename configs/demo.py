"""The whole life of a small model on two CPU cores: pre-training, mid-training, fine-tuning, reinforcement learning.

`configs/demo.py:study` adds, to the same workdir, the control arms and the seeds behind the tables of the README.
`configs/demo.py:staged` adds the context doubled step by step: the next doubling begins when things are looked up at
this length and short text is within 2% of what it was.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.base import ADAM, add_stage, longer_base, small

SHORT, LONG = 256, 1024  # context of pre-training, and four times that for the study of retrieval
LENGTHS = (512, 1024)  # of `staged`

# Difficulty, fixed here and nowhere else: what mid-training and fine-tuning show, and what reinforcement learning is
# judged at: the longest of these, every step right. Few answers are possible, so the answer alone could be guessed.
EASY: dict[str, Any] = {'name': 'arithmetic', 'operations': (1, 3), 'digits': 1, 'max_value': 10}
HARD: dict[str, Any] = {**EASY, 'operations': 3, 'worked': True}
STORY: dict[str, Any] = {'name': 'wordgraph', 'operations': (1, 2), 'max_value': 10}

# How the answers of a model that does not chat yet are evaluated.
TEXT: dict[str, Any] = {'type': 'task', 'format': 'text', 'max_tokens': 64}


def get_config(variant: str = '') -> ConfigDict:
    """The config; `variant` is '', 'study' or 'staged'."""
    if variant not in ('', 'study', 'staged'):
        raise ValueError(f'configs/demo.py:{variant}: expected no variant, study or staged')
    config = small('demo', LONG)
    config.tokenizer.update(sources=('stdlib', 'arithmetic', 'story'), vocab_size=2048)
    config.model.update(kv_lora_rank=64, qk_nope_head_dim=32, original_max_position_embeddings=SHORT)
    config.sources.update(
        stdlib={'type': 'stdlib', 'piece': 2000},
        instructions={'type': 'stdlib_instructions'},
        arithmetic={'type': 'task', 'format': 'completion', **EASY},
        story={'type': 'task', 'format': 'completion', **STORY},
        arithmetic_chat={'type': 'task', 'format': 'chat', **EASY},
        story_chat={'type': 'task', 'format': 'chat', **STORY},
    )
    # Of one shape, 256 answers of 32 tokens, as in reinforcement learning: one compiled sampler serves all of these.
    short = {**TEXT, 'items': 256, 'max_tokens': 32}
    chat = {**short, 'format': 'chat'}
    config.evaluations.update(
        bits_per_byte={'type': 'text', 'source': {'type': 'stdlib', 'split': 'heldout'}, 'length': SHORT},
        arithmetic={**short, 'task': EASY},
        wordgraph={**TEXT, 'task': STORY},
        chat_format={
            'type': 'stopped',
            'source': {'type': 'stdlib_instructions', 'split': 'heldout'},
            'max_tokens': SHORT,
        },
        hard={**chat, 'task': HARD, 'samples': 8, 'temperature': 1.0},
        hard_half={**chat, 'task': HARD, 'samples': 8, 'temperature': 0.5},
        hard_greedy={**chat, 'task': HARD},
    )
    base_evaluations = ('bits_per_byte', 'arithmetic', 'wordgraph')
    judged = ('hard', 'hard_greedy')
    general = {'stdlib': 1.0}
    better = {'stdlib': 0.53, 'arithmetic': 0.23, 'story': 0.24}

    add_stage(
        config,
        'pretrain',
        'pretrain',
        steps=520,
        batch_size=16,
        sequence_length=SHORT,
        save_every=130,
        mixture=((0.0, general),),
        evaluations=base_evaluations,
        optimizer={'learning_rate': 0.015, 'decay': 0.5},
    )
    if variant == 'staged':
        _add_recall(config)
        _add_lengths(config)
        return config
    # Reasoning is learnt in many small steps: half the rows in twice the steps gave nearly twice the problems solved.
    midtrain: dict[str, Any] = {
        'steps': 320,
        'batch_size': 8,
        'sequence_length': SHORT,
        'save_every': 160,
        'keep_optimizer': False,  # the rate has come down before
        'evaluations': base_evaluations,
        'optimizer': {'learning_rate': 0.008},
    }
    add_stage(config, 'midtrain', 'midtrain', parent='pretrain', mixture=((0.0, better),), **midtrain)
    sft: dict[str, Any] = {
        'parent': 'midtrain',
        'steps': 120,
        'batch_size': 8,
        'sequence_length': SHORT,
        'mixture': ((0.0, {'instructions': 0.2, 'arithmetic_chat': 0.7, 'story_chat': 0.1}),),
        'save_every': 60,
        'evaluations': ('chat_format', *judged),
        'optimizer': {'learning_rate': 0.005},
    }
    add_stage(config, 'sft', 'sft', **sft)
    grpo: dict[str, Any] = {
        'task': HARD,
        'steps': 60,
        'prompts': 32,
        'samples': 8,
        'temperature': 1.2,
        'batch_size': 256,
        'microbatches': 32,
        'sequence_length': SHORT,
        'max_tokens': 32,
        'save_every': 20,
        'evaluations': judged,
        'optimizer': {**ADAM, 'learning_rate': 0.0005},
    }
    add_stage(config, 'grpo', 'grpo', parent='sft', **grpo)
    if variant == 'study':
        # How sharp is the fine-tuned model? Half the temperature lies between sampling and greedy.
        sft['evaluations'] = config.stages.sft.evaluations = ('chat_format', *judged, 'hard_half')
        # What would the same steps have bought on the pre-training mixture alone?
        add_stage(config, 'midtrain_control', 'midtrain', parent='pretrain', mixture=((0.0, general),), **midtrain)
        _add_recall(config)
        _add_extension(config)
        # More steps of reinforcement learning than the demo has time for, and as many for each control.
        for seed in (0, 1, 2):
            end = f'_{seed}' if seed else ''
            if seed:
                add_stage(config, f'sft{end}', 'sft', seed=seed, **sft)
            for arm, fields in (
                ('long', {}),
                ('format', {'reward': 'format'}),
                ('random', {'reward': 'random'}),
                ('rejection', {'algorithm': 'rejection'}),
            ):
                longer = {**grpo, 'steps': 160, 'seed': seed, 'parent': f'sft{end}', **fields}
                add_stage(config, f'{arm}{end}', 'grpo', **longer)
    return config


def _add_recall(config: ConfigDict) -> None:
    """Mid-training that teaches looking things up at the short length."""
    needle: dict[str, Any] = {'type': 'task', 'format': 'completion', 'name': 'needle'}
    config.sources.update(
        repeats_2={'type': 'repeats', 'words': (2, 3)},
        repeats_5={'type': 'repeats', 'words': (2, 5)},
        repeats_8={'type': 'repeats', 'words': (3, 8)},
        repeats_16={'type': 'repeats', 'words': (4, 16)},
        needle_few={**needle, 'pairs': (2, 8), 'questions': 2},
        needle_many={**needle, 'pairs': (6, 40), 'questions': 6},
        needle={**needle, 'pairs': (6, 40)},
    )
    # 80 to 200 tokens.
    config.evaluations.retrieval_short = {**TEXT, 'task': {'name': 'needle', 'pairs': (20, 50)}}
    # Strings of two words first, nothing beside them: the circuit that copies forms there, or not at all in this time.
    recall = (
        (0.0, {'repeats_2': 1.0}),
        (0.07, {'repeats_5': 1.0}),
        (0.13, {'repeats_8': 1.0}),
        (0.2, {'stdlib': 0.7, 'repeats_16': 0.1, 'needle_few': 0.2}),
        (0.5, {'stdlib': 0.7, 'needle_few': 0.06, 'needle_many': 0.14, 'needle': 0.1}),
    )
    add_stage(
        config,
        'recall',
        'midtrain',
        parent='pretrain',
        steps=420,
        batch_size=8,
        sequence_length=SHORT,
        save_every=140,
        mixture=recall,
        keep_optimizer=False,
        evaluations=('bits_per_byte', 'retrieval_short'),
        optimizer={'learning_rate': 0.013},
    )


def _add_extension(config: ConfigDict) -> None:
    """From there the same data in long and in short rows."""
    needle: dict[str, Any] = {'type': 'task', 'format': 'completion', 'name': 'needle', 'pairs': (100, 220)}
    config.sources.update(needle_long={**needle, 'questions': 6}, needle_long_one=needle)
    # 600 to 900 tokens.
    config.evaluations.retrieval_long = {**TEXT, 'task': {'name': 'needle', 'pairs': (150, 220)}}
    theta = longer_base(config.model.rope_theta, LONG / SHORT, config.model.qk_rope_head_dim)
    extend: dict[str, Any] = {
        'parent': 'recall',
        'keep_optimizer': False,
        'steps': 60,
        'save_every': 60,
        'mixture': ((0.0, {'stdlib': 0.4, 'needle': 0.1, 'needle_long': 0.3, 'needle_long_one': 0.2}),),
        'evaluations': ('bits_per_byte', 'retrieval_short', 'retrieval_long'),
        'optimizer': {'learning_rate': 0.005},
    }
    add_stage(config, 'extend', 'midtrain', batch_size=4, sequence_length=LONG, model={'rope_theta': theta}, **extend)
    add_stage(config, 'extend_short', 'midtrain', batch_size=16, sequence_length=SHORT, **extend)


def _add_lengths(config: ConfigDict) -> None:
    """The context doubled again and again in as many tokens, each time behind a gate."""
    parent, solved, model = 'recall', 'retrieval_short', config.model
    for length in LENGTHS:
        pairs = (length // 10, length // 5)  # of some four tokens
        tasks: dict[str, dict[str, Any]] = {
            'needle': {'name': 'needle', 'pairs': pairs},
            'needles': {'name': 'needle', 'pairs': pairs, 'questions': 3},
            'variables': {'name': 'variables', 'chains': (length // 48, length // 36), 'hops': 3},
            'common_words': {'name': 'common_words', 'others': (length // 8, length // 5), 'often': 4, 'rarely': 1},
        }
        for name, task in tasks.items():
            config.sources[f'{name}_{length}'] = {'type': 'task', 'format': 'completion', **task}
            config.evaluations[f'{name}_{length}'] = {**TEXT, 'task': task, 'items': 64, 'max_tokens': 24}
        config.sources[f'many_{length}'] = {**config.sources[f'needle_{length}'], 'questions': 6}
        own = {f'{name}_{length}': 0.15 if name == 'needle' else 0.05 for name in tasks}
        theta = longer_base(model.rope_theta, length / SHORT, model.qk_rope_head_dim)
        add_stage(
            config,
            f'length_{length}',
            'midtrain',
            parent=parent,
            keep_optimizer=False,
            steps=90,
            save_every=90,
            batch_size=4096 // length,
            sequence_length=length,
            model={'rope_theta': theta},
            mixture=((0.0, {'stdlib': 0.4, f'many_{length}': 0.3, **own}),),
            evaluations=('bits_per_byte', 'retrieval_short', *own),
            gate={solved: {'least': 0.8}, 'bits_per_byte': {'most': 1.02, 'times': 'recall'}},
            optimizer={'learning_rate': 0.005},
        )
        parent, solved = f'length_{length}', f'needle_{length}'
