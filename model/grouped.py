"""The grouped matmul: rows sorted by expert, each expert's rows padded to whole blocks, so that a block has one expert.

One layout serves every backend; what multiplies it is chosen where the program is compiled for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from model.backend import platform

TOGETHER = 4  # blocks that the loops on CPU take at a time, where an expert has so many
ADDED = 128  # rows whose products are summed by one matrix product, at most, before they join an expert's gradient


def plan_blocks(ids: jax.Array, experts: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Lays assignments out in blocks of one expert each; nothing is dropped at any skew.

    Args:
        ids: expert of each assignment, int32 [M]; the id `experts` means: computed by none.

    Returns:
        slot: int32 [M], the row of each assignment in the blocked layout (past its end for those computed by none).
        source: int32 [blocks * block], the assignment in each row, M where there is none.
        owner: int32 [blocks], the expert of each block; blocks: int32 [], how many are in use.
    """
    m = ids.shape[0]
    blocks = -(-m // block) + min(experts, m)  # every expert may leave one block partly filled
    counts = jnp.bincount(ids, length=experts + 1)[:experts]
    used = -(-counts // block)
    ends = jnp.cumsum(used)
    order = jnp.argsort(ids, stable=True)
    sorted_ids = ids[order]
    start = jnp.append((ends - used) * block, blocks * block)  # first row of each expert
    rank = jnp.arange(m) - jnp.append(jnp.cumsum(counts) - counts, counts.sum())[sorted_ids]
    row = start[sorted_ids] + rank
    slot = jnp.zeros(m, jnp.int32).at[order].set(row.astype(jnp.int32))
    source = jnp.full(blocks * block, m, jnp.int32).at[row].set(order.astype(jnp.int32), mode='drop')
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks), side='right'), experts - 1)
    return slot, source, owner.astype(jnp.int32), ends[-1].astype(jnp.int32)


@jax.custom_vjp
def grouped_matmul(rows: jax.Array, weights: jax.Array, owner: jax.Array, blocks: jax.Array) -> jax.Array:
    """Multiplies each block of rows by its expert's matrix.

    Args:
        rows: [len(owner) * block, D], sorted by expert; weights: [E, D, F]; owner, blocks: see `plan_blocks`.

    Returns:
        [len(owner) * block, F]; rows of unused blocks are zero.
    """
    return multiply(rows, weights, owner, blocks)


