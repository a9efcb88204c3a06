"""Differences between evaluations, item by item and over seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from train.compare import _cell, compare, main
from train.measure.statistics import interval


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ('base_0', 'base_1', 'tuned_0', 'tuned_1'):
        scores = rng.integers(0, 2, 40) * 0.5 + (0.25 if name.startswith('tuned') else 0.0)
        other = {'details': {'scores': [0.0, 1.0][: 1 + name.endswith('1')]}}
        results = {'hard': {'details': {'scores': scores.tolist()}}, 'few': other, 'text': {'details': {}}}
        (tmp_path / name).mkdir()
        (tmp_path / name / 'evaluations.json').write_text(json.dumps(results))
    return tmp_path


def test_differences_are_paired_and_averaged_over_seeds(stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = lambda name: np.array(  # noqa: E731
        json.loads((stages / name / 'evaluations.json').read_text())['hard']['details']['scores']
    )
    base, tuned = ([str(stages / f'{name}_{seed}') for seed in (0, 1)] for name in ('base', 'tuned'))
    said = compare(base, tuned, 'hard')['hard']
    each = [read(f'tuned_{seed}') - read(f'base_{seed}') for seed in (0, 1)]
    assert said['seeds'] == pytest.approx([x.mean() for x in each]) and said['items'] == 40
    assert said['difference'] == pytest.approx(np.mean(each)) and said['low'] < said['difference'] < said['high']
    wide = 1.96 * np.mean(each, 0).std() / 40**0.5
    assert said['high'] - said['low'] == pytest.approx(2 * wide, rel=0.15)
    same = compare(base, base, 'hard')['hard']
    assert same['difference'] == same['low'] == same['high'] == 0
    between = compare(base, tuned, 'hard', between=(0.5, 1.0))['hard']
    chosen = [read(f'base_{seed}') >= 0.5 for seed in (0, 1)]
    pooled = np.concatenate([x[c] for x, c in zip(each, chosen, strict=True)])
    assert between['difference'] == pytest.approx(pooled.mean()) and between['items'] == sum(chosen[0] | chosen[1])
    assert between['levels'] == pytest.approx([read(f'tuned_{s}')[chosen[s]].mean() for s in (0, 1)])
    assert main([base[0], tuned[0]]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line['evaluation'] for line in printed] == ['few', 'hard']


def test_documents_weigh_by_their_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 5000, 30)
    bits = {name: 2 + rng.random(30) * 0.2 - 0.1 * name.startswith('tuned') for name in ('a_0', 'tuned_0', 'tuned_1')}
    for name, scores in bits.items():
        said = {'prose': {'details': {'scores': scores.tolist(), 'weights': sizes.tolist()}}}
        (tmp_path / name).mkdir()
        (tmp_path / name / 'evaluations.json').write_text(json.dumps(said))
    base, tuned = [str(tmp_path / 'a_0')] * 2, [str(tmp_path / f'tuned_{seed}') for seed in (0, 1)]
    found = compare(base, tuned)['prose']
    each = [np.average(bits[f'tuned_{seed}'] - bits['a_0'], weights=sizes) for seed in (0, 1)]
    assert found['seeds'] == pytest.approx(each) and found['difference'] == pytest.approx(np.mean(each))
    both = (bits['tuned_0'] + bits['tuned_1']) / 2 - bits['a_0']
    assert (found['low'], found['high']) == pytest.approx(interval(both, sizes.astype(float))) and found['high'] < 0
    assert found['levels'] == pytest.approx([np.average(bits[f'tuned_{seed}'], weights=sizes) for seed in (0, 1)])
    with pytest.raises(InputError, match='prose has other items'):  # as many documents, of other sizes
        said['prose']['details']['weights'][0] += 1
        Path(tuned[0], 'evaluations.json').write_text(json.dumps(said))
        compare(base, tuned)


def test_a_merge_is_compared_with_its_parents_and_with_the_best_of_them(stages: Path) -> None:
    """Against all of them it stands once beside each: the difference is that to their mean."""
    parents, merged = [str(stages / name) for name in ('base_0', 'base_1', 'tuned_0')], str(stages / 'tuned_1')
    said = compare(parents, [merged] * 3, 'hard')['hard']
    each = [compare([parent], [merged], 'hard')['hard'] for parent in parents]
    assert said['seeds'] == pytest.approx([one['difference'] for one in each]) and said['items'] == 40
    assert said['difference'] == pytest.approx(np.mean(said['seeds']))
    best = min(each, key=lambda one: one['difference'])
    assert best['low'] < best['difference'] < best['high']


def test_what_cannot_be_compared_is_named(stages: Path) -> None:
    one, other = str(stages / 'base_0'), str(stages / 'base_1')
    for message, call in [
        ('1 stages and 2: expected as many', lambda: compare([one], [one, other])),
        ("base_0: no evaluation 'hart' with scores; did you mean 'hard'", lambda: compare([one], [other], 'hart')),
        ("no evaluation 'text' with scores", lambda: compare([one], [other], 'text')),
        ('base_1: few has other items than', lambda: compare([one], [other], 'few')),
        ('few: seeds have other items', lambda: compare([one, other], [one, other], 'few')),
        ('hard has no item between', lambda: compare([one], [other], 'hard', between=(0.1, 0.2))),
        ('evaluations.json does not exist', lambda: compare([one], [str(stages / 'none')])),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def specialised(folder: Path) -> None:
    """Two seeds of a base and of stages trained on sums and on puzzles: each gains 0.5 at its own, puzzles lose 0.25
    at sums, and text, which has bits, gets worse by 0.1."""
    rng = np.random.default_rng(0)
    tasks = {'sums': {'name': 'arithmetic', 'digits': 1}, 'puzzles': {'name': 'sudoku'}}
    evaluations = {name: {'type': 'task', 'task': task} for name, task in tasks.items()}
    evaluations['prose'] = {'type': 'text', 'source': {'type': 'stdlib', 'split': 'heldout'}}
    sources = {name: {'type': 'task', 'format': 'chat', **task} for name, task in tasks.items()}
    sources['noise'] = {'type': 'noisy', 'source': {'type': 'task', 'name': 'arithmetic'}}
    start = {seed: {name: rng.integers(0, 2, 40) / 4 for name in evaluations} for seed in (0, 1)}
    lifts = {'start': {}, 'sums': {'sums': 0.5, 'prose': 0.1}, 'puzzles': {'sums': -0.25, 'puzzles': 0.5, 'prose': 0.1}}
    for stage, lift in lifts.items():
        for seed, scores in start.items():
            mixture = ((0.0, {'noise' if stage == 'sums' else stage: 1.0}),) if stage in tasks else ()
            parent = '' if stage == 'start' else f'start_{seed}'
            record = {'stage': {'mixture': mixture, 'parent': parent}, 'sources': sources, 'evaluations': evaluations}
            said = {
                name: {
                    'unit': 'bits/byte' if name == 'prose' else 'share',
                    'details': {'scores': (x + lift.get(name, 0)).tolist()},
                }
                for name, x in scores.items()
            }
            (folder / f'{stage}_{seed}').mkdir()
            (folder / f'{stage}_{seed}' / 'config.json').write_text(json.dumps(record))
            (folder / f'{stage}_{seed}' / 'evaluations.json').write_text(json.dumps(said))


def test_specialists_of_one_base_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specialised(tmp_path)
    base, *several = (
        ','.join(str(tmp_path / f'{name}_{seed}') for seed in (0, 1)) for name in ('start', 'sums', 'puzzles')
    )
    assert main([base, *several]) == 0
    assert capsys.readouterr().out.splitlines() == [
        '| start to | sums | puzzles |',
        '|---|---|---|',
        '| prose | +0.1000 [0.1000, 0.1000] | +0.1000 [0.1000, 0.1000] |',
        '| puzzles | +0.0 [0.0, 0.0] | **+50.0 [50.0, 50.0]** |',
        '| sums | **+50.0 [50.0, 50.0]** | -25.0 [-25.0, -25.0] |',
        '| trained on, mean | +50.0 [50.0, 50.0] | +50.0 [50.0, 50.0] |',
        '| not trained on, mean | +0.0 [0.0, 0.0] | -25.0 [-25.0, -25.0] |',
    ]
    assert _cell(
        [{'difference': 0.1, 'low': 0.07, 'high': 0.13}, {'difference': 0.3, 'low': 0.26, 'high': 0.34}], 'share'
    ) == ('+20.0 [16.5, 23.5]')
    for option in ('--against=sums', '--answers=sums'):
        assert main([base, *several, option]) == 1
        assert 'expected one TUNED' in capsys.readouterr().err
