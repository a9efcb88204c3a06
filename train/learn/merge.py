"""Averages of checkpoints: of runs with other data or seeds, or of the last steps of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from data.errors import InputError
from model.transformer import Variables


def merge_weights(c: Mapping[str, Any]) -> list[float]:
    """The share of each of a stage's `parents`, in all 1.

    Alike by default (Wortsman et al. 2022, "Model soups", section 2); in proportion to `weights`; or, oldest first,
    each `decay` times that of the one after it (an exponential average over steps; Polyak & Juditsky 1992 for the
    uniform one).

    Raises:
        InputError: fewer than two parents, other weights than one for each, or weights and decay.
    """
    count, weights, decay = len(c['parents']), c['weights'], c['decay']
    if count < 2:
        raise InputError(f'parents is {c["parents"]!r}: expected the addresses of two checkpoints or more')
    if not 0 < decay <= 1 or (weights and decay != 1):
        raise InputError(f'decay is {decay}: expected a number above 0 and up to 1, and 1 beside weights')
    weights = weights or [decay ** (count - 1 - i) for i in range(count)]
    if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
        raise InputError(f'weights is {weights!r}: expected {count} numbers of at least 0, one for each parent')
    return [weight / sum(weights) for weight in weights]


def average(weights: Sequence[float], read: Callable[[int], Variables]) -> Variables:
    """The sum of `read(i)` times weights[i], added up in float32; two of them are in memory at a time."""

    @jax.jit
    def added(total: Variables, more: Variables, weight: jax.Array) -> Variables:
        return jax.tree.map(lambda x, y: x + weight * y.astype(jnp.float32), total, more)

    first = read(0)
    dtypes = jax.tree.map(lambda x: x.dtype, first)
    total = jax.tree.map(lambda x: x.astype(jnp.float32) * weights[0], first)
    del first
    for i, weight in enumerate(weights[1:], start=1):
        total = added(total, read(i), jnp.float32(weight))
    return jax.tree.map(lambda x, dtype: x.astype(dtype), total, dtypes)
