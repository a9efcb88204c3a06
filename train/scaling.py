"""How the loss falls with parameters and tokens: a scaling law fitted to finished runs, and what it predicts.

python -m train.scaling DIR [DIR ...] --stage=pretrain [--evaluation=NAME] [--hold=4] [--predict=PARAMETERS,TOKENS]

Each DIR holds runs, as `train.sweep` leaves them, or is one. Of each finished stage of that name the parameters
active for a token, the tokens it saw and its loss are a point: the mean over its last tenth or, of all runs on the same
text, an evaluation in bits per byte. Runs of more than 1 / --hold of
the largest compute are predicted from the others, and not fitted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from data.errors import InputError, did_you_mean
from train.checkpoint import read_json
from train.launch.command import command
from train.launch.log import at_the_end

RESAMPLES = 200
DELTA = 1e-3  # of the Huber loss, in nats of log-loss
LEAST = 6  # points: one more than the law has parameters
# Where the search begins: log E, log A, log B, alpha, beta. Few of its steps are taken from each, many from the best.
STARTS = list(itertools.product((-0.5, 0.5), (2.0, 8.0), (2.0, 8.0), (0.3, 0.8), (0.3, 0.8)))
FEW, MANY = 100, 3000


class Point(NamedTuple):
    """A run: active parameters, tokens, loss in nats a token or bits per byte."""

    parameters: float
    tokens: float
    loss: float

    @property
    def compute(self) -> float:
        """Its training FLOPs, 6 N D (Kaplan et al. 2020, section 2.1)."""
        return 6 * self.parameters * self.tokens


class Law(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, parameters: float, tokens: float) -> float:
        """The loss of so many parameters after so many tokens."""
        return float(self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta)

    @property
    def exponent(self) -> float:
        """a of N_opt ~ C^a, the parameters to choose for a compute of C (the same, equation 4)."""
        return self.beta / (self.alpha + self.beta)


def fit(points: Sequence[Point], near: Law | None = None) -> Law:
    """The law by least Huber loss of log L, from many starts (Hoffmann et al. 2022, equation 3 and appendix D.2).

    near: where to begin instead, for fits to resampled points.

    Raises:
        InputError: fewer than LEAST points, or all of one size or one length.
    """
    _check(points)
    sizes, tokens, losses = (np.log([getattr(p, name) for p in points]) for name in ('parameters', 'tokens', 'loss'))

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        e, a, b, alpha, beta = x
        terms = np.stack([np.full_like(sizes, e), a - alpha * sizes, b - beta * tokens])
        predicted = logsumexp(terms, axis=0)
        gap = predicted - losses
        small = np.abs(gap) <= DELTA
        value = np.where(small, gap**2 / 2, DELTA * (np.abs(gap) - DELTA / 2)).sum()
        slope = np.clip(gap, -DELTA, DELTA) * np.exp(terms - predicted)  # of each term
        inner = np.stack([slope[0], slope[1], slope[2], -slope[1] * sizes, -slope[2] * tokens])
        # Scaled, or the search would stop where the Huber loss is flat by its own smallness.
        return value / DELTA**2, inner.sum(1) / DELTA**2

    bounds = [(-10.0, 5.0), (-10.0, 40.0), (-10.0, 40.0), (0.01, 3.0), (0.01, 3.0)]

    def search(start: Sequence[float], steps: int) -> Any:
        options = {'maxiter': steps, 'ftol': 1e-12}
        return minimize(objective, start, jac=True, method='L-BFGS-B', bounds=bounds, options=options)

    if near is None:
        best = min((search(start, FEW) for start in STARTS), key=lambda found: found.fun)
        e, a, b, alpha, beta = search(best.x, MANY).x
    else:
        e, a, b, alpha, beta = search((*np.log(near[:3]), near.alpha, near.beta), 3 * FEW).x
    return Law(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), float(alpha), float(beta))


def _check(points: Sequence[Point]) -> None:
    for name in ('parameters', 'tokens'):
        if len({getattr(p, name) for p in points}) < 2:
            raise InputError(f'all {len(points)} runs have the same {name}: expected several, to see what they do')
    if len(points) < LEAST:
        raise InputError(f'{len(points)} runs to fit: expected {LEAST} or more')


def resampled(points: Sequence[Point], law: Law, resamples: int) -> list[Law]:
    """Laws fitted to bootstrap samples of the residuals: sizes and lengths were chosen, noise was drawn.

    Residuals of log L are drawn with replacement and added to what the law says, so that every resample has all sizes
    (Davison and Hinkley 1997, section 6.2.3); they are widened for the five parameters that were fitted.
    """
    rng = np.random.default_rng(0)
    said = np.array([law(p.parameters, p.tokens) for p in points])
    gaps = np.log([p.loss for p in points]) - np.log(said)
    gaps = (gaps - gaps.mean()) * (len(points) / max(len(points) - len(law), 1)) ** 0.5
    laws = []
    for _ in range(resamples):
        losses = said * np.exp(rng.choice(gaps, len(points)))
        again = [p._replace(loss=float(loss)) for p, loss in zip(points, losses, strict=True)]
        laws.append(fit(again, law))
    return laws


def between(laws: Sequence[Law], parameters: float, tokens: float) -> tuple[float, float]:
    """A 95% interval of the predicted loss."""
    low, high = np.percentile([law(parameters, tokens) for law in laws], [2.5, 97.5])
    return float(low), float(high)


def points_of(folders: Sequence[Path], stage: str, evaluation: str = '') -> list[Point]:
    """The runs in some folders that have finished a stage; each counts once, however many runs share it.

    Raises:
        InputError: a folder without such a run; one without the evaluation, or where more of it is better.
    """
    found: dict[Path, Point] = {}
    for folder in folders:
        finished = [*folder.glob(f'{stage}/finished.json'), *folder.glob(f'*/{stage}/finished.json')]
        if not finished:
            raise InputError(f'{folder}: no run in it has finished a stage {stage!r}')
        for path in finished:
            told = read_json(path)
            loss = at_the_end(path.parent)
            if evaluation:
                said = told['evaluations'].get(evaluation)
                if said is None or said['direction'] != 'lower':
                    near = did_you_mean(evaluation, told['evaluations'])
                    raise InputError(f'{path.parent}: no evaluation {evaluation!r} that is a loss{near}')
                loss = float(said['value'])
            if loss is None:
                raise InputError(f'{path.parent}: no loss in its metrics: expected a stage that trains')
            found[path.resolve()] = Point(float(told['parameters']['active']), float(told['tokens']), loss)
    return sorted(found.values(), key=lambda point: point.compute)


def report(points: Sequence[Point], hold: float, predict: tuple[float, float] | None) -> str:
    """The law, how far off it is, and what it predicts, for people to read."""
    largest = points[-1].compute
    fitted = [p for p in points if not hold or p.compute * hold <= largest]
    held = [p for p in points if p not in fitted]
    law = fit(fitted)
    laws = resampled(fitted, law, RESAMPLES)
    lines = [f'L(N, D) = E + A / N^alpha + B / D^beta, fitted to {len(fitted)} runs']
    for name in Law._fields:
        low, high = np.percentile([getattr(x, name) for x in laws], [2.5, 97.5])
        lines.append(f'  {name:<6}{getattr(law, name)!r:<24} [{low:.4g}, {high:.4g}]')
    low, high = np.percentile([x.exponent for x in laws], [2.5, 97.5])
    lines.append(f'  parameters to choose grow with compute to the power of {law.exponent:.3f} [{low:.3f}, {high:.3f}]')
    gaps = [law(p.parameters, p.tokens) / p.loss - 1 for p in fitted]
    lines.append(f'  the runs fitted are off by {np.std(gaps):.2%} (standard deviation)')
    for p in held:
        low, high = between(laws, p.parameters, p.tokens)
        said, further = law(p.parameters, p.tokens), p.compute / fitted[-1].compute
        inside = 'within' if low <= p.loss <= high else 'outside'
        off = f'{p.loss / said - 1:+.2%}, {inside}'
        lines.append(
            f'held out: {p.parameters:,.0f} parameters, {p.tokens:,.0f} tokens, {further:.1f} times the largest '
            f'compute fitted: predicted {said:.4f} [{low:.4f}, {high:.4f}], was {p.loss:.4f} ({off})'
        )
    if predict is not None:
        low, high = between(laws, *predict)
        lines.append(
            f'{predict[0]:,.0f} parameters, {predict[1]:,.0f} tokens: {law(*predict):.4f} [{low:.4f}, {high:.4f}]'
        )
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
    parser.add_argument('--predict', default='', metavar='PARAMETERS,TOKENS')
    parser.add_argument('--json', action='store_true', help='the points alone, a line of JSON each')
    options = parser.parse_args(arguments)
    if options.hold and options.hold <= 1:
        raise InputError(f'--hold is {options.hold}: expected more than 1, or 0 to fit all runs')
    points = points_of([Path(folder) for folder in options.folders], options.stage, options.evaluation)
    if options.json:
        print('\n'.join(json.dumps(p._asdict()) for p in points))
        return 0
    predict = None
    if options.predict:
        try:
            parameters, tokens = map(float, options.predict.split(','))
        except ValueError:
            raise InputError(f'--predict is {options.predict!r}: expected PARAMETERS,TOKENS') from None
        predict = parameters, tokens
    print(report(points, options.hold, predict))
    return 0


if __name__ == '__main__':
    sys.exit(main())
