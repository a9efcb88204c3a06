"""Proposer and solver: the model in training writes the problems that it is then trained to solve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from data.errors import InputError, did_you_mean
from data.tasks import Prompt, Proposable, Verdict
from train.act.episodes import padded, play
from train.act.rollout import Drawn, Problem, RolloutStream
from train.sampler import row_keys


def learnability(rate: float) -> float:
    """1 - |2p - 1| of the rate p at which a problem is solved: 1 for a half, 0 for always and for never."""
    return 1 - abs(2 * rate - 1)


def hardness(rate: float) -> float:
    """1 - p where a problem is solved at all, else 0 (Zhao et al. 2025, equation 4)."""
    return 1 - rate if rate else 0.0


EARNED = {'half': learnability, 'hard': hardness}  # by the rate at which its problem was solved


class _Invitation:
    """The proposer's own task: to write a problem that another task takes."""

    name: ClassVar[str] = 'proposal'

    def __init__(self, task: Proposable):
        self._task = task

    def prompt(self, index: int) -> Prompt:
        return Prompt(self._task.invitation, '', self._task.invitation)

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        return Verdict(float(self._task.parse(completion) is not None))


class ProposerStream(RolloutStream):
    """The model writes `prompts` problems and answers each of the different ones `samples` times. As solver it earns
    what the verifier gives; as proposer what `proposal_reward` names (`EARNED`) by the rate at which its problem was
    solved, and `invalid_reward` for what the task does not take as a problem (bad form, out of its options, held out)
    and for one that the rollout has already. So many as `posed` of the problems are the task's own instead.

    Asymmetric self-play (Sukhbaatar et al. 2018) with one model in both roles and a verifier (Zhao et al. 2025,
    "Absolute Zero", whose proposer earns 1 - p for p above 0). Repetition is punished as in R-Zero (Huang et al. 2025),
    here that of the very same problem: else the safest proposal is the one made most often, and the others die out.
    Each role has its own baseline: the proposals are one group, the answers to a problem another.
    """

    def __init__(self, *given: Any, **named: Any):
        """Arguments as of `RolloutStream`.

        Raises:
            InputError: levels or refills; a task that takes no proposals; and as `RolloutStream`.
        """
        super().__init__(*given, **named)
        c = self._config
        if c['proposal_reward'] not in EARNED:
            raise InputError(f'proposal_reward is {c["proposal_reward"]!r}{did_you_mean(c["proposal_reward"], EARNED)}')
        if not 0 <= c['posed'] < c['prompts']:
            raise InputError(f'posed is {c["posed"]}: expected 0 or more, and fewer than prompts, {c["prompts"]}')
        for field in ('levels', 'refills'):
            if self._config[field]:
                raise InputError(f'{field} is {self._config[field]!r}: expected none, as the proposer decides')
        (task,) = self._levels.tasks
        if not isinstance(task, Proposable):
            raise InputError(f'task.name is {task.name!r}: expected a task that takes proposals, such as arithmetic')
        self._task: Proposable = task

    @staticmethod
    def most(c: Mapping[str, Any]) -> int:
        """Proposals, and answers to all of them."""
        return int(c['prompts'] * (c['samples'] + 1))

    def _draw(self, variables: Any) -> Drawn:
        """Proposals and the answers to them."""
        c, task, numbers = self._config, self._task, self._numbers()
        asked_for, given = numbers[c['posed'] :], numbers[: c['posed']]
        keys = row_keys(self._seed, numbers, c['samples'] + 1)  # the last is the proposer's
        sample = self._sampler(self._model, variables)
        asked = _Invitation(task)
        proposals = play([asked], [asked.prompt(0)], self._tokenizer, sample, keys[c['posed'] :, -1].reshape(1, -1))[0]
        found = [task.parse(e.text) if e.stopped else None for e in proposals]
        chance = [Problem(number, 0, task, self._prompt(0, number)) for number in given]
        first: dict[str, Problem] = {p.prompt.key: p for p in chance}
        posed = len(first)
        for number, prompt in zip(asked_for, found, strict=True):
            if prompt is not None:
                first.setdefault(prompt.key, Problem(number, 0, task, prompt))
        drawn = Drawn([], [], {'prompt': task.invitation, 'completion': proposals[0].text, 'score': 0.0}, {}, 0)
        rates: dict[int, float] = {}  # by the number of the proposal
        if first:
            rows = padded(list(first.values()))
            places = np.array([p.number - numbers.start for p in rows])
            prompts = [p.prompt for p in rows]
            answers = play([task] * len(rows), prompts, self._tokenizer, sample, keys[places, :-1])[: len(first)]
            drawn = self._judged(list(first.values()), answers)
            solved = [np.mean([e.verdict.score * e.stopped for e in group]) for group in answers]
            rates = {p.number: float(rate) for p, rate in zip(first.values(), solved, strict=True)}
            if len(solved) > posed:
                drawn.metrics['proposer/solve_rate'] = float(np.mean(solved[posed:]))
        worth = EARNED[c['proposal_reward']]
        earned = [worth(rates[n]) if n in rates else float(c['invalid_reward']) for n in asked_for]
        drawn.groups.append(
            [self._rewarded(e, n, c['samples'], r) for e, n, r in zip(proposals, asked_for, earned, strict=True)]
        )
        drawn.episodes += proposals
        drawn.read += len(proposals[0].prompt) + sum(len(e.tokens) for e in proposals)
        drawn.metrics |= {
            'proposer/valid': sum(prompt is not None for prompt in found) / len(proposals),
            'proposer/distinct': (len(first) - posed) / len(proposals),
            'proposer/reward': float(np.mean(earned)),
        }
        return drawn
