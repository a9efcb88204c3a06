"""Which records made a step of a run, decoded, with what of them was learnt.

    python -m data.inspect DIR/STAGE --step=N [--rows=0,1,2] [--json]

Steps count from 1, as in metrics.jsonl. The batch is made again from the sources, from the newest checkpoint before
that step where there is one; weights are not needed. Text that is learnt stands between «»; a place says from which
source a segment comes, which of its records, which of the record's tokens, and its provenance.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.sources import open_source
from data.stream import RowStream
from data.tokenizer import Tokenizer

STREAM = 'stream.json'  # in a stage's folder: what its batches are made from


def describe(folder: Path, sources: Mapping[str, Any], mixture: Any, **settings: Any) -> None:
    """Notes for `python -m data.inspect` what a stage's RowStream is made from: see its arguments."""
    temporary = folder / f'{STREAM}.tmp'
    told = {'sources': sources, 'mixture': mixture, 'settings': settings}
    temporary.write_text(json.dumps(told, default=dict) + '\n')
    temporary.replace(folder / STREAM)


def reopened(folder: Path, step: int, rows: Sequence[int] | None) -> tuple[RowStream, Tokenizer]:
    """A stage's stream, about to make the batch of `step` (from 1), and its tokenizer.

    Raises:
        InputError: no such stage, or one that makes its batches in another way; a step or row that it has not.
    """
    if not (folder / STREAM).exists():
        raise InputError(f'{folder}: no {STREAM} in it: expected the folder of a stage that learns from packed records')
    told = json.loads((folder / STREAM).read_text())
    settings = told['settings']
    if not 1 <= step <= settings['steps']:
        raise InputError(f'--step is {step}: expected 1 to {settings["steps"]}, as many as the stage has')
    if rows is not None and not {*rows} <= {*range(settings['rows'])}:
        raise InputError(f'--rows is {",".join(map(str, rows))}: expected some of 0 to {settings["rows"] - 1}')
    tokenizer = Tokenizer.load(folder.parent / 'tokenizer')
    sources = {name: open_source(spec) for name, spec in told['sources'].items()}
    stream = RowStream(sources, told['mixture'], tokenizer, rows_here=rows, **settings)
    saved = [int(path.name) for path in (folder / 'checkpoints').glob('[0-9]*') if path.name.isdigit()]
    done = max((number for number in saved if number < step), default=0)
    if done:
        stream.restore(json.loads((folder / 'checkpoints' / str(done) / 'stream' / 'metadata').read_text()))
    for earlier in range(done, step - 1):
        stream.next(earlier)
    return stream, tokenizer


def segments(stream: RowStream, tokenizer: Tokenizer, step: int) -> Iterator[dict[str, Any]]:
    """Of each segment of the batch of `step` (from 1) its row, source, record, which of the record's tokens it holds
    (begin, end), its text, the pieces [text, learnt] that this falls into, and any provenance of the record."""
    batch, _ = stream.next(step - 1)
    for i, (row, taken) in enumerate(stream.taken.items()):
        at = 0
        for place in taken:
            size = place.end - place.begin
            tokens = batch['tokens'][i, at : at + size].tolist()
            learnt = (batch['loss_weight'][i, at : at + size] > 0).tolist()
            pieces: list[tuple[list[int], bool]] = []
            for token, own in zip(tokens, learnt, strict=True):
                if not pieces or pieces[-1][1] != own:
                    pieces.append(([], own))
                pieces[-1][0].append(token)
            shown = [[tokenizer.decode(some), own] for some, own in pieces]
            known = {name: x for name, x in stream.record(place).items() if name == 'provenance'}
            yield {'row': row, **place._asdict(), **known, 'text': tokenizer.decode(tokens), 'pieces': shown}
            at += size


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m data.inspect', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('stage', help='DIR/STAGE, the folder of a stage')
    parser.add_argument('--step', type=int, required=True, help='from 1')
    parser.add_argument('--rows', default='', help='rows of the batch, from 0, with commas (all)')
    parser.add_argument('--json', action='store_true', help='a line of JSON for each segment')
    options = parser.parse_args(arguments)
    try:
        rows = [int(row) for row in options.rows.split(',')] if options.rows else None
        stream, tokenizer = reopened(Path(options.stage), options.step, rows)
        for segment in segments(stream, tokenizer, options.step):
            if options.json:
                print(json.dumps(segment))
                continue
            place = f'{segment["source"]}, record {segment["record"]}, tokens {segment["begin"]} to {segment["end"]}'
            known = f', {json.dumps(segment["provenance"])}' if 'provenance' in segment else ''
            print(f'--- row {segment["row"]}: {place}{known}')
            print(''.join(f'«{text}»' if learnt else text for text, learnt in segment['pieces']))
    except (InputError, ValueError) as error:
        print(f'data.inspect: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
