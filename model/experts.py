"""Mixture of experts: the router, the dropless dispatch to sorted blocks, the grouped matmul, and load balancing."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from model.config import ModelConfig
from model.layers import FeedForward, Module
from model.sharding import batch_axes

BLOCK = 128  # rows of one expert that are multiplied at a time
Statistics = dict[str, jax.Array]


def route(scores: jax.Array, bias: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Chooses experts by biased scores and weighs them by unbiased ones (DeepSeek-V3, equations 12 to 16).

    With groups, only the topk_group groups with the largest sum of their two best biased scores take part (their single
    best score under 'group_limited_greedy': DeepSeek-V2, section 2.2.2); the experts of the others are masked with
    -inf, as in DeepSeek's own inference code.

    Args:
        scores: affinities after sigmoid or softmax, float32 [..., E]; bias: float32 [E].

    Returns:
        Expert ids int32 [..., k] and their weights float32 [..., k].
    """
    choice = scores + bias.reshape((1,) * (scores.ndim - 1) + (-1,))
    if config.n_group > 1:
        grouped = choice.reshape(*choice.shape[:-1], config.n_group, -1)
        best = lax.top_k(grouped, 1 if config.topk_method == 'group_limited_greedy' else 2)[0].sum(-1)
        _, kept = lax.top_k(best, config.topk_group)
        allowed = jax.nn.one_hot(kept, config.n_group, dtype=jnp.bool_).any(-2)
        choice = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(choice.shape)
    _, ids = lax.top_k(lax.stop_gradient(choice), config.num_experts_per_tok)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return ids, weights * config.routed_scaling_factor


def routing_statistics(scores: jax.Array, ids: jax.Array, segments: jax.Array, config: ModelConfig) -> Statistics:
    """Loads and balance losses of one layer. Padding (segment 0) counts in none of them.

    Returns:
        load: float32 [E], assignments over the global microbatch.
        entropy: sum over tokens of the entropy of the normalised scores, in nats.
        sequence_balance: sum over segments of sum_i f_i P_i (DeepSeek-V3, equations 17 to 20, f from the experts really
            chosen, where equation 18 takes the best of the unbiased scores).
        batch_balance: the same with f and P taken over all tokens of the microbatch (Fedus et al. 2022, eq. 4).
    """
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    real = (segments > 0).astype(jnp.float32)
    chosen = jax.nn.one_hot(ids, experts, dtype=jnp.float32).sum(-2) * real[..., None]
    share = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)
    share = share * real[..., None]

    batch, length = segments.shape
    row = (jnp.arange(batch) * (length + 1))[:, None]

    def per_segment(x: jax.Array) -> jax.Array:
        flat = x.reshape(batch * length, -1)
        return jax.ops.segment_sum(flat, (row + segments).reshape(-1), num_segments=batch * (length + 1))

    tokens = jnp.maximum(per_segment(real), 1.0)
    fraction = per_segment(lax.stop_gradient(chosen)) * (experts / k) / tokens
    load = chosen.sum((0, 1))
    total = jnp.maximum(real.sum(), 1.0)
    return {
        'load': load,
        'entropy': lax.stop_gradient(jnp.sum(entropy * real)),
        'sequence_balance': jnp.sum(fraction * per_segment(share) / tokens),
        'batch_balance': jnp.sum(lax.stop_gradient(load) * (experts / k) / total * share.sum((0, 1)) / total),
    }


def updated_bias(bias: jax.Array, load: jax.Array, config: ModelConfig) -> jax.Array:
    """The router biases after a step, from the global loads (never a shard's: replicas would drift apart).

    'sign': b_i + u sign(mean load - load_i) (DeepSeek-V3, section 2.1.2; Wang et al. 2024, algorithm 1).
    'bounded': the mean of the signs is taken off, biases keep their sum (Moonlight: Liu et al. 2025, section 2.1).

    Args:
        bias: float32 [layers, E]; load: float32 [layers, E].
    """
    if config.bias_update_rule == 'none':
        return bias
    sign = jnp.sign(load.mean(-1, keepdims=True) - load)
    if config.bias_update_rule == 'bounded':
        sign = sign - sign.mean(-1, keepdims=True)
    return bias + config.bias_update_speed * sign


# Grouped matmul. Rows are sorted by expert and every expert's rows padded to whole blocks, so a block has one expert.


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


def grouped_matmul(rows: jax.Array, weights: jax.Array, owner: jax.Array, blocks: jax.Array) -> jax.Array:
    """Multiplies each block of rows by its expert's matrix.

    On CPU a loop over the blocks in use, with its own backward pass (`lax.ragged_dot` multiplies every row by every
    expert there); elsewhere `lax.ragged_dot` over the padded groups.

    Args:
        rows: [len(owner) * block, D], sorted by expert; weights: [E, D, F]; owner, blocks: see `plan_blocks`.

    Returns:
        [len(owner) * block, F]; rows of unused blocks are zero.
    """
    if jax.default_backend() == 'cpu':
        return _blocked_matmul(rows, weights, owner, blocks)
    block = rows.shape[0] // owner.shape[0]
    in_use = (jnp.arange(owner.shape[0]) < blocks).astype(jnp.int32) * block
    sizes = jax.ops.segment_sum(in_use, owner, num_segments=weights.shape[0])
    return lax.ragged_dot(rows, weights, sizes)


@jax.custom_vjp
def _blocked_matmul(rows: jax.Array, weights: jax.Array, owner: jax.Array, blocks: jax.Array) -> jax.Array:
    return _multiply_blocks(rows, weights, owner, blocks, transposed=False)


