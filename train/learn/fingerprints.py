"""Fingerprints of arrays: a flipped bit changes them, and how the array is spread over devices does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.launch.host import fetch


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A float32 array of a tree to save that is made by `read` whenever it is needed, and not kept."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype = np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def sums(x: jax.Array) -> jax.Array:
    """Two wrapping uint32 sums over an array's bits, the second weighted by position: no sharding changes them."""
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    bits = bits.astype(jnp.uint32).reshape(-1)
    place = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
    return jnp.stack([bits.sum(dtype=jnp.uint32), (bits * place).sum(dtype=jnp.uint32)])


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> list[jax.Array]:
    return [sums(x) for x in leaves]


def _host_fingerprint(x: np.ndarray) -> tuple[int, int]:
    """The same two sums of an array on the host, piece by piece: they need next to no memory beside it."""
    bits = np.ascontiguousarray(x).reshape(-1).view(f'u{x.dtype.itemsize}')
    plain, placed = np.uint32(0), np.uint32(0)
    with np.errstate(over='ignore'):
        for start in range(0, bits.size, 2**24):
            piece = bits[start : start + 2**24].astype(np.uint32)
            place = np.arange(start, start + piece.size, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(1)
            plain += piece.sum(dtype=np.uint32)
            placed += (piece * place.astype(np.uint32)).sum(dtype=np.uint32)
    return int(plain), int(placed)


def fingerprints(tree: Any) -> dict[str, str]:
    """For each leaf's path: dtype, shape and fingerprint in one string."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if leaves and isinstance(leaves[0][1], (Lazy, np.ndarray)):
        sums = [_host_fingerprint(x.read() if isinstance(x, Lazy) else x) for _, x in leaves]
    else:
        sums = fetch(_fingerprints([jnp.asarray(x) for _, x in leaves]))
    named = zip(leaves, sums, strict=True)
    return {jax.tree_util.keystr(p): f'{x.dtype} {list(x.shape)} {s[0]:08x}{s[1]:08x}' for (p, x), s in named}
