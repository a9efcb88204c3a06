"""What a handful of items says about all of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def interval(values: np.ndarray, weights: np.ndarray | None = None, resamples: int = 1000) -> tuple[float, float]:
    """A 95% percentile bootstrap interval of the (weighted) mean over items, with a fixed seed."""
    generator = np.random.default_rng(0)
    weights = np.ones_like(values) if weights is None else weights
    picks = generator.integers(0, len(values), (resamples, len(values)))
    means = (values * weights)[picks].sum(1) / weights[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def scored(details: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The scores of an evaluation's items and the weights with which they make its value; both empty without scores."""
    scores = np.array(details.get('scores') or (), float)
    return scores, np.array(details.get('weights') or np.ones(len(scores)), float)


def pass_at_k(samples: int, right: np.ndarray, k: int) -> np.ndarray:
    """Unbiased pass@k of each item, 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1)."""
    missed = [math.comb(samples - int(c), k) / math.comb(samples, k) for c in right]
    return 1.0 - np.array(missed)


def counts_to(samples: int) -> list[int]:
    """The k of pass@k that are told: powers of two up to the samples, and as many as those."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def majority(said: Sequence[str], right: np.ndarray) -> tuple[float, float]:
    """How far the commonest of some answers is right (Wang et al. 2023, "Self-Consistency", section 2), and which share
    of them it is; of several that are as common the mean. '' is no answer, and 0, 0 where there is none."""
    counts = Counter(answer for answer in said if answer)
    most = max(counts.values(), default=0)
    rights = [right[[x == answer for x in said]].mean() for answer, count in counts.items() if count == most]
    return (float(np.mean(rights)), most / len(said)) if rights else (0.0, 0.0)
