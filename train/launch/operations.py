"""Hot operations beside what bounds them: grouped matmul, decoding over a growing cache, latents kept or expanded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from model.attention import attend_cached
from model.backend import platform
from model.config import ModelConfig
from model.experts import block_rows
from model.grouped import grouped_matmul, plan_blocks
from model.sharding import make_mesh
from model.transformer import Model
from train.act.decoding import admit, decode, empty_pool

SHAPES = ((16, 128), (16, 512), (64, 128), (64, 512))  # experts, and rows of each on average
BATCH = 16  # rows that decode together
CACHED = (64, 256, 1024, 2048)  # tokens before them
STEPS = 32  # tokens they decode


def seconds(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of a call of each, taken in turns: CPU time on CPU, where other work hardly disturbs it."""
    clock = time.process_time if platform() == 'cpu' else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, call in candidates.items():
            started = clock()
            jax.block_until_ready(call())
            if repeat:  # the first one compiles
                taken[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def grouped_against_dense(
    experts: int, rows: int, width: int, inner: int, dtype: str, repeats: int
) -> dict[str, float]:
    """Seconds of forward and backward of a grouped matmul and of one dense matmul with as many rows.

    Args:
        rows: of each expert on average; each row draws its expert at random, so some have more.
    """
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(experts, size=experts * rows), jnp.int32)
    _, source, owner, blocks = plan_blocks(ids, experts, block_rows(ids.size, experts))
    x = jnp.asarray(rng.normal(size=(ids.size, width)), dtype)
    weights = jnp.asarray(rng.normal(size=(experts, width, inner)), dtype)
    laid_out = jnp.where((source < ids.size)[:, None], x[jnp.minimum(source, ids.size - 1)], 0)

    def gradients(product: Callable[..., jax.Array]) -> Callable[..., object]:
        # What comes back is of the size of the result, as behind an activation.
        return jax.jit(jax.grad(lambda a, b: jnp.sum(product(a, b).astype(jnp.float32) ** 2), argnums=(0, 1)))

    grouped = gradients(lambda a, b: grouped_matmul(a, b, owner, blocks))
    dense = gradients(jnp.matmul)
    return seconds({'grouped': lambda: grouped(laid_out, weights), 'dense': lambda: dense(x, weights[0])}, repeats)


def decoding(config: ModelConfig, repeats: int) -> dict[int, float]:
    """Seconds a token of a model with random weights, by the number of tokens in the cache; see BATCH and STEPS."""
    model = Model(config)
    variables = model.init(0, make_mesh({}, jax.devices()[:1]))
    token = jnp.zeros((BATCH, 1), jnp.int32)
    output = jax.eval_shape(lambda: model.apply(variables, token))
    logits = jnp.zeros((BATCH, config.vocab_size), jnp.float32)
    keys = jax.random.split(jax.random.key(0), BATCH)

    def pool(cached: int) -> object:
        entries = {name: jnp.zeros((*x.shape[:2], cached, *x.shape[3:]), x.dtype) for name, x in output.entries.items()}
        lengths = np.full(BATCH, cached, np.int32)
        empty = empty_pool(model, entries, rows=BATCH, max_tokens=STEPS)
        return jax.block_until_ready(admit(empty, np.arange(BATCH), entries, logits, lengths, keys))

    pools = {cached: pool(cached) for cached in CACHED}

    def call(cached: int) -> Callable[[], object]:
        def run() -> object:
            fresh = jax.tree.map(jnp.copy, pools[cached])  # the decoder writes in place
            return decode(model, variables, fresh, np.float32(1), np.bool_(False), np.int32(BATCH), stop=-1)

        return run

    taken = seconds({str(cached): call(cached) for cached in CACHED}, repeats)
    return {cached: taken[str(cached)] / (BATCH * STEPS) for cached in CACHED}


