"""Variables: find all names that stand for a value, through chains of assignments (multi-hop tracing)."""

import random
from dataclasses import dataclass
from typing import Any

from data.errors import InputError
from data.tasks import ProceduralTask, Prompt, Verdict, register, share_of_lines, uniform
from data.words import WORDS


@register('variables')
@dataclass(kw_only=True)
class Variables(ProceduralTask):
    """`chains` values, each handed on `hops` times from name to name; list the names that stand for one of them.

    Assignments of all chains are mixed, none before what it refers to, as in a program. Names may come in any order,
    and the score is the share that is right; more lines than names score nothing (variable tracking of RULER, Hsieh et
    al. 2024, section 3.3). A line is four tokens or so.
    """

    chains: tuple[int, int] = (2, 4)
    hops: tuple[int, int] = (1, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chains, self.hops = self._interval('chains', 1, 64), self._interval('hops', 0, 16)
        most = self.chains[1] * (self.hops[1] + 1)
        if most > len(WORDS):
            raise InputError(f'task {self.name!r}: chains and hops need {most} names: expected {len(WORDS)} at most')

    def draw(self, rng: random.Random) -> tuple[str, Any]:
        lengths = [1 + uniform(rng, *self.hops) for _ in range(uniform(rng, *self.chains))]
        values = rng.sample(range(10, 100), len(lengths))
        names = iter(rng.sample(WORDS, sum(lengths)))
        chains = [[next(names) for _ in range(length)] for length in lengths]
        told = [i for i, length in enumerate(lengths) for _ in range(length)]
        rng.shuffle(told)
        given: list[str] = []
        done = [0] * len(chains)
        for i in told:
            given.append(f'{chains[i][done[i]]} = {chains[i][done[i] - 1] if done[i] else values[i]}')
            done[i] += 1
        asked = uniform(rng, 0, len(chains) - 1)
        return '; '.join([*sorted(given), str(values[asked])]), (given, values[asked], chains[asked])

    def pose(self, key: str, problem: Any, rng: random.Random) -> Prompt:
        given, value, names = problem
        return Prompt(
            text='\n'.join([*given, f'Which names stand for {value}?']),
            reference='\n'.join(f'- {name}' for name in names),
            key=key,
            info={'names': names},
        )

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        return share_of_lines(completion, {f'- {name}': name for name in prompt.info['names']})
