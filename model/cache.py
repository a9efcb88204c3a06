"""The cache of a decoding model: what each layer's attention needs of the tokens already seen.

It comes in parts, along `transformer.layer_parts`, each with its layers stacked in front: [layers, B, S, ...]. What the
model adds for new tokens, its entries, is one stack of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

Entries = dict[str, jax.Array]
Cache = tuple[Entries, ...]


def empty(entries: Entries, counts: list[int], rows: int, slots: int) -> Cache:
    """A cache of zeros for entries of that kind, in parts of so many layers."""
    return tuple(
        {name: jnp.zeros((count, rows, slots, *x.shape[3:]), x.dtype) for name, x in entries.items()}
        for count in counts
    )


def _pairs(cache: Cache, entries: Entries) -> Iterator[tuple[Entries, Entries]]:
    """Each part of the cache with the entries of its layers."""
    first = 0
    for part in cache:
        count = len(next(iter(part.values())))
        yield part, {name: x[first : first + count] for name, x in entries.items()}
        first += count


def repeated(entries: Entries, times: int) -> Entries:
    """Each row `times` times in a row: one prefill serves a group of samples."""
    return {name: jnp.repeat(x, times, axis=1) for name, x in entries.items()}


def begun(cache: Cache, entries: Entries, rows: jax.Array) -> Cache:
    """The cache with the entries of prompts [layers, N, S, ...] in the first slots of the given rows, int32 [N]."""
    return tuple(
        {name: x.at[:, rows, : own[name].shape[2]].set(own[name]) for name, x in part.items()}
        for part, own in _pairs(cache, entries)
    )


def written(cache: Cache, entries: Entries, slot: jax.Array) -> Cache:
    """The cache with one new token's entries [layers, B, 1, ...] in the given slot."""
    return tuple(
        {name: lax.dynamic_update_slice_in_dim(x, own[name], slot, axis=2) for name, x in part.items()}
        for part, own in _pairs(cache, entries)
    )
