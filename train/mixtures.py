"""Which mixture of data is best: a regression on the losses of many short runs (Liu et al. 2024, arXiv 2407.01492).

python -m train.mixtures DIR --stage=NAME --evaluations=NAME[,NAME...]

DIR holds the arms of a sweep whose mixtures differ (see `swarm`). What is explained is the mean logarithm of the
evaluations, which have to be losses: linear, quadratic or logarithmic in the weights, with a ridge penalty, whichever
errs least on arms left out one at a time. A quarter of the arms takes no part in that choice or in the fit and tells
how far it errs; the best mixture is then predicted by a fit to all, no further out than some arm was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from data.errors import InputError
from data.mixture import weights_at
from train.checkpoint import read_json
from train.launch.command import command

KINDS = ('linear', 'quadratic', 'logarithmic')
PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LEAST = 8  # arms
FLOOR = 0.01  # added to weights under the logarithm
DRAWS = 20_000  # mixtures that are looked at
RESAMPLES = 200


def swarm(
    weights: Mapping[str, float], count: int, concentration: float = 5.0, seed: int = 0
) -> list[dict[str, float]]:
    """Mixtures drawn from a Dirichlet distribution around one (RegMix, section 3.1); the first is that one itself.

    The larger `concentration`, the closer they are to it. A source with less than half a percent is left out.
    """
    names, mean = list(weights), np.array([*weights.values()], np.float64)
    drawn = np.random.default_rng(seed).dirichlet(concentration * mean / mean.sum(), count - 1)
    rounded = [mean / mean.sum(), *drawn.round(2)]
    return [{name: float(x) for name, x in zip(names, row, strict=True) if x > 0} for row in rounded]


class Fit(NamedTuple):
    """What a regression is made of: its kind, its penalty, the features' means and deviations, and coefficients."""

    kind: str
    penalty: float
    mean: np.ndarray
    deviation: np.ndarray
    coefficients: np.ndarray

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Mean log losses [n] of mixtures [n, sources]."""
        x = (_features(weights, self.kind) - self.mean) / self.deviation
        return self.coefficients[0] + x @ self.coefficients[1:]


def _features(weights: np.ndarray, kind: str) -> np.ndarray:
    """Of mixtures [n, sources]. The last source is what is left, and adds nothing to a polynomial."""
    free = weights[:, :-1]
    if kind == 'linear':
        return free
    if kind == 'logarithmic':
        return np.log(weights + FLOOR)
    pairs = itertools.combinations_with_replacement(range(free.shape[1]), 2)
    return np.concatenate([free, *(free[:, [i]] * free[:, [j]] for i, j in pairs)], axis=1)


def _ridge(weights: np.ndarray, y: np.ndarray, kind: str, penalty: float) -> tuple[Fit, np.ndarray]:
    """A fit, and by how much each arm would be missed by a fit to the others."""
    raw = _features(weights, kind)
    mean, deviation = raw.mean(0), raw.std(0) + 1e-9
    x = np.concatenate([np.ones((len(y), 1)), (raw - mean) / deviation], axis=1)
    square = x.T @ x + penalty * len(y) * np.diag([0.0] + [1.0] * raw.shape[1])
    solve = np.linalg.solve(square, x.T)
    coefficients = solve @ y
    leverage = np.einsum('np,pn->n', x, solve)
    return Fit(kind, penalty, mean, deviation, coefficients), (y - x @ coefficients) / np.maximum(1 - leverage, 1e-3)


def fit(weights: np.ndarray, y: np.ndarray) -> Fit:
    """The regression of mean log losses [n] on mixtures [n, sources] that errs least on arms left out."""
    every = (_ridge(weights, y, kind, penalty) for kind in KINDS for penalty in PENALTIES)
    return min(every, key=lambda found: float((found[1] ** 2).mean()))[0]


def best(found: Fit, weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """The mixture [sources] of least predicted loss: of the arms [n, sources], and of many between any two of them."""
    rng = np.random.default_rng(seed)
    one, other = rng.integers(len(weights), size=(2, DRAWS))
    part = rng.random((DRAWS, 1))
    some = np.concatenate([weights, part * weights[one] + (1 - part) * weights[other]])
    return np.asarray(some[found(some).argmin()])


def report(names: Sequence[str], weights: np.ndarray, y: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """What the regression says of arms: mixtures [n, sources] and mean log losses [n].

    Returns:
        'arms'; 'form' of the regression; 'error' on the arms held out, and 'error_of_mean', what their mean would err:
        root mean squares of a share of the loss; 'rank_correlation' there (Spearman); 'best': weights by source;
        'predicted': its loss over that of the best arm, with a bootstrap interval over arms; 'best_arm': its weights.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    held, kept = order[: len(y) // 4], order[len(y) // 4 :]
    said = fit(weights[kept], y[kept])(weights[held])
    error, plain = (np.sqrt(((x - y[held]) ** 2).mean()) for x in (said, np.full(len(held), y[kept].mean())))
    whole = fit(weights, y)
    chosen = best(whole, weights)
    resampled = []
    for _ in range(RESAMPLES):
        some = rng.integers(len(y), size=len(y))
        again, _ = _ridge(weights[some], y[some], whole.kind, max(whole.penalty, 1e-4))
        resampled.append(float(again(chosen[None])[0]))
    low, high = np.quantile(resampled, (0.025, 0.975))
    arm = int(y.argmin())
    ratios = [float(np.exp(x - y[arm])) for x in (float(whole(chosen[None])[0]), low, high)]
    return {
        'arms': len(y),
        'form': whole.kind,
        'error': float(error),
        'error_of_mean': float(plain),
        'rank_correlation': float(spearmanr(said, y[held]).statistic),
        'best': {name: round(float(x), 3) for name, x in zip(names, chosen, strict=True)},
        'predicted': ratios,
        'best_arm': {name: round(float(x), 3) for name, x in zip(names, weights[arm], strict=True)},
    }


def arms_of(folder: Path, stage: str, evaluations: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the sources, mixtures [n, sources] and mean log losses [n] of the finished arms in a folder.

    Raises:
        InputError: too few arms, a mixture that changes on the way, an evaluation that is no loss or is not there.
    """
    mixtures, losses = [], []
    for path in sorted(folder.glob(f'*/{stage}/finished.json')):
        mixture = read_json(path.with_name('config.json'))['stage']['mixture']
        if len(mixture) != 1:
            raise InputError(f'{path.parent}: the mixture changes on the way: expected one for the whole stage')
        results = read_json(path)['evaluations']
        for name in evaluations:
            if name not in results:
                raise InputError(f'{path.parent}: no evaluation {name!r}: expected one of {", ".join(results)}')
            if results[name]['direction'] != 'lower':
                raise InputError(f'{path.parent}: evaluation {name!r}: expected a loss, of which less is better')
        mixtures.append(weights_at(mixture, 0.0))
        losses.append(float(np.mean([np.log(results[name]['value']) for name in evaluations])))
    names = sorted({name for mixture in mixtures for name in mixture})
    if len(mixtures) < LEAST or len(names) < 2:
        raise InputError(
            f'{folder}: {len(mixtures)} finished arms of stage {stage!r} on {len(names)} sources: expected {LEAST} or '
            'more, on two or more'
        )
    return names, np.array([[mixture.get(name, 0.0) for name in names] for mixture in mixtures]), np.array(losses)


@command('train.mixtures')
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m train.mixtures', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', metavar='DIR', help='of a sweep')
    parser.add_argument('--stage', required=True, help='the stage whose mixtures differ')
    parser.add_argument('--evaluations', required=True, help='names of its evaluations, with commas between them')
    options = parser.parse_args(arguments)
    names, weights, y = arms_of(Path(options.folder), options.stage, options.evaluations.split(','))
    found = report(names, weights, y)
    if found['error'] >= found['error_of_mean']:
        print('train.mixtures: on arms held out this is no better than their mean', file=sys.stderr)
    print(json.dumps({name: _rounded(x) for name, x in found.items()}))
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == '__main__':
    sys.exit(main())
