"""Evaluations on the way: at the steps that were asked for, once each, and without a trace in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from loops import Counting, lines, plan, saved
from small import one_device

from train.launch import evaluated
from train.launch.goodput import Clock
from train.launch.log import set_aside
from train.loop import train

FLOPS = 1e3


class Seen:
    """What a stage's `measure` is shown."""

    def __init__(self) -> None:
        self.at: list[tuple[int, float, float]] = []

    def __call__(self, step: int, flops: float, variables: Any) -> None:
        total = sum(float(np.abs(x).sum()) for x in jax.tree.leaves(variables['params']))
        self.at.append((step, flops, total))


def test_the_loop_measures_when_it_is_asked_to(tmp_path: Path) -> None:
    plain, state = plan(tmp_path / 'plain')
    train(plain, state)
    seen = Seen()
    watched, state = plan(tmp_path / 'watched', evaluate_every=2, measure=seen)
    train(watched, state)
    assert [step for step, _, _ in seen.at] == [2, 4, 6]
    logged = {line['step']: line['flops'] for line in lines(tmp_path / 'watched', 'metrics.jsonl')}
    assert [flops for _, flops, _ in seen.at] == [logged[step] for step in (2, 4, 6)]
    assert len({total for _, _, total in seen.at}) == 3
    assert saved(tmp_path / 'watched', 7) == saved(tmp_path / 'plain', 7)


def test_a_killed_stage_measures_what_it_had_not(tmp_path: Path) -> None:
    """It dies at step 5, after the save at 4; taken up there, it measures at 4, as nothing says that it had."""
    whole, first, second = Seen(), Seen(), Seen()
    uninterrupted, state = plan(tmp_path / 'whole', evaluate_every=2, measure=whole)
    train(uninterrupted, state)

    def die(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    dying, state = plan(tmp_path / 'killed', stream=Counting(2, die), evaluate_every=2, measure=first)
    with pytest.raises(KeyboardInterrupt):
        train(dying, state)
    again, state = plan(tmp_path / 'killed', evaluate_every=2, measure=second)
    train(again, state)
    assert first.at == whole.at[:2] and second.at == whole.at[1:]


def test_each_step_has_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def evaluate(model: Any, variables: Any, tokenizer: Any, spec: Any, workdir: Path) -> dict[str, Any]:
        asked.append((spec, variables))
        return {'value': variables, 'details': {'scores': [variables]}, 'samples': ['long texts']}

    monkeypatch.setattr(evaluated, 'evaluate', evaluate)
    config = {'stages': {'sft': {'evaluations': ('sums',)}}, 'evaluations': {'sums': 'spec', 'other': 'spec'}}
    stage = evaluated.Evaluated(config, 'sft', tmp_path, None, None, one_device(), Clock())  # type: ignore[arg-type]
    (tmp_path / 'sft').mkdir()
    for step, value in ((10, 0.1), (20, 0.2), (20, 0.9)):
        stage.on_the_way(step, step * FLOPS, value)
    told = [
        {'step': step, 'flops': step * FLOPS, 'evaluations': {'sums': {'value': x, 'details': {'scores': [x]}}}}
        for step, x in ((10, 0.1), (20, 0.2))
    ]
    assert lines(tmp_path / 'sft', evaluated.PARTS) == told and len(asked) == 2
    set_aside(tmp_path / 'sft' / evaluated.PARTS, 15)  # as when the stage goes on from there
    stage.on_the_way(20, 20 * FLOPS, 0.2)
    assert lines(tmp_path / 'sft', evaluated.PARTS) == told and len(asked) == 3
