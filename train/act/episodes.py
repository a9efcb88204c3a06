"""From problems to answers: one turn of the model, or an exchange with an environment until one of them ends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

from data.chat import render_chat
from data.errors import InputError
from data.tasks import Environment, Prompt, Task, Turn, Verdict
from data.tokenizer import Tokenizer
from train.sampler import Completion

JUDGES = 4  # answers judged at a time
LEAST_ROWS = 16  # that speak at a time, a power of two: fewer hardly cost less
Item = TypeVar('Item')
Result = TypeVar('Result')

# Prompts [n] and keys [n, samples] -> completions [n][samples].
Sample = Callable[[list[list[int]], jax.Array], list[list[Completion]]]


@dataclasses.dataclass
class Episode:
    """What came of one problem in one sample: see `train.act.algorithms.Trajectory`; `text` is what the model said
    last, `messages` the whole exchange as a chat."""

    prompt: list[int]
    tokens: list[int]
    learnt: list[bool]
    logprobs: list[float]
    text: str
    stopped: bool
    verdict: Verdict
    turns: int
    expert_ids: np.ndarray | None
    messages: list[dict[str, Any]]

    @property
    def said(self) -> list[int]:
        """The tokens that the model wrote."""
        return [token for token, own in zip(self.tokens, self.learnt, strict=True) if own]


def chat_prompt(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """A task's problem as the user's turn, with the assistant about to speak."""
    return render_chat([{'role': 'user', 'content': prompt.text}], tokenizer, add_generation_prompt=True)[0]


def play(
    tasks: Sequence[Task], prompts: Sequence[Prompt], tokenizer: Tokenizer, sample: Sample, keys: jax.Array
) -> list[list[Episode]]:
    """Answers to each problem, judged; `keys` [problems, samples] decide what is drawn.

    An environment replies to each turn of the model, until it says that this was the last one or has seen as many turns
    as it allows; answers that did not end by themselves end there.
    """
    starts = [chat_prompt(prompt, tokenizer) for prompt in prompts]
    posed: list[tuple[Task, Prompt, Exchange]] = []
    for task, prompt, start, group in zip(tasks, prompts, starts, sample(starts, keys), strict=True):
        for completion in group:
            posed.append((task, prompt, Exchange(prompt, start, tokenizer)))
            posed[-1][2].hear(completion)
    flat, turn = keys.reshape(-1), 1
    going = dict(enumerate(posed))
    while going := {i: one for i, one in going.items() if _answered(*one)}:
        speak(sample, {i: exchange for i, (_, _, exchange) in going.items()}, flat, turn)
        turn += 1
    episodes, samples = in_threads(lambda one: _judged(*one), posed), keys.shape[1]
    return [episodes[i : i + samples] for i in range(0, len(posed), samples)]


def speak(sample: Sample, exchanges: Mapping[int, Exchange], keys: jax.Array, turn: int) -> None:
    """Lets the model speak in each of some exchanges, by their numbers among all; `keys`, of all, are folded with the
    turn."""
    rows = padded(list(exchanges), LEAST_ROWS)
    fresh = jax.vmap(lambda key: jax.random.fold_in(key, turn))(keys[np.array(rows)])
    said = sample([exchanges[i].heard for i in rows], fresh[:, None])
    for exchange, (completion,) in zip(exchanges.values(), said, strict=False):
        exchange.hear(completion)


def padded(items: Sequence[Item], least: int = 1) -> list[Item]:
    """As many as a power of two, the last one repeated, so that few programs are compiled."""
    return [*items, *[items[-1]] * (max(least, 2 ** (len(items) - 1).bit_length()) - len(items))]


def in_threads(judge: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The judge's results in order, several at a time: one that runs a program mostly waits for it."""
    with ThreadPoolExecutor(JUDGES) as pool:
        return list(pool.map(judge, items))


class Exchange:
    """What was said of one problem so far, as one who takes part in it reads and writes it."""

    def __init__(self, prompt: Prompt, start: list[int], tokenizer: Tokenizer):
        """`start` is the prompt's `chat_prompt`."""
        self._tokenizer, self._start = tokenizer, start
        self._messages: list[dict[str, Any]] = [{'role': 'user', 'content': prompt.text}]
        self.transcript: list[Turn] = []
        self._tokens: list[int] = []
        self._learnt: list[bool] = []
        self._logprobs: list[float] = []

    def hear(self, completion: Completion) -> None:
        """Takes down what the model said."""
        self.last = completion
        self._tokens += completion.tokens
        self._learnt += [True] * len(completion.tokens)
        self._logprobs += completion.logprobs
        self.transcript.append(Turn('assistant', completion.text))
        self._messages.append({'role': 'assistant', 'content': completion.text})

    def tell(self, reply: Turn) -> None:
        """Takes down what somebody else said, which is not to be learnt."""
        self.transcript.append(reply)
        before, _ = render_chat(self._messages, self._tokenizer)
        self._messages.append({'role': reply.role, 'content': reply.text})
        after, _ = render_chat(self._messages, self._tokenizer, add_generation_prompt=True)
        if after[: len(before)] != before:
            raise InputError('chat template: it rewrites what was said before; expected one that only appends')
        self._tokens += after[len(before) :]
        self._learnt += [False] * (len(after) - len(before))

    @property
    def heard(self) -> list[int]:
        """All that the model has to read before it speaks again."""
        return self._start + self._tokens

    @property
    def turns(self) -> int:
        """How often the model spoke."""
        return sum(turn.role == 'assistant' for turn in self.transcript)

    def episode(self, verdict: Verdict) -> Episode:
        """What came of it."""
        return Episode(
            self._start,
            self._tokens,
            self._learnt,
            self._logprobs,
            self.last.text,
            self.last.stopped,
            verdict,
            self.turns,
            self.last.expert_ids,
            self._messages,
        )


def _answered(task: Task, prompt: Prompt, exchange: Exchange) -> bool:
    """Lets the environment reply, where there is one; whether the model is to speak again."""
    if not isinstance(task, Environment) or not exchange.last.stopped or exchange.turns >= task.turns:
        return False
    reply = task.reply(prompt, exchange.transcript)
    if not reply.done:
        exchange.tell(reply)
    return not reply.done


def _judged(task: Task, prompt: Prompt, exchange: Exchange) -> Episode:
    if isinstance(task, Environment):
        return exchange.episode(task.judge(prompt, exchange.transcript))
    return exchange.episode(task.verify(prompt, exchange.last.text))
