"""Records of preferences in the forms they come in, and the segments they become."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text import small_tokenizer

from data.errors import InputError
from data.preferences import as_judged, as_pair, as_steps, judged_segments, pair_segments, step_segments
from train.learn.pairs import RecordStream
from train.measure.scoring import Other

ASKED = [{'role': 'user', 'content': 'say 1'}]
SYSTEM = {'role': 'system', 'content': 'be brief'}


@pytest.mark.parametrize(
    'record',
    [
        {'prompt': 'say 1', 'chosen': 'one', 'rejected': 'two'},
        {'prompt': ASKED, 'chosen': [{'role': 'assistant', 'content': 'one'}], 'rejected': {'content': 'two'}},
        {'messages': ASKED, 'chosen': 'one', 'rejected': 'two'},
        {
            'conversations': [{'from': 'human', 'value': 'say 1'}],
            'chosen': {'from': 'gpt', 'value': 'one'},
            'rejected': {'from': 'gpt', 'value': 'two'},
        },
        {'instruction': 'say 1', 'input': '', 'output': 'x', 'chosen': 'one', 'rejected': 'two'},
        {'chosen': '\n\nHuman: say 1\n\nAssistant: one', 'rejected': '\n\nHuman: say 1\n\nAssistant: two'},
    ],
    ids=['text', 'messages in prompt', 'messages', 'conversations', 'instruction', 'dialogues'],
)
def test_forms_of_pairs(record: dict[str, Any]) -> None:
    assert as_pair(record) == (ASKED, 'one', 'two', 1.0, 0.0)
    assert as_pair({**record, 'probability': 0.7, 'margin': 2})[3:] == (0.7, 2.0)


def test_only_the_answer_is_learnt_and_its_last_token_carries_the_label() -> None:
    tokenizer = small_tokenizer()
    record = {'prompt': [SYSTEM, *ASKED], 'chosen': 'one', 'rejected': 'two two', 'probability': 0.75, 'margin': 0.5}
    for segment, answer in zip(pair_segments(record, tokenizer), ('one', 'two two'), strict=True):
        learnt = [token for token, weight in zip(segment.tokens, segment.loss_weight, strict=True) if weight]
        assert learnt == [*tokenizer.encode(answer), tokenizer.end_id]
        assert not segment.loss_weight[: -len(learnt)].any()  # whatever was said before, by whomever
    chosen, rejected = pair_segments(record, tokenizer)
    assert np.flatnonzero(chosen.stamps['target']).tolist() == [len(chosen.tokens) - 1] and not rejected.stamps
    assert (chosen.stamps['target'][-1], chosen.stamps['margin'][-1]) == (0.75, 0.5)


def test_earlier_answers_of_a_conversation_are_not_learnt_again() -> None:
    tokenizer = small_tokenizer()
    chat = [*ASKED, {'role': 'assistant', 'content': 'one'}, {'role': 'user', 'content': 'again'}]
    (segment,) = judged_segments(
        {'messages': [*chat, {'role': 'assistant', 'content': 'one'}], 'label': False}, tokenizer
    )
    assert segment.loss_weight.sum() == len(tokenizer.encode('one')) + 1
    assert segment.stamps['target'].sum() == -1.0 and segment.stamps['target'][-1] == -1.0


def test_each_step_is_judged_on_its_last_token() -> None:
    tokenizer = small_tokenizer()
    record = {'prompt': 'say 1', 'steps': ['first \n', 'then'], 'scores': [1, 0.5]}
    (segment,) = step_segments(record, tokenizer)
    places = np.flatnonzero(segment.loss_weight)
    assert segment.stamps['target'][places].tolist() == [1.0, 0.5]
    assert tokenizer.decode(segment.tokens[: places[0] + 1]).endswith('first \n')
    assert places[1] == len(segment.tokens) - 1


@pytest.mark.parametrize(
    ('read', 'record', 'message'),
    [
        (as_pair, {'prompt': 'a', 'chosen': 'b'}, 'expected chosen and rejected'),
        (as_pair, {'prompt': 'a', 'chosen': 'b', 'rejected': 3}, 'rejected: expected a text or a message, got .3'),
        (
            as_pair,
            {'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'probability': 1.5},
            'probability: expected a number',
        ),
        (as_pair, {'chosen': 'b', 'rejected': 'c'}, 'expected a dialogue'),
        (
            as_pair,
            {'chosen': '\n\nHuman: a\n\nAssistant: b', 'rejected': '\n\nHuman: c\n\nAssistant: d'},
            'differ in the last answer alone',
        ),
        (as_pair, {'text': 'a', 'chosen': {'content': 'b'}, 'rejected': 'c'}, 'expected prompt, messages'),
        (as_judged, {'prompt': 'a', 'completion': 'b', 'label': 1}, 'label: expected true or false, got 1'),
        (as_judged, {'messages': ASKED, 'label': True}, "expected the assistant's answer last"),
        (as_steps, {'prompt': 'a', 'steps': ['b'], 'scores': [1, 2]}, 'two lists of equal length'),
        (as_steps, {'prompt': 'a', 'steps': ['b'], 'scores': [2]}, r'numbers in \[0, 1\]'),
    ],
)
def test_what_is_no_preference_is_named(read: Any, record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(record)


class Listed:
    """Records in memory."""

    def __init__(self, name: str, count: int, words: int = 1):
        answers = {'chosen': 'y' * words, 'rejected': 'n'}
        self.records = [{'prompt': f'{name} {i}', **answers, 'probability': (i + 1) / 64} for i in range(count)]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]


def record_stream(sources: dict[str, Any], mixture: Any, length: int = 64) -> RecordStream:
    settings = {'records': 8, 'batch_size': 16, 'sequence_length': length, 'microbatches': 1, 'steps': 8}
    return RecordStream('pair', sources, mixture, small_tokenizer(), settings, 5, Other(None, {}))  # type: ignore[arg-type]


def test_steps_have_whole_pairs_in_the_proportions_asked_for_and_go_on_from_a_state() -> None:
    sources = {'a': Listed('a', 40), 'b': Listed('b', 7), 'long': Listed('long', 4, words=200)}
    mixture = ((0.0, {'a': 0.75, 'b': 0.25}), (0.5, {'a': 0.5, 'long': 0.5}))
    whole = record_stream(sources, mixture)
    batches, states = zip(*(whole.next(step) for step in range(5)), strict=True)
    assert [state['taken'] for state in states[:4]] == [{'a': 6 * n, 'b': 2 * n, 'long': 0} for n in (1, 2, 3, 4)]
    for batch in batches:
        assert (batch['target'] > 0).sum() == 8  # a label a pair
        for segments, weight in zip(batch['segments'], batch['loss_weight'], strict=True):
            assert segments.max() % 2 == 0
            assert all(weight[segments == s].any() for s in range(1, segments.max() + 1))
    assert states[4]['skipped'] > 0 and states[4]['metrics']['records/skipped'] == states[4]['skipped']
    resumed = record_stream(sources, mixture)
    resumed.restore(json.loads(json.dumps(states[2])))
    for step in (3, 4):
        again, state = resumed.next(step)
        assert state == states[step]
        for name, array in batches[step].items():
            np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_records_that_fit_nowhere_are_named() -> None:
    with pytest.raises(InputError, match='1000 records on end are longer than sequence_length=64'):
        record_stream({'long': Listed('long', 4, words=200)}, ((0.0, {'long': 1.0}),)).next(0)


REAL = {
    'hh_rlhf_harmless_base_test.jsonl.gz': (2312, as_pair, pair_segments),
    'dpo_en_demo_300.json.gz': (300, as_pair, pair_segments),
    'raschka_preference_1100.json.gz': (1100, as_pair, pair_segments),
    'kto_en_demo_300.json.gz': (300, as_judged, judged_segments),
}


@pytest.mark.parametrize('name', REAL)
def test_published_records(name: str) -> None:
    """TORSO_RECORDS may name a folder with published sets as preference/NAME."""
    path = Path(os.environ.get('TORSO_RECORDS', '')) / 'preference' / name
    if not path.is_file():
        pytest.skip('TORSO_RECORDS does not name a folder with the published records')
    count, read, cut = REAL[name]
    text = gzip.decompress(path.read_bytes()).decode()
    records = json.loads(text) if '.json.' in name else [json.loads(line) for line in text.split('\n') if line]
    assert len(records) == count
    failed = []
    for number, record in enumerate(records):
        try:
            read(record)
        except InputError as error:
            failed.append((number, str(error)))
    assert len(failed) <= count // 100, failed[:3]
    bad = {number for number, _ in failed}
    for record in [record for number, record in enumerate(records) if number not in bad][:20]:
        for segment in cut(record, small_tokenizer()):
            assert segment.loss_weight.any()
