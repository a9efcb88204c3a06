"""Curation: records through one step into a folder of ArrayRecord, which the next step, a run or `data.prepare` reads.

    python -m data.curate dedup --input=PATH|TFDS_NAME --output=DIR [--level=paragraph] [--similarity=0.8]
    python -m data.curate repetition --input=... --output=DIR [--mask]
    python -m data.curate decontaminate --input=... --output=DIR [--against=TASK|FILE|JSON ...]

Records get `provenance`: where each was found, under which licence, and what was done to it. DIR/metadata.json says
how many came and stayed, and DIR/notes.jsonl of which records what was dropped or changed, and why. A command that was
cut off goes on from its last shard when it is given again. --workers=N shares the shards among processes.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from data.curate.decontaminate import Decontaminate
from data.curate.dedup import LEVELS, Dedup
from data.curate.passes import Step, curate
from data.curate.repetition import Repetition
from data.errors import InputError
from data.prepare import source_spec


def _dedup(options: argparse.Namespace) -> Step:
    return Dedup(options.level, options.similarity)


def _repetition(options: argparse.Namespace) -> Step:
    return Repetition(options.mask, options.times)


def _decontaminate(options: argparse.Namespace) -> Step:
    return Decontaminate(tuple(options.against), options.most)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m data.curate', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar='STEP')
    dedup = commands.add_parser('dedup', help='drop what repeats an earlier record, or nearly does')
    dedup.add_argument('--level', choices=LEVELS, default='document', help='drop whole records, or paragraphs of them')
    dedup.add_argument('--similarity', type=float, default=0.8, help='least Jaccard similarity of duplicates')
    dedup.set_defaults(step=_dedup)
    repetition = commands.add_parser('repetition', help='drop, or do not learn, what a text says over and over')
    repetition.add_argument('--mask', action='store_true', help='keep the records, and learn the first saying alone')
    repetition.add_argument('--times', type=int, default=32, help='how often on end')
    repetition.set_defaults(step=_repetition)
    clean = commands.add_parser('decontaminate', help='drop what holds an item of an evaluation')
    clean.add_argument(
        '--against',
        action='append',
        default=[],
        help='task, JSON Lines file, config.json of a stage, or JSON of a task or source; may come again (all tasks)',
    )
    clean.add_argument('--most', type=int, default=1000, help='items of a task or source')
    clean.set_defaults(step=_decontaminate)
    for command in commands.choices.values():
        command.add_argument('--input', required=True, help='file, folder, glob, or the name of a TFDS dataset')
        command.add_argument('--output', required=True, help='folder to make')
        command.add_argument('--field', default='', help='field that holds the text, or a text with {FIELD} in it')
        command.add_argument('--split', default='train', help='split of a TFDS dataset')
        command.add_argument('--licence', default='', help='of records that do not say')
        command.add_argument('--shard_records', type=int, default=10_000, help='records read for a shard')
        command.add_argument('--workers', type=int, default=1, help='processes')
    options = parser.parse_args(arguments)
    try:
        told = curate(
            options.step(options),
            source_spec(options.input, options.split, options.field),
            options.output,
            licence=options.licence,
            shard_records=options.shard_records,
            workers=options.workers,
            progress=sys.stderr.isatty(),
        )
    except InputError as error:
        print(f'data.curate: {error}', file=sys.stderr)
        return 1
    last = told['curated'][-1]
    notes = ''.join(f', {count} {reason}' for reason, count in last['notes'].items())
    print(f'{options.output}: {last["kept"]} of {last["records"]} records{notes}')
    spent = os.times()
    seconds = spent.user + spent.system + spent.children_user + spent.children_system
    print(f'{last["characters"] / 1e6:.1f} million characters, {seconds:.1f} CPU-seconds with all that came before')
    return 0


if __name__ == '__main__':
    sys.exit(main())
