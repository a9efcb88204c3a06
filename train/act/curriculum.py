"""Which level of difficulty the next problem is of."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from data.errors import InputError, did_you_mean
from data.tasks import Task

MODES = ('uniform', 'solve_rate')
MEMORY = 0.9  # of a level's solve rate, from one problem to the next
LEAST = 0.05  # weight of a level that is always or never solved: rates change, and somebody has to notice


class Levels:
    """Tasks of graded difficulty, drawn uniformly or by how often they are solved.

    'solve_rate' draws level l with probability proportional to p (1 - p) + LEAST, p its recent mean reward: what is
    solved sometimes has the most to teach (the variance of a group's rewards; Foster et al. 2025).
    """

    def __init__(self, tasks: Sequence[Task], seed: int, mode: str):
        """Raises InputError for an unknown mode."""
        if mode not in MODES:
            raise InputError(f'curriculum is {mode!r}{did_you_mean(mode, MODES)}')
        self.tasks, self._seed, self._mode = list(tasks), seed, mode
        self._rates = [0.5] * len(tasks)

    def choose(self, number: int) -> int:
        """The level of problem `number`."""
        if len(self.tasks) == 1:
            return 0
        weights = [1.0 if self._mode == 'uniform' else p * (1 - p) + LEAST for p in self._rates]
        return random.Random(f'{self._seed} level {number}').choices(range(len(weights)), weights)[0]

    def record(self, level: int, rewards: Sequence[float]) -> None:
        """Takes note of what answers to a problem of a level earned."""
        rate = min(max(sum(rewards) / len(rewards), 0.0), 1.0)
        self._rates[level] = MEMORY * self._rates[level] + (1 - MEMORY) * rate

    def metrics(self) -> dict[str, float]:
        """The solve rate of each level, where there are several."""
        return {f'level/{i}': p for i, p in enumerate(self._rates)} if len(self.tasks) > 1 else {}

    def state(self) -> list[float]:
        return list(self._rates)

    def restore(self, state: Any) -> None:
        self._rates = list(state)
