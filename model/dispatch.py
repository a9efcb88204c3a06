"""Running the routed experts: on one device, or with tokens sent to the devices that hold the experts they chose."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from model.backend import trips
from model.grouped import accumulate, grouped_matmul, multiply, no_gradient, plan_blocks

Array = jax.Array
Weights = tuple[Array, Array]  # gate and up projections side by side [E, D, 2F], down projections [E, F, D]


def run_experts(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, block: int
) -> jax.Array:
    """Sum over each token's experts of weight * down(silu(gate x) * up x), all experts on this device.

    Args:
        x: [N, D]; ids: int32 [N, k], where the id E means no expert (padding); weights: [N, k].
        gate_up: [E, D, 2F], gates first; down: [E, F, D].

    Returns:
        [N, D] in the dtype of x.
    """
    n, k = ids.shape
    slot, source, owner, blocks = plan_blocks(ids.reshape(-1), gate_up.shape[0], block)
    # Gathers with a row of zeros behind the last one: for empty rows here, for tokens without an expert below.
    rows = _picked(x, jnp.where(source < n * k, source // k, n))
    gate, up = jnp.split(grouped_matmul(rows, gate_up, owner, blocks), 2, axis=-1)
    out = _picked(grouped_matmul(jax.nn.silu(gate) * up, down, owner, blocks), slot).reshape(n, k, -1)
    return jnp.einsum('nkd,nk->nd', out, weights.astype(out.dtype))


def _picked(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of x, and rows of zeros for numbers past its end."""
    return jnp.concatenate([x, jnp.zeros_like(x[:1])])[jnp.minimum(rows, x.shape[0])]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How the devices of a mesh share the work of `run_experts_apart`.

    Attributes:
        over: mesh axis over which experts are spread ('' if they are not); ways: its size.
        storage: mesh axes over which each expert's weights are stored in parts (along D).
        agree: mesh axes whose devices take the same number of rounds.
        rows: rows that a device sends to one other in a round; block: see `plan_blocks`.
        rounds: how many rounds are taken where every expert has its fair share, for estimates of cost.
        dtype: of the weights as they are used; gradient_dtype: of their gradients as they cross the network.
    """

    over: str
    ways: int
    storage: tuple[str, ...]
    agree: tuple[str, ...]
    rows: int
    block: int
    rounds: int
    dtype: str
    gradient_dtype: str

    def __call__(self, x: jax.Array) -> jax.Array:
        """Part d of the first axis goes to device d, and the parts sent here take its place."""
        return lax.all_to_all(x, self.over, 0, 0, tiled=True) if self.over else x

    def gathered(self, gate: jax.Array, up: jax.Array, down: jax.Array) -> Weights:
        """This device's experts, whole and in the dtype they are used in."""
        wide, narrow = jnp.concatenate([gate, up], axis=-1).astype(self.dtype), down.astype(self.dtype)
        if not self.storage:
            return wide, narrow
        return (
            lax.all_gather(wide, self.storage, axis=1, tiled=True),
            lax.all_gather(narrow, self.storage, axis=2, tiled=True),
        )

    def scattered(self, wide: jax.Array, narrow: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients summed over the devices that store parts of a weight; to each its part, in float32."""
        if self.storage:
            wide, narrow = wide.astype(self.gradient_dtype), narrow.astype(self.gradient_dtype)
            wide = lax.psum_scatter(wide, self.storage, scatter_dimension=1, tiled=True)
            narrow = lax.psum_scatter(narrow, self.storage, scatter_dimension=2, tiled=True)
        gate, up = jnp.split(wide.astype(jnp.float32), 2, axis=-1)
        return gate, up, narrow.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def run_experts_apart(
    x: Array, ids: Array, weights: Array, gate: Array, up: Array, down: Array, exchange: Exchange
) -> Array:
    """`run_experts` on one device of a mesh, in lossless rounds of bounded all-to-all.

    Assignments are sorted by expert. In a round each device sends every other at most `exchange.rows` of those that are
    meant for its experts; there are as many rounds as the fullest pair of devices needs, so nothing is dropped at any
    skew, while memory is bounded by one round. The backward pass keeps the inputs alone and takes the rounds anew; what
    it sums over rounds, it sums in float32.

    Args:
        x: [N, D], ids: int32 [N, k] and weights [N, k] of this device's tokens, over all E experts.
        gate, up: float32 [E / ways, D / storage, F], down: float32 [E / ways, F, D / storage], this device's parts.

    Returns:
        [N, D] in the dtype of x.
    """
    route, rounds = _routes(ids, gate.shape[0], exchange)
    wide, narrow = exchange.gathered(gate, up, down)

    def one(r: jax.Array, total: jax.Array) -> jax.Array:
        sent = _Round(route, r, exchange)
        rows, layout = sent.arrive(x, gate.shape[0])
        first, second = jnp.split(multiply(rows, wide, *layout), 2, axis=-1)
        out = sent.back(multiply(jax.nn.silu(first) * second, narrow, *layout))
        weight = jnp.where(sent.real, weights.reshape(-1)[sent.which], 0).astype(jnp.float32)
        return total.at[sent.token].add(out.astype(jnp.float32) * weight[:, None])

    with trips(exchange.rounds):
        return lax.fori_loop(0, rounds, one, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)


def _routes(ids: jax.Array, experts: int, exchange: Exchange) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Assignments in the order of their experts, where those for each device begin and how many; and the rounds."""
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    pairs = jnp.bincount(flat // experts, length=exchange.ways + 1)[: exchange.ways]
    rounds = -(-pairs.max() // exchange.rows)
    if exchange.over:
        rounds = lax.pmax(rounds, exchange.agree)
    return (flat, order, jnp.cumsum(pairs) - pairs, pairs, jnp.asarray(ids.shape[1])), rounds


class _Round:
    """One round: which assignments leave this device, and how what arrives is laid out for its experts."""

    def __init__(self, route: tuple[jax.Array, ...], number: jax.Array, exchange: Exchange):
        flat, order, start, pairs, k = route
        place = number * exchange.rows + jnp.arange(exchange.rows)[None]
        real = place < pairs[:, None]
        self.real = real.reshape(-1)
        self.which = order[jnp.where(real, start[:, None] + place, 0).reshape(-1)]
        self.token = self.which // k
        self.expert = flat[self.which]
        self.exchange = exchange

    def arrive(self, x: jax.Array, experts: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The tokens sent here, laid out by expert, and the (owner, blocks) of their layout."""
        mine = self.exchange(jnp.where(self.real, self.expert % experts, experts).astype(jnp.int32))
        self.slot, self.source, owner, blocks = plan_blocks(mine, experts, self.exchange.block)
        return self.sent(x), (owner, blocks)

    def sent(self, x: jax.Array) -> jax.Array:
        """One more array over tokens, sent and laid out like the first."""
        return _picked(self.exchange(jnp.where(self.real[:, None], x[self.token], 0)), self.source)

    def back(self, rows: jax.Array) -> jax.Array:
        """Rows of the layout, returned to where their tokens came from, in the order of `which`."""
        return self.exchange(_picked(rows, self.slot))


def _forward(x: Any, ids: Any, weights: Any, gate: Any, up: Any, down: Any, exchange: Exchange) -> tuple[Any, Any]:
    return run_experts_apart(x, ids, weights, gate, up, down, exchange), (x, ids, weights, gate, up, down)


def _backward(exchange: Exchange, saved: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, ...]:
    """With y = w (h W), h = silu(a) b, (a, b) = x V: the rows of dy and of w go out beside those of x, and
    dy W^T serves both h and w, whose gradient is h . (dy W^T)."""
    x, ids, weights, gate, up, down = saved
    experts = gate.shape[0]
    route, rounds = _routes(ids, experts, exchange)
    wide, narrow = exchange.gathered(gate, up, down)

    def one(r: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_x, d_weights, d_wide, d_narrow = totals
        sent = _Round(route, r, exchange)
        rows, layout = sent.arrive(x, experts)
        given = sent.sent(gradient)
        weight = exchange(jnp.where(sent.real, weights.reshape(-1)[sent.which], 0))
        weight = _picked(weight[:, None], sent.source).astype(jnp.float32)

        first, second = (h.astype(jnp.float32) for h in jnp.split(multiply(rows, wide, *layout), 2, axis=-1))
        sigmoid = jax.nn.sigmoid(first)
        inner = first * sigmoid * second
        d_inner = multiply(given, narrow, *layout, transposed=True).astype(jnp.float32)
        d_weight = jnp.sum(inner * d_inner, axis=-1, keepdims=True)
        d_inner = d_inner * weight
        d_first = d_inner * second * sigmoid * (1 + first * (1 - sigmoid))
        d_both = jnp.concatenate([d_first, d_inner * first * sigmoid], axis=-1).astype(rows.dtype)

        d_narrow = accumulate(d_narrow, (inner * weight).astype(rows.dtype), given, *layout)
        d_wide = accumulate(d_wide, rows, d_both, *layout)
        d_rows = sent.back(multiply(d_both, wide, *layout, transposed=True)).astype(jnp.float32)
        d_weight = sent.back(d_weight)[:, 0]
        d_x = d_x.at[sent.token].add(jnp.where(sent.real[:, None], d_rows, 0))
        d_weights = d_weights.at[sent.which].add(jnp.where(sent.real, d_weight, 0))
        return d_x, d_weights, d_wide, d_narrow

    zeros = [jnp.zeros(shape, jnp.float32) for shape in (x.shape, (weights.size,), wide.shape, narrow.shape)]
    with trips(exchange.rounds):
        d_x, d_weights, d_wide, d_narrow = lax.fori_loop(0, rounds, one, tuple(zeros))
    d_weights = d_weights.reshape(weights.shape).astype(weights.dtype)
    # What lies below waits for the scattering: left to itself the compiler puts it off to the end, and whole gradients
    # of the multi-token module's experts stay through the backward pass of all layers.
    d_x, *d_experts = lax.optimization_barrier((d_x.astype(x.dtype), *exchange.scattered(d_wide, d_narrow)))
    return d_x, no_gradient(ids), d_weights, *d_experts


run_experts_apart.defvjp(_forward, _backward)
