"""Quality: prose is told from what is shuffled or garbled, and curves say how often to see what."""

import ast
import functools
import json
import random

import numpy as np
import pytest

from data.corpus import standard_library
from data.curate.__main__ import main
from data.curate.passes import curate
from data.curate.quality import Quality, curve, fit, scores, spoilt, upsample
from data.errors import InputError
from data.mixture import validate_mixture
from data.sources import open_source
from tests.test_curate import notes, read, texts, write

pytest.importorskip('sklearn')


@functools.cache
def prose(split):
    """Docstrings of some of the standard library."""
    found = []
    for record in standard_library(split)[:200]:
        nodes = [n for n in ast.walk(ast.parse(record['text'])) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        found += [text for text in map(ast.get_docstring, nodes) if text and len(text) >= 200]
    return found


def swapped(text, rng):
    """Another way to garble, which no classifier here has seen: neighbouring letters change places."""
    letters = list(text)
    for place in range(0, len(letters) - 1, 3):
        if rng.random() < 0.5:
            letters[place : place + 2] = letters[place : place + 2][::-1]
    return ''.join(letters)


def area(good, bad):
    """Area under the ROC curve: how often a good one scores more than a bad one."""
    return np.mean([(good[:, None] > bad[None, :]) + 0.5 * (good[:, None] == bad[None, :])])


def test_prose_is_told_from_what_is_spoilt():
    rng = random.Random(0)
    good = prose('train')
    model = fit(good, [spoilt(text, rng) for text in good])
    heldout = prose('heldout')
    right = scores(heldout, model)
    assert len(heldout) > 40 and right.min() >= 0 and right.max() <= 1
    for make in (swapped, lambda text, rng: ' '.join(rng.sample(w := text.split(), len(w))), spoilt):
        assert area(right, scores([make(text, rng) for text in heldout], model)) >= 0.95


def test_records_are_scored_and_the_worst_dropped(tmp_path):
    good, rng = prose('train')[:120], random.Random(1)
    write(tmp_path / 'good.jsonl', [{'text': text} for text in good[:80]])
    mixed = [{'text': text} for text in good[80:]] + [{'text': spoilt(text, rng)} for text in good[80:]]
    spec = write(tmp_path / 'in.jsonl', mixed)
    arguments = ['quality', f'--input={tmp_path}/in.jsonl', f'--good={tmp_path}/good.jsonl', '--least=0.5']
    assert main([*arguments, f'--output={tmp_path}/out']) == 0
    dropped = {note['record'] for note in notes(tmp_path / 'out')}
    assert len(dropped & {*range(40, 80)}) > 25 and len(dropped & {*range(40)}) < 10
    assert all(record['provenance']['scores']['quality'] >= 0.5 for record in read(tmp_path / 'out'))
    two = curate(Quality(str(tmp_path / 'good.jsonl'), least=0.5), spec, tmp_path / 'two', shard_records=9, workers=2)
    assert read(tmp_path / 'two') == read(tmp_path / 'out') and len(two['shards']) > 3


def test_any_callable_scores(tmp_path):
    curate(Quality(score=len), write(tmp_path / 'in.jsonl', [{'text': 'abc'}, {'text': 'a'}]), tmp_path / 'out')
    assert [r['provenance']['scores'] for r in read(tmp_path / 'out')] == [{'quality': 3}, {'quality': 1}]


@pytest.mark.parametrize(('drop', 'cap', 'count'), [(0.4, 4, 5), (0.0, 7, 10), (0.25, 2, 4), (0.5, 2, 8), (0.3, 3, 1)])
def test_the_curve_keeps_what_there_is_to_see(drop, cap, count):
    often = curve(drop, cap, count)
    assert often.mean() == pytest.approx(1) and (np.diff(often) >= -1e-9).all() and often.max() <= cap
    assert (often[: int(drop * count)] == 0).all()
    fine = curve(drop, cap, 20_000)
    assert fine[-1] == pytest.approx(cap, rel=1e-3) and fine.reshape(count, -1).mean(1) == pytest.approx(often)


def test_a_cap_that_is_too_low_is_kept():
    assert curve(0.5, 1, 4).tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match='drop=1.0'):
        curve(1.0, 2, 4)


def test_classes_become_a_mixture(tmp_path, capsys):
    scored = [{**r, 'provenance': {'scores': {'quality': i / 50}}} for i, r in enumerate(texts(50))]
    random.Random(0).shuffle(scored)
    spec = write(tmp_path / 'in.jsonl', scored)
    assert main(['upsample', f'--input={tmp_path}/in.jsonl', f'--output={tmp_path}/up', '--drop=0.4', '--cap=3']) == 0
    told = json.loads((tmp_path / 'up' / 'mixture.json').read_text())
    assert json.loads(capsys.readouterr().out) == told
    assert [*told['sources']] == ['class-2', 'class-3', 'class-4']
    weights = told['mixture'][0][1]
    assert sum(weights.values()) == pytest.approx(1, abs=0.05) and weights['class-4'] > 2 * weights['class-2']
    sources = {name: open_source(source) for name, source in told['sources'].items()}
    validate_mixture(told['mixture'], sources)
    assert sum(map(len, sources.values())) in range(29, 32)
    best = [record['provenance']['scores']['quality'] for record in read(tmp_path / 'up' / 'class-4')]
    assert min(best) >= 0.78 and len(best) in range(9, 12)
    assert upsample(spec, tmp_path / 'up', 0.4, 3) == {**told, 'mixture': ((0.0, weights),)}  # and again
    with pytest.raises(InputError, match='provenance.scores.quality: expected a number, got None'):
        upsample(write(tmp_path / 'b.jsonl', texts(2)), tmp_path / 'none', 0.4, 3)
