"""Reinforcement-learning algorithms: from groups of scored trajectories to an advantage for each of them."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One sampled answer: prompt tokens, sampled tokens with the sampler's log-probabilities, its group, its reward."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    group: int
    reward: float


def group_relative(rewards: np.ndarray, normalize: bool) -> np.ndarray:
    """Group-relative advantages (GRPO: Shao et al. 2024, section 4.1.2).

    A_i = r_i - mean(r), divided by std(r) + 1e-6 if `normalize` (population deviation; Liu et al. 2025, "Dr. GRPO",
    leave it out). A group of equal rewards gives zeros.

    Args:
        rewards: float [groups, samples].
    """
    advantage = rewards - rewards.mean(axis=1, keepdims=True)
    return advantage / (rewards.std(axis=1, keepdims=True) + 1e-6) if normalize else advantage


def rejection(rewards: np.ndarray) -> np.ndarray:
    """Rejection-sampling fine-tuning: weight 1 on every right answer, 0 on the others (Yuan et al. 2023).

    With the policy-gradient objective and no baseline this is the likelihood gradient of the right answers.
    """
    return (rewards >= 1.0).astype(np.float64)
