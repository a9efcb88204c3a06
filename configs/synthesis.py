"""What records that models make are worth, each in minutes on two CPU cores: `configs/synthesis.py:backtranslation`,
and so on."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.base import ADAM, SEEDS, add_stage, experiment

SUMS: dict[str, Any] = {'name': 'arithmetic', 'digits': 1, 'worked': True}
PAIRS = 512  # questions with answers


def get_config(variant: str = '') -> ConfigDict:
    """The config; `variant` names the experiment."""
    config = experiment('synthesis', variant, VARIANTS, context=256)
    VARIANTS[variant](config)
    return config


def _backtranslation(config: ConfigDict) -> None:
    """Few questions with worked answers, and many worked answers without a question: a model that was taught both
    directions on the few writes the questions, and keeps those that make the answer likely (Li et al. 2023)."""
    sums: dict[str, Any] = {**SUMS, 'operations': (2, 3), 'max_value': 20}
    config.tokenizer.update(sources=('pairs', 'backwards'), vocab_size=448)
    config.sources.update(
        pairs={'type': 'task', 'format': 'chat', 'records': PAIRS, **sums},
        backwards={'type': 'task', 'format': 'instruction', 'records': PAIRS, **sums},  # the same problems
        answers={'type': 'task', 'format': 'completion', **sums},  # of which the completion is read alone
    )
    judged: dict[str, Any] = {'type': 'task', 'task': sums, 'items': 512, 'max_tokens': 48}
    config.evaluations.update(greedy=judged, sampled={**judged, 'samples': 4, 'temperature': 1.0})
    for seed in SEEDS:
        start = f'start_{seed}'
        shaped: dict[str, Any] = {'seed': seed, 'sequence_length': 128, 'batch_size': 16}
        shaped |= {'evaluations': tuple(config.evaluations), 'weighting': 'example'}
        taught = ((0.0, {'pairs': 0.4, 'backwards': 0.6}),)
        add_stage(config, start, 'sft', steps=200, mixture=taught, optimizer={'learning_rate': 0.01}, **shaped)
        asked: dict[str, Any] = {'seed': seed, 'source': 'answers', 'prompts': 4096, 'block': 512, 'samples': 1}
        asked |= {'template': 'instruction', 'into': 'question', 'max_tokens': 24}
        fits = {'fits': {'type': 'likelihood', 'model': 'judge', 'threshold': -0.3}}
        for arm, judges in (('pairs', None), ('uncurated', {}), ('curated', fits)):
            mixture = {'pairs': 1.0}
            if judges is not None:
                models = {'generator': start, **({'judge': start} if judges else {})}
                add_stage(config, f'{arm}_records_{seed}', 'rewrite', models=models, judges=judges, **asked)
                config.sources[f'{arm}_{seed}'] = {'type': 'stage', 'name': f'{arm}_records_{seed}'}
                mixture = {'pairs': 0.3, f'{arm}_{seed}': 0.7}
            tuned: dict[str, Any] = {'parent': start, 'steps': 120, 'optimizer': {'learning_rate': 0.005}}
            add_stage(config, f'{arm}_{seed}', 'sft', mixture=((0.0, mixture),), **tuned, **shaped)


def _judge(config: ConfigDict) -> None:
    """A reward model that was told of some attempts which are right filters those at other problems (Cobbe et al. 2021,
    section 4.2): does a model learn more from them than from all attempts?"""
    hard: dict[str, Any] = {**SUMS, 'operations': (3, 4), 'max_value': 10}
    config.tokenizer.update(sources=('easy',), vocab_size=288)
    config.sources.update(
        easy={'type': 'task', 'format': 'chat', **hard, 'operations': (1, 2)},
        hard={'type': 'task', 'format': 'chat', **hard},
    )
    judged: dict[str, Any] = {'type': 'task', 'task': hard, 'items': 512, 'max_tokens': 48}
    config.evaluations.update(greedy=judged, sampled={**judged, 'samples': 4, 'temperature': 1.0})
    for seed in SEEDS:
        start, judge = f'start_{seed}', f'judge_{seed}'
        shaped: dict[str, Any] = {'seed': seed, 'sequence_length': 128, 'batch_size': 16}
        tuned: dict[str, Any] = {**shaped, 'evaluations': tuple(config.evaluations)}
        taught = ((0.0, {'easy': 0.6, 'hard': 0.4}),)
        add_stage(config, start, 'sft', steps=200, mixture=taught, **tuned)
        asked: dict[str, Any] = {'seed': seed, 'task': hard, 'block': 256, 'max_tokens': 48}
        right = {'right': {'type': 'verifier'}}
        pairs: dict[str, Any] = {'models': {'generator': start}, 'judges': right, 'prompts': 1024, 'samples': 4}
        add_stage(config, f'pairs_{seed}', 'label', **pairs, **asked)
        config.sources[f'pairs_{seed}'] = {'type': 'stage', 'name': f'pairs_{seed}'}
        learnt: dict[str, Any] = {'parent': start, 'steps': 80, 'mixture': ((0.0, {f'pairs_{seed}': 1.0}),)}
        learnt |= {'records': 16, 'optimizer': {**ADAM, 'learning_rate': 0.001}}
        add_stage(config, judge, 'reward_model', **learnt, **shaped)
        for arm, threshold in (('all', -1000.0), ('kept', 0.0)):
            # The verifier has no vote: it says in the report how often the judge is right.
            judges = {'judge': {'type': 'reward', 'model': 'judge', 'threshold': threshold}, **right}
            given: dict[str, Any] = {'models': {'generator': start, 'judge': judge}, 'judges': judges, 'truth': 'right'}
            add_stage(config, f'{arm}_records_{seed}', 'attempts', prompts=1536, samples=2, **given, **asked)
            config.sources[f'{arm}_{seed}'] = {'type': 'stage', 'name': f'{arm}_records_{seed}'}
            mixture = ((0.0, {f'{arm}_{seed}': 1.0}),)
            rate = {**ADAM, 'learning_rate': 0.0005}
            add_stage(config, f'{arm}_{seed}', 'sft', parent=start, steps=60, mixture=mixture, optimizer=rate, **tuned)


VARIANTS = {'backtranslation': _backtranslation, 'judge': _judge}
