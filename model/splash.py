"""Attention on TPU: JAX's Pallas kernel "splash attention", which skips the blocks that a mask leaves empty."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: tuple[jax.Array, jax.Array],
    along: tuple[str, ...],
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attend`, for queries that are scaled already and a length that is a multiple of 128.

    Args:
        interpret: runs the kernel as plain JAX, on any backend.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, keys, heads = query.shape[1], key.shape[1], query.shape[2]
    side = next(size for size in (1024, 512, 256, 128) if length % size == 0)
    tile = min(side, 512)
    blocks = kernels.BlockSizes(side, side, tile, side, side, tile, side, side)
    mask = masks.MultiHeadMask([masks.CausalMask((keys, keys)) for _ in range(heads)])
    kernel = kernels.make_splash_mha(
        mask, block_sizes=blocks, head_shards=1, q_seq_shards=keys // length, interpret=interpret
    )
    if along:
        infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
        number = lax.axis_index(along)
        kernel = kernels.SplashAttentionKernel(*(_share(x, number, keys // length) for x in infos), **kernel.kwargs)

    def one(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array) -> jax.Array:
        ids = kernels.SegmentIds(q_segments, k_segments)
        return kernel(q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1), segment_ids=ids).swapaxes(0, 1)

    return jax.vmap(one)(query, key, value, *segments)


def _share(info: Any, number: jax.Array, ways: int) -> Any:
    """What a mask's plan of blocks says of one device's queries."""

    def part(x: jax.Array | None, axis: int) -> jax.Array | None:
        return (
            None
            if x is None
            else lax.dynamic_slice_in_dim(x, number * (x.shape[axis] // ways), x.shape[axis] // ways, axis)
        )

    return info._replace(
        data_next=part(info.data_next, 1),
        mask_next=part(info.mask_next, 1),
        block_mask=part(info.block_mask, 1),
        q_sequence=part(info.q_sequence, 0),
    )
