"""The cache of a decoding model: what each layer's attention needs of the tokens already seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Cache = dict[str, jax.Array]


def repeated(cache: Cache, times: int) -> Cache:
    """Each row of the cache `times` times in a row: one prefill serves a group of samples."""
    return {name: jnp.repeat(x, times, axis=1) for name, x in cache.items()}


def written(cache: Cache, entries: Cache, slot: jax.Array) -> Cache:
    """The cache with one new token's entries [layers, B, 1, ...] in the given slot."""
    return {name: lax.dynamic_update_slice_in_dim(x, entries[name], slot, axis=2) for name, x in cache.items()}
