"""Curation: records through one step into a folder of ArrayRecord, which the next step, a run or `data.prepare` reads.

    python -m data.curate dedup --input=PATH|TFDS_NAME --output=DIR [--level=paragraph] [--similarity=0.8]
    python -m data.curate repetition --input=... --output=DIR [--mask]
    python -m data.curate decontaminate --input=... --output=DIR [--against TASK|FILE|JSON ...]
    python -m data.curate quality --input=... --output=DIR [--good=PATH] [--bad=PATH] [--least=0.5]
    python -m data.curate upsample --input=SCORED --output=DIR [--drop=0.4] [--cap=4]

Records get `provenance`: where each was found, under which licence, what was done to it, and scores.
DIR/metadata.json says how many came and stayed, DIR/notes.jsonl of which records what was dropped or changed, and why.
A command that was cut off goes on from its last shard when it is given again; --workers=N shares the shards among
processes. `upsample` cuts scored records into folders by quality, and DIR/mixture.json says how often to see each.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.curate.decontaminate import Decontaminate
from data.curate.dedup import Dedup
from data.curate.passes import curate
from data.curate.quality import Quality, upsample
from data.curate.repetition import Repetition
from data.errors import InputError
from data.prepare import source_spec

STEPS: dict[str, Any] = {step.name: step for step in (Dedup, Repetition, Decontaminate, Quality)}
OPTIONS = {
    'level': 'what is dropped: document, or paragraph',
    'similarity': 'least Jaccard similarity of duplicates; 1: exact ones alone',
    'mask': 'keep the records, and learn the first saying alone',
    'times': 'how often on end is too often',
    'against': 'tasks, JSON Lines files, config.json of stages, JSON of tasks or sources (none: all tasks)',
    'most': 'items of a task or source',
    'good': 'records to be like (the standard library)',
    'bad': 'records to be unlike (the good ones, shuffled or garbled)',
    'least': 'records of a lower score are dropped',
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m data.curate', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar='STEP', dest='step')
    for name, step in STEPS.items():
        command = commands.add_parser(name)
        for field in dataclasses.fields(step):
            if said := OPTIONS.get(field.name):
                kinds = {bool: {'action': 'store_true'}, tuple: {'nargs': '*'}}
                kind = kinds.get(type(field.default), {'type': type(field.default)})
                command.add_argument(f'--{field.name}', default=field.default, help=said, **kind)
        command.add_argument('--licence', default='', help='of records that do not say')
        command.add_argument('--shard_records', type=int, default=10_000, help='records read for a shard')
        command.add_argument('--workers', type=int, default=1, help='processes')
    command = commands.add_parser('upsample')
    command.add_argument('--drop', type=float, default=0.4, help='share of the text, the worst, that is never seen')
    command.add_argument('--cap', type=float, default=4.0, help='how often the best is seen')
    command.add_argument('--classes', type=int, default=5, help='folders')
    for command in commands.choices.values():
        command.add_argument('--input', required=True, help='file, folder, glob, or the name of a TFDS dataset')
        command.add_argument('--output', required=True, help='folder to make')
        command.add_argument('--field', default='', help='field that holds the text, or a text with {FIELD} in it')
        command.add_argument('--split', default='train', help='split of a TFDS dataset')
    options = parser.parse_args(arguments)
    try:
        spec = source_spec(options.input, options.split, options.field)
        if options.step == 'upsample':
            mixture = upsample(spec, options.output, options.drop, options.cap, options.classes)
            (Path(options.output) / 'mixture.json').write_text(json.dumps(mixture, indent=2) + '\n')
            print(json.dumps(mixture))
            return 0
        step, told = STEPS[options.step], vars(options)
        given = {field.name: told[field.name] for field in dataclasses.fields(step) if field.name in OPTIONS}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        how = {name: told[name] for name in ('licence', 'shard_records', 'workers')}
        told = curate(step(**given), spec, options.output, **how, progress=sys.stderr.isatty())
    except InputError as error:
        print(f'data.curate: {error}', file=sys.stderr)
        return 1
    last, spent = told['curated'][-1], os.times()
    notes = ''.join(f', {count} {reason}' for reason, count in last['notes'].items())
    print(f'{options.output}: {last["kept"]} of {last["records"]} records{notes}')
    seconds = spent.user + spent.system + spent.children_user + spent.children_system
    print(f'{last["characters"] / 1e6:.1f} million characters, {seconds:.1f} CPU-seconds with all that came before')
    return 0


if __name__ == '__main__':
    sys.exit(main())
