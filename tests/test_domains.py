"""What keeps evaluations apart from training data, on folders for which it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.measure.domains import contamination, domain, trained_on

SUMS: dict[str, Any] = {'type': 'task', 'task': {'name': 'arithmetic', 'digits': 1}}
PROSE: dict[str, Any] = {'type': 'text', 'source': {'type': 'stdlib', 'split': 'heldout'}}
QUIZ: dict[str, Any] = {'type': 'choice', 'source': {'type': 'jsonl', 'path': 'quiz.jsonl'}}


def test_what_stages_learnt_from_is_found_along_the_lineage(tmp_path: Path) -> None:
    text, chats, solved = {'type': 'stdlib'}, {'type': 'task', 'name': 'sudoku'}, {'type': 'stage', 'name': 'solved'}
    sources = {'text': text, 'chats': chats, 'solved': solved, 'never': {'type': 'jsonl', 'path': 'x'}}
    stages: dict[str, dict[str, Any]] = {
        'pretrain': {'parent': 'imported/model', 'mixture': ((0.0, {'text': 1.0}),)},
        'solved': {'models': {'generator': 'pretrain'}, 'task': {'name': 'nim'}},
        'sft': {'parent': 'pretrain@5', 'mixture': ((0.0, {'chats': 0.5}), (0.5, {'solved': 1.0}))},
        'grpo': {'parent': 'sft', 'task': {'name': 'arithmetic'}},
    }
    for name, stage in stages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(json.dumps({'stage': stage, 'sources': sources}))
    imported = tmp_path / 'imported' / 'model'
    imported.mkdir(parents=True)
    (imported / 'config.json').write_text(json.dumps({'model': {}}))
    stages['pretrain']['parent'] = str(imported)
    (tmp_path / 'pretrain' / 'config.json').write_text(json.dumps({'stage': stages['pretrain'], 'sources': sources}))
    found = trained_on(tmp_path / 'grpo')
    assert {name: domain(spec) for name, spec in found.items() if name != str(imported)} == {
        'grpo.task': 'arithmetic',
        'solved.task': 'nim',
        'chats': 'sudoku',
        'text': 'stdlib',
    }
    assert found[str(imported)] == {'type': 'checkpoint'}
    assert list(trained_on(tmp_path / 'grpo', ancestors=False)) == ['grpo.task']


@pytest.mark.parametrize(
    ('evaluation', 'data', 'words'),
    [
        (SUMS, {'chats': {'type': 'task', 'name': 'arithmetic'}}, 'held out by its split'),
        (SUMS, {'puzzles': {'type': 'task', 'name': 'sudoku'}}, 'held out by its split'),
        (SUMS, {'text': {'type': 'stdlib'}}, 'not checked against text; held out by its split'),
        (
            {'type': 'task', 'task': {'name': 'arithmetic', 'split': 'train'}},
            {'a.task': {'type': 'task', 'name': 'arithmetic'}},
            'trained on the same data (a.task)',
        ),
        (PROSE, {'text': {'type': 'stdlib', 'piece': 2000}}, 'held out by its split'),
        (PROSE, {'fim': {'type': 'fim', 'source': {'type': 'stdlib'}}}, 'held out by its split'),
        (PROSE, {'text': {'type': 'stdlib', 'split': 'heldout'}}, 'trained on the same data (text)'),
        (PROSE, {'chats': {'type': 'task', 'name': 'arithmetic'}}, 'held out by its split'),
        (
            PROSE,
            {'gsm': {'type': 'task', 'name': 'mathematics', 'path': 'x'}},
            'not checked against gsm; held out by its split',
        ),
        (PROSE, {'other': {'type': 'checkpoint'}}, 'not checked against other; held out by its split'),
        (QUIZ, {'q': {'type': 'jsonl', 'path': 'quiz.jsonl'}}, 'trained on the same data (q)'),
        (QUIZ, {'q': {'type': 'jsonl', 'path': 'other.jsonl'}}, 'not checked against q'),
        (QUIZ, {'sums': {'type': 'task', 'name': 'arithmetic'}}, 'not checked against sums'),
        (QUIZ, {}, 'in no training data'),
    ],
    ids=str,
)
def test_how_an_evaluation_is_kept_apart(evaluation: dict[str, Any], data: Any, words: str) -> None:
    assert contamination(evaluation, 'hard', data) == words


@pytest.mark.parametrize('key', ['quiz.jsonl', 'hard'])
def test_folders_held_against_it_are_named(tmp_path: Path, key: str) -> None:
    curated = [{'step': 'dedup'}, {'step': 'decontaminate', 'items': {key: 12}}]
    (tmp_path / 'metadata.json').write_text(json.dumps({'curated': curated}))
    data = {'web': {'type': 'arrayrecord', 'path': str(tmp_path)}, 'wiki': {'type': 'text', 'path': 'x'}}
    assert contamination(QUIZ, 'hard', data) == 'removed from web; not checked against wiki'
    assert contamination(QUIZ, 'easy', data).startswith('removed from web') == (key == 'quiz.jsonl')
