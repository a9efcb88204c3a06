"""Members of committees from their specs: checkpoints of our own, and endpoints, behind the same plain calls."""

from __future__ import annotations

import inspect
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.chat import render_chat
from data.committee import Generator, Item, Judge, Messages, Vote
from data.endpoint import Endpoint
from data.errors import InputError, did_you_mean
from data.mixture import as_dict
from data.packing import Segment
from data.tokenizer import Tokenizer
from model.sharding import batch_ways
from train.checkpoint import Loaded
from train.measure.scoring import Other, Scorer
from train.sampler import prompt_width, row_keys, sample_tokens

ROW_TOKENS = 8192  # about as many are scored in one call,
PARTS = 8  # in so many parts, of which empty ones cost nothing


class CheckpointMember:
    """A loaded checkpoint as a generator, by calling it, and by `logprobs` as a scorer (see `data.committee`).

    Attributes:
        usage: tokens read and written.
    """

    def __init__(self, loaded: Loaded, temperature: float = 1.0, max_tokens: int = 256):
        self._loaded, self._temperature, self._max_tokens = loaded, temperature, max_tokens
        self._room = loaded.model.config.max_position_embeddings
        self._scorers: dict[int, Scorer] = {}  # by the width of their rows
        self.usage: Counter[str] = Counter(prompt_tokens=0, completion_tokens=0, flops=0)

    def __call__(self, prompts: Sequence[Messages], n: int, seed: int) -> list[list[str]]:
        """n answers to each chat; '' for one that the limit ended, or whose prompt leaves it no room.
        Draws depend on the prompt's words, the seed and the sample's number alone. Raises InputError where none would
        have room.
        """
        if self._max_tokens >= self._room:
            raise InputError(f'max_tokens is {self._max_tokens}: expected less than the context of {self._room}')
        everything = [self._tokens(prompt) for prompt in prompts]
        tokens = [ids for ids in everything if len(ids) <= self._room - self._max_tokens]
        if not tokens:
            return [[''] * n for _ in prompts]
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
        self._spend(tokens, [answer.tokens for group in groups for answer in group])
        answers = iter([[answer.text if answer.stopped else '' for answer in group] for group in groups])
        return [next(answers) if len(ids) <= self._room - self._max_tokens else [''] * n for ids in everything]

    def logprobs(self, prompts: Sequence[Messages], options: Sequence[str]) -> list[list[float]]:
        """The log-probability of each option as the whole answer to each prompt, at temperature 1; -inf for one
        that does not fit into the context with its prompt."""
        sums = [
            math.fsum(x) if len(x) else -math.inf
            for x in self.token_logprobs([Item(p, option) for p in prompts for option in options])
        ]
        return [sums[i : i + len(options)] for i in range(0, len(sums), len(options))]

    def token_logprobs(self, items: Sequence[Item]) -> list[np.ndarray]:
        """Log-probabilities of the tokens of each answer, its stop token included; none where the context is too short
        for prompt and answer."""
        return self._said(items, 'logprob')

    def values(self, items: Sequence[Item]) -> list[float | None]:
        """What the value head says at each answer's stop token; None as above. Raises InputError without one."""
        if not self._loaded.model.config.value_head:
            raise InputError('a model without a value head: expected a reward model')
        return [values[-1].item() if len(values) else None for values in self._said(items, 'value')]

    def _said(self, items: Sequence[Item], name: str) -> list[np.ndarray]:
        """A field of `model.heads.Output` at the tokens of each answer, its stop token included."""
        tokenizer = self._loaded.tokenizer
        starts, rows = [], []
        for item in items:
            tokens = self._tokens(item.prompt)
            starts.append(len(tokens))
            rows.append([*tokens, *tokenizer.encode(item.answer), tokenizer.end_id])
        found: list[np.ndarray] = [np.zeros(0)] * len(items)
        widths = {i: prompt_width(len(row)) for i, row in enumerate(rows) if len(row) <= self._room}
        for width in set(widths.values()):
            chosen = [i for i in widths if widths[i] == width]
            segments = [Segment(rows[i], np.ones(len(rows[i]))) for i in chosen]
            said = self._scorer(width)(self._loaded.variables, segments, (name,))
            for i, fields in zip(chosen, said, strict=True):
                found[i] = np.asarray(fields[name][starts[i] :], np.float64)
        self._spend([rows[i] for i in widths], [])
        return found

    def _scorer(self, width: int) -> Scorer:
        if width not in self._scorers:
            ways = batch_ways()
            part = -(-max(1, ROW_TOKENS // PARTS // width) // ways) * ways
            shape = {'batch_size': PARTS * part, 'microbatches': PARTS, 'sequence_length': width}
            self._scorers[width] = Scorer(self._loaded.model, self._loaded.tokenizer.pad_id, shape)
        return self._scorers[width]

    def _spend(self, read: Sequence[Sequence[int]], written: Sequence[Sequence[int]]) -> None:
        """Counts tokens, and the FLOPs of as many at their mean length."""
        counts = [sum(map(len, tokens)) for tokens in (read, written)]
        length = sum(counts) / max(len(read), len(written), 1)
        flops = sum(counts) * self._loaded.model.flops_per_token(length, backward=False)
        self.usage.update(prompt_tokens=counts[0], completion_tokens=counts[1], flops=round(flops))

    def _tokens(self, prompt: Messages) -> list[int]:
        return render_chat(prompt, self._loaded.tokenizer, add_generation_prompt=True)[0]


def _judge(
    read: Callable[[Sequence[Item]], list[float | None]], threshold: float, score: Callable[[float], float]
) -> Judge:
    """Accepts what has `threshold` or more of what is read of it, and abstains where that is None."""

    def judge(items: Sequence[Item], seed: int) -> list[Vote]:
        return [Vote(None) if x is None else Vote(bool(x >= threshold), score(x)) for x in read(items)]

    return judge


def likelihood_judge(member: CheckpointMember, threshold: float) -> Judge:
    """Accepts answers whose tokens have a mean log-probability of `threshold` or more; the score is its exponential. It
    abstains on those too long for its context."""

    def means(items: Sequence[Item]) -> list[float | None]:
        return [values.mean().item() if len(values) else None for values in member.token_logprobs(items)]

    return _judge(means, threshold, lambda x: min(1.0, math.exp(x)))


def reward_judge(member: CheckpointMember, threshold: float = 0.0) -> Judge:
    """Accepts answers that a reward model gives `threshold` or more; the score is the reward's logistic. It abstains on
    those too long for its context."""
    return _judge(member.values, threshold, lambda x: 0.5 + math.tanh(x / 2) / 2)


def chosen(table: Mapping[str, Callable[..., Any]], spec: Mapping[str, Any], what: str, *given: Any) -> Any:
    """What the entry of a table that a spec {'type': TYPE, option: value, ...} names makes of `given` and its options.

    Raises InputError, beginning with `what`, for an unknown type or option, a missing one, or what the type refuses.
    """
    options = as_dict(spec)
    kind = options.pop('type', None)
    if kind not in table:
        raise InputError(f'{what}: type {kind!r}{did_you_mean(str(kind), table)}')
    try:
        inspect.signature(table[kind]).bind(*given, **options)
    except TypeError as error:
        raise InputError(f'{what} {kind}: {error}') from error
    return table[kind](*given, **options)


class Members:
    """Generators and judges of a stage, each made where it is first asked for.

    Attributes:
        used: all that were made, by what they are for.
    """

    def __init__(self, config: Mapping[str, Any], models: Mapping[str, Other], tokenizer: Tokenizer, folder: Path):
        """
        Args:
            config: of the stage: `endpoints`, arguments of `Endpoint` by name; `temperature` and `max_tokens` of
                generators.
            models: checkpoints by name; of one name the checkpoint counts.
            folder: where replies of endpoints are kept that name no cache.
        """
        self._config, self._models, self._tokenizer, self._folder = config, models, tokenizer, folder
        self._endpoints = as_dict(config['endpoints'])
        self._known = [*self._models, *self._endpoints]
        self._asked: set[str] = set()
        self.used: dict[str, Any] = {}

    def generators(self) -> dict[str, Generator]:
        """All members whose name begins with 'generator'. Raises InputError where there are none."""
        c = self._config
        names = [name for name in sorted(self._known) if name.startswith('generator')]
        if not names:
            raise InputError('models.generator is empty: expected a stage that answers, or endpoints.generator')
        return {name: self.member(f'generator {name}', name, c['temperature'], c['max_tokens']) for name in names}

    def member(self, purpose: str, name: str, temperature: float = 1.0, max_tokens: int = 256) -> Any:
        """The checkpoint or endpoint of that name. An endpoint's own settings come before these."""
        if name not in self._known:
            raise InputError(f'{purpose}: no model or endpoint {name!r}{did_you_mean(name, self._known)}')
        self._asked.add(name)
        if purpose not in self.used and name in self._models:
            loaded = Loaded(*self._models[name], self._tokenizer, {}, {})
            self.used[purpose] = CheckpointMember(loaded, temperature, max_tokens)
        elif purpose not in self.used:
            spec = {'cache': str(self._folder / f'{name}.replies.jsonl'), **as_dict(self._endpoints[name])}
            settings = {'temperature': temperature, 'max_tokens': max_tokens, **as_dict(spec.get('settings', {}))}
            wanted = {**spec, 'type': 'endpoint', 'settings': settings}
            self.used[purpose] = chosen({'endpoint': Endpoint}, wanted, 'member')
        return self.used[purpose]

    def no_others(self) -> None:
        """Raises InputError for a member that nothing has asked for."""
        for name in sorted(set(self._known) - self._asked):
            wanted = "a name that begins with 'generator', or one that a judge has as its model"
            raise InputError(f'models.{name}: unknown role: expected {wanted}')
