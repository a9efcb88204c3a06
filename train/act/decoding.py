"""The programs of sampling: reading prompts, admitting them to a pool of rows, decoding until enough rows are done.

A row of the pool is one answer being written. All rows write their next token at the same place of a ring of max_tokens
places, whenever they began, so that the cache is written once a step for all; what a row may see of the ring are the
places it has written itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from model import cache as latent_cache
from model.adapters import merge_adapters
from model.backend import trips
from model.sharding import constrain
from model.transformer import Model, Variables, layer_parts

BLOCK = 64  # token probabilities are summed in blocks of this size when one is drawn

# What `decode` goes by, R rows: 'step' (how many were taken, a scalar); 'prompts' (lengths), 'counts' (tokens sampled),
# 'done', 'keys' [R]; 'logits' [R, V] of the next token; 'cache'; the rings 'tokens', 'logprobs' [R, max_tokens] and,
# where they are wanted, 'experts' [R, max_tokens, layers, k].
Pool = dict[str, Any]


def draw(logits: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws a token a row by inverting the cumulative distribution, with one uniform number a row.

    Args:
        logits: float32 [rows, V]; keys: one a row.

    Returns:
        int32 [rows] and its log-probability, float32 [rows]. A token of probability zero is never drawn.
    """
    rows, vocabulary = logits.shape
    logprob = jax.nn.log_softmax(logits, axis=-1)
    pad = -vocabulary % BLOCK
    mass = jnp.pad(jnp.exp(logprob), ((0, 0), (0, pad))).reshape(rows, -1, BLOCK)
    per_block = mass.sum(-1)
    ends = jnp.cumsum(per_block, axis=-1)
    # The uniform is scaled by what the masses really sum to, so that rounding never leads past the last token.
    target = jax.vmap(lambda key: jax.random.uniform(key, ()))(keys) * ends[:, -1]
    block = jnp.minimum(jnp.sum(ends <= target[:, None], axis=-1), mass.shape[1] - 1)
    before = jnp.take_along_axis(ends - per_block, block[:, None], axis=-1)
    inside = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
    within = jnp.cumsum(inside, axis=-1)
    passed = jnp.sum(within <= (target[:, None] - before), axis=-1)
    last = BLOCK - 1 - jnp.argmax((inside > 0)[:, ::-1], axis=-1)
    token = (block * BLOCK + jnp.minimum(passed, last)).astype(jnp.int32)
    return token, jnp.take_along_axis(logprob, token[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames=('model', 'samples', 'experts'))
def prefill(
    model: Model,
    variables: Variables,
    prompts: jax.Array,
    lengths: jax.Array,
    temperature: jax.Array,
    samples: int,
    experts: bool = False,
) -> tuple[latent_cache.Entries, jax.Array, jax.Array | None]:
    """Reads each prompt once.

    Args:
        prompts: int32 [P, S], padded on the right; lengths: int32 [P].

    Returns:
        Its cache entries and the next token's logits, `samples` times each; where `experts` are wanted, those its
        tokens chose, int32 [P, S, layers, k].
    """
    real = (jnp.arange(prompts.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    output = model.apply(variables, prompts, segments=real, temperature=temperature)
    final = dataclasses.replace(output, hidden=jnp.take_along_axis(output.hidden, lengths[:, None, None] - 1, axis=1))
    entries = latent_cache.repeated(output.entries, samples)
    return entries, jnp.repeat(final.logits[:, 0], samples, axis=0), output.expert_ids if experts else None


@functools.partial(jax.jit, static_argnames=('model', 'rows', 'max_tokens', 'experts'))
def empty_pool(model: Model, entries: latent_cache.Entries, rows: int, max_tokens: int, experts: bool = False) -> Pool:
    """A pool without answers, for prompts as wide as those that gave `entries` of `prefill`.

    experts: whether those that the tokens choose are kept.
    """
    slots = next(iter(entries.values())).shape[2] + max_tokens
    cache = latent_cache.empty(entries, [count for _, _, count in layer_parts(model.config)], rows, slots)

    def split(x: jax.Array, *before: None) -> jax.Array:
        return constrain(x, *before, 'batch', *(None for _ in x.shape[len(before) + 1 :]))

    def blank(dtype: Any, *shape: int) -> jax.Array:
        return split(jnp.zeros((rows, *shape), dtype))

    pool = {
        'step': jnp.zeros((), jnp.int32),
        'prompts': blank(jnp.int32),
        'counts': blank(jnp.int32),
        'done': ~blank(jnp.bool_),
        'keys': jax.random.split(jax.random.key(0), rows),
        'logits': blank(jnp.float32, model.config.vocab_size),
        'cache': jax.tree.map(lambda x: split(x, None), cache),
        'tokens': blank(jnp.int32, max_tokens),
        'logprobs': blank(jnp.float32, max_tokens),
    }
    if not experts:
        return pool
    kept = model.config.num_moe_layers, model.config.num_experts_per_tok
    return {**pool, 'experts': blank(jnp.int32, max_tokens, *kept)}


@functools.partial(jax.jit, donate_argnames=('pool',))
def admit(
    pool: Pool, rows: jax.Array, entries: latent_cache.Entries, logits: jax.Array, lengths: jax.Array, keys: jax.Array
) -> Pool:
    """The pool with answers begun in the given rows, which must be done.

    Args:
        rows: int32 [N], different ones; entries, logits: of `prefill`, N answers; lengths: int32 [N], of the prompts.
        keys: one an answer.
    """
    return {
        **pool,
        'cache': latent_cache.begun(pool['cache'], entries, rows),
        'prompts': pool['prompts'].at[rows].set(lengths),
        'counts': pool['counts'].at[rows].set(0),
        'done': pool['done'].at[rows].set(False),
        'keys': pool['keys'].at[rows].set(keys),
        'logits': pool['logits'].at[rows].set(logits),
    }


@functools.partial(jax.jit, static_argnames=('model', 'stop'), donate_argnames=('pool',))
def decode(
    model: Model,
    variables: Variables,
    pool: Pool,
    temperature: jax.Array,
    greedy: jax.Array,
    enough: jax.Array,
    stop: int,
) -> Pool:
    """Samples a token a row and step, until `enough` rows (int32) are done: by the stop token or by max_tokens.

    greedy: bool, not static, so that sampling of either kind compiles once. A row that is done keeps what it wrote.
    """
    longest = pool['tokens'].shape[1]
    width = jax.tree.leaves(pool['cache'])[0].shape[2] - longest
    model, variables = merge_adapters(model, variables)
    variables = model.in_parts(variables)

    def likeliest(logits: jax.Array, *_: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[0], jnp.float32)

    def drawn(logits: jax.Array, keys: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        return draw(logits, jax.vmap(jax.random.fold_in)(keys, counts))

    def step(pool: Pool) -> Pool:
        place, was_done, counts = pool['step'] % longest, pool['done'], pool['counts']

        def noted(name: str, new: jax.Array) -> jax.Array:
            old = lax.dynamic_index_in_dim(pool[name], place, axis=1, keepdims=False)
            new = jnp.where(was_done.reshape(-1, *(1 for _ in new.shape[1:])), old, new)
            return lax.dynamic_update_index_in_dim(pool[name], new, place, axis=1)

        token, logprob = lax.cond(greedy, likeliest, drawn, pool['logits'], pool['keys'], counts)
        token = jnp.where(was_done, stop, token)
        # How many steps ago each place of the ring was written.
        age = (place - 1 - jnp.arange(longest)) % longest
        written = age[None] < counts[:, None]
        valid = jnp.concatenate([jnp.arange(width)[None] < pool['prompts'][:, None], written], axis=1)
        done = was_done | (token == stop)
        live = jnp.where(done, 0, 1)[:, None]
        position = (pool['prompts'] + counts)[:, None]
        out = model.apply(variables, token[:, None], position, live, temperature, pool['cache'], valid)
        # The same place, but known only when all layers have read the cache: with nothing to wait for XLA:CPU would
        # copy the whole cache for every token, to be free to write before.
        slot = width + jnp.minimum(place, place + jnp.isnan(out.logits[0, 0, 0]))
        counts = jnp.where(was_done, counts, counts + 1)
        after = {
            **pool,
            'step': pool['step'] + 1,
            'counts': counts,
            'done': done | (counts >= longest),
            'logits': out.logits[:, 0],
            'cache': latent_cache.written(pool['cache'], out.entries, slot),
            'tokens': noted('tokens', token),
            'logprobs': noted('logprobs', logprob),
        }
        return after if 'experts' not in pool else {**after, 'experts': noted('experts', out.expert_ids[:, 0])}

    with trips(longest):  # as many as it takes when some answer does not end
        return lax.while_loop(lambda pool: jnp.sum(pool['done']) < enough, step, pool)