def absorbed_against_expanded(config: ModelConfig, cached: int, repeats: int) -> dict[str, float]:
    """Seconds of one layer's attention of BATCH new tokens over the latents in the cache: absorbed into query and
    output, as `LatentAttention` does it, or with keys and values of all heads expanded for each token anew."""
    c, rng = config, np.random.default_rng(0)
    rank, nope, heads = c.kv_lora_rank, c.qk_nope_head_dim, c.num_attention_heads

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), c.dtype)

    query, latent = normal(BATCH, heads, c.qk_head_dim), normal(BATCH, cached, rank + c.qk_rope_head_dim)
    new, up = normal(BATCH, rank + c.qk_rope_head_dim), normal(rank, heads, nope + c.v_head_dim)
    valid, scale = jnp.ones((BATCH, cached), jnp.bool_), c.qk_head_dim**-0.5

    @jax.jit
    def absorbed(query: jax.Array, latent: jax.Array, new: jax.Array, up: jax.Array) -> jax.Array:
        inside = jnp.concatenate([jnp.einsum('bhd,rhd->bhr', query[..., :nope], up[..., :nope]), query[..., nope:]], -1)
        past, present = attend_cached(inside[:, None], latent[:, :, None], new[:, None], valid, scale)
        mixed = jnp.einsum('bgns,bsr->bnr', past.astype(latent.dtype), latent)[..., :rank]
        mixed = mixed + present[:, 0].astype(latent.dtype) * new[:, None, :rank]
        return jnp.einsum('bhr,rhv->bhv', mixed, up[..., nope:])

    @jax.jit
    def expanded(query: jax.Array, latent: jax.Array, new: jax.Array, up: jax.Array) -> jax.Array:
        seen = jnp.concatenate([latent, new[:, None]], axis=1)
        both = jnp.einsum('bsr,rhd->bshd', seen[..., :rank], up)
        rotated = jnp.broadcast_to(seen[:, :, None, rank:], (*both.shape[:3], c.qk_rope_head_dim))
        key = jnp.concatenate([both[..., :nope], rotated], axis=-1)
        weights = jax.nn.softmax(jnp.einsum('bhd,bshd->bhs', query, key).astype(jnp.float32) * scale, axis=-1)
        return jnp.einsum('bhs,bshv->bhv', weights.astype(both.dtype), both[..., nope:])

    given = (query, latent, new, up)
    np.testing.assert_allclose(absorbed(*given), expanded(*given), rtol=0.1, atol=0.02)
    return seconds({'absorbed': lambda: absorbed(*given), 'expanded': lambda: expanded(*given)}, repeats)


def report(config: ModelConfig, repeats: int) -> str:
    """The operations at the sizes of a model, for people to read."""
    kind = 'CPU-seconds' if platform() == 'cpu' else 'seconds'
    lines = [f'Medians of {repeats} calls in turns, {kind} on one {jax.devices()[0].device_kind}, {config.dtype}:']
    for experts, rows in SHAPES:
        width, inner = config.hidden_size, 2 * config.moe_intermediate_size
        t = grouped_against_dense(experts, rows, width, inner, config.dtype, repeats)
        lines.append(
            f'  grouped matmul, {experts} experts x {rows} rows, {width} -> {inner}, forward and backward: '
            f'{1000 * t["grouped"]:.2f} ms, {t["grouped"] / t["dense"]:.2f} times a dense matmul of as many rows'
        )
    per_token = decoding(config, repeats)
    by_length = ', '.join(f'{cached:,}: {1e6 * per_token[cached]:.0f}' for cached in CACHED)
    lines.append(
        f'  decoding {BATCH} rows, microseconds a token by tokens in the cache: {by_length}; '
        f'{per_token[CACHED[-1]] / per_token[CACHED[0]]:.2f} times from the least to the most'
    )
    if config.attention == 'mla':
        for cached in (512, 2048):
            t = absorbed_against_expanded(config, cached, repeats)
            lines.append(
                f'  latent attention of one layer, {BATCH} rows over {cached:,} tokens: {1000 * t["absorbed"]:.2f} ms, '
                f'{t["expanded"] / t["absorbed"]:.1f} times as fast as with latents expanded'
            )
    return '\n'.join(lines)
