"""Answers of on-policy stages as records: what is kept, what a kill leaves, and a stage that draws on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict
from small import get_config, one_device

from configs.base import add_stage
from data.errors import InputError
from data.sources import open_source
from train.act.answers import Answers
from train.checkpoint import read_json
from train.launch.edges import check_edges, order
from train.launch.graph import Run


def answer(text: str, sample: int = 0, score: float = 1.0) -> dict[str, Any]:
    return {'messages': [{'role': 'assistant', 'content': text}], 'score': score, 'provenance': {'sample': sample}}


def kept(path: Path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line['step'], line['messages'][0]['content']) for line in lines]


def read(folder: Path) -> list[dict[str, Any]]:
    source = open_source({'type': 'arrayrecord', 'path': str(folder / 'records')})
    return [source[i] for i in range(len(source))]


def test_an_answer_is_kept_once_and_what_is_sampled_again_replaces_what_was(tmp_path: Path) -> None:
    first = Answers(tmp_path, 'right')
    first.add(0, [answer('a'), answer('b'), answer('a', sample=1)])
    first.add(1, [answer('b', sample=2), answer('c')])
    first.add(2, [answer('d')])
    before = (tmp_path / 'answers.jsonl').read_bytes()
    assert kept(tmp_path / 'answers.jsonl') == [(1, 'a'), (1, 'b'), (2, 'c'), (3, 'd')]
    resumed = Answers(tmp_path, 'right')  # from a checkpoint after the first step
    resumed.add(1, [answer('b', sample=2), answer('c')])
    resumed.add(2, [answer('d')])
    assert (tmp_path / 'answers.jsonl').read_bytes() == before
    assert kept(tmp_path / 'answers.replayed.jsonl') == [(2, 'c'), (3, 'd')]
    resumed.finish()
    assert [record['messages'][0]['content'] for record in read(tmp_path)] == ['a', 'b', 'c', 'd']
    resumed.finish()  # a kill right after the last step finishes twice


def test_which_answers_are_kept(tmp_path: Path) -> None:
    right, everything, none = (Answers(tmp_path, word) for word in ('right', 'all', ''))
    assert (right.wants(1.0), right.wants(0.5)) == (True, False)
    assert (everything.wants(0.0), none.wants(1.0), Answers(None, 'all').wants(1.0)) == (True, False, False)
    none.add(0, [answer('a')])
    none.finish()
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="records is 'rigth'; did you mean 'right'"):
        Answers(tmp_path, 'rigth')
    with pytest.raises(InputError, match='no answer was kept'):
        right.finish()


def test_a_stage_learns_from_what_another_has_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('train.launch.graph.make_mesh', lambda sizes: one_device())
    config = get_config()
    config.stages.grpo.update(steps=2, parent='pretrain', records='all', reward='random')
    config.stages.pretrain.steps = 2
    for name in ('midtrain', 'sft'):
        del config.stages[name]
    config.model.n_routed_experts = 0
    for stage in config.stages.values():
        stage.optimizer.name = 'adamw'
    config.sources.own = ConfigDict({'type': 'stage', 'name': 'grpo'})
    mixture = ((0.0, {'own': 1.0}),)
    add_stage(config, 'again', 'sft', parent='pretrain', mixture=mixture, steps=2, batch_size=8, sequence_length=64)
    given = config.to_dict()
    assert order(given) == ['pretrain', 'grpo', 'again']
    Run(given, tmp_path)()
    records = read(tmp_path / 'grpo')
    stage = config.stages.grpo
    assert 0 < len(records) <= stage.steps * stage.prompts * stage.samples
    assert {record['step'] for record in records} == {1, 2}
    for record in records:
        assert [turn['role'] for turn in record['messages']] == ['user', 'assistant']
        assert record['provenance']['task'] == 'arithmetic' and record['score'] in (0.0, 1.0)
    finished = read_json(tmp_path / 'again' / 'finished.json')
    assert finished['records'] == ['grpo'] and finished['tokens'] > 0
    del given['stages']['grpo']['records']
    with pytest.raises(InputError, match="needs the records of 'grpo'"):
        check_edges(given, 'again')
