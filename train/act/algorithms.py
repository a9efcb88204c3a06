"""Reinforcement-learning algorithms: from groups of scored trajectories to an advantage for each sampled token.

An algorithm is a function of groups and settings that sets `advantage` (and, of one with a critic, `value_target`) on
every trajectory. Tokens of an answer that the model did not write, an environment's replies, have no advantage; the
others are `learnt`, and rewards, values and log-probabilities are given for them alone, in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


@dataclasses.dataclass
class Trajectory:
    """One sampled answer, or the model's part in an exchange.

    Attributes:
        prompt, tokens: what was read first, and all that came after it.
        learnt: bool [tokens], those that the model wrote.
        logprobs: float [learnt], the sampler's.
        group: number of the problem; sample: of the answer to it.
        rewards: float [learnt], mostly zeros before the last token; judged: bool [learnt], where one was given.
        stopped: whether the answer ended by itself.
        expert_ids: int [prompt + tokens, layers, k], where they were asked for.
        stamps: what was found out about each learnt token, by the names of a batch's arrays: `old_logprob`,
            `reference_logprob`, `teacher_logprob`, `old_value`, `advantage`, `value_target`.
    """

    prompt: list[int]
    tokens: list[int]
    learnt: list[bool]
    logprobs: list[float]
    group: int
    sample: int
    rewards: Array
    judged: Array
    stopped: bool
    expert_ids: Array | None = None
    stamps: dict[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        """Tokens that the model wrote."""
        return len(self.logprobs)


Groups = Sequence[Sequence[Trajectory]]
Algorithm = Callable[[Groups, Mapping[str, Any]], None]


def returns(group: Sequence[Trajectory]) -> Array:
    """float [answers]: what each answer of a group earned in all."""
    return np.array([t.rewards.sum() for t in group])


def per_answer(advantage: Callable[[Array], Array]) -> Algorithm:
    """An algorithm that gives all tokens of an answer one advantage, a function of the `returns` [1, answers] of its
    group: groups may be of different sizes."""

    def algorithm(groups: Groups, _: Mapping[str, Any]) -> None:
        for group in groups:
            for trajectory, value in zip(group, advantage(returns(group)[None])[0], strict=True):
                trajectory.stamps['advantage'] = np.full(trajectory.count, value)

    return algorithm


def group_relative(rewards: Array, normalize: bool) -> Array:
    """A_i = r_i - mean(r) over the answers to one problem, divided by std(r) + 1e-6 if `normalize`.

    GRPO (Shao et al. 2024, section 4.1.2) with the population deviation; Dr. GRPO (Liu et al. 2025, section 3.2) leaves
    the division out. A group of equal rewards gives zeros. rewards: float [groups, samples].
    """
    advantage = rewards - rewards.mean(axis=1, keepdims=True)
    return advantage / (rewards.std(axis=1, keepdims=True) + 1e-6) if normalize else advantage


def leave_one_out(rewards: Array) -> Array:
    """RLOO: A_i = r_i - mean of the others' (Ahmadian et al. 2024, equation 8)."""
    samples = rewards.shape[1]
    return (rewards - rewards.mean(axis=1, keepdims=True)) * samples / max(samples - 1, 1)


def rejection(rewards: Array) -> Array:
    """Rejection-sampling fine-tuning: weight 1 on every right answer, 0 on the others (Yuan et al. 2023).

    With the policy-gradient objective and no baseline this is the likelihood gradient of the right answers.
    """
    return (rewards >= 1.0).astype(np.float64)


def best_of_n(rewards: Array) -> Array:
    """Weight 1 on the first of the best answers to each problem, unless all earned the same (Touvron et al. 2023,
    "Llama 2", section 3.2.3)."""
    best = np.arange(rewards.shape[1])[None] == rewards.argmax(axis=1)[:, None]
    return (best & (rewards.max(axis=1) > rewards.min(axis=1))[:, None]).astype(np.float64)


def whiten(groups: Groups) -> None:
    """Takes advantages to mean 0 and deviation 1 over all tokens of the batch (Bessel's correction; epsilon 1e-8)."""
    if not groups:
        return
    everything = np.concatenate([t.stamps['advantage'] for group in groups for t in group])
    deviation = np.sqrt(everything.var(ddof=min(1, len(everything) - 1)) + 1e-8)
    for trajectory in (t for group in groups for t in group):
        trajectory.stamps['advantage'] = (trajectory.stamps['advantage'] - everything.mean()) / deviation


