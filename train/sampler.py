"""Sampling: a prompt is prefilled once, its cache repeated for the group, and tokens drawn in one jitted loop.

The two are compiled apart: a loop serves any number of prompts and samples that make the same number of rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from data.errors import InputError
from data.tokenizer import Tokenizer
from model import cache as latent_cache
from model.backend import trips
from model.sharding import batch_ways
from model.transformer import Model, Variables
from train.host import fetch

WIDTHS = (32, 128, 256)  # prompts are padded to one of these, or to a multiple of 1024: few programs are compiled
ROWS = 256  # about as many answers are sampled at a time
BLOCK = 64  # token probabilities are summed in blocks of this size when one is drawn


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
        text: without control tokens.
        tokens: as sampled, the stop token included.
        logprobs: of each token under the sampling distribution (temperature included; 0 in greedy sampling).
        stopped: whether the stop token ended it, rather than the limit.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    stopped: bool


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


@functools.partial(jax.jit, static_argnames=('model', 'samples'))
def _prefill(
    model: Model,
    variables: Variables,
    prompts: jax.Array,
    lengths: jax.Array,
    temperature: jax.Array,
    samples: int,
) -> tuple[latent_cache.Cache, jax.Array]:
    """Reads each prompt once: its cache entries and the next token's logits, `samples` times each.

    prompts: int32 [P, S], padded on the right; lengths: int32 [P].
    """
    real = (jnp.arange(prompts.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    output = model.apply(variables, prompts, segments=real, temperature=temperature)
    final = dataclasses.replace(output, hidden=jnp.take_along_axis(output.hidden, lengths[:, None, None] - 1, axis=1))
    return latent_cache.repeated(output.entries, samples), jnp.repeat(final.logits[:, 0], samples, axis=0)


@functools.partial(jax.jit, static_argnames=('model', 'max_tokens', 'stop'))
def _decode(
    model: Model,
    variables: Variables,
    entries: latent_cache.Cache,
    logits: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    greedy: jax.Array,
    max_tokens: int,
    stop: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Samples [rows, max_tokens] tokens and log-probabilities, and how many of each row count.

    entries, logits: of `_prefill`; lengths: int32 [rows], of the prompts; keys: one a row; greedy: bool, not static, so
    that sampling of either kind compiles once.
    """
    rows, slots = logits.shape[0], next(iter(entries.values())).shape[2]
    total = slots + max_tokens
    cache = latent_cache.grown(entries, total)

    def choose(logits: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        token, logprob = draw(logits, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index))
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jnp.where(greedy, likeliest, token), jnp.where(greedy, 0.0, logprob)

    def step(carry: Any) -> Any:
        index, logits, cache, done, tokens, logprobs = carry
        token, logprob = choose(logits, index)
        token = jnp.where(done, stop, token)
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, axis=1)
        logprobs = lax.dynamic_update_slice_in_dim(logprobs, jnp.where(done, 0.0, logprob)[:, None], index, axis=1)
        done = done | (token == stop)
        slot = jnp.arange(total)[None]
        valid = (slot < lengths[:, None]) | ((slot >= slots) & (slot < slots + index))
        position = (lengths + index)[:, None]
        live = jnp.where(done, 0, 1)[:, None]
        out = model.apply(variables, token[:, None], position, live, temperature, cache, valid)
        cache = latent_cache.written(cache, out.entries, slots + index)
        return index + 1, out.logits[:, 0], cache, done, tokens, logprobs

    def unfinished(carry: Any) -> jax.Array:
        return (carry[0] < max_tokens) & ~carry[3].all()

    blank = jnp.full((rows, max_tokens), stop, jnp.int32)
    start = (jnp.zeros((), jnp.int32), logits, cache, jnp.zeros(rows, bool), blank, jnp.zeros(blank.shape, jnp.float32))
    with trips(max_tokens):  # as many as it takes when some answer does not end
        _, _, _, _, tokens, logprobs = lax.while_loop(unfinished, step, start)
    is_stop = tokens == stop
    counts = jnp.where(is_stop.any(1), jnp.argmax(is_stop, axis=1) + 1, max_tokens)
    return tokens, logprobs, counts


