"""Laws of loss and accuracy, fitted to finished runs, with bootstrap intervals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.special import expit, logsumexp

from data.errors import InputError

RESAMPLES = 200
ALIKE = 1.1  # runs whose compute is within this factor are of one budget
DELTA = 1e-3  # of the Huber loss, in nats of log-loss
LEAST = 6  # points: one more than the law has parameters
# Where the search begins: log E, log A, log B, alpha, beta. Few of its steps are taken from each, many from the best.
STARTS = list(itertools.product((-0.5, 0.5), (2.0, 8.0), (2.0, 8.0), (0.3, 0.8), (0.3, 0.8)))
FEW, MANY = 100, 3000


class Point(NamedTuple):
    """A run: active parameters, tokens, loss in nats a token or bits per byte, all parameters, accuracy in a task."""

    parameters: float
    tokens: float
    loss: float
    total: float = 0.0
    accuracy: float | None = None

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


class Sparse(NamedTuple):
    """log L(N, B) = a log N + b log B + c log N log B + d, of N active parameters and N B in all, after one number of
    tokens: what experts add at equal compute, and that they add less to large models where c > 0 (Clark et al. 2022,
    section 4, of the ratio of parameters instead of the number of experts, and without its saturation)."""

    a: float
    b: float
    c: float
    d: float

    def __call__(self, parameters: float, total: float) -> float:
        """The loss with so many parameters active of so many."""
        size, ratio = np.log(parameters), np.log(total / parameters)
        return float(np.exp(self.a * size + self.b * ratio + self.c * size * ratio + self.d))

    def dense(self, parameters: float, total: float) -> float:
        """The parameters of the dense model with the same loss (the same, "effective parameter count")."""
        return float(np.exp((np.log(self(parameters, total)) - self.d) / self.a))


def fit_sparse(points: Sequence[Point], near: Sparse | None = None) -> Sparse:
    """The law by least squares of log L; it needs no start.

    Raises:
        InputError: fewer than LEAST points, all of one size or one share of active parameters, or several lengths.
    """
    shares = {round(p.parameters / p.total, 3) for p in points}
    if len({p.tokens for p in points}) > 1:
        raise InputError(f'{len(points)} runs of several lengths: expected the same tokens in all')
    if len(shares) < 2 or len({p.parameters for p in points}) < 2 or len(points) < LEAST:
        raise InputError(
            f'{len(points)} runs, shares of active parameters {sorted(shares)}: expected {LEAST} or more runs of '
            'several sizes and shares'
        )
    size, ratio = (np.log([p.parameters for p in points]), np.log([p.total / p.parameters for p in points]))
    table = np.stack([size, ratio, size * ratio, np.ones_like(size)], 1)
    return Sparse(*map(float, np.linalg.lstsq(table, np.log([p.loss for p in points]), rcond=None)[0]))


class Form(NamedTuple):
    """A law of loss: its formula, which of a point's fields it takes beside the parameters, how it is fitted."""

    formula: str
    second: str
    fit: Callable[..., Any]

    def at(self, point: Point) -> tuple[float, float]:
        return point.parameters, getattr(point, self.second)


FORMS = {
    'law': Form('L(N, D) = E + A / N^alpha + B / D^beta', 'tokens', fit),
    'sparsity': Form('log L(N, B) = a log N + b log B + c log N log B + d, B = total / N', 'total', fit_sparse),
}


def redrawn(points: Sequence[Point], said: np.ndarray, free: int, resamples: int) -> Iterator[list[Point]]:
    """Bootstrap samples of the residuals: sizes and lengths were chosen, noise was drawn.

    Residuals of log L are drawn with replacement and added to what was said of the losses, so that every resample has
    all sizes (Davison and Hinkley 1997, section 6.2.3); they are widened for the `free` parameters that were fitted.
    """
    rng = np.random.default_rng(0)
    gaps = np.log([p.loss for p in points]) - np.log(said)
    gaps = (gaps - gaps.mean()) * (len(points) / max(len(points) - free, 1)) ** 0.5
    for _ in range(resamples):
        losses = said * np.exp(rng.choice(gaps, len(points)))
        yield [p._replace(loss=float(loss)) for p, loss in zip(points, losses, strict=True)]


def resampled(points: Sequence[Point], law: Any, resamples: int, form: Form = FORMS['law']) -> list[Any]:
    """Laws fitted to bootstrap samples."""
    said = np.array([law(*form.at(p)) for p in points])
    return [form.fit(again, law) for again in redrawn(points, said, len(law), resamples)]


def between(laws: Sequence[Callable[..., float]], *at: float) -> tuple[float, float]:
    """A 95% interval of what laws say."""
    low, high = np.percentile([law(*at) for law in laws], [2.5, 97.5])
    return float(low), float(high)


class Frontier(NamedTuple):
    """N_opt = k C^a through the minima of loss at equal compute (Hoffmann et al. 2022, section 3.2).

    Attributes:
        minima: by budget, the compute, parameters and loss where a parabola is least; budgets without are missing.
    """

    k: float
    a: float
    minima: dict[int, tuple[float, float, float]]

    def __call__(self, compute: float) -> float:
        """The parameters to choose for a compute."""
        return float(self.k * compute**self.a)


