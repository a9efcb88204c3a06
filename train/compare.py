"""What a stage changed: differences between evaluations of two checkpoints, item by item.

From the command line: python -m train.compare BASE TUNED, each a stage's folder, or one for each seed with commas. Of
one base and several TUNED it makes a table of what each gained and lost, on what it was trained on and on the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError, did_you_mean
from train.checkpoint import read_json
from train.launch.command import command
from train.measure.domains import domain, trained_on
from train.measure.statistics import interval, scored


def compare(
    base: Sequence[str],
    tuned: Sequence[str],
    evaluation: str = '',
    against: str = '',
    between: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """By evaluation, how much higher the tuned stages score than the base stages at their sides.

    Args:
        base, tuned: folders of finished stages, seed by seed.
        evaluation: the one to compare; '' all that both have and that score items.
        against: the evaluation of the base, where it is another one of the same items ('' the same).
        between: only items on which the base of that seed scores in this range, its ends included.

    Returns:
        {evaluation: {difference, low, high, seeds, levels, items}}: the mean over seeds and items, its 95% bootstrap
        interval over items (each item's mean over the seeds that have it is drawn as one), the mean difference of each
        seed and the mean score of its tuned stage.

    Raises:
        InputError: folders that do not match; no such evaluation; other items.
    """
    if len(base) != len(tuned):
        raise InputError(f'{len(base)} stages and {len(tuned)}: expected as many tuned as base ones, one for each seed')
    scores = [(_scores(a), _scores(b)) for a, b in zip(base, tuned, strict=True)]
    common = set.intersection(*({*before} & {*after} for before, after in scores))
    found = {}
    for name in [evaluation] if evaluation else sorted(common):
        changes, levels, sizes = [], [], []
        for (before, after), folders in zip(scores, zip(base, tuned, strict=True), strict=True):
            for known, wanted, folder in zip((before, after), (against or name, name), folders, strict=True):
                if wanted not in known:
                    raise InputError(f'{folder}: no evaluation {wanted!r} with scores{did_you_mean(wanted, known)}')
            (start, size), (end, same) = before[against or name], after[name]
            if not np.array_equal(size, same):
                raise InputError(f'{folders[1]}: {name} has other items than {folders[0]}')
            chosen = (start >= between[0]) & (start <= between[1]) if between else np.ones(len(start), bool)
            if not chosen.any():
                raise InputError(f'{folders[0]}: {against or name} has no item between {between}')
            changes.append(np.where(chosen, end - start, np.nan))
            levels.append(float(np.average(end[chosen], weights=size[chosen])))
            sizes.append(size)
        if not all(np.array_equal(size, sizes[0]) for size in sizes):
            raise InputError(f'{name}: seeds have other items')
        held = ~np.isnan(changes)
        seen = held.any(0)
        means, counts = np.nansum(changes, 0)[seen] / held.sum(0)[seen], (held.sum(0) * sizes[0])[seen]
        low, high = interval(means, counts)
        found[name] = {
            'difference': float(np.average(means, weights=counts)),
            'low': low,
            'high': high,
            'seeds': [float(np.average(x[h], weights=sizes[0][h])) for x, h in zip(changes, held, strict=True)],
            'levels': levels,
            'items': len(means),
        }
    return found


def matrix(base: Sequence[str], several: Sequence[Sequence[str]], evaluation: str = '') -> str:
    """A Markdown table of what stages specialised from one base have gained and lost: see `compare`.

    What a stage was trained on itself is bold. The last lines are means over evaluations in shares, of those it was
    trained on and of the others.
    """
    columns = [_label(tuned) for tuned in several]
    found = [compare(base, tuned, evaluation) for tuned in several]
    record = read_json(Path(base[0]) / 'config.json')
    about = {name: domain(spec) for name, spec in record['evaluations'].items()}
    units = {name: said.get('unit') for name, said in read_json(Path(base[0]) / 'evaluations.json').items()}
    known = [{domain(spec) for spec in trained_on(Path(tuned[0]), ancestors=False).values()} for tuned in several]
    lines = [f'| {_label(base)} to | {" | ".join(columns)} |', '|---' * (1 + len(columns)) + '|']
    for name in dict.fromkeys(name for changes in found for name in changes):
        cells = []
        for changes, own in zip(found, known, strict=True):
            said = changes.get(name)
            cell = _cell([said], units.get(name)) if said else ''
            cells.append(f'**{cell}**' if cell and about.get(name) in own else cell)
        lines.append(f'| {name} | {" | ".join(cells)} |')
    for title, wanted in (('trained on, mean', True), ('not trained on, mean', False)):
        groups = [
            [x for n, x in changes.items() if units.get(n) == 'share' and (about.get(n) in own) == wanted]
            for changes, own in zip(found, known, strict=True)
        ]
        lines.append(f'| {title} | {" | ".join(_cell(group, "share") if group else "" for group in groups)} |')
    return '\n'.join(lines)


def _cell(changes: Sequence[Mapping[str, Any]], unit: str | None) -> str:
    """The mean of differences, of shares in points, with the mean of their bounds, which is never too narrow."""
    scale, digits = (100, 1) if unit == 'share' else (1, 4)
    mean, low, high = (scale * float(np.mean([x[field] for x in changes])) for field in ('difference', 'low', 'high'))
    return f'{mean:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]'


def _label(folders: Sequence[str]) -> str:
    """What the stages of several seeds have in common in their names."""
    names = [Path(folder).name for folder in folders]
    return os.path.commonprefix(names).rstrip('_-') if len(names) > 1 else names[0]


def _scores(folder: str) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Of each evaluation that scores items, the scores and the weights of its items (documents weigh by bytes)."""
    path = Path(folder) / 'evaluations.json'
    if not path.exists():
        raise InputError(f'{path} does not exist: expected the folder of a stage that was evaluated')
    details = {name: result['details'] for name, result in read_json(path).items()}
    return {name: scored(said) for name, said in details.items() if 'scores' in said}


@command('train.compare')
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m train.compare',
        description='How much higher one stage scores than another, item by item, with 95% bootstrap intervals.',
    )
    parser.add_argument('base', help='DIR/STAGE, or several with commas between them, one for each seed')
    parser.add_argument('tuned', nargs='+', help='as many, in the same order; of several such a table')
    parser.add_argument('--evaluation', default='', help='one evaluation (all that both have)')
    parser.add_argument('--against', default='', help='the evaluation of BASE, where it is another one')
    parser.add_argument('--between', nargs=2, type=float, help='only items on which BASE scores in this range')
    parser.add_argument(
        '--answers',
        metavar='EVALUATION',
        default='',
        help='let both models answer the problems of this evaluation of TUNED, and compare: tokens shifted, diversity, '
        'how answers reason, what is solved, weights moved',
    )
    parser.add_argument('--samples', type=int, default=8, help='with --answers: of each model for each problem')
    parser.add_argument('--html', default='', help='with --answers: a file for the tokens of TUNED, coloured by rank')
    options = parser.parse_args(arguments)
    if options.answers:
        return _compare_answers(options)
    base, *several = (folders.split(',') for folders in (options.base, *options.tuned))
    if len(several) > 1:
        if options.against or options.between:
            raise InputError('--against and --between: expected one TUNED')
        print(matrix(base, several, options.evaluation))
        return 0
    found = compare(base, several[0], options.evaluation, options.against, options.between)
    for name, change in found.items():
        print(json.dumps({'evaluation': name, **_rounded(change)}))
    return 0


def _compare_answers(options: argparse.Namespace) -> int:
    # Imported late: the differences above need no JAX.
    from train.checkpoint import load
    from train.launch.host import prepare
    from train.measure.behaviour import behaviour, page

    if len(options.tuned) > 1:
        raise InputError('--answers: expected one TUNED')
    prepare()
    base, tuned = load(options.base), load(options.tuned[0])
    known = tuned.config['evaluations']
    if options.answers not in known:
        raise InputError(f'--answers: no evaluation {options.answers!r}{did_you_mean(options.answers, known)}')
    if options.samples < 1:
        raise InputError(f'--samples is {options.samples}: expected 1 or more')
    found = behaviour(base, tuned, known[options.answers], options.samples)
    if options.html:
        Path(options.html).write_text(page(found, tuned.tokenizer, f'{options.base} and {options.tuned[0]}'))
    for name in ('shift', 'routing', 'diversity', 'traces', 'coverage', 'drift'):
        print(json.dumps({name: _rounded(found[name])}))
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(x) for x in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == '__main__':
    sys.exit(main())