def reward_to_go(rewards: Array, discount: float) -> Array:
    """G_t = r_t + discount G_{t+1}."""
    sums, total = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        total = sums[t] = rewards[t] + discount * total
    return sums


def reinforce_plus_plus(groups: Groups, c: Mapping[str, Any]) -> None:
    """REINFORCE++: the reward to go of each token, whitened over the batch (Hu et al. 2025, equations 6 to 8)."""
    for trajectory in (t for group in groups for t in group):
        trajectory.stamps['advantage'] = reward_to_go(trajectory.rewards, c['discount'])
    whiten(groups)


def reinforce_plus_plus_baseline(groups: Groups, c: Mapping[str, Any]) -> None:
    """REINFORCE++ with the group's mean as baseline: r_i - mean(r), whitened over the batch (Hu et al. 2025, section
    on the baseline variant)."""
    per_answer(lambda rewards: group_relative(rewards, normalize=False))(groups, c)
    whiten(groups)


def process_relative(groups: Groups, c: Mapping[str, Any]) -> None:
    """GRPO with process supervision: every reward within a group is normalised, and a token's advantage is the sum of
    those at it and after it (Shao et al. 2024, section 4.1.3)."""
    for group in groups:
        given = np.concatenate([t.rewards[t.judged] for t in group])
        for trajectory in group:
            scaled = (trajectory.rewards - given.mean()) / (given.std() + 1e-6)
            trajectory.stamps['advantage'] = reward_to_go(np.where(trajectory.judged, scaled, 0.0), 1.0)


def generalized_advantage(groups: Groups, c: Mapping[str, Any]) -> None:
    """GAE (Schulman et al. 2015, equation 16), for PPO: delta_t = r_t + discount V_{t+1} - V_t, A_t = delta_t +
    discount gae_lambda A_{t+1}; the value target is A_t + V_t, and advantages are then whitened over the batch.

    Steps are the tokens that the model wrote: an environment's reply is part of the step from one to the next.
    """
    for trajectory in (t for group in groups for t in group):
        values = trajectory.stamps['old_value']
        following = np.append(values[1:], 0.0)
        delta = trajectory.rewards + c['discount'] * following - values
        advantage = reward_to_go(delta, c['discount'] * c['gae_lambda'])
        trajectory.stamps |= {'advantage': advantage, 'value_target': advantage + values}
    whiten(groups)


def reverse_kl(groups: Groups, c: Mapping[str, Any]) -> None:
    """On-policy distillation: A_t = log teacher - log p_sampler at each sampled token, whose policy gradient is that of
    the reverse KL of that token's distribution (Gu et al. 2024, "MiniLLM"; Agarwal et al. 2023, section 3)."""
    for trajectory in (t for group in groups for t in group):
        trajectory.stamps['advantage'] = trajectory.stamps['teacher_logprob'] - np.asarray(trajectory.logprobs)


ALGORITHMS: dict[str, Algorithm] = {
    'grpo': per_answer(lambda rewards: group_relative(rewards, normalize=True)),
    'dr_grpo': per_answer(lambda rewards: group_relative(rewards, normalize=False)),
    'rloo': per_answer(leave_one_out),
    'rejection': per_answer(rejection),
    'best_of_n': per_answer(best_of_n),
    'reinforce_plus_plus': reinforce_plus_plus,
    'reinforce_plus_plus_baseline': reinforce_plus_plus_baseline,
    'process': process_relative,
    'gae': generalized_advantage,
    'reverse_kl': reverse_kl,
}


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO's soft punishment of answers in the last `buffer` tokens before `limit`, from 0 down to -1 (Yu et al. 2025,
    equation 13); 0 where buffer is 0."""
    return -min(max(length - (limit - buffer), 0) / buffer, 1.0) if buffer else 0.0


def adapted(coefficient: float, kl: float, target: float, tokens: int, horizon: int) -> float:
    """The KL coefficient after an observed KL: pushed by at most a fifth of `tokens` / `horizon` towards where the KL
    is at `target` (Ziegler et al. 2019, section 2.2). tokens and horizon count in the same unit."""
    error = float(np.clip(kl / target - 1, -0.2, 0.2))
    return coefficient * (1 + error * tokens / horizon)
