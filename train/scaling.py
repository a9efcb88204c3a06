"""How the loss falls with parameters and tokens: a scaling law fitted to finished runs, and what it predicts.

python -m train.scaling DIR [DIR ...] --stage=pretrain [--evaluation=NAME] [--hold=4] [--predict=PARAMETERS,TOKENS]
python -m train.scaling DIR [DIR ...] --accuracy=NAME      from size and length to the loss, from there to an accuracy
python -m train.scaling DIR [DIR ...] --fit=isoflop        the best size of each budget, and of others (--predict=FLOPS)
python -m train.scaling DIR [DIR ...] --fit=sparsity       what experts add at equal active parameters
                                                           (--predict=PARAMETERS,TOTAL)

Each DIR holds runs, as `train.sweep` leaves them, or is one. Of each finished stage of that name the parameters
active for a token, the tokens it saw and its loss are a point: the mean over its last tenth or, of all runs on the same
text, an evaluation in bits per byte. Runs of more than 1 / --hold of
the largest compute are predicted from the others, and not fitted. Intervals are of 95%, by bootstrap.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError, did_you_mean
from train.checkpoint import read_json
from train.launch.command import command
from train.launch.log import at_the_end
from train.measure import laws as fits
from train.measure.laws import FORMS, Law, Point, Sparse, between, fit_sigmoid, frontier, resampled, resampled_sigmoids


def points_of(folders: Sequence[Path], stage: str, evaluation: str = '', accuracy: str = '') -> list[Point]:
    """The runs in some folders that have finished a stage; each counts once, however many runs share it.

    Raises:
        InputError: a folder without such a run; one without the evaluation, or where more of it is better; one without
            the accuracy, or where less of it is better.
    """
    found: dict[Path, Point] = {}
    for folder in folders:
        finished = [*folder.glob(f'{stage}/finished.json'), *folder.glob(f'*/{stage}/finished.json')]
        if not finished:
            raise InputError(f'{folder}: no run in it has finished a stage {stage!r}')
        for path in finished:
            told = read_json(path)
            loss = _value(told, path, evaluation, 'lower') if evaluation else at_the_end(path.parent)
            if loss is None:
                raise InputError(f'{path.parent}: no loss in its metrics: expected a stage that trains')
            right = _value(told, path, accuracy, 'higher') if accuracy else None
            active, total = (float(told['parameters'][name]) for name in ('active', 'total'))
            found[path.resolve()] = Point(active, float(told['tokens']), loss, total, right)
    return sorted(found.values(), key=lambda point: point.compute)


def _value(told: dict[str, Any], path: Path, name: str, direction: str) -> float:
    said = told['evaluations'].get(name)
    if said is None or said['direction'] != direction:
        near, kind = did_you_mean(name, told['evaluations']), 'a loss' if direction == 'lower' else 'an accuracy'
        raise InputError(f'{path.parent}: no evaluation {name!r} that is {kind}{near}')
    return float(said['value'])


def _apart(points: Sequence[Point], hold: float) -> tuple[list[Point], list[Point]]:
    """Runs to fit, and those that are held out."""
    largest = points[-1].compute
    fitted = [p for p in points if not hold or p.compute * hold <= largest]
    return fitted, [p for p in points if p not in fitted]


def _interval(values: Sequence[float]) -> str:
    low, high = np.percentile(values, [2.5, 97.5])
    return f'[{low:.4g}, {high:.4g}]'


def _parameters(law: Any, laws: Sequence[Any]) -> list[str]:
    """A law's parameters, unrounded."""
    values = ((name, getattr(law, name), [getattr(x, name) for x in laws]) for name in law._fields if name != 'minima')
    return [f'  {name:<8}{value!r:<24} {_interval(several)}' for name, value, several in values]


def report(points: Sequence[Point], hold: float, predict: Sequence[float], fit: str = 'law') -> str:
    """A law of the loss, how far off it is, and what it predicts, for people to read."""
    form, (fitted, held) = FORMS[fit], _apart(points, hold)
    law = form.fit(fitted)
    laws = resampled(fitted, law, fits.RESAMPLES, form)
    lines = [f'{form.formula}, fitted to {len(fitted)} runs', *_parameters(law, laws)]
    if isinstance(law, Law):
        low, high = np.percentile([x.exponent for x in laws], [2.5, 97.5])
        said = f'{law.exponent:.3f} [{low:.3f}, {high:.3f}]'
        lines.append(f'  parameters to choose grow with compute to the power of {said}')
    gaps = [law(*form.at(p)) / p.loss - 1 for p in fitted]
    lines.append(f'  the runs fitted are off by {np.std(gaps):.2%} (standard deviation)')
    for p in held:
        low, high = between(laws, *form.at(p))
        said, further = law(*form.at(p)), p.compute / fitted[-1].compute
        inside = 'within' if low <= p.loss <= high else 'outside'
        off = f'{p.loss / said - 1:+.2%}, {inside}'
        lines.append(
            f'held out: {p.parameters:,.0f} parameters, {form.at(p)[1]:,.0f} {form.second}, {further:.1f} times the '
            f'largest compute fitted: predicted {said:.4f} [{low:.4f}, {high:.4f}], was {p.loss:.4f} ({off})'
        )
    if predict:
        low, high = between(laws, *predict)
        text = f'{predict[0]:,.0f} parameters, {predict[1]:,.0f} {form.second}'
        lines.append(f'{text}: {law(*predict):.4f} [{low:.4f}, {high:.4f}]')
    if isinstance(law, Sparse):
        for parameters, total in dict.fromkeys(map(form.at, points)):
            same = _interval([x.dense(parameters, total) for x in laws])
            dense = f'{law.dense(parameters, total):,.0f} {same}'
            lines.append(f'  {parameters:,.0f} active of {total:,.0f} are worth {dense} in a dense model')
    return '\n'.join(lines)


