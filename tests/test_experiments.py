"""The experiments of configs/: every stage can be built, and arms differ in what is compared alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs import methods, steering
from data.constitution import read_principles
from data.tasks.errands import Errands
from train.edges import differences, needed_for
from train.graph import Run

FILES = (methods, steering)


@pytest.mark.parametrize(('file', 'variant'), [(file, name) for file in FILES for name in file.VARIANTS])
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
