"""Mixture of experts: the router, load balancing, and the layer that joins them with the experts."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from model.backend import platform
from model.config import ModelConfig
from model.dispatch import Exchange, run_experts, run_experts_apart
from model.layers import FeedForward, Module
from model.sharding import mesh_in_use, per_device, splits

# Rows of one expert that are multiplied at a time: fewer and a TPU would wait for weights, more and many are padding.
BLOCKS = {'cpu': 128, 'gpu': 128, 'tpu': 256}
Statistics = dict[str, jax.Array]


def route(
    scores: jax.Array, bias: jax.Array, config: ModelConfig, given: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Chooses experts by biased scores and weighs them by unbiased ones (DeepSeek-V3, equations 12 to 16).

    With groups, only the topk_group groups with the largest sum of their two best biased scores take part (their single
    best score under 'group_limited_greedy': DeepSeek-V2, section 2.2.2); the experts of the others are masked with
    -inf, as in DeepSeek's own inference code.

    Args:
        scores: affinities after sigmoid or softmax, float32 [..., E]; bias: float32 [E].
        given: int32 [..., k], experts that were chosen before and are taken again (Ma et al. 2025, "R3"), weighed by
            the scores as they are now; -1 where a token is to choose.

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
    if given is not None:
        ids = jnp.where(given[..., :1] < 0, ids, given)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return ids, weights * config.routed_scaling_factor


def routing_statistics(
    scores: jax.Array,
    ids: jax.Array,
    segments: jax.Array,
    config: ModelConfig,
    axes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
) -> Statistics:
    """Loads and balance losses of one layer. Padding (segment 0) counts in none of them.

    Args:
        scores: float32 [B, T, E]; ids: int32 [B, T, k]; segments: int32 [B, T].
        axes: mesh axes that split the rows and the length, where these are one device's shares of a batch. Results are
            those of the whole batch: loads of a share would let the replicas' router biases drift apart.

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

    def total(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
        return lax.psum(x, over) if over else x

    everywhere = axes[0] + axes[1]
    batch, length = segments.shape
    width = length * math.prod(lax.axis_size(axis) for axis in axes[1]) + 1  # a row's segments, and its padding
    rooms = batch * width
    row = (jnp.arange(batch) * width)[:, None]

    def per_segment(x: jax.Array) -> jax.Array:
        flat = x.reshape(batch * length, -1)
        return total(jax.ops.segment_sum(flat, (row + segments).reshape(-1), num_segments=rooms), axes[1])

    tokens = jnp.maximum(per_segment(real), 1.0)
    fraction = per_segment(lax.stop_gradient(chosen)) * (experts / k) / tokens
    load = total(chosen.sum((0, 1)), everywhere)
    count = jnp.maximum(total(real.sum(), everywhere), 1.0)
    mass = total(share.sum((0, 1)), everywhere)
    return {
        'load': load,
        'entropy': lax.stop_gradient(total(jnp.sum(entropy * real), everywhere)),
        'sequence_balance': total(jnp.sum(fraction * per_segment(share) / tokens), axes[0]),
        'batch_balance': jnp.sum(lax.stop_gradient(load) * (experts / k) / count * mass / count),
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


class MixtureOfExperts(Module):
    """Routed fine-grained experts beside shared ones (DeepSeekMoE, Dai et al. 2024)."""

    @nn.compact
    def __call__(
        self, x: jax.Array, segments: jax.Array, given: jax.Array | None = None
    ) -> tuple[jax.Array, Statistics]:
        """x [B, T, hidden_size] -> (output, statistics of `routing_statistics`, and 'expert_ids' [B, T, k]).

        given: experts [B, T, k] that tokens are sent to (see `route`), if any.
        """
        c = self.config
        experts, hidden, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        # The router is small and sensitive: float32 throughout.
        logits = x.astype(jnp.float32) @ self.weight('gate', (hidden, experts), ('embed', None), role='router')
        scores = jax.nn.sigmoid(logits) if c.scoring_func == 'sigmoid' else jax.nn.softmax(logits, axis=-1)
        bias = self.variable('balance', 'bias', jnp.zeros, (experts,), jnp.float32).value
        ids, weights = route(scores, lax.stop_gradient(bias), c, given)
        axes = splits('batch', x.shape[0]), splits('length', x.shape[1])
        token = ('batch', 'length', None)
        count = per_device(
            functools.partial(routing_statistics, config=c, axes=axes),
            (token, token, ('batch', 'length')),
            {'load': None, 'entropy': None, 'sequence_balance': None, 'batch_balance': None},
        )
        statistics = {**count(scores, ids, segments), 'expert_ids': ids}

        wide, narrow = ('experts', 'expert_embed', 'mlp'), ('experts', 'mlp', 'expert_embed')
        gate_proj = self.weight('experts_gate_proj', (experts, hidden, width), wide, gather=False)
        up_proj = self.weight('experts_up_proj', (experts, hidden, width), wide, gather=False)
        down_proj = self.weight('experts_down_proj', (experts, width, hidden), narrow, gather=False)
        ids = jnp.where((segments > 0)[..., None], ids, experts)
        own = functools.partial(self._run, axes=axes, sizes=mesh_in_use())
        run = per_device(own, (token, token, token, wide, wide, narrow), 0)
        out = run(x, ids, weights, gate_proj, up_proj, down_proj)
        if c.n_shared_experts:
            out = out + FeedForward(c, width=width * c.n_shared_experts, name='shared_experts')(x)
        return out, statistics

    def _run(self, *values: jax.Array, axes: tuple[tuple[str, ...], ...], sizes: dict[str, int]) -> jax.Array:
        """One device's tokens x [B, T, D], with ids and weights [B, T, k], through the experts' three projections."""
        c, (x, ids, weights, gate, up, down) = self.config, values
        flat = (x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1]))
        block = block_rows(ids.size, c.n_routed_experts)
        if not sizes:
            wide, narrow = jnp.concatenate([gate, up], axis=-1).astype(c.dtype), down.astype(c.dtype)
            return run_experts(*flat, wide, narrow, block).reshape(x.shape)
        ways = sizes['expert']
        fair = -(-ids.size // ways)
        rows = min(ids.size, -(-int(fair * c.round_capacity) // 8) * 8 or 8)
        exchange = Exchange(
            over='expert' if ways > 1 else '',
            ways=ways,
            storage=('fsdp',) if down.shape[2] < c.hidden_size else (),
            agree=tuple(dict.fromkeys((*axes[0], *axes[1], 'expert'))),
            rows=rows,
            block=block_rows(rows * ways, gate.shape[0]),
            rounds=-(-fair // rows),
            dtype=c.dtype,
            gradient_dtype=c.gradient_dtype,
        )
        out = run_experts_apart(*flat, gate, up, down, exchange)
        if down.shape[1] < c.moe_intermediate_size:
            out = lax.psum(out, 'tensor')
        return out.reshape(x.shape)


def block_rows(assignments: int, experts: int) -> int:
    """Rows of a block for so many assignments: a small batch (a decoding step) is not padded to large blocks."""
    return min(BLOCKS[platform()], max(8, assignments // (4 * experts)))
