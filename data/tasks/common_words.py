"""Common words: which words of a long list come most often (aggregation over long text)."""

import random
from dataclasses import dataclass
from typing import Any

from data.errors import InputError
from data.tasks import ProceduralTask, Prompt, Verdict, register, share_of_lines, uniform
from data.words import WORDS


@register('common_words')
@dataclass(kw_only=True)
class CommonWords(ProceduralTask):
    """A list in which `common` words come `often` times each and `others` come `rarely`; name the common ones.

    Words may be named in any order, and the score is the share that is right; more lines than words score nothing
    (common words extraction of RULER, Hsieh et al. 2024, section 3.4).
    """

    others: tuple[int, int] = (8, 16)
    common: int = 2
    often: int = 6
    rarely: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer('common', 1, 32)
        self._integer('often', 2, 1000)
        self._integer('rarely', 1, 1000)
        self.others = self._interval('others', 1, len(WORDS) - self.common)
        if self.rarely >= self.often:
            raise InputError(f'task {self.name!r}: rarely is {self.rarely}: expected less than often, {self.often}')

    def draw(self, rng: random.Random) -> tuple[str, Any]:
        count = uniform(rng, *self.others)
        words = rng.sample(WORDS, self.common + count)
        common, others = words[: self.common], words[self.common :]
        listed = common * self.often + others * self.rarely
        rng.shuffle(listed)
        return ' '.join([*sorted(common), '/', *sorted(others)]), (listed, common)

    def pose(self, key: str, problem: Any, rng: random.Random) -> Prompt:
        listed, common = problem
        asked = 'word comes' if len(common) == 1 else f'{len(common)} words come'
        return Prompt(
            text=f'{" ".join(listed)}\nWhich {asked} most often?',
            reference='\n'.join(f'- {word}' for word in common),
            key=key,
            info={'words': common},
        )

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        return share_of_lines(completion, {f'- {word}': word for word in prompt.info['words']})