def _multiply_blocks(rows: jax.Array, weights: jax.Array, owner: jax.Array, blocks: jax.Array, transposed: bool) -> Any:
    block = rows.shape[0] // owner.shape[0]
    width = weights.shape[1] if transposed else weights.shape[2]

    def multiply(i: jax.Array, out: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(rows, i * block, block)
        w = lax.dynamic_index_in_dim(weights, owner[i], keepdims=False)
        y = lax.dot_general(x, w, (((1,), (1 if transposed else 0,)), ((), ())))
        return lax.dynamic_update_slice_in_dim(out, y, i * block, 0)

    return lax.fori_loop(0, blocks, multiply, jnp.zeros((rows.shape[0], width), rows.dtype))


def _blocked_forward(rows: Any, weights: Any, owner: Any, blocks: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _blocked_matmul(rows, weights, owner, blocks), (rows, weights, owner, blocks)


def _blocked_backward(saved: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, ...]:
    rows, weights, owner, blocks = saved
    block = rows.shape[0] // owner.shape[0]

    def accumulate(i: jax.Array, total: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(rows, i * block, block)
        g = lax.dynamic_slice_in_dim(gradient, i * block, block)
        product = jnp.einsum('bd,bf->df', x, g, preferred_element_type=jnp.float32)
        old = lax.dynamic_index_in_dim(total, owner[i], keepdims=False)
        return lax.dynamic_update_index_in_dim(total, old + product, owner[i], 0)

    d_weights = lax.fori_loop(0, blocks, accumulate, jnp.zeros(weights.shape, jnp.float32))
    d_rows = _multiply_blocks(gradient, weights, owner, blocks, transposed=True)

    def nothing(x: jax.Array) -> np.ndarray:
        return np.zeros(x.shape, jax.dtypes.float0)

    return d_rows, d_weights.astype(weights.dtype), nothing(owner), nothing(blocks)


_blocked_matmul.defvjp(_blocked_forward, _blocked_backward)


def run_experts(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, block: int
) -> jax.Array:
    """Sum over each token's experts of weight * down(silu(gate x) * up x).

    Args:
        x: [N, D]; ids: int32 [N, k], where the id E means no expert (padding); weights: [N, k].
        gate_up: [E, D, 2F], gates first; down: [E, F, D].

    Returns:
        [N, D] in the dtype of x.
    """
    n, k = ids.shape
    slot, source, owner, blocks = plan_blocks(ids.reshape(-1), gate_up.shape[0], block)
    # Gathers with a row of zeros behind the last one: for empty rows here, for tokens without an expert below.
    rows = jnp.concatenate([x, jnp.zeros_like(x[:1])])[jnp.minimum(source // k, n)]
    gate, up = jnp.split(grouped_matmul(rows, gate_up, owner, blocks), 2, axis=-1)
    out = grouped_matmul(jax.nn.silu(gate) * up, down, owner, blocks)
    out = jnp.concatenate([out, jnp.zeros_like(out[:1])])[jnp.minimum(slot, out.shape[0])].reshape(n, k, -1)
    return jnp.einsum('nkd,nk->nd', out, weights.astype(out.dtype))


class MixtureOfExperts(Module):
    """Routed fine-grained experts beside shared ones (DeepSeekMoE, Dai et al. 2024)."""

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array) -> tuple[jax.Array, Statistics]:
        """x [B, T, hidden_size] -> (output, statistics of `routing_statistics`)."""
        c = self.config
        experts, hidden, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        # The router is small and sensitive: float32 throughout.
        logits = x.astype(jnp.float32) @ self.weight('gate', (hidden, experts), ('embed', None), role='router')
        scores = jax.nn.sigmoid(logits) if c.scoring_func == 'sigmoid' else jax.nn.softmax(logits, axis=-1)
        bias = self.variable('balance', 'bias', jnp.zeros, (experts,), jnp.float32).value
        ids, weights = route(scores, lax.stop_gradient(bias), c)
        statistics = routing_statistics(scores, ids, segments, c)

        wide, narrow = ('experts', 'expert_embed', 'mlp'), ('experts', 'mlp', 'expert_embed')
        gate_proj = self.weight('experts_gate_proj', (experts, hidden, width), wide)
        up_proj = self.weight('experts_up_proj', (experts, hidden, width), wide)
        down_proj = self.weight('experts_down_proj', (experts, width, hidden), narrow)
        ids = jnp.where((segments > 0)[..., None], ids, experts)
        # A small batch (a decoding step) is not padded to large blocks.
        block = min(BLOCK, max(8, ids.size // (4 * experts)))

        def local(
            x: jax.Array, ids: jax.Array, weights: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
        ) -> jax.Array:
            flat = run_experts(
                x.reshape(-1, hidden),
                ids.reshape(-1, ids.shape[-1]),
                weights.reshape(-1, weights.shape[-1]),
                jnp.concatenate([gate, up], axis=-1),
                down,
                block,
            )
            return flat.reshape(x.shape)

        axes = batch_axes()
        if axes:  # each device sorts and computes its own tokens
            split, whole = PartitionSpec(axes), PartitionSpec()
            specs = (split, split, split, whole, whole, whole)
            local = jax.shard_map(local, in_specs=specs, out_specs=split, check_vma=False)
        out = local(x, ids, weights, gate_proj, up_proj, down_proj)
        if c.n_shared_experts:
            out = out + FeedForward(c, width=width * c.n_shared_experts, name='shared_experts')(x)
        return out, statistics
