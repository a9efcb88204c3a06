"""Shards with broken records: these are passed over, counted and named where the source allows some of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet
from text import small_tokenizer

from data.errors import InputError
from data.rows import sample_texts
from data.sources import Source, open_source
from data.stream import Prefetch, RowStream
from train.learn.pairs import RecordStream
from train.measure.scoring import Other

COUNT = 24
BAD = (0, 5, 17)
TEXTS = [f'number {i} ' * (1 + i % 5) for i in range(COUNT)]


def json_lines(path: Path) -> dict[str, Any]:
    lines = [json.dumps({'text': text}).encode() for text in TEXTS]
    broken = (b'{"text": "cut', b'\xff\xfe', b'[1]')
    for number, line in zip(BAD, broken, strict=True):
        lines[number] = line
    path.write_bytes(b'\n'.join(lines))
    return {'type': 'jsonl', 'path': str(path)}


def array_record(path: Path) -> dict[str, Any]:
    writer = ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
    for text in TEXTS:
        writer.write(json.dumps({'text': text}).encode())
    writer.close()
    content = bytearray(path.read_bytes())
    for number in BAD:
        place = content.index(json.dumps({'text': TEXTS[number]}).encode())
        content[place + 3] ^= 4
    path.write_bytes(content)
    return {'type': 'arrayrecord', 'path': str(path)}


def row_groups(path: Path) -> dict[str, Any]:
    table = pyarrow.table({'text': TEXTS})
    options: dict[str, Any] = {'write_page_checksum': True, 'use_dictionary': False, 'compression': 'none'}
    parquet.write_table(table, path, row_group_size=1, **options)
    content = bytearray(path.read_bytes())
    metadata = parquet.read_metadata(path)
    for number in BAD:  # the header of its page
        place = metadata.row_group(number).column(0).data_page_offset
        content[place : place + 8] = b'\xff' * 8
    path.write_bytes(content)
    return {'type': 'parquet', 'path': str(path)}


MAKERS = {'jsonl': json_lines, 'arrayrecord': array_record, 'parquet': row_groups}


class Sound:
    """The same, and nothing is broken."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {'text': TEXTS[index]}


@pytest.fixture(params=MAKERS)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    make: Callable[[Path], dict[str, Any]] = MAKERS[request.param]
    return make(tmp_path / 'shard')


def stream(source: Source, rows_here: Any = None) -> RowStream:
    mixture = ((0.0, {'a': 1.0}),)
    return RowStream(
        {'a': source}, mixture, small_tokenizer(), rows=4, sequence_length=48, steps=9, seed=3, rows_here=rows_here
    )


def words(batches: list[Mapping[str, Any]]) -> str:
    return small_tokenizer().decode([int(t) for batch in batches for t in batch['tokens'].reshape(-1)])


def test_none_is_allowed_unless_said(spec: dict[str, Any]) -> None:
    with pytest.raises(InputError, match='shard'):
        open_source(spec)
    with pytest.raises(InputError, match='broken is -1'):
        open_source({**spec, 'broken': -1})


def test_they_are_passed_over_counted_and_named(spec: dict[str, Any]) -> None:
    source = open_source({**spec, 'broken': 3})
    assert len(source) == COUNT  # so that what is not broken keeps its place in the order
    flowing = stream(source)
    taken = [flowing.next(step) for step in range(9)]  # several epochs
    assert taken[-1][1]['metrics'] == {'records/broken': 3.0}
    told = []
    while flowing.events:
        told.append(flowing.events.pop(0))
    assert sorted(detail.split(', record ')[1].split(':')[0] for _, detail in told) == ['0', '17', '5']
    assert all(kind == 'broken record' and 'shard' in detail for kind, detail in told)
    said = words([batch for batch, _ in taken])
    assert all(f'number {i} ' in said for i in range(COUNT) if i not in BAD) and 'number 17 ' not in said

    for first in (1, 4):  # bit for bit the same from any state, also as one process of two
        for rows in (range(4), (1, 3)):
            again = stream(open_source({**spec, 'broken': 3}), rows)
            again.restore(json.loads(json.dumps(taken[first][1])))
            for step in range(first + 1, 9):
                batch, state = again.next(step)
                np.testing.assert_array_equal(batch['tokens'], taken[step][0]['tokens'][np.asarray(rows)])
                assert all(state['rows'][str(row)] == taken[step][1]['rows'][str(row)] for row in rows)


def test_one_too_many_ends_the_run_by_name(spec: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        flowing = stream(open_source({**spec, 'broken': 2}))  # of JSON Lines all are looked at here
        for step in range(9):
            flowing.next(step)
    expected = 'shard:18: expected an object' if spec['type'] == 'jsonl' else 'with it 3 records are broken'
    assert expected in str(error.value) and 'shard' in str(error.value)


def test_nothing_changes_where_nothing_is_broken() -> None:
    plain, made = stream(Sound()), Prefetch(stream(Sound()))
    for step in range(9):
        batch, state = plain.next(step)
        other, other_state = made.next(step)
        np.testing.assert_array_equal(batch['tokens'], other['tokens'])
        assert state == other_state and 'broken' not in json.dumps(state)
    assert made.events == []
    made.close()


def test_tokenizers_and_streams_ahead_pass_over_them_too(spec: dict[str, Any]) -> None:
    source = open_source({**spec, 'broken': 3})
    assert sorted(sample_texts(source)) == sorted(text for i, text in enumerate(TEXTS) if i not in BAD)
    made = Prefetch(stream(source))
    for step in range(9):
        made.next(step)
    made.close()
    assert len(made.events) == 3


def test_records_of_preferences(tmp_path: Path) -> None:
    lines = [json.dumps({'prompt': f'{i}', 'chosen': 'yes', 'rejected': 'no'}) for i in range(8)]
    lines[2] = '{"prompt": "2", "chosen": "yes"}'
    lines[6] = '{'
    (tmp_path / 'pairs').write_text('\n'.join(lines))
    config = {'records': 4, 'batch_size': 8, 'sequence_length': 64, 'microbatches': 1, 'steps': 8}

    def pairs(broken: int) -> RecordStream:
        sources = {'a': open_source({'type': 'jsonl', 'path': str(tmp_path / 'pairs'), 'broken': broken})}
        mixture = ((0.0, {'a': 1.0}),)
        return RecordStream('pair', sources, mixture, small_tokenizer(), config, 5, Other(None, {}))  # type: ignore[arg-type]

    whole, states = pairs(2), []
    batches = []
    for step in range(5):
        batch, state = whole.next(step)
        batches, states = [*batches, batch], [*states, state]
    assert states[-1]['metrics'] == {'records/broken': 2.0} and len(whole.events) == 2
    resumed = pairs(2)
    resumed.restore(json.loads(json.dumps(states[2])))
    again, state = resumed.next(3)
    np.testing.assert_array_equal(again['tokens'], batches[3]['tokens'])
    assert state == states[3]
    with pytest.raises(InputError, match='with it 2 records are broken: option broken = 1'):
        one = pairs(1)
        for step in range(5):
            one.next(step)
