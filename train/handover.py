"""What mid-training hands over to reinforcement learning: what has changed, and which checkpoint RL gains more from.

From the command line: python -m train.handover BASE TUNED, each a stage's folder, or one for each seed with commas.
BASE had as many tokens without what TUNED was given; from each of them one stage of the run, the probe, went on by
reinforcement learning, with the same settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.errors import InputError
from train.checkpoint import read_json, split_address
from train.compare import compare
from train.launch.command import command
from train.launch.edges import differences
from train.measure.statistics import interval
from train.stages import get_kind


class Row(NamedTuple):
    """Of an evaluation, or of what the probe adds to it: means over seeds and items, the difference that TUNED makes
    with its 95% bootstrap interval over items, and what that means."""

    what: str
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    verdict: str


def handover(base: Sequence[str], tuned: Sequence[str]) -> list[Row]:
    """A row for each evaluation that scores items, then one for each that was made after the probes as well: the gain
    of both, and of each item how much larger it is.

    Args:
        base, tuned: folders of finished stages, seed by seed.

    Raises:
        InputError: folders that do not match (see `train.compare.compare`); not one probe from each, or other ones.
    """
    rows = []
    for name, said in compare(base, tuned).items():
        level = float(np.mean(said['levels']))
        change = (said['difference'], said['low'], said['high'])
        rows.append(Row(name, level - said['difference'], level, *change, _verdict(base[0], name, *change[1:])))
    probes = [[_probe(folder) for folder in folders] for folders in (base, tuned)]
    for one, other in zip(*probes, strict=True):
        settings = (read_json(Path(folder) / 'config.json')['stage'] for folder in (one, other))
        for field, before, after in differences(next(settings), next(settings), 'stage'):
            if field != 'stage.parent':
                raise InputError(f'{other} has {field} = {after!r}, {one} {before!r}: expected the same probe')
    common = set.intersection(*({*compare(*both)} for both in zip((base, tuned), probes, strict=True)))
    for name in sorted(common):
        gains = [
            np.mean([_scores(after, name) - _scores(before, name) for before, after in zip(*both, strict=True)], 0)
            for both in zip((base, tuned), probes, strict=True)
        ]
        more = gains[1] - gains[0]
        low, high = interval(more)
        means = (float(gains[0].mean()), float(gains[1].mean()), float(more.mean()))
        rows.append(Row(f'{name}: gain of RL', *means, low, high, _verdict(base[0], name, low, high)))
    return rows


def _probe(folder: str) -> str:
    """The one finished stage by reinforcement learning from that of the folder."""
    found = []
    for path in sorted(Path(folder).parent.glob('*/finished.json')):
        said: dict[str, Any] = read_json(path)
        if split_address(said['parent'])[0] == Path(folder).name and get_kind(said['kind']).on_policy:
            found.append(str(path.parent))
    if len(found) != 1:
        raise InputError(f'{folder}: {len(found)} finished stages of reinforcement learning come from it: expected one')
    return found[0]


def _scores(folder: str, name: str) -> np.ndarray:
    return np.array(read_json(Path(folder) / 'evaluations.json')[name]['details']['scores'])


def _verdict(folder: str, name: str, low: float, high: float) -> str:
    if low <= 0 <= high:
        return 'not separated'
    lower = read_json(Path(folder) / 'evaluations.json')[name]['direction'] == 'lower'
    return 'better' if (low > 0) != lower else 'worse'


@command('train.handover')
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m train.handover',
        description='What mid-training changed, and whether reinforcement learning gains more from it.',
    )
    parser.add_argument('base', help='DIR/STAGE, the control, or several with commas between them, one for each seed')
    parser.add_argument('tuned', help='as many, in the same order')
    options = parser.parse_args(arguments)
    rows = handover(options.base.split(','), options.tuned.split(','))
    print('| | base | tuned | difference | |\n|---|---|---|---|---|')
    for row in rows:
        change = f'{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]'
        print(f'| {row.what} | {row.base:.4f} | {row.tuned:.4f} | {change} | {row.verdict} |')
    return 0


if __name__ == '__main__':
    sys.exit(main())
