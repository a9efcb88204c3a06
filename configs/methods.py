"""What reinforcement learning does, each in minutes on two CPU cores: `configs/methods.py:sudoku`, and so on."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.base import ADAM, SEEDS, add_stage, experiment

# Reinforcement learning on sums that are worked out line by line.
SUMS: dict[str, Any] = {
    'prompts': 16,
    'samples': 8,
    'temperature': 1.2,
    'batch_size': 160,
    'microbatches': 4,
    'max_tokens': 48,
    'optimizer': {**ADAM, 'learning_rate': 0.0002},
}


def get_config(variant: str = '') -> ConfigDict:
    """The config; `variant` names the experiment."""
    config = experiment('methods', variant, VARIANTS)
    VARIANTS[variant](config)
    return config


def _graded(
    config: ConfigDict,
    easy: dict[str, Any],
    hard: dict[str, Any],
    *,
    vocabulary: int,
    length: int,
    answer: int,
    taste: float = 0.0,
    start: dict[str, Any],
    rl: dict[str, Any],
    arms: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Reinforcement learning on hard problems by a model that was taught easy ones and, a share `taste` of what it saw,
    hard ones; beside it arms that differ in some fields: as many answers rewarded by a coin, unless they are named."""
    config.tokenizer.update(sources=('easy',), vocab_size=vocabulary)
    config.sources.easy = {'type': 'task', 'format': 'chat', **easy}
    config.sources.hard = {'type': 'task', 'format': 'chat', **hard}
    judged = {'type': 'task', 'task': hard, 'items': 256, 'max_tokens': answer}
    config.evaluations.update(
        easy={**judged, 'task': easy},
        hard={**judged, 'samples': 16, 'temperature': 1.0},
        hard_greedy=judged,
    )
    for seed in SEEDS:
        end = f'_{seed}'
        taught: dict[str, Any] = {
            'seed': seed,
            'sequence_length': length,
            'mixture': ((0.0, {'easy': 1.0 - taste, 'hard': taste} if taste else {'easy': 1.0}),),
            'evaluations': ('easy', 'hard', 'hard_greedy'),
            **start,
        }
        add_stage(config, f'start{end}', 'sft', **taught)
        grpo: dict[str, Any] = {
            'seed': seed,
            'parent': f'start{end}',
            'task': hard,
            'prompts': 32,
            'samples': 8,
            'batch_size': 256,
            'microbatches': 4,
            'sequence_length': length,
            'max_tokens': answer,
            'evaluations': ('hard', 'hard_greedy'),
            'optimizer': {**ADAM, 'learning_rate': 0.0006},
            **rl,
        }
        add_stage(config, f'grpo{end}', 'grpo', **grpo)
        for arm, fields in (arms or {'random': {'reward': 'random'}}).items():
            add_stage(config, f'{arm}{end}', 'grpo', **{**grpo, **fields})


def _sudoku(config: ConfigDict) -> None:
    hard: dict[str, Any] = {'name': 'sudoku', 'size': 4, 'blanks': (7, 8)}
    judged = ('easy', 'hard', 'hard_greedy', 'pool')
    _graded(
        config,
        {**hard, 'blanks': (1, 5)},
        hard,
        vocabulary=288,
        length=64,
        answer=24,
        start={'steps': 250, 'batch_size': 32, 'optimizer': {'learning_rate': 0.01}, 'evaluations': judged},
        rl={'steps': 160},
        arms={'random': {'reward': 'random'}, 'pool': {'problems': 64, 'evaluations': ('pool',)}},
    )
    # What it makes of few problems that it sees again and again: whether the algorithm can learn what it is shown.
    config.evaluations.pool = {**config.evaluations.hard, 'task': {**hard, 'split': 'train'}, 'items': 64}
    # Do three who were taught alike, each from weights and data of its own, judge better than any of them?
    judges = {f'judge_{seed}': {'type': 'likelihood', 'model': f'judge_{seed}', 'threshold': -0.05} for seed in SEEDS}
    for seed in SEEDS:
        votes: dict[str, Any] = {'judges': {**judges, 'right': {'type': 'verifier'}}, 'truth': 'right', 'samples': 4}
        models = {'generator': f'start_{seed}', **{f'judge_{other}': f'start_{other}' for other in SEEDS}}
        asked: dict[str, Any] = {'seed': seed, 'task': hard, 'prompts': 1024, 'block': 64, 'max_tokens': 24}
        add_stage(config, f'voted_{seed}', 'attempts', models=models, **asked, **votes)


