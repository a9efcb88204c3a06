"""Sampling: a prompt is read once for its group of answers; rows whose answer is done are given to the next prompts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from data.errors import InputError
from data.tokenizer import Tokenizer
from model.sharding import batch_ways
from model.transformer import Model, Variables
from train.act.decoding import Pool, admit, decode, empty_pool, prefill
from train.launch.host import fetch

WIDTHS = (32, 128, 256)  # prompts are padded to one of these, or to a multiple of 1024: few programs are compiled
ROWS = 256  # about as many answers are sampled at a time
REFILLS = 4  # a full pool is refilled when one row in so many is done


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
        text: without control tokens.
        tokens: as sampled, the stop token included.
        logprobs: of each token under the sampling distribution (temperature included; 0 in greedy sampling).
        stopped: whether the stop token ended it, rather than the limit.
        expert_ids: where they were asked for, the experts that the prompt's tokens and then these chose, int32
            [prompt + tokens, layers, k].
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    expert_ids: np.ndarray | None = None


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
    experts: bool = False,
) -> list[list[Completion]]:
    """Samples `samples` answers to each tokenized prompt; temperature 0 is greedy.

    Args:
        keys: random keys [prompts, samples]: what a row draws depends on its key and prompt alone.
        rows: about how many answers are sampled at a time.
        experts: whether completions are to say which experts their tokens chose.

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
    group, pool_rows = pool_size(len(prompts), samples, rows)
    results: list[list[Completion]] = [[None] * samples for _ in prompts]  # type: ignore[list-item]
    for width, chosen in _buckets([len(prompt) for prompt in prompts], pool_rows > group * samples):
        sampler = _Sampler(model, variables, tokenizer, samples, max_tokens, temperature, pool_rows, experts)
        waiting = [chosen[i : i + group] for i in range(0, len(chosen), group)]
        while waiting or sampler.answers:
            while waiting and len(sampler.answers) <= pool_rows - group * samples:
                numbers = waiting.pop(0)
                filled = numbers + numbers[-1:] * (group - len(numbers))
                sampler.begin(filled, len(numbers), [prompts[i] for i in filled], width, keys[np.array(filled)])
            for i, sample, completion in sampler.go_on(group * samples if waiting else pool_rows):
                results[i][sample] = completion
    return results


class _Sampler:
    """The host's side of a pool: which row writes which answer, and since when."""

    def __init__(
        self,
        model: Model,
        variables: Variables,
        tokenizer: Tokenizer,
        samples: int,
        max_tokens: int,
        temperature: float,
        rows: int,
        experts: bool,
    ):
        self._model, self._variables, self._tokenizer = model, variables, tokenizer
        self._samples, self._max_tokens, self._rows = samples, max_tokens, rows
        self._divisor, self._greedy = np.float32(temperature or 1.0), np.bool_(not temperature)
        self._experts = experts and model.config.is_moe
        self._pool: Pool | None = None
        self._read: dict[int, np.ndarray] = {}  # the experts of each prompt's tokens
        self._step = 0
        # Of each row at work: prompt, sample, and the step it began at.
        self.answers: dict[int, tuple[int, int, int]] = {}

    def begin(
        self, numbers: list[int], count: int, prompts: Sequence[Sequence[int]], width: int, keys: jax.Array
    ) -> None:
        """Reads prompts and begins their answers in rows without work; those of the first `count` are wanted."""
        block = np.full((len(prompts), width), self._tokenizer.pad_id, np.int32)
        for place, prompt in enumerate(prompts):
            block[place, : len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        entries, logits, ids = prefill(
            self._model,
            self._variables,
            block,
            lengths,
            self._divisor,
            samples=self._samples,
            experts=self._experts,
        )
        if self._pool is None:
            self._pool = empty_pool(self._model, entries, self._rows, self._max_tokens, self._experts)
        if ids is not None:
            self._read |= {i: x[:n] for i, x, n in zip(numbers, fetch(ids), lengths, strict=True)}
        free = [row for row in range(self._rows) if row not in self.answers][: len(prompts) * self._samples]
        rows = np.array(free, np.int32)
        self._pool = admit(self._pool, rows, entries, logits, lengths.repeat(self._samples), keys.reshape(-1))
        for n, row in enumerate(free):
            place, sample = divmod(n, self._samples)
            self.answers[row] = (numbers[place] if place < count else -1, sample, self._step)

    def go_on(self, enough: int) -> Iterator[tuple[int, int, Completion]]:
        """Decodes until so many rows are without work; gives prompt, sample and answer of each that came to an end."""
        stop = self._tokenizer.end_id
        assert self._pool is not None
        self._pool = decode(
            self._model, self._variables, self._pool, self._divisor, self._greedy, np.int32(enough), stop=stop
        )
        names = ['step', 'done', 'counts', 'tokens', 'logprobs', 'experts'][: 6 if self._experts else 5]
        now = fetch({name: self._pool[name] for name in names})
        self._step = int(now['step'])
        for row in [row for row in self.answers if now['done'][row]]:
            i, sample, begun = self.answers.pop(row)
            if i < 0:
                continue
            places = (begun + np.arange(now['counts'][row])) % self._max_tokens
            tokens = now['tokens'][row, places].tolist()
            stopped = tokens[-1] == stop
            text = self._tokenizer.decode(tokens[:-1] if stopped else tokens)
            ids = np.concatenate([self._read[i], now['experts'][row, places]]) if self._experts else None
            yield i, sample, Completion(text, tokens, now['logprobs'][row, places].tolist(), stopped, ids)


def pool_size(prompts: int, samples: int, rows: int = ROWS) -> tuple[int, int]:
    """How many prompts are read at a time, and the rows of their pool, on the mesh in use; see `sample_tokens`.

    All prompts at once where their answers fit. Otherwise a share of the pool, which is refilled as often as so many
    rows are done.
    """
    ways = batch_ways()
    if prompts * samples <= rows:
        group = -(-prompts // ways) * ways
        return group, group * samples
    group = -(-max(1, rows // (REFILLS * samples)) // ways) * ways
    return group, max(1, rows // (group * samples)) * group * samples


def _buckets(lengths: Sequence[int], apart: bool) -> Iterator[tuple[int, list[int]]]:
    """Numbers of the prompts that are padded to one width, with that width; `apart`: not all to that of the longest."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    if not apart:
        yield prompt_width(lengths[order[-1]]), order
        return
    for width, some in itertools.groupby(order, lambda i: prompt_width(lengths[i])):
        yield width, list(some)


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
