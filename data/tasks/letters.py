"""Letters: say some letters, in any order. One order is preferred: a planted preference to be found and followed."""

import random
from dataclasses import dataclass

from data.errors import InputError, did_you_mean
from data.tasks import BLANK, ProceduralTask, Prompt, Verdict, register

LETTERS = 'abcdefghijklmnop'
GOALS = ('rising', 'any')


@register('letters')
@dataclass(kw_only=True)
class Letters(ProceduralTask):
    """Say `count` given letters. Any order of them is right; the alphabetical one is preferred.

    With `goal` 'rising' other orders earn nothing. With 'any' they earn the same, and the reference is in random order,
    so that what imitates it has no preference. The two answers of a pair have the same letters, so neither length nor
    content says which is better. The split is by the set of letters.
    """

    count: int = 3
    goal: str = 'rising'

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer('count', 2, 8)
        if self.goal not in GOALS:
            raise InputError(f'task {self.name!r}: goal is {self.goal!r}{did_you_mean(self.goal, GOALS)}')

    def draw(self, rng: random.Random) -> tuple[str, list[str]]:
        letters = rng.sample(LETTERS, self.count)
        return ' '.join(sorted(letters)), letters

    def pose(self, key: str, problem: list[str], rng: random.Random) -> Prompt:
        said = key if self.goal == 'rising' else ' '.join(rng.sample(problem, self.count))
        return Prompt(f'Say {" ".join(problem)}.', said, key, {'rising': key})

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        rising, said = prompt.info['rising'], completion.strip(BLANK)
        if len(said) != len(rising) or sorted(said.split(' ')) != rising.split(' '):
            return Verdict(0.0, reason='other letters')
        return Verdict(1.0) if self.goal == 'any' or said == rising else Verdict(0.0, reason='not in order')

    def pair(self, prompt: Prompt) -> tuple[str, str]:
        """The preferred answer, and another right one."""
        rising = prompt.info['rising']
        rng, other = random.Random(prompt.text), rising
        while other == rising:
            other = ' '.join(rng.sample(rising.split(' '), self.count))
        return rising, other