def _code(config: ConfigDict) -> None:
    _graded(
        config,
        {'name': 'code', 'level': (1, 2), 'examples': 1},
        {'name': 'code', 'level': 3, 'examples': 1},
        taste=0.05,
        vocabulary=512,
        length=160,
        answer=72,
        start={'steps': 220, 'batch_size': 24, 'optimizer': {'learning_rate': 0.01}},
        rl={'steps': 70, 'prompts': 16, 'batch_size': 128, 'sequence_length': 176},  # prompts of up to 100 tokens
    )


def _proof(config: ConfigDict) -> None:
    """Proofs of one or two lines; in the hard ones a premise is of no use, so that their number gives nothing away."""
    easy: dict[str, Any] = {'name': 'proof', 'steps': (1, 2), 'distractors': 0}
    _graded(
        config,
        easy,
        {**easy, 'distractors': 1},
        taste=0.2,
        vocabulary=320,
        length=96,
        answer=40,
        start={'steps': 600, 'batch_size': 24, 'optimizer': {'learning_rate': 0.01}},
        rl={'steps': 300, 'temperature': 1.2},
    )


def _stories(config: ConfigDict) -> None:
    """Stories of two operations, each line judged: does it help to be told which line was wrong?"""
    story: dict[str, Any] = {'name': 'wordgraph', 'operations': 2, 'max_value': 10}
    _graded(
        config,
        {**story, 'operations': 1},
        story,
        taste=0.6,
        vocabulary=512,
        length=128,
        answer=48,
        start={'steps': 600, 'batch_size': 32, 'optimizer': {'learning_rate': 0.01}},
        rl={'steps': 120, 'prompts': 16, 'batch_size': 128},
        arms={'process': {'algorithm': 'process', 'process_coefficient': 1.0}},
    )


def _nim(config: ConfigDict) -> None:
    """Self-play from a beginner who knows the rules: rating against its own frozen past, on held-out starts."""
    nim: dict[str, Any] = {'name': 'nim', 'heaps': 3, 'most': 7}
    config.model.update(hidden_size=96, num_hidden_layers=2, v_head_dim=24, n_routed_experts=4, n_shared_experts=1)
    config.tokenizer.update(sources=('legal',), vocab_size=288)
    config.sources.legal = {'type': 'task', 'format': 'chat', 'goal': 'legal', **nim}
    for seed in SEEDS:
        rated: dict[str, Any] = {'type': 'elo', 'task': nim, 'opponents': (f'rules_{seed}', f'play_{seed}')}
        config.evaluations[f'elo_{seed}'] = {**rated, 'every': 20, 'items': 32, 'max_tokens': 12, 'samples': 4}
        beginner: dict[str, Any] = {'steps': 160, 'save_every': 160, 'batch_size': 8, 'sequence_length': 128}
        legal = ((0.0, {'legal': 1.0}),)
        rules = {**beginner, 'seed': seed, 'mixture': legal, 'optimizer': {'learning_rate': 0.01}}
        add_stage(config, f'rules_{seed}', 'sft', **rules)
        add_stage(
            config,
            f'play_{seed}',
            'self_play',
            seed=seed,
            parent=f'rules_{seed}',
            models={'opponent': f'rules_{seed}'},
            task=nim,
            steps=60,
            prompts=16,
            samples=8,
            batch_size=256,
            microbatches=8,
            sequence_length=192,
            max_tokens=12,
            save_every=20,
            keep=4,
            opponent_share=0.25,
            evaluations=(f'elo_{seed}',),
            optimizer={**ADAM, 'learning_rate': 0.001, 'schedule': 'constant'},
        )


