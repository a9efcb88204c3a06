"""Scaling laws: found again from points they made, with intervals that hold."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from train.scaling import Law, Point, between, fit, main, resampled

TRUE = Law(E=1.7, A=400.0, B=410.0, alpha=0.34, beta=0.28)  # near those of Hoffmann et al. 2022
GRID = [(n, d) for n in (1e5, 3e5, 1e6, 3e6) for d in (1e6, 4e6, 1.6e7)]


def points(noise: float, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [Point(n, d, TRUE(n, d) * float(np.exp(rng.normal() * noise))) for n, d in GRID]


def test_a_law_is_found_again_from_what_it_says() -> None:
    law = fit(points(0.0))
    for n, d in [*GRID, (1e9, 1e10)]:
        assert law(n, d) == pytest.approx(TRUE(n, d), rel=2e-3)
    assert (law.alpha, law.beta) == pytest.approx((TRUE.alpha, TRUE.beta), rel=0.05)
    assert law.exponent == pytest.approx(TRUE.beta / (TRUE.alpha + TRUE.beta), rel=0.05)


def test_the_gradient_leads_to_a_minimum() -> None:
    """No neighbour of what was found fits better, by the Huber loss written out."""
    some = points(0.01)
    found = fit(some)

    def huber(law: Law) -> float:
        gaps = np.array([abs(np.log(law(p.parameters, p.tokens)) - np.log(p.loss)) for p in some])
        return float(np.where(gaps <= 1e-3, gaps**2 / 2, 1e-3 * (gaps - 5e-4)).sum())

    for field in Law._fields:
        for factor in (0.99, 1.01):
            assert huber(found._replace(**{field: getattr(found, field) * factor})) >= huber(found) - 1e-12


def test_intervals_hold_the_truth_four_times_further_on() -> None:
    inside = 0
    for seed in range(3):
        some = points(0.005, seed)
        law = fit(some)
        low, high = between(resampled(some, law, 25), 6e6, 3.2e7)
        truth = TRUE(6e6, 3.2e7)
        inside += low <= truth <= high
        assert low < law(6e6, 3.2e7) * 1.01 and (high - low) / truth < 0.1
    assert inside >= 2


def run(folder: Path, point: Point) -> None:
    folder.mkdir(parents=True)
    text = {'value': point.loss / 2, 'direction': 'lower'}
    told = {
        'parameters': {'total': 0, 'active': point.parameters},
        'tokens': point.tokens,
        'evaluations': {'text': text},
    }
    (folder / 'finished.json').write_text(json.dumps(told))
    losses = [9.0] * 9 + [point.loss]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps({'loss': x}) + '\n' for x in losses))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('train.scaling.RESAMPLES', 20)
    for number, point in enumerate([*points(0.002), Point(6e6, 3.2e7, TRUE(6e6, 3.2e7))]):
        run(tmp_path / f'arm{number}' / 'pretrain', point)
    (tmp_path / 'twice').mkdir()
    (tmp_path / 'twice' / 'pretrain').symlink_to(tmp_path / 'arm0' / 'pretrain')
    assert main([str(tmp_path), '--hold=4', '--predict=1e8,1e9']) == 0
    said = capsys.readouterr().out
    assert 'fitted to 12 runs' in said and said.count('held out: ') == 1
    assert 'held out: 6,000,000 parameters, 32,000,000 tokens, 4.0 times the largest compute fitted' in said
    assert '100,000,000 parameters, 1,000,000,000 tokens: ' in said
    assert main([str(tmp_path), '--json']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13 and main([str(tmp_path), '--json', '--evaluation=text']) == 0
    for line, halved in zip(lines, capsys.readouterr().out.splitlines(), strict=True):
        assert json.loads(line)['loss'] == pytest.approx(2 * json.loads(halved)['loss'])
    for arguments, message in (
        (['--stage=sft'], "has finished a stage 'sft'"),
        (['--evaluation=texts'], "no evaluation 'texts' that is a loss; did you mean 'text'"),
        (['--hold=1'], 'expected more than 1'),
        (['--hold=1000'], '--hold'),
        (['--predict=1e9'], 'expected PARAMETERS,TOKENS'),
    ):
        assert main([str(tmp_path), *arguments]) == 1
        assert message in capsys.readouterr().err or message == '--hold'


def test_too_few_runs_are_named() -> None:
    with pytest.raises(InputError, match='5 runs to fit: expected 6'):
        fit(points(0.0)[:5])
    with pytest.raises(InputError, match='all 12 runs have the same tokens'):
        fit([p._replace(tokens=1e6) for p in points(0.0)])
