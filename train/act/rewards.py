"""What a sampled answer earns: the verifier's score, its parts, or a control that knows nothing of the problem."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data.tasks import Part, Prompt, Task, Verdict, final_answer
from data.tokenizer import Tokenizer


class Answer(NamedTuple):
    """An answer to be rewarded: its problem, what the verifier said, its text, number among the samples, and whether it
    ended by itself."""

    task: Task
    prompt: Prompt
    verdict: Verdict
    text: str
    sample: int
    stopped: bool


Reward = Callable[[Answer], float]


def verifier_reward(answer: Answer) -> float:
    """The verifier's score; an answer that did not end by itself earns nothing."""
    return answer.verdict.score if answer.stopped else 0.0


def format_reward(answer: Answer) -> float:
    """A control arm: 1 for any answer in the right form, right or wrong."""
    return float(answer.stopped and final_answer(answer.text) is not None)


def random_reward(answer: Answer) -> float:
    """A control arm: a coin thrown for each problem and sample, blind to the answer."""
    # No checksum: a single changed digit would always, or never, turn its last bit.
    return float(hashlib.blake2b(f'{answer.prompt.key} {answer.sample}'.encode(), digest_size=1).digest()[0] & 1)


def no_reward(answer: Answer) -> float:
    """None: what is learnt comes from elsewhere, as from a teacher or a reward model."""
    return 0.0


REWARDS: dict[str, Reward] = {
    'verifier': verifier_reward,
    'format': format_reward,
    'random': random_reward,
    'none': no_reward,
}


def step_rewards(parts: Sequence[Part], tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The scores of judged steps at the tokens that complete them, and where there are any: float and bool [tokens].

    A step that is missing, and so has no place in the answer, counts at the last token.
    """
    ends = [len(tokenizer.decode(tokens[: count + 1])) for count in range(len(tokens))]
    rewards, judged = np.zeros(len(tokens)), np.zeros(len(tokens), bool)
    for part in parts:
        place = bisect.bisect_left(ends, part.end) if part.start < part.end else len(tokens)
        place = min(place, len(tokens) - 1)
        rewards[place] += part.score
        judged[place] = True
    return rewards, judged