def _forward(rows: Any, weights: Any, owner: Any, blocks: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return grouped_matmul(rows, weights, owner, blocks), (rows, weights, owner, blocks)


def _backward(saved: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, ...]:
    rows, weights, owner, blocks = saved
    d_weights = accumulate(jnp.zeros(weights.shape, jnp.float32), rows, gradient, owner, blocks)
    d_rows = multiply(gradient, weights, owner, blocks, transposed=True)
    return d_rows, d_weights.astype(weights.dtype), no_gradient(owner), no_gradient(blocks)


grouped_matmul.defvjp(_forward, _backward)


def no_gradient(x: jax.Array) -> np.ndarray:
    """The cotangent of integers."""
    return np.zeros(x.shape, jax.dtypes.float0)


def multiply(
    rows: jax.Array, weights: jax.Array, owner: jax.Array, blocks: jax.Array, transposed: bool = False
) -> jax.Array:
    """`grouped_matmul` without a gradient, by the matrices or by their transposes.

    A loop over the blocks in use on CPU (`lax.ragged_dot` multiplies every row by every expert there), the Pallas
    kernel megablox on TPU, `lax.ragged_dot` elsewhere.
    """
    if platform() == 'cpu':
        return _multiply_blocks(rows, weights, owner, blocks, transposed)
    block, sizes = _sizes(rows, owner, blocks, weights.shape[0])
    if platform() == 'tpu':
        from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

        tiles = (block, _tile(rows.shape[1]), _tile(weights.shape[1 if transposed else 2]))
        out = gmm(rows, weights, sizes, rows.dtype, tiles, transpose_rhs=transposed)
        # The kernel leaves rows behind the last group as it finds them.
        return jnp.where(jnp.arange(out.shape[0])[:, None] < blocks * block, out, 0)
    return lax.ragged_dot(rows, weights.swapaxes(1, 2) if transposed else weights, sizes)


def accumulate(
    total: jax.Array, rows: jax.Array, gradient: jax.Array, owner: jax.Array, blocks: jax.Array
) -> jax.Array:
    """total + rows^T gradient, summed over the rows of each expert: float32 [E, D, F], the gradient of its matrix.

    On CPU and TPU in the place of `total`: a second array of this size is often the largest of a program.
    """
    if platform() == 'cpu':
        return _accumulate_blocks(total, rows, gradient, owner, blocks)
    block, sizes = _sizes(rows, owner, blocks, total.shape[0])
    if platform() == 'tpu':
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        in_use = jnp.arange(rows.shape[0])[:, None] < blocks * block
        rows, gradient = jnp.where(in_use, rows, 0), jnp.where(in_use, gradient, 0)
        # Narrower than those of the kernel above: float32 tiles of the old and the new total share the chip's memory.
        tiles = (block, _tile(rows.shape[1]), _tile(gradient.shape[1], 512))
        return tgmm(rows.T, gradient, sizes, jnp.float32, tiles, existing_out=total)
    dimensions = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return total + lax.ragged_dot_general(rows, gradient, sizes, dimensions, preferred_element_type=jnp.float32)


def _sizes(rows: jax.Array, owner: jax.Array, blocks: jax.Array, experts: int) -> tuple[int, jax.Array]:
    """Rows of a block, and int32 [E], the rows of each expert with those that fill its last block."""
    block = rows.shape[0] // owner.shape[0]
    in_use = (jnp.arange(owner.shape[0]) < blocks).astype(jnp.int32) * block
    return block, jax.ops.segment_sum(in_use, owner, num_segments=experts)


def _tile(size: int, most: int = 1024) -> int:
    """Columns of a tile of the TPU kernels: all of a narrow matrix; else what covers it with the least to spare."""
    if size <= most:
        return size
    return min(range(most, most // 2 - 1, -128), key=lambda tile: -size % tile)


def _expert_by_expert(
    owner: jax.Array,
    blocks: jax.Array,
    experts: int,
    body: Callable[[jax.Array, jax.Array, jax.Array, Any], Any],
    out: Any,
) -> Any:
    """`out` after body(expert, its first block, end of its blocks, out) for each expert that has blocks.

    So that an expert's weights are cut out of the stack once, and not for each of its blocks.
    """
    in_use = (jnp.arange(owner.shape[0]) < blocks).astype(jnp.int32)
    counts = jax.ops.segment_sum(in_use, owner, num_segments=experts)
    ends = jnp.cumsum(counts)
    busy = jnp.nonzero(counts, size=experts, fill_value=0)[0]

    def one(n: jax.Array, out: Any) -> Any:
        expert = busy[n]
        return body(expert, ends[expert] - counts[expert], ends[expert], out)

    return lax.fori_loop(0, jnp.sum(counts > 0), one, out)


def _in_pieces(
    first: jax.Array, end: jax.Array, block: int, together: int, body: Callable[[jax.Array, int, Any], Any], out: Any
) -> Any:
    """`out` after body(first row, how many, out) for pieces of several blocks, then for the single ones left over: few
    large products keep the cores busier than many small ones."""
    if together > 1:
        large = (end - first) // together
        out = lax.fori_loop(0, large, lambda i, out: body((first + i * together) * block, together * block, out), out)
        first += large * together
    return lax.fori_loop(first, end, lambda i, out: body(i * block, block, out), out)


def _multiply_blocks(rows: jax.Array, weights: jax.Array, owner: jax.Array, blocks: jax.Array, transposed: bool) -> Any:
    block = rows.shape[0] // owner.shape[0]
    width = weights.shape[1] if transposed else weights.shape[2]

    def multiply_own(expert: jax.Array, first: jax.Array, end: jax.Array, out: jax.Array) -> jax.Array:
        w = lax.dynamic_index_in_dim(weights, expert, keepdims=False)

        def multiply_some(start: jax.Array, count: int, out: jax.Array) -> jax.Array:
            x = lax.dynamic_slice_in_dim(rows, start, count)
            y = lax.dot_general(x, w, (((1,), (1 if transposed else 0,)), ((), ())))
            return lax.dynamic_update_slice_in_dim(out, y, start, 0)

        return _in_pieces(first, end, block, min(TOGETHER, len(owner)), multiply_some, out)

    out = jnp.zeros((rows.shape[0], width), rows.dtype)
    return _expert_by_expert(owner, blocks, weights.shape[0], multiply_own, out)


def _accumulate_blocks(
    total: jax.Array, rows: jax.Array, gradient: jax.Array, owner: jax.Array, blocks: jax.Array
) -> jax.Array:
    block = rows.shape[0] // owner.shape[0]

    def add_own(expert: jax.Array, first: jax.Array, end: jax.Array, total: jax.Array) -> jax.Array:
        def add_some(start: jax.Array, count: int, own: jax.Array) -> jax.Array:
            x = lax.dynamic_slice_in_dim(rows, start, count)
            g = lax.dynamic_slice_in_dim(gradient, start, count)
            return own + jnp.einsum('bd,bf->df', x, g, preferred_element_type=jnp.float32)

        own = lax.dynamic_index_in_dim(total, expert, keepdims=False)
        own = _in_pieces(first, end, block, min(ADDED // block, TOGETHER, len(owner)), add_some, own)
        return lax.dynamic_update_index_in_dim(total, own, expert, 0)

    return _expert_by_expert(owner, blocks, total.shape[0], add_own, total)
