"""Needle: find the words that go with a few others among many pairs (long-context retrieval)."""

import random
from dataclasses import dataclass

from data.tasks import ProceduralTask, Prompt, Verdict, register, share_of_lines
from data.words import WORDS


@register('needle')
@dataclass(kw_only=True)
class Needle(ProceduralTask):
    """`pairs` lines pair each of as many words with a second one; repeat the lines of the `questions` words asked for.

    Lines may come in any order, and the score is the share that is right: more lines than questions score nothing, so
    guessing twice never pays. A line is four tokens or so.
    """

    pairs: tuple[int, int] = (8, 16)
    questions: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pairs = self._interval('pairs', 1, len(WORDS))
        self._integer('questions', 1, self.pairs[0])

    def draw(self, rng: random.Random) -> tuple[str, tuple[dict[str, str], list[str]]]:
        pairs = rng.randint(*self.pairs)
        # Second words are distinct, so that reading the wrong line never gives the right answer.
        partners = dict(zip(rng.sample(WORDS, pairs), rng.sample(WORDS, pairs), strict=True))
        asked = rng.sample(list(partners), self.questions)
        key = '; '.join([*sorted(f'{first} {second}' for first, second in partners.items()), *sorted(asked)])
        return key, (partners, asked)

    def pose(self, key: str, problem: tuple[dict[str, str], list[str]], rng: random.Random) -> Prompt:
        partners, asked = problem
        *most, last = asked
        question = f'Which words follow {", ".join(most)} and {last}?' if most else f'Which word follows {last}?'
        return Prompt(
            text='\n'.join([*(f'- {first} {second}' for first, second in partners.items()), question]),
            reference='\n'.join(f'- {first} {partners[first]}' for first in asked),
            key=key,
            info={'partners': {first: partners[first] for first in asked}},
        )

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        partners = prompt.info['partners']
        return share_of_lines(completion, {f'- {first} {second}': first for first, second in partners.items()})