def _proposals(config: ConfigDict) -> None:
    """Who chooses the problems: chance, the rate at which a level is solved, or the model itself?"""
    sums: dict[str, Any] = {'name': 'arithmetic', 'operations': (1, 5), 'digits': 1, 'max_value': 10, 'worked': True}
    config.tokenizer.update(sources=('easy', 'proposals'), vocab_size=288)
    config.sources.update(
        easy={'type': 'task', 'format': 'chat', **sums, 'operations': (1, 3)},
        hard={'type': 'task', 'format': 'chat', **sums, 'operations': (4, 5)},
        proposals={'type': 'task', 'format': 'proposal', **sums},
    )
    judged: dict[str, Any] = {'type': 'task', 'task': sums, 'items': 256, 'max_tokens': 48}
    config.evaluations.update(mixed={**judged, 'samples': 4, 'temperature': 1.0}, mixed_greedy=judged)
    levels = tuple({'operations': count} for count in range(1, 6))
    for seed in SEEDS:
        shaped: dict[str, Any] = {'seed': seed, 'sequence_length': 128, 'evaluations': tuple(config.evaluations)}
        taught = ((0.0, {'easy': 0.6, 'hard': 0.25, 'proposals': 0.15}),)
        add_stage(config, f'start_{seed}', 'sft', steps=200, batch_size=16, mixture=taught, **shaped)
        rl: dict[str, Any] = {
            **shaped,
            'parent': f'start_{seed}',
            'task': sums,
            **SUMS,
        }
        add_stage(config, f'uniform_{seed}', 'grpo', levels=levels, steps=80, **rl)
        add_stage(config, f'solve_rate_{seed}', 'grpo', levels=levels, curriculum='solve_rate', steps=80, **rl)
        # Proposals are short, and so are the answers to them: as many tokens in more steps.
        add_stage(config, f'proposer_{seed}', 'proposer_solver', steps=150, **rl)
        add_stage(config, f'harder_{seed}', 'proposer_solver', steps=150, proposal_reward='hard', **rl)
        add_stage(config, f'mixed_{seed}', 'proposer_solver', steps=110, posed=8, **rl)


def _flywheel(config: ConfigDict) -> None:
    """A turn of reinforcement learning, mid-training on what it wrote, a second turn: do its right answers help more
    than all its answers, than none, than more of what was taught, or than the second turn at once?"""
    sums: dict[str, Any] = {'name': 'arithmetic', 'digits': 1, 'max_value': 10, 'worked': True}
    hard: dict[str, Any] = {**sums, 'operations': (4, 5)}
    config.tokenizer.update(sources=('easy',), vocab_size=288)
    config.sources.update(
        easy={'type': 'task', 'format': 'chat', **sums, 'operations': (1, 3)},
        hard={'type': 'task', 'format': 'chat', **hard},
    )
    judged: dict[str, Any] = {'type': 'task', 'task': hard, 'items': 256, 'max_tokens': 48}
    config.evaluations.update(hard={**judged, 'samples': 4, 'temperature': 1.0}, hard_greedy=judged)
    for seed in SEEDS:
        shaped: dict[str, Any] = {'seed': seed, 'sequence_length': 128, 'evaluations': tuple(config.evaluations)}
        taught = ((0.0, {'easy': 0.75, 'hard': 0.25}),)
        start = f'start_{seed}'
        add_stage(config, start, 'sft', steps=200, batch_size=16, mixture=taught, **shaped)
        turn: dict[str, Any] = {**shaped, 'task': hard, 'steps': 80, **SUMS}
        mixtures: dict[str, dict[str, float]] = {'none': {'easy': 1.0}, 'taught': taught[0][1]}
        for arm in ('all', 'right'):
            first = f'{arm}_{seed}'
            add_stage(config, first, 'grpo', parent=start, records=arm, **turn)
            config.sources[first] = {'type': 'stage', 'name': first}
            mixtures[arm] = {'easy': 0.5, first: 0.5}
        add_stage(config, f'longer_{seed}', 'grpo', parent=f'right_{seed}', **turn)
        for arm, mixture in mixtures.items():
            fields = {**shaped, 'parent': start, 'mixture': ((0.0, mixture),), 'optimizer': {'learning_rate': 0.005}}
            fields |= {'keep_optimizer': False}  # the rate has come down before
            add_stage(config, f'mid_{arm}_{seed}', 'midtrain', steps=80, batch_size=16, **fields)
            add_stage(config, f'again_{arm}_{seed}', 'grpo', parent=f'mid_{arm}_{seed}', **turn)


VARIANTS = {
    'sudoku': _sudoku,
    'code': _code,
    'proof': _proof,
    'stories': _stories,
    'nim': _nim,
    'proposals': _proposals,
    'flywheel': _flywheel,
}
