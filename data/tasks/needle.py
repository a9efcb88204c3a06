"""Needle: find the codes of a few things among many (long-context retrieval)."""

import random
from dataclasses import dataclass

from data.tasks import Part, ProceduralTask, Prompt, Verdict, lines, register

ADJECTIVES = """
red blue green black white brown pink gray gold silver big small tall short long wide thin fat old new young fast slow
hot cold warm cool dry wet clean soft hard loud quiet happy sad angry calm brave shy kind wild tame lazy busy rich poor
strong weak sharp smooth rough sweet sour bright dark light heavy round flat
""".split()
NOUNS = """
fox cat dog horse cow pig sheep goat bear wolf lion tiger mouse rabbit deer duck hen goose owl crow fish frog snake
turtle bee ant tree flower leaf river lake hill stone house door window table chair bed lamp clock book pen cup plate
spoon knife box bag hat coat shoe ring ball boat car train bike road bridge tower
""".split()


@register('needle')
@dataclass(kw_only=True)
class Needle(ProceduralTask):
    """`pairs` lines give each thing a code of `digits` digits; repeat the lines of the `questions` things asked for.

    Lines may come in any order, and the score is the share that is right: more lines than questions score nothing, so
    guessing twice never pays.
    """

    pairs: tuple[int, int] = (8, 16)
    questions: int = 1
    digits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer('digits', 1, 9)
        # Codes are distinct, so that reading the wrong line never gives the right answer.
        self.pairs = self._interval('pairs', 1, min(len(ADJECTIVES) * len(NOUNS), 10**self.digits))
        self._integer('questions', 1, self.pairs[0])

    def draw(self, rng: random.Random) -> tuple[str, tuple[dict[str, str], list[str]]]:
        pairs = rng.randint(*self.pairs)
        things = [
            f'{ADJECTIVES[n // len(NOUNS)]} {NOUNS[n % len(NOUNS)]}'
            for n in rng.sample(range(len(ADJECTIVES) * len(NOUNS)), pairs)
        ]
        numbers = rng.sample(range(10**self.digits), pairs)
        codes = dict(zip(things, (f'{n:0{self.digits}d}' for n in numbers), strict=True))
        asked = rng.sample(things, self.questions)
        key = '; '.join([*sorted(f'{thing}: {code}' for thing, code in codes.items()), *sorted(asked)])
        return key, (codes, asked)

    def pose(self, key: str, problem: tuple[dict[str, str], list[str]], rng: random.Random) -> Prompt:
        codes, asked = problem
        *most, last = (f'the {thing}' for thing in asked)
        question = f'What are the codes of {", ".join(most)} and {last}?' if most else f'What is the code of {last}?'
        return Prompt(
            text='\n'.join([*(f'{thing}: {code}' for thing, code in codes.items()), question]),
            reference='\n'.join(f'{thing}: {codes[thing]}' for thing in asked),
            key=key,
            info={'codes': {thing: codes[thing] for thing in asked}},
        )

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        codes = prompt.info['codes']
        found = lines(completion, len(codes))
        if len(found) > len(codes):
            return Verdict(0.0, reason=f'more than {len(codes)} lines')
        open_lines = {f'{thing}: {code}': thing for thing, code in codes.items()}
        parts = []
        for line in found:
            thing = open_lines.pop(line.text, None)
            parts.append(Part(thing or 'wrong', float(thing is not None), line.start, line.end))
        score = (len(codes) - len(open_lines)) / len(codes)
        return Verdict(score, tuple(parts), '' if not open_lines else f'{len(open_lines)} of {len(codes)} not found')
