"""A config for runs that are killed: stages of ten kinds, with evaluations. The variant is a folder to write in."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict
from test_methods import with_methods

from configs.base import add_stage

KINDS = ('dpo', 'distill', 'ppo', 'self_play')


def get_config(variant: str) -> ConfigDict:
    """The small graph with preferences, distillation, a critic, a game, an average and records behind it."""
    config = with_methods(Path(variant), KINDS)
    config.evaluations = ConfigDict(
        {'bits': {'type': 'text', 'source': {'type': 'stdlib', 'split': 'heldout'}, 'length': 64, 'documents': 4}}
    )
    for name in ('pretrain', 'sft', 'a_dpo'):
        config.stages[name].evaluations = ('bits',)
    config.stages.grpo.reward = 'random'  # a model that knows nothing would earn nothing, and learn nothing
    add_stage(config, 'merged', 'merge', parents=('sft', 'a_dpo'), weights=(1.0, 2.0))
    judges = {'any': {'type': 'likelihood', 'model': 'judge', 'threshold': -100.0}}
    models = {'generator': 'sft', 'judge': 'merged'}
    task = {'name': 'arithmetic', 'operations': 1}
    fields = {'models': models, 'judges': judges, 'task': task, 'prompts': 6, 'block': 2, 'samples': 8}
    add_stage(config, 'made', 'attempts', max_tokens=64, temperature=2.0, **fields)
    return config
