"""QK-clip: heads whose attention logits grow too large have their query and key weights scaled down."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from model.config import ModelConfig


def clipped(params: Any, largest: Any, limit: float, config: ModelConfig) -> Any:
    """Parameters with which no head's largest logit would have been above `limit` (Kimi Team 2025, "Kimi K2",
    arXiv:2507.20534, section 2.1).

    A head whose largest logit was s > limit has its logits scaled by limit / s, and the others stay as they are to the
    last bit: the parts of query and key without position take the root of that each; the rotated part of the query
    takes it whole, as the rotated key is shared by all heads. So do whole queries in grouped-query attention, where
    keys are shared as well.

    Args:
        params: nested dictionaries; largest: those of its layers with 'heads', float32 [layers, heads] or [heads].
    """
    if 'heads' not in largest:
        return {name: clipped(x, largest[name], limit, config) if name in largest else x for name, x in params.items()}
    factor = jnp.minimum(1.0, limit / jnp.maximum(largest['heads'], limit))
    query = 'q_b_proj' if 'q_b_proj' in params else 'q_proj'  # [layers, inputs, heads, width]
    if config.attention == 'gqa':
        return {**params, query: params[query] * factor[..., None, :, None]}
    nope = jnp.arange(config.qk_head_dim) < config.qk_nope_head_dim
    keys = jnp.arange(config.qk_nope_head_dim + config.v_head_dim) < config.qk_nope_head_dim
    of_query = jnp.where(nope, jnp.sqrt(factor)[..., None], factor[..., None])
    of_key = jnp.where(keys, jnp.sqrt(factor)[..., None], 1.0)
    scaled = {query: params[query] * of_query[..., None, :, :]}
    return {**params, **scaled, 'kv_b_proj': params['kv_b_proj'] * of_key[..., None, :, :]}


def largest_of(largest: Any) -> jax.Array:
    """The largest logits of all heads of all layers: float32 [...]."""
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(largest)])
