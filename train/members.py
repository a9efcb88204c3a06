"""Members of committees from their specs: checkpoints of our own, and endpoints, behind the same plain calls."""

from __future__ import annotations

import inspect
import json
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data.chat import render_chat
from data.committee import Item, Judge, Messages, Vote
from data.endpoint import Endpoint
from data.errors import InputError, did_you_mean
from data.mixture import as_dict
from model.sharding import batch_ways
from train.checkpoint import Loaded, load
from train.host import fetch
from train.sampler import prompt_width, row_keys, sample_tokens

ROW_TOKENS = 8192  # about as many are scored at a time


class CheckpointMember:
    """A loaded checkpoint as a generator, by calling it, and by `logprobs` as a scorer (see `data.committee`).

    Attributes:
        usage: tokens read and written.
    """

    def __init__(self, loaded: Loaded, temperature: float = 1.0, max_tokens: int = 256):
        self._loaded, self._temperature, self._max_tokens = loaded, temperature, max_tokens
        self._score = jax.jit(lambda variables, b: loaded.model.apply(variables, b[0], segments=b[1]).logprob)
        self.usage: Counter[str] = Counter(prompt_tokens=0, completion_tokens=0)

    def __call__(self, prompts: Sequence[Messages], n: int, seed: int) -> list[list[str]]:
        """n answers to each chat; '' for one that the limit ended. Draws depend on the prompt's words, the seed and the
        sample's number alone. Raises InputError for a prompt too long for the context.
        """
        if not prompts:
            return []
        tokens = [self._tokens(prompt) for prompt in prompts]
        names = [zlib.crc32(json.dumps(ids).encode()) for ids in tokens]
        groups = sample_tokens(
            self._loaded.model,
            self._loaded.variables,
            self._loaded.tokenizer,
            tokens,
            samples=n,
            temperature=self._temperature,
            max_tokens=self._max_tokens,
            keys=row_keys(seed, names, n),
        )
        self.usage['prompt_tokens'] += sum(map(len, tokens))
        self.usage['completion_tokens'] += sum(len(answer.tokens) for group in groups for answer in group)
        return [[answer.text if answer.stopped else '' for answer in group] for group in groups]

    def logprobs(self, prompts: Sequence[Messages], options: Sequence[str]) -> list[list[float]]:
        """The log-probability of each option as the whole answer to each prompt, at temperature 1."""
        sums = [math.fsum(x) for x in self.token_logprobs([Item(p, option) for p in prompts for option in options])]
        return [sums[i : i + len(options)] for i in range(0, len(sums), len(options))]

    def token_logprobs(self, items: Sequence[Item]) -> list[np.ndarray]:
        """Log-probabilities of the tokens of each answer, its stop token included.

        Raises InputError for a prompt and answer longer than the context.
        """
        tokenizer, room = self._loaded.tokenizer, self._loaded.model.config.max_position_embeddings
        starts, rows = [], []
        for number, item in enumerate(items):
            tokens = self._tokens(item.prompt)
            starts.append(len(tokens))
            rows.append([*tokens, *tokenizer.encode(item.answer), tokenizer.end_id])
            if len(rows[-1]) > room:
                raise InputError(f'answer {number}: {len(rows[-1])} tokens with its prompt: expected {room} at most')
        found: list[np.ndarray] = [np.zeros(0)] * len(items)
        order = sorted(range(len(items)), key=lambda i: len(rows[i]))
        while order:
            # The longest first: what fits beside it has its width.
            width, ways = prompt_width(len(rows[order[-1]])), batch_ways()
            count = min(max(1, ROW_TOKENS // width), 1 << (len(order) - 1).bit_length())
            count = -(-count // ways) * ways
            chosen, order = order[-count:], order[:-count]
            block = np.full((2, count, width), tokenizer.pad_id, np.int32)
            block[1] = 0
            for place, i in enumerate(chosen):
                block[:, place, : len(rows[i])] = np.array([rows[i], [1] * len(rows[i])])
            values = np.asarray(fetch(self._score(self._loaded.variables, block)), np.float64)
            for place, i in enumerate(chosen):
                found[i] = values[place, starts[i] : len(rows[i])]
        self.usage['prompt_tokens'] += sum(map(len, rows))
        return found

    def _tokens(self, prompt: Messages) -> list[int]:
        return render_chat(prompt, self._loaded.tokenizer, add_generation_prompt=True)[0]


def likelihood_judge(member: CheckpointMember, threshold: float) -> Judge:
    """Accepts answers whose tokens have a mean log-probability of `threshold` or more; the score is its exponential."""

    def judge(items: Sequence[Item], seed: int) -> list[Vote]:
        means = [values.mean().item() for values in member.token_logprobs(items)]
        return [Vote(bool(mean >= threshold), min(1.0, math.exp(mean))) for mean in means]

    return judge


def make_member(spec: Mapping[str, Any]) -> CheckpointMember | Endpoint:
    """The generator and scorer that a spec describes: {'type': TYPE, option: value, ...}.

      checkpoint   path (DIR/STAGE[@STEP]), temperature, max_tokens
      endpoint     url, model, cache, and the other arguments of `data.endpoint.Endpoint`

    Raises InputError for an unknown type or option, a missing one, or what the type itself refuses.
    """
    options = as_dict(spec)
    kind = options.pop('type', None)
    if kind not in _TYPES:
        raise InputError(f'member: type {kind!r}{did_you_mean(str(kind), _TYPES)}')
    try:
        inspect.signature(_TYPES[kind]).bind(**options)
    except TypeError as error:
        raise InputError(f'member {kind}: {error}') from error
    return _TYPES[kind](**options)


_TYPES: dict[str, Any] = {
    'checkpoint': lambda path, temperature=1.0, max_tokens=256: CheckpointMember(load(path), temperature, max_tokens),
    'endpoint': Endpoint,
}
