"""Signs that a reward is being gamed: measured beside every rollout, with limits for `alarms` of a stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.tasks import Task, final_answer
from train.act.rewards import Answer

NGRAM = 4
LIMITS = {'reward/gap': 0.25, 'rollout/repetition': 0.5}


def repetition(tokens: Sequence[int]) -> float:
    """Share of an answer's n-grams (of NGRAM tokens) that it had before."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def signs(
    answers: Sequence[Answer], rewards: Sequence[float], tokens: Sequence[Sequence[int]], strict: Sequence[Task | None]
) -> dict[str, float]:
    """Metrics of some answers: what they earned beside what a verifier gives them, their form, how they repeat.

    Args:
        rewards: that they earned; tokens: that the model wrote.
        strict: for each a stricter task whose verifier is asked instead of that of its own task.
    """
    judged = [
        (other.verify(answer.prompt, answer.text) if other is not None else answer.verdict).score * answer.stopped
        for answer, other in zip(answers, strict, strict=True)
    ]
    return {
        'reward/verified': float(np.mean(judged)),
        'reward/gap': float(np.mean(rewards) - np.mean(judged)),
        'rollout/format': float(np.mean([final_answer(answer.text) is not None for answer in answers])),
        'rollout/repetition': float(np.mean([repetition(x) for x in tokens])),
    }
