"""From problems to answers: one turn of the model, or an exchange with an environment until one of them ends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
Item = TypeVar('Item')
Result = TypeVar('Result')

# Prompts [n] and keys [n, samples] -> completions [n][samples].
Sample = Callable[[list[list[int]], jax.Array], list[list[Completion]]]


@dataclasses.dataclass
class Episode:
    """What came of one problem in one sample: see `train.algorithms.Trajectory`; `text` is what the model said last."""

    prompt: list[int]
    tokens: list[int]
    learnt: list[bool]
    logprobs: list[float]
    text: str
    stopped: bool
    verdict: Verdict
    turns: int
    expert_ids: np.ndarray | None

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
    games = [
        _Game(task, prompt, start, completion, tokenizer)
        for task, prompt, start, group in zip(tasks, prompts, starts, sample(starts, keys), strict=True)
        for completion in group
    ]
    flat, turn = keys.reshape(-1), 1
    while going := [i for i, game in enumerate(games) if game.answer()]:
        # As many rows as a power of two, so that few programs are compiled.
        rows = going + going[-1:] * (2 ** (len(going) - 1).bit_length() - len(going))
        fresh = jax.vmap(lambda key, turn=turn: jax.random.fold_in(key, turn))(flat[np.array(rows)])
        said = sample([games[i].heard for i in rows], fresh[:, None])
        for i, (completion,) in zip(going, said, strict=False):
            games[i].hear(completion)
        turn += 1
    episodes, samples = in_threads(_Game.episode, games), keys.shape[1]
    return [episodes[i : i + samples] for i in range(0, len(games), samples)]


def in_threads(judge: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The judge's results in order, several at a time: one that runs a program mostly waits for it."""
    with ThreadPoolExecutor(JUDGES) as pool:
        return list(pool.map(judge, items))


class _Game:
    """One problem under way."""

    def __init__(self, task: Task, prompt: Prompt, start: list[int], completion: Completion, tokenizer: Tokenizer):
        self._task, self._prompt, self._tokenizer = task, prompt, tokenizer
        self._start = start
        self._messages: list[dict[str, Any]] = [{'role': 'user', 'content': prompt.text}]
        self._transcript: list[Turn] = []
        self._tokens: list[int] = []
        self._learnt: list[bool] = []
        self._logprobs: list[float] = []
        self.hear(completion)

    def hear(self, completion: Completion) -> None:
        """Takes down what the model said."""
        self._last = completion
        self._tokens += completion.tokens
        self._learnt += [True] * len(completion.tokens)
        self._logprobs += completion.logprobs
        self._transcript.append(Turn('assistant', completion.text))
        self._messages.append({'role': 'assistant', 'content': completion.text})

    @property
    def heard(self) -> list[int]:
        """All that the model has to read before it speaks again."""
        return self._start + self._tokens

    def answer(self) -> bool:
        """Lets the environment reply; whether the model is to speak again."""
        task = self._task
        if not isinstance(task, Environment) or not self._last.stopped:
            return False
        if sum(turn.role == 'assistant' for turn in self._transcript) >= task.turns:
            return False
        if self._transcript[-1].role != 'assistant':
            return False
        reply = task.reply(self._prompt, self._transcript)
        if reply.done:
            return False
        self._transcript.append(reply)
        before, _ = render_chat(self._messages, self._tokenizer)
        self._messages.append({'role': reply.role, 'content': reply.text})
        after, _ = render_chat(self._messages, self._tokenizer, add_generation_prompt=True)
        if after[: len(before)] != before:
            raise InputError('chat template: it rewrites what was said before; expected one that only appends')
        self._tokens += after[len(before) :]
        self._learnt += [False] * (len(after) - len(before))
        return True

    def episode(self) -> Episode:
        """What came of it."""
        if isinstance(self._task, Environment):
            verdict = self._task.judge(self._prompt, self._transcript)
        else:
            verdict = self._task.verify(self._prompt, self._last.text)
        return Episode(
            self._start,
            self._tokens,
            self._learnt,
            self._logprobs,
            self._last.text,
            self._last.stopped,
            verdict,
            sum(turn.role == 'assistant' for turn in self._transcript),
            self._last.expert_ids,
        )
