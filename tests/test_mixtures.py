"""Mixture search: a known optimum is found again, errors are those on arms held out, and bad input is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import InputError
from train.mixtures import _ridge, arms_of, best, fit, main, report, swarm

NAMES = ['a', 'b', 'c']


def drawn(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet([2.0, 2.0, 2.0], count)


def bowl(weights: np.ndarray) -> np.ndarray:
    """Log losses that are least at (0.5, 0.3, 0.2)."""
    return 0.7 + ((weights - [0.5, 0.3, 0.2]) ** 2).sum(1)


def test_a_swarm_is_around_the_mixture_it_begins_with() -> None:
    given = {'text': 3.0, 'code': 1.0}
    some = swarm(given, 400, concentration=10.0)
    assert some[0] == {'text': 0.75, 'code': 0.25} and some == swarm(given, 400, concentration=10.0)
    shares = np.array([x.get('text', 0.0) for x in some])
    assert shares.mean() == pytest.approx(0.75, abs=0.03) and 0.05 < shares.std() < 0.2
    assert all(weight > 0 for x in some for weight in x.values())
    assert swarm(given, 5, seed=1)[1:] != some[1:5]


def test_a_known_optimum_is_found_again() -> None:
    weights = drawn(30)
    y = bowl(weights) + np.random.default_rng(1).normal(size=30) * 0.002
    found = report(NAMES, weights, y)
    assert found['form'] == 'quadratic' and found['error'] < 0.01 < found['error_of_mean']
    assert found['rank_correlation'] > 0.9
    assert [found['best'][name] for name in NAMES] == pytest.approx([0.5, 0.3, 0.2], abs=0.05)
    ratio, low, high = found['predicted']
    assert low <= ratio <= high <= 1.005


def test_noise_is_not_explained() -> None:
    weights = drawn(40)
    found = report(NAMES, weights, np.random.default_rng(2).normal(size=40))
    assert found['error'] > 0.9 * found['error_of_mean']


@pytest.mark.parametrize('kind', ['linear', 'quadratic', 'logarithmic'])
def test_what_one_arm_is_missed_by_is_what_a_fit_to_the_others_misses_it_by(kind: str) -> None:
    """The shortcut by leverages is exact without a penalty; with one, features are scaled by what all arms have."""
    weights, y = drawn(16), np.random.default_rng(3).normal(size=16)
    _, missed = _ridge(weights, y, kind, 0.0)
    for arm in range(16):
        others = np.arange(16) != arm
        again, _ = _ridge(weights[others], y[others], kind, 0.0)
        assert y[arm] - again(weights[[arm]])[0] == pytest.approx(missed[arm], rel=1e-5)


def test_the_best_is_no_further_out_than_arms_were() -> None:
    weights = drawn(20)
    falling = weights[:, 0]
    chosen = best(fit(weights, -falling), weights)
    assert chosen.sum() == pytest.approx(1) and chosen[0] == pytest.approx(falling.max())


def arm(folder: Path, mixture: Any, value: float, direction: str = 'lower') -> None:
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps({'stage': {'mixture': mixture}}))
    told = {'evaluations': {'prose': {'value': value, 'direction': direction}}}
    (folder / 'finished.json').write_text(json.dumps(told))


def test_the_command_reads_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = drawn(24)
    for number, (row, y) in enumerate(zip(weights, bowl(weights), strict=True)):
        mixture = {name: 2 * float(x) for name, x in zip(NAMES, row, strict=True)}
        arm(tmp_path / f'{number:02}' / 'mid', [[0.0, mixture]], float(np.exp(y)))
    names, read, y = arms_of(tmp_path, 'mid', ['prose'])
    assert names == NAMES
    np.testing.assert_allclose(read, weights)
    np.testing.assert_allclose(y, bowl(weights))
    assert main([str(tmp_path), '--stage=mid', '--evaluations=prose']) == 0
    said = json.loads(capsys.readouterr().out)
    assert said['arms'] == 24 and [said['best'][name] for name in NAMES] == pytest.approx([0.5, 0.3, 0.2], abs=0.05)


def test_bad_arms_are_named(tmp_path: Path) -> None:
    for number in range(3):
        arm(tmp_path / f'{number}' / 'mid', [[0.0, {'a': 1.0}]], 2.0)
    with pytest.raises(InputError, match=r"3 finished arms of stage 'mid' on 1 sources: expected 8 or more"):
        arms_of(tmp_path, 'mid', ['prose'])
    with pytest.raises(InputError, match="no evaluation 'poems': expected one of prose"):
        arms_of(tmp_path, 'mid', ['poems'])
    arm(tmp_path / '4' / 'mid', [[0.0, {'a': 1.0}]], 2.0, direction='higher')
    with pytest.raises(InputError, match='expected a loss'):
        arms_of(tmp_path, 'mid', ['prose'])
    arm(tmp_path / '3' / 'mid', [[0.0, {'a': 1.0}], [0.5, {'b': 1.0}]], 2.0)
    with pytest.raises(InputError, match='the mixture changes on the way'):
        arms_of(tmp_path, 'mid', ['prose'])
