"""What `data.inspect` shows of a step is what the stage was trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
from text import small_tokenizer

from data.errors import InputError
from data.inspect import describe, main, reopened, segments
from data.packing import encode_record
from data.prepare import prepare
from data.sources import open_source
from data.stream import RowStream

SOURCES = {
    'stdlib': {'type': 'stdlib', 'split': 'heldout'},
    'sums': {'type': 'task', 'name': 'arithmetic', 'format': 'chat'},
}
MIXTURE = ((0.0, {'stdlib': 0.5, 'sums': 0.5}),)
SETTINGS = {'rows': 3, 'sequence_length': 96, 'steps': 6, 'seed': 7, 'per_example': False}


@pytest.fixture(params=[True, False], ids=['split', 'whole'])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A stage's folder as a run leaves it, with a checkpoint after step 3."""
    small_tokenizer().save(tmp_path / 'tokenizer')
    folder = tmp_path / 'stage'
    saved = folder / 'checkpoints' / '3' / 'stream'
    saved.mkdir(parents=True)
    sources = SOURCES if request.param else {'sums': SOURCES['sums']}
    mixture = MIXTURE if request.param else ((0.0, {'sums': 1.0}),)
    describe(folder, sources, mixture, split_documents=request.param, **SETTINGS)
    opened = {name: open_source(spec) for name, spec in sources.items()}
    stream = RowStream(opened, mixture, small_tokenizer(), split_documents=request.param, **SETTINGS)
    for step in range(6):
        batch, state = stream.next(step)
        np.savez(folder / f'{step + 1}.npz', **batch)
        if step == 2:
            (saved / 'metadata').write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize('step', [1, 3, 4, 6])
def test_segments_are_those_of_the_batch(stage: Path, step: int) -> None:
    """Each is the part of its record that it says it is; together they are the batch."""
    stream, tokenizer = reopened(stage, step, None)
    found = list(segments(stream, tokenizer, step))
    batch = np.load(stage / f'{step}.npz')
    for row in range(SETTINGS['rows']):
        at = 0
        for segment in (s for s in found if s['row'] == row):
            tokens, weight = encode_record(open_source(SOURCES[segment['source']])[segment['record']], tokenizer)
            begin, end = segment['begin'], segment['end']
            placed = batch['tokens'][row, at : at + end - begin]
            assert placed.tolist() == tokens[begin:end].tolist()
            assert (
                segment['text'] == ''.join(text for text, _ in segment['pieces']) == tokenizer.decode(placed.tolist())
            )
            learnt = batch['loss_weight'][row, at : at + end - begin] > 0
            assert learnt[1:].tolist() == (weight[begin:end] > 0)[1:].tolist() and not learnt[0]
            at += end - begin
        assert not batch['segments'][row, at:].any() and at == (batch['segments'][row] > 0).sum()
    alone, _ = reopened(stage, step, [1])
    assert list(segments(alone, tokenizer, step)) == [s for s in found if s['row'] == 1]


def test_the_command(stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(stage), '--step=4', '--rows=0']) == 0
    said = capsys.readouterr().out
    assert said.startswith('--- row 0: ') and 'record' in said and '«' in said
    assert main([str(stage), '--step=4', '--rows=0', '--json']) == 0
    assert all(json.loads(line)['row'] == 0 for line in capsys.readouterr().out.splitlines())


def test_provenance_is_shown_of_text_and_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_tokenizer().save(tmp_path / 'tokenizer')
    origin = {'source': 'web', 'licence': 'CC0', 'transforms': ['dedup 1']}
    records = [{'text': f'text {i}', 'provenance': {**origin, 'scores': {'quality': i}}} for i in range(4)]
    (tmp_path / 'in.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    for name, words in (('text', ''), ('tokens', str(tmp_path / 'tokenizer'))):
        prepare({'type': 'jsonl', 'path': str(tmp_path / 'in.jsonl')}, tmp_path / name, words)
        (tmp_path / f'stage-{name}').mkdir()
        sources = {'web': {'type': 'arrayrecord', 'path': str(tmp_path / name)}}
        describe(tmp_path / f'stage-{name}', sources, ((0.0, {'web': 1.0}),), split_documents=True, **SETTINGS)
        stream, tokenizer = reopened(tmp_path / f'stage-{name}', 1, None)
        for segment in segments(stream, tokenizer, 1):
            assert segment['provenance'] == records[segment['record']]['provenance']
        assert main([str(tmp_path / f'stage-{name}'), '--step=1', '--rows=0']) == 0
        assert '"licence": "CC0", "transforms": ["dedup 1"]' in capsys.readouterr().out


def test_what_cannot_be_shown_is_one_line(stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(stage), '--step=7'], '--step is 7: expected 1 to 6'),
        ([str(stage), '--step=1', '--rows=3'], 'expected some of 0 to 2'),
        ([str(stage.parent), '--step=1'], 'no stream.json in it'),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match='--step is 0'):
        reopened(stage, 0, None)