def report_accuracy(points: Sequence[Point], hold: float, predict: Sequence[float]) -> str:
    """The two steps from size and length to a task's accuracy, each with its error."""
    fitted, held = _apart(points, hold)
    law, sigmoid = FORMS['law'].fit(fitted), fit_sigmoid(fitted)
    laws, sigmoids = resampled(fitted, law, fits.RESAMPLES), resampled_sigmoids(fitted, sigmoid, fits.RESAMPLES)
    lines = ['accuracy = floor + (ceiling - floor) / (1 + exp(slope (loss - middle)))', *_parameters(sigmoid, sigmoids)]
    gaps = [sigmoid(p.loss) - float(p.accuracy or 0) for p in fitted]
    lines.append(f'  the runs fitted are off by {np.std(gaps):.2%} (standard deviation, of 100%)')

    def said(parameters: float, tokens: float) -> tuple[float, str]:
        several = [second(first(parameters, tokens)) for first, second in zip(laws, sigmoids, strict=True)]
        low, high = np.percentile(several, [2.5, 97.5])
        value = sigmoid(law(parameters, tokens))
        return value, f'{value:.2%} [{low:.2%}, {high:.2%}]'

    for p in held:
        (value, text), was = said(p.parameters, p.tokens), float(p.accuracy or 0)
        lines.append(
            f'held out: {p.parameters:,.0f} parameters, {p.tokens:,.0f} tokens: predicted {text}, was {was:.2%} '
            f'({was - value:+.2%}; {was - sigmoid(p.loss):+.2%} from the loss it had)'
        )
    if predict:
        lines.append(f'{predict[0]:,.0f} parameters, {predict[1]:,.0f} tokens: {said(*predict)[1]}')
    return '\n'.join(lines)


def report_isoflop(points: Sequence[Point], hold: float, predict: Sequence[float]) -> str:
    """The best size of each budget, and how it grows; budgets held out are predicted from the others."""
    fitted, held = _apart(points, hold)
    best, several = frontier(fitted)
    groups = fits.budgets(fitted)
    lines = [f'N_opt = k C^a, through the minima of {len(best.minima)} of {len(groups)} budgets']
    lines += _parameters(best, several)
    for number, (compute, parameters, loss) in best.minima.items():
        sizes, losses = zip(*(f.minima[number][1:] for f in (best, *several) if number in f.minima), strict=True)
        lines.append(
            f'  {compute:.3g} FLOPs: {parameters:,.0f} parameters {_interval(sizes)}, '
            f'{compute / 6 / parameters:,.0f} tokens, loss {loss:.4f} {_interval(losses)}'
        )
    there = frontier(points)[0].minima.values() if held else ()
    for compute, parameters, _ in (m for m in there if m[0] > fitted[-1].compute):
        said = f'{best(compute):,.0f} {_interval([f(compute) for f in several])}'
        off = f'{parameters / best(compute) - 1:+.1%}'
        lines.append(f'held out: {compute:.3g} FLOPs: predicted {said} parameters, was {parameters:,.0f} ({off})')
    for compute in predict:
        lines.append(f'{compute:.3g} FLOPs: {best(compute):,.0f} {_interval([f(compute) for f in several])} parameters')
    return '\n'.join(lines)


@command('train.scaling')
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m train.scaling', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folders', nargs='+', metavar='DIR', help='a run, or a folder of runs')
    parser.add_argument('--stage', default='pretrain')
    parser.add_argument('--evaluation', default='', help='a loss on held-out text instead of that in training')
    parser.add_argument('--hold', type=float, default=0.0, help='runs within this factor of the largest are held out')
    parser.add_argument('--accuracy', default='', help='an evaluation to be predicted from the loss')
    parser.add_argument('--fit', choices=('law', 'isoflop', 'sparsity'), default='law')
    parser.add_argument('--predict', default='', metavar='NUMBERS', help='what to predict; see above')
    parser.add_argument('--json', action='store_true', help='the points alone, a line of JSON each')
    options = parser.parse_args(arguments)
    if options.hold and options.hold <= 1:
        raise InputError(f'--hold is {options.hold}: expected more than 1, or 0 to fit all runs')
    points = points_of(
        [Path(folder) for folder in options.folders], options.stage, options.evaluation, options.accuracy
    )
    if options.json:
        print('\n'.join(json.dumps(p._asdict()) for p in points))
        return 0
    wanted = {'law': 'PARAMETERS,TOKENS', 'sparsity': 'PARAMETERS,TOTAL', 'isoflop': 'FLOPS'}[options.fit]
    try:
        predict = [float(number) for number in options.predict.split(',') if options.predict]
    except ValueError:
        predict = [0.0]
    if options.predict and (len(predict) != len(wanted.split(',')) or min(predict) <= 0):
        raise InputError(f'--predict is {options.predict!r}: expected {wanted}')
    if options.accuracy and options.fit != 'law':
        raise InputError(f'--accuracy with --fit={options.fit}: expected --fit=law, whose loss it is predicted from')
    if options.fit == 'isoflop':
        print(report_isoflop(points, options.hold, predict))
        return 0
    print(report(points, options.hold, predict, options.fit))
    if options.accuracy:
        print(report_accuracy(points, options.hold, predict))
    return 0


if __name__ == '__main__':
    sys.exit(main())
