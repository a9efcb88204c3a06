"""Scaling laws: found again from points they made, with intervals that hold."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from train.measure.laws import (
    FORMS,
    Law,
    Point,
    Sigmoid,
    Sparse,
    between,
    fit,
    fit_sigmoid,
    fit_sparse,
    frontier,
    resampled,
    resampled_sigmoids,
)
from train.scaling import main

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


def noise(amount: float, seed: int = 0) -> float:
    return float(np.exp(np.random.default_rng(seed).normal() * amount))


def equal_compute(amount: float) -> list[Point]:
    """Six sizes for each of four budgets around N_opt = 0.3 C^0.45; a parabola in log N has its minimum there."""
    made = []
    for compute in (1e13, 1e14, 1e15, 1e16):
        best = 0.3 * compute**0.45
        for number, times in enumerate((0.3, 0.5, 0.8, 1.4, 2.2, 3.5)):
            size, loss = best * times, compute**-0.02 * 8 * (1 + 0.05 * np.log(times) ** 2)
            made.append(Point(size, compute / 6 / size, loss * noise(amount, number + int(np.log(compute)))))
    return made


def test_minima_of_equal_compute_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('train.measure.laws.RESAMPLES', 50)
    best, _ = frontier(equal_compute(0.0))
    assert (best.a, best.k) == (pytest.approx(0.45, rel=1e-6), pytest.approx(0.3, rel=1e-5))
    for compute, parameters, loss in best.minima.values():
        assert parameters == pytest.approx(0.3 * compute**0.45) and loss == pytest.approx(8 * compute**-0.02)
    assert best(1e18) == pytest.approx(0.3 * 1e18**0.45, rel=1e-5)
    found, several = frontier(equal_compute(0.005))
    low, high = np.percentile([f.a for f in several], [2.5, 97.5])
    assert low < 0.45 < high and 0 < high - low < 0.1 and low < found.a < high
    # A budget whose least loss is at the end of its sizes has no minimum, and two are too few without it.
    ends = [p for p in equal_compute(0.0) if p.compute < 2e14]
    assert len(frontier([*ends, *[p for p in equal_compute(0.0) if p.compute > 5e15][:3]])[0].minima) == 2
    with pytest.raises(InputError, match='1 budgets of three sizes or more: expected two'):
        frontier(ends[:6])


def sparse(amount: float) -> list[Point]:
    truth = Sparse(a=-0.08, b=-0.1, c=0.003, d=2.0)
    grid = [(n, ratio) for n in (1e6, 3e6, 1e7) for ratio in (1, 2, 4, 8)]
    return [Point(n, 1e9, truth(n, n * r) * noise(amount, i), total=n * r) for i, (n, r) in enumerate(grid)]


def test_what_experts_add_is_found_again() -> None:
    law = fit_sparse(sparse(0.0))
    assert law == pytest.approx((-0.08, -0.1, 0.003, 2.0), abs=1e-8)
    # log L = -0.08 log N' + 2 of the dense model with the same loss.
    size, ratio = np.log(1e7), np.log(8)
    worth = np.exp((-0.08 * size - 0.1 * ratio + 0.003 * size * ratio) / -0.08)
    assert law.dense(1e7, 8e7) == pytest.approx(worth) and law.dense(1e7, 1e7) == pytest.approx(1e7)
    laws = resampled(sparse(0.005), fit_sparse(sparse(0.005)), 100, FORMS['sparsity'])
    low, high = between(laws, 3e7, 2.4e8)
    assert low < law(3e7, 2.4e8) < high and (high - low) / high < 0.1
    with pytest.raises(InputError, match='runs of several lengths'):
        fit_sparse([p._replace(tokens=p.parameters) for p in sparse(0.0)])
    with pytest.raises(InputError, match=r'shares of active parameters \[1.0\]'):
        fit_sparse([p._replace(total=p.parameters) for p in sparse(0.0)])


def test_a_sigmoid_is_found_again() -> None:
    truth, losses = Sigmoid(0.25, 0.9, 4.0, 2.6), np.linspace(1.8, 3.6, 12)
    assert (truth(100.0), truth(-100.0), truth(2.6)) == (0.25, 0.9, pytest.approx(0.575))
    exact = [Point(1e6, 1e6, loss, accuracy=truth(loss)) for loss in losses]
    assert fit_sigmoid(exact) == pytest.approx(truth, rel=1e-3)
    rough = [p._replace(accuracy=truth(p.loss) + np.log(noise(0.01, i))) for i, p in enumerate(exact)]
    low, high = between(resampled_sigmoids(rough, fit_sigmoid(rough), 50), 2.2)
    assert low < truth(2.2) < high and 0.001 < high - low < 0.1
    with pytest.raises(InputError, match='5 runs with an accuracy: expected 6'):
        fit_sigmoid(exact[:5])


def run(folder: Path, point: Point) -> None:
    folder.mkdir(parents=True)
    text = {'value': point.loss / 2, 'direction': 'lower'}
    sums = {'value': Sigmoid(0.0, 1.0, 4.0, 14.0)(point.loss), 'direction': 'higher'}
    told = {
        'parameters': {'total': point.total, 'active': point.parameters},
        'tokens': point.tokens,
        'evaluations': {'text': text, 'sums': sums},
    }
    (folder / 'finished.json').write_text(json.dumps(told))
    losses = [9.0] * 9 + [point.loss]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps({'loss': x}) + '\n' for x in losses))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('train.measure.laws.RESAMPLES', 20)
    for number, point in enumerate([*points(0.002), Point(6e6, 3.2e7, TRUE(6e6, 3.2e7))]):
        run(tmp_path / f'arm{number}' / 'pretrain', point)
    (tmp_path / 'twice').mkdir()
    (tmp_path / 'twice' / 'pretrain').symlink_to(tmp_path / 'arm0' / 'pretrain')
    assert main([str(tmp_path), '--hold=4', '--predict=1e8,1e9', '--accuracy=sums']) == 0
    said = capsys.readouterr().out
    assert 'fitted to 12 runs' in said and said.count('held out: ') == 2
    held = re.search(r'predicted ([\d.]+)% .*, was ([\d.]+)% \(.*; ([-+][\d.]+)% from the loss it had', said)
    assert held and float(held[1]) == pytest.approx(float(held[2]), abs=2) and abs(float(held[3])) < 1
    assert 'held out: 6,000,000 parameters, 32,000,000 tokens, 4.0 times the largest compute fitted' in said
    assert '100,000,000 parameters, 1,000,000,000 tokens: ' in said
    assert main([str(tmp_path), '--json']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13 and main([str(tmp_path), '--json', '--evaluation=text']) == 0
    for line, halved in zip(lines, capsys.readouterr().out.splitlines(), strict=True):
        assert json.loads(line)['loss'] == pytest.approx(2 * json.loads(halved)['loss'])
    for arguments, message in (
        (['--accuracy=text'], "no evaluation 'text' that is an accuracy"),
        (['--fit=isoflop', '--accuracy=sums'], 'expected --fit=law'),
        (['--fit=isoflop', '--predict=1,2'], 'expected FLOPS'),
        (['--fit=sparsity', '--predict=1e6,x'], 'expected PARAMETERS,TOTAL'),
        (['--stage=sft'], "has finished a stage 'sft'"),
        (['--evaluation=texts'], "no evaluation 'texts' that is a loss; did you mean 'text'"),
        (['--hold=1'], 'expected more than 1'),
        (['--hold=1000'], '--hold'),
        (['--predict=1e9'], 'expected PARAMETERS,TOKENS'),
    ):
        assert main([str(tmp_path), *arguments]) == 1
        assert message in capsys.readouterr().err or message == '--hold'


def test_other_fits_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('train.measure.laws.RESAMPLES', 20)
    for name, made in (('isoflop', equal_compute(0.001)), ('sparsity', sparse(0.001))):
        for number, point in enumerate(made):
            run(tmp_path / name / f'arm{number}' / 'pretrain', point)
    assert main([str(tmp_path / 'isoflop'), '--fit=isoflop', '--hold=5', '--predict=1e18']) == 0
    said = capsys.readouterr().out
    assert 'minima of 3 of 3 budgets' in said and said.count('held out: 1e+16 FLOPs: predicted') == 1
    exponent = re.search(r'  a +(0\.\d{10,})', said)  # not rounded
    assert exponent and float(exponent[1]) == pytest.approx(0.45, abs=0.02)
    assert main([str(tmp_path / 'sparsity'), '--fit=sparsity', '--hold=2', '--predict=2e7,1e8']) == 0
    said = capsys.readouterr().out
    assert said.count('held out: ') == 4 and '20,000,000 parameters, 100,000,000 total: ' in said
    assert '10,000,000 active of 80,000,000 are worth' in said


def test_too_few_runs_are_named() -> None:
    with pytest.raises(InputError, match='5 runs to fit: expected 6'):
        fit(points(0.0)[:5])
    with pytest.raises(InputError, match='all 12 runs have the same tokens'):
        fit([p._replace(tokens=1e6) for p in points(0.0)])
