"""The experiments of configs/: every stage can be built, and arms differ in what is compared alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs import ablations, methods, midtraining, spikes, steering
from data.constitution import read_principles
from data.tasks.errands import Errands
from model.config import ModelConfig
from model.transformer import Model
from train.launch.edges import differences, needed_for, order
from train.launch.graph import Run
from train.sweep import arms, declared

FILES = (methods, steering)


CHAINS = [
    *((file, name) for file in FILES for name in file.VARIANTS),
    (ablations, 'epochs'),
    (ablations, 'specialists'),
]


@pytest.mark.parametrize(('file', 'variant'), CHAINS)
def test_the_stages_of_an_experiment_can_be_built(file: Any, variant: str, tmp_path: Path) -> None:
    config = file.get_config(variant).to_dict()
    run = Run(config, tmp_path)
    for name in run.order:
        if name.endswith('_0'):
            run._check(name)
    assert {name[:-2] for name in run.order if name.endswith('_0')} == {name[:-2] for name in run.order}


@pytest.mark.parametrize('variant', ['sudoku', 'code'])
def test_a_coin_replaces_the_reward_and_nothing_else(variant: str) -> None:
    stages = methods.get_config(variant).to_dict()['stages']
    for seed in (0, 1, 2):
        assert differences(stages[f'grpo_{seed}'], stages[f'random_{seed}'], '') == [['.reward', 'verifier', 'random']]
        assert needed_for({'stages': stages, 'sources': {}}, f'random_{seed}') == [f'start_{seed}', f'random_{seed}']


def test_an_unknown_experiment_is_named() -> None:
    with pytest.raises(ValueError, match='configs/methods.py:sudok: expected one of sudoku, code'):
        methods.get_config('sudok')


def test_the_principle_is_the_one_that_the_critic_was_taught() -> None:
    assert read_principles(steering.PRINCIPLES) == [Errands.principle]


@pytest.mark.parametrize(
    ('file', 'variant', 'count'),
    [
        (spikes, '', 9),
        (midtraining, 'decay', 12),
        (midtraining, 'value', 15),
        (midtraining, 'extend', 9),
        (midtraining, 'few', 9),
        (midtraining, 'placement', 21),
        (midtraining, 'mixture', 24),
        (ablations, 'attention', 12),
        (ablations, 'experts', 9),
        (ablations, 'balance', 12),
        (ablations, 'reasoning', 12),
        (ablations, 'scaling', 13),
        (ablations, 'thinking', 6),
    ],
)
def test_arms_of_a_sweep_can_be_built(file: Any, variant: str, count: int, tmp_path: Path) -> None:
    """Stages that have no parent in a run of another config, as that would have to be trained before."""
    given = [variant] if variant else []
    made = arms(file.get_config(*given).to_dict(), *declared(file.__file__, *given))
    assert len(made) == count == (1 if variant in ('mixture', 'scaling') else 3) * len({arm.group for arm in made})
    for arm in (made[0], made[-1]):
        name = order(arm.config)[0]
        if not arm.config['stages'][name]['parent']:
            run = Run(arm.config, tmp_path / arm.name)
            run._check(name)


def test_anneals_end_where_the_trunk_does_and_start_where_it_saved() -> None:
    trunk = midtraining.get_config().stages.trunk
    added, _ = declared(midtraining.__file__, 'decay')
    merge = midtraining.get_config('merge').stages
    starts = [(x['stages.anneal.parent'], x['stages.anneal.steps']) for x in added]
    starts += [(merge[name].parent, merge[name].steps) for name in merge if name.startswith('anneal')]
    for parent, steps in starts:
        begin = int(parent.split('@')[1])
        assert begin % trunk.save_every == 0 and begin + steps == trunk.steps and trunk.keep >= trunk.steps


def test_attention_is_compared_at_equal_parameters_and_experts_at_equal_active_ones() -> None:
    for variant, kind, share in (('attention', 'total', 0.002), ('experts', 'active', 0.03)):
        config = ablations.get_config(variant).to_dict()
        made = arms(config, *declared(ablations.__file__, variant))
        models = [Model(ModelConfig.from_dict({**arm.config['model'], 'vocab_size': 1024})) for arm in made]
        counts = [model.parameter_counts[kind] for model in models]
        assert max(counts) / min(counts) < 1 + share
        if variant == 'attention':
            caches = {arm.group: model.config.cache_elements_per_token for arm, model in zip(made, models, strict=True)}
            assert caches == {'latent': 192, 'multi-head': 768, 'grouped-query': 384, 'multi-query': 192}
