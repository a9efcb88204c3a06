"""The guard against spikes: what it skips, what it lets pass, and that it is as if a bad batch had never come."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from loops import LENGTH, Counting, kinds, lines, plan, saved
from small import one_device

from data.errors import InputError
from train.learn.health import (
    FINE,
    NOT_FINITE,
    SPIKE,
    Watch,
    check_guard,
    first_health,
    guard,
    restored_health,
    saved_health,
)
from train.learn.step import Layout
from train.loop import train
from train.stages import COMMON

GUARD: dict[str, Any] = {**COMMON['guard'], 'sigma': 6.0, 'window': 16, 'patience': 3}


def verdicts(values: list[tuple[float, float]], settings: Any) -> list[int]:
    """Those of the guard over losses and gradient norms."""
    judge, health, found = jax.jit(guard(settings)), first_health(settings), []
    for loss, norm in values:
        skip, health, said = judge(health, {'loss': np.float32(loss), 'gradient_norm': np.float32(norm)}, 1.0)
        assert bool(skip) == bool(said['verdict'])
        found.append(int(said['verdict']))
    return found


def reference(values: list[tuple[float, float]], settings: Any) -> list[int]:
    """The verdicts, in NumPy."""
    window, kept, row, verdicts = settings['window'], [], 0, []
    for loss, norm in values:
        x = np.array([loss, np.log(max(norm, 1e-12))])
        last = np.array(kept[-window:])
        spike = False
        if len(kept) >= window and np.isfinite(x).all():
            median = np.median(last, axis=0)
            spread = np.maximum(1.4826 * np.median(np.abs(last - median), axis=0), [0.01, 0.05])
            spike = bool((x > median + settings['sigma'] * spread).any())
        skip = not np.isfinite(x).all() or (spike and row < settings['patience'])
        row = row + 1 if spike or not np.isfinite(x).all() else 0
        verdicts.append(NOT_FINITE if not np.isfinite(x).all() else SPIKE if skip else FINE)
        if not skip:
            kept.append(x)
    return verdicts


def test_verdicts_are_those_of_numpy() -> None:
    """Over quiet steps, single spikes of either kind, numbers that are not finite, and a level that rises for good."""
    draw = np.random.default_rng(0)
    values = [(3 + 0.1 * draw.normal(), np.exp(0.3 * draw.normal())) for _ in range(60)]
    values[5] = (float('nan'), 1.0)
    values[25], values[30], values[31] = (9.0, 1.0), (3.0, 50.0), (3.0, float('inf'))
    values[45:] = [(loss + 4, norm) for loss, norm in values[45:]]
    found = verdicts(values, GUARD)
    assert found == reference(values, GUARD)
    assert [i for i, v in enumerate(found) if v] == [5, 25, 30, 31, 45, 46, 47]  # then the new level is accepted


def test_a_step_can_be_left_out_by_its_factor() -> None:
    one = {'loss': np.float32(1), 'gradient_norm': np.float32(1)}
    assert jax.jit(guard(GUARD))(first_health(GUARD), one, np.float32(np.nan))[2]['verdict'] == NOT_FINITE
    assert guard({**GUARD, 'sigma': 0.0}) is None


def test_the_window_survives_json() -> None:
    health = {
        name: np.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype)
        for name, x in first_health(GUARD).items()
    }
    back = restored_health(GUARD, json.loads(json.dumps(saved_health(health))))
    assert all(back[name].tobytes() == x.tobytes() and back[name].dtype == x.dtype for name, x in health.items())
    for other in (None, saved_health(first_health({**GUARD, 'window': 32}))):
        assert restored_health(GUARD, other)['accepted'] == 0


@pytest.mark.parametrize(('field', 'value'), [('sigma', -1.0), ('window', 4), ('patience', 0), ('policy', 'ignore')])
def test_settings_are_checked(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f'guard.{field} is {value!r}: expected'):
        check_guard({**GUARD, field: value}, {})


@pytest.mark.parametrize(
    ('limit', 'message'),
    [
        ({'beneath': 0.1}, "alarms.entropy: no field 'beneath'"),
        ({'below': 0.1, 'then': 'halt'}, "alarms.entropy.then is 'halt': expected 'alarm', 'stop' or 'rewind'"),
        ({'below': 0.1, 'then': 'rewind'}, 'expected a guard.sigma above 0, as it leaves out a step'),
    ],
)
def test_limits_are_checked(limit: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_guard({**GUARD, 'sigma': 0.0}, {'entropy': limit})
    check_guard(GUARD, {'entropy': {'below': 0.1, 'then': 'rewind'}, 'loss': 3.0})


def test_a_limit_is_told_of_once_and_may_stop_the_run() -> None:
    told: list[tuple[int, str, str]] = []
    limits = {'entropy': {'below': 0.5}, 'length': 20, 'kl': {'above': 0.1, 'then': 'stop'}}
    watch = Watch(GUARD, limits, lambda *event: told.append(event))
    for step, entropy in enumerate([0.7, 0.4, 0.3, 0.6, 0.2]):
        # The length is a metric of every second step.
        more = {'length': 30} if step % 2 else {}
        watch(step, FINE, 0, {'loss': 1.0, 'gradient_norm': 1.0, 'kl': 0.05, 'entropy': entropy, **more}, asked=False)
    below = [(step, 'alarm', f'entropy is {value}, below 0.5') for step, value in ((1, 0.4), (4, 0.2))]
    assert told == [below[0], (1, 'alarm', 'length is 30, above 20'), below[1]]
    with pytest.raises(InputError, match='step 5: kl is 0.2, above 0.1'):
        watch(5, FINE, 0, {'loss': 1.0, 'gradient_norm': 1.0, 'kl': 0.2}, asked=False)


def test_a_limit_may_take_the_run_back(tmp_path: Path) -> None:
    """At step 45 the loss is above any of a good batch: the steps from 41 on are left out."""
    limits = {'loss': {'above': 6.2, 'then': 'rewind'}}
    run(tmp_path / 'stage', {44}, alarms=limits, back=4)
    told = kinds(tmp_path / 'stage')
    assert told[:3] == [(45, 'alarm'), (45, 'spike'), (40, 'went back')] or told[:2] == [
        (45, 'alarm'),
        (40, 'went back'),
    ]
    left = [step for step, kind in told if kind == 'batch left out']
    assert left == [41, 42, 43, 44, 45] and json.loads((tmp_path / 'stage' / 'skipped.json').read_text()) == left


class Planted(Counting):
    """Text in which one of two tokens comes next, with the contrary at some steps."""

    def __init__(self, bad: set[int]):
        super().__init__(8)
        self.bad = bad

    def next(self, step: int, variables: Any = None) -> Any:
        batch, after = super().next(step)
        strides = np.random.default_rng(step).integers(1, 3, size=(8, LENGTH)).cumsum(-1)
        # The bad ones go backwards, which contradicts all that was learnt.
        batch['tokens'] = ((-strides if step in self.bad else strides) % 40).astype(np.int32)
        return batch, after


def run(
    folder: Path, bad: set[int], steps: int = 60, alarms: dict[str, Any] | None = None, **guard: Any
) -> list[dict[str, Any]]:
    settings = {**GUARD, **guard}
    stage = {'layout': Layout(one_device(), 8, LENGTH, 1), 'steps': steps, 'save_every': 8, 'keep': 9}
    falling = {'learning_rate': lambda step: 0.01 * (1 - 0.8 * step / steps)}
    train(*plan(folder, stream=Planted(bad), guard=settings, alarms=alarms or {}, **stage, **falling))
    found = lines(folder, 'metrics.jsonl')
    assert [line['step'] for line in found] == list(range(1, steps + 1))
    return found


def test_planted_batches_are_skipped(tmp_path: Path) -> None:
    """Each of them, whatever it would have done, and nothing else."""
    bad = {30, 36, 44, 50, 56}
    run(tmp_path / 'stage', bad)
    assert kinds(tmp_path / 'stage') == [(step + 1, 'spike') for step in sorted(bad)]


def test_lasting_spikes_are_taken_back(tmp_path: Path) -> None:
    """The policy 'rewind': the stage goes back to a checkpoint, and the batches are left out; also after a kill."""
    bad = {40, 41, 42}
    found = run(tmp_path / 'stage', bad, policy='rewind', back=10)
    assert kinds(tmp_path / 'stage')[:4] == [(41, 'spike'), (42, 'spike'), (43, 'spike'), (24, 'went back')]
    assert kinds(tmp_path / 'stage')[4:] == [(step, 'batch left out') for step in (41, 42, 43)]
    assert json.loads((tmp_path / 'stage' / 'skipped.json').read_text()) == [41, 42, 43]
    assert (tmp_path / 'stage' / 'checkpoints.abandoned').is_dir()
    before = saved(tmp_path / 'stage', 60)
    (tmp_path / 'stage' / 'checkpoints' / '60').rename(tmp_path / '60')
    run(tmp_path / 'stage', bad, policy='rewind', back=10)
    assert saved(tmp_path / 'stage', 60) == before and len(found) == 60


@pytest.mark.parametrize('sigma', [0.0, 6.0])
def test_what_is_not_finite_for_long_ends_the_run(sigma: float, tmp_path: Path) -> None:
    started, first = plan(tmp_path / 'stage', steps=9, guard={**GUARD, 'sigma': sigma})
    first['params'] = jax.tree.map(lambda x: x * np.float32(np.nan), first['params'])
    with pytest.raises(InputError, match='3 steps in a row up to step 3 were not fine, the last with loss nan'):
        train(started, first)
    assert kinds(tmp_path / 'stage') == [(step, 'not finite') for step in (1, 2, 3)]
