"""python -m data.prepare: complete or absent, never overwriting, and readable by the stream."""

import json
import subprocess
import sys

import pytest

from data import prepare as command
from data.errors import InputError
from data.packing import encode_record
from data.prepare import main, prepare, source_spec
from data.sources import open_source
from data.stream import RowStream
from tests.text import small_tokenizer

CHAT = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / 'in.jsonl'
    records = [{'text': f'text {i} é', 'url': f'u{i}'} for i in range(10)]
    path.write_text('\n'.join(json.dumps(record) for record in records))
    return path


@pytest.fixture
def tokenizer_path(tmp_path):
    small_tokenizer().save(tmp_path / 'tokenizer')
    return str(tmp_path / 'tokenizer')


def read(path):
    source = open_source({'type': 'arrayrecord', 'path': str(path)})
    return [source[i] for i in range(len(source))]


def test_text(lines, tmp_path):
    metadata = prepare({'type': 'jsonl', 'path': str(lines)}, tmp_path / 'out', shard_records=4)
    assert read(tmp_path / 'out') == [json.loads(line) for line in lines.read_text().splitlines()]
    assert json.loads((tmp_path / 'out' / 'metadata.json').read_text()) == metadata
    assert [shard['records'] for shard in metadata['shards']] == [4, 4, 2] and metadata['records'] == 10
    assert metadata['tokenizer'] is None


def test_a_file_that_was_written_anew_is_read_anew(lines, tmp_path):
    prepare({'type': 'jsonl', 'path': str(lines)}, tmp_path / 'out')
    lines.unlink()
    lines.write_text(json.dumps({'text': 'another'}))
    prepare({'type': 'jsonl', 'path': str(lines)}, tmp_path / 'again')
    assert read(tmp_path / 'again') == [{'text': 'another'}] and len(read(tmp_path / 'out')) == 10


def test_tokens_are_what_the_stream_would_make(lines, tmp_path, tokenizer_path):
    lines.write_text('\n'.join(json.dumps(record) for record in ({'text': 'abc'}, {'messages': CHAT})))
    metadata = prepare({'type': 'jsonl', 'path': str(lines)}, tmp_path / 'out', tokenizer_path)
    for record, plain in zip(read(tmp_path / 'out'), ({'text': 'abc'}, {'messages': CHAT}), strict=True):
        made, expected = (encode_record(r, small_tokenizer()) for r in (record, plain))
        assert made[0].tolist() == expected[0].tolist() and made[1].tolist() == expected[1].tolist()
    assert metadata['tokenizer'] == small_tokenizer().fingerprint and metadata['tokens'] > 10


def test_tokens_of_another_tokenizer_are_refused(lines, tmp_path, tokenizer_path):
    prepare({'type': 'jsonl', 'path': str(lines)}, tmp_path / 'out', tokenizer_path)
    source = open_source({'type': 'arrayrecord', 'path': str(tmp_path / 'out')})
    options = {'rows': 1, 'sequence_length': 8, 'steps': 1, 'seed': 0}
    RowStream({'a': source}, ((0.0, {'a': 1.0}),), small_tokenizer(), **options).next(0)
    with pytest.raises(InputError, match="source 'a': its tokens come from another tokenizer"):
        RowStream({'a': source}, ((0.0, {'a': 1.0}),), small_tokenizer(401), **options)


def test_workers_change_nothing(lines, tmp_path):
    spec = {'type': 'jsonl', 'path': str(lines)}
    one, two = (prepare(spec, tmp_path / f'{n}', shard_records=5, workers=n) for n in (1, 2))
    assert one == two and read(tmp_path / '1') == read(tmp_path / '2')


def test_never_overwrites(lines, tmp_path):
    (tmp_path / 'out').mkdir()
    with pytest.raises(InputError, match='exists already'):
        prepare({'type': 'jsonl', 'path': str(lines)}, tmp_path / 'out')
    assert not list((tmp_path / 'out').iterdir())


def test_failure_leaves_nothing(lines, tmp_path, tokenizer_path, monkeypatch):
    spec = {'type': 'jsonl', 'path': str(lines)}
    monkeypatch.setattr(command, 'encode_record', lambda *_: (_ for _ in ()).throw(InputError('bad')))
    with pytest.raises(InputError, match='record 0: bad'):
        prepare(spec, tmp_path / 'out', tokenizer_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in.jsonl', 'tokenizer']


def test_source_spec(tmp_path, lines):
    (tmp_path / 'ds').mkdir()
    (tmp_path / 'ds' / 'dataset_info.json').write_text('{}')
    path = str(tmp_path)
    assert source_spec(str(lines), 'train', 'body') == {'type': 'jsonl', 'path': str(lines), 'field': 'body'}
    assert source_spec(f'{path}/*.parquet', 'train', '') == {'type': 'parquet', 'path': f'{path}/*.parquet'}
    assert source_spec(f'{path}/ds', 'test', '') == {'type': 'tfds', 'path': f'{path}/ds', 'split': 'test'}
    assert source_spec(path, 'train', '') == {'type': 'text', 'path': path}
    assert source_spec('c4/en', 'train', '') == {'type': 'tfds', 'name': 'c4/en', 'split': 'train'}
    with pytest.raises(InputError, match='no such file'):
        source_spec(f'{path}/none.jsonl', 'train', '')


def test_command(lines, tmp_path, capsys):
    assert main([f'--input={lines}', f'--output={tmp_path / "out"}']) == 0
    assert '10 records' in capsys.readouterr().out
    lines.write_text('{"text": "x"}\n{"text"')
    run = [sys.executable, '-m', 'data.prepare', f'--input={lines}', f'--output={tmp_path / "two"}']
    out = subprocess.run(run, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr.count('\n') == 1
    assert out.stderr.startswith(f'error: {lines}:2: expected a JSON object')
    assert not (tmp_path / 'two').exists()