def budgets(points: Sequence[Point]) -> list[list[Point]]:
    """Runs of about the same compute, which have a parabola: those of three sizes or more."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda p: p.compute):
        if groups and point.compute <= groups[-1][0].compute * ALIKE:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [group for group in groups if len({p.parameters for p in group}) > 2]


def frontier(points: Sequence[Point]) -> tuple[Frontier, list[Frontier]]:
    """Minima of a parabola in log N for each budget, and a power of compute through them; also of RESAMPLES resamples.

    Raises:
        InputError: fewer than two budgets whose minimum lies between the sizes that were tried.
    """
    groups = budgets(points)

    def parabolas(groups: Sequence[Sequence[Point]]) -> list[np.ndarray]:
        return [np.polyfit(np.log([p.parameters for p in g]), [p.loss for p in g], 2) for g in groups]

    def through(groups: Sequence[Sequence[Point]]) -> Frontier | None:
        minima = {}
        for number, (group, (bend, slope, _)) in enumerate(zip(groups, fitted := parabolas(groups), strict=True)):
            sizes, least = np.log([p.parameters for p in group]), -slope / (2 * bend)
            if bend > 0 and sizes.min() <= least <= sizes.max():
                compute = float(np.exp(np.mean(np.log([p.compute for p in group]))))
                minima[number] = (compute, float(np.exp(least)), float(np.polyval(fitted[number], least)))
        if len(minima) < 2:
            return None
        computes, sizes, _ = np.log(list(minima.values())).T
        a, k = np.polyfit(computes, sizes, 1)
        return Frontier(float(np.exp(k)), float(a), minima)

    best = through(groups)
    if best is None:
        raise InputError(
            f'{len(groups)} budgets of three sizes or more: expected two with the least loss between their sizes'
        )
    runs, ends = [p for g in groups for p in g], np.cumsum([len(g) for g in groups])[:-1]
    said = np.concatenate(
        [np.polyval(c, np.log([p.parameters for p in g])) for c, g in zip(parabolas(groups), groups, strict=True)]
    )
    several = [
        through([again[start:end] for start, end in itertools.pairwise([0, *ends, len(runs)])])
        for again in redrawn(runs, said, 3 * len(groups), RESAMPLES)
    ]
    return best, [f for f in several if f is not None] or [best]


class Sigmoid(NamedTuple):
    """Accuracy in a task as a function of the loss: floor + (ceiling - floor) / (1 + exp(slope (loss - middle))).

    The second of two steps from a run's size and length to what it can do (Grattafiori et al. 2024, section 3.2.1;
    Bhagia et al. 2024, equation 2).
    """

    floor: float
    ceiling: float
    slope: float
    middle: float

    def __call__(self, loss: float) -> float:
        """The accuracy of a model with that loss."""
        return float(self.floor + (self.ceiling - self.floor) * expit(-self.slope * (loss - self.middle)))


def fit_sigmoid(points: Sequence[Point], near: Sigmoid | None = None) -> Sigmoid:
    """The sigmoid by least squares, from several starts, or from what is `near`.

    Raises:
        InputError: fewer than LEAST points, or all of one loss.
    """
    losses, found = np.array([p.loss for p in points]), np.array([p.accuracy for p in points], np.float64)
    width = np.ptp(losses)
    if len(points) < LEAST or not width:
        raise InputError(f'{len(points)} runs with an accuracy: expected {LEAST} or more, of several losses')
    low, high = max(found.min(), 0.0), min(found.max(), 1.0)
    starts = [(low, high, s / width, m) for s in (3, 10) for m in np.quantile(losses, (0.1, 0.5, 0.9))]
    bounds = [(0, 0, 0, losses.min() - 2 * width), (1, 1, 1e3 / width, losses.max() + 2 * width)]

    def search(start: Sequence[float]) -> Any:
        return least_squares(
            lambda x: x[0] + (x[1] - x[0]) * expit(-x[2] * (losses - x[3])) - found, start, bounds=bounds, x_scale='jac'
        )

    return Sigmoid(*map(float, min(map(search, [near] if near else starts), key=lambda s: s.cost).x))


def resampled_sigmoids(points: Sequence[Point], sigmoid: Sigmoid, resamples: int) -> list[Sigmoid]:
    """Sigmoids fitted to bootstrap samples of the residuals of accuracy, as `redrawn` draws those of loss."""
    rng, said = np.random.default_rng(1), np.array([sigmoid(p.loss) for p in points])
    gaps = np.array([p.accuracy for p in points], np.float64) - said
    gaps = (gaps - gaps.mean()) * (len(points) / max(len(points) - len(sigmoid), 1)) ** 0.5
    drawn = (said + rng.choice(gaps, len(points)) for _ in range(resamples))
    return [
        fit_sigmoid([p._replace(accuracy=float(x)) for p, x in zip(points, again, strict=True)], sigmoid)
        for again in drawn
    ]