def sample_tokens(
    model: Model,
    variables: Variables,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    temperature: float,
    max_tokens: int,
    keys: jax.Array,
    rows: int = ROWS,
) -> list[list[Completion]]:
    """Samples `samples` answers to each tokenized prompt; temperature 0 is greedy.

    Args:
        keys: random keys [prompts, samples]: what a row draws depends on its key and prompt alone.
        rows: about how many answers are sampled at a time.

    Raises:
        InputError: an empty prompt, or one that leaves no room for max_tokens in the context of the model.
    """
    room = model.config.max_position_embeddings - max_tokens
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise InputError(
                f'prompt {number} has {len(prompt)} tokens: expected 1 to {room}, the context of '
                f'{model.config.max_position_embeddings} less the {max_tokens} to be sampled'
            )
    group = group_size(len(prompts), samples, rows)
    # Prompts of like length go together; what a prompt draws does not depend on its company.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[Completion]] = [[] for _ in prompts]
    for begin in range(0, len(order), group):
        chosen = order[begin : begin + group]
        filled = chosen + [chosen[-1]] * (group - len(chosen))
        width = prompt_width(max(len(prompts[i]) for i in filled))
        block = np.full((group, width), tokenizer.pad_id, np.int32)
        for row, i in enumerate(filled):
            block[row, : len(prompts[i])] = prompts[i]
        lengths = np.array([len(prompts[i]) for i in filled], np.int32)
        divisor = np.float32(temperature or 1.0)
        entries, logits = _prefill(model, variables, block, lengths, divisor, samples=samples)
        tokens, logprobs, counts = fetch(
            _decode(
                model,
                variables,
                entries,
                logits,
                lengths.repeat(samples),
                keys[np.array(filled)].reshape(-1),
                divisor,
                np.bool_(not temperature),
                max_tokens=max_tokens,
                stop=tokenizer.end_id,
            )
        )
        for row, i in enumerate(chosen):
            for s in range(row * samples, (row + 1) * samples):
                ids = tokens[s, : counts[s]].tolist()
                stopped = ids[-1] == tokenizer.end_id
                text = tokenizer.decode(ids[:-1] if stopped else ids)
                results[i].append(Completion(text, ids, logprobs[s, : counts[s]].tolist(), stopped))
    return results


def group_size(prompts: int, samples: int, rows: int = ROWS) -> int:
    """How many prompts are answered at a time, on the mesh in use; see `sample_tokens`."""
    group = max(1, min(rows // samples, prompts))
    return -(-group // batch_ways()) * batch_ways()


def prompt_width(length: int) -> int:
    """The padded width of a prompt of `length` tokens."""
    return next((width for width in WIDTHS if length <= width), -(-length // 1024) * 1024)


def row_keys(seed: Any, examples: Sequence[int], samples: int) -> jax.Array:
    """Keys [examples, samples], each folded from the seed's key, the example's id and the sample's number."""
    key = seed if isinstance(seed, jax.Array) else jax.random.key(seed)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    per_example = jax.vmap(jax.random.fold_in, (None, 0))(key, np.asarray(examples, np.uint32))
    return fold(per_example, np.arange(samples, dtype=np.uint32))


def sample(
    loaded: Any,
    prompts: Sequence[str],
    n: int = 1,
    temperature: float = 1.0,
    max_tokens: int = 256,
    seed: int = 0,
) -> list[list[Completion]]:
    """Samples n continuations of each text prompt from a loaded checkpoint (`train.checkpoint.load`).

    Raises:
        InputError: a prompt too long for the context.
    """
    tokenizer = loaded.tokenizer
    tokens = [[tokenizer.begin_id, *tokenizer.encode(text)] for text in prompts]
    keys = row_keys(seed, range(len(prompts)), n)
    return sample_tokens(
        loaded.model,
        loaded.variables,
        tokenizer,
        tokens,
        samples=n,
        temperature=temperature,
        max_tokens=max_tokens,
        keys=keys,
    )
