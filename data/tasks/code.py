"""Code: write a function from a description of what it does, step by step, and a few examples."""

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.errors import InputError, did_you_mean
from data.tasks import ProceduralTask, Prompt, Verdict, register, uniform
from data.tasks.sandbox import grade

TESTS = 4  # hidden values of a problem's own, besides the probes and the empty value
PROBES = 12
TIMEOUT = 2.0  # seconds; the programs asked for take microseconds
LONGEST = 20_000  # characters of a completion
SHOWN = 60  # characters at most of what a function makes of a probe
DIFFERENT = 4  # results at least, of all probes
COMMENTS = {'none': 0.0, 'some': 1 / 3, 'all': 1.0}  # share of references that have them
COMMENT = re.compile(r'  # [a-z]{2,}')

KINDS = {'list': 'a list of numbers', 'text': 'a text', 'number': 'a number'}
EMPTY: dict[str, Any] = {'list': [], 'text': '', 'number': 0}


class Step(NamedTuple):
    """An operation on x that turns a value of one kind into one of another. Of nothing (see EMPTY) it makes nothing."""

    takes: str
    gives: str
    phrase: str
    expression: str


# Each line: kinds, what to say, what to write; {k} stands for each of the digits or letters at the end.
_TABLE = """
list list | sort it | sorted(x) |
list list | reverse it | x[::-1] |
list list | drop the first | x[1:] |
list list | drop the last | x[:-1] |
list list | drop repeats | list(dict.fromkeys(x)) |
list list | say it twice | x + x |
list list | take every second | x[::2] |
list list | take the first {k} | x[:{k}] | 234
list list | take the last {k} | x[-{k}:] | 234
list list | add {k} to each | [y + {k} for y in x] | 123456789
list list | multiply each by {k} | [y * {k} for y in x] | 23456789
list list | square each | [y * y for y in x] |
list list | negate each | [-y for y in x] |
list list | keep the even | [y for y in x if y % 2 == 0] |
list list | keep the odd | [y for y in x if y % 2 == 1] |
list list | keep those above {k} | [y for y in x if y > {k}] | 012345
list list | keep those below {k} | [y for y in x if y < {k}] | 012345
list number | count them | len(x) |
list number | add them up | sum(x) |
list number | take the largest | max(x, default=0) |
list number | take the smallest | min(x, default=0) |
text text | sort it | ''.join(sorted(x)) |
text text | reverse it | x[::-1] |
text text | drop the first | x[1:] |
text text | drop the last | x[:-1] |
text text | drop repeats | ''.join(dict.fromkeys(x)) |
text text | say it twice | x + x |
text text | take every second | x[::2] |
text text | take the first {k} | x[:{k}] | 234
text text | take the last {k} | x[-{k}:] | 234
text text | make it upper case | x.upper() |
text text | make it lower case | x.lower() |
text text | swap its case | x.swapcase() |
text text | remove every {k} | x.replace('{k}', '') | abcde
text text | double every {k} | x.replace('{k}', '{k}{k}') | abcde
text number | count its letters | len(x) |
text number | count every {k} | x.count('{k}') | abcde
number number | multiply by {k} | x * {k} | 23456789
number number | divide by {k}, rounding down | x // {k} | 23456789
number number | take the rest modulo {k} | x % {k} | 23456789
number number | square it | x * x |
number number | negate it | -x |
number number | add its digits | sum(map(int, str(abs(x)))) |
number number | reverse its digits | int(str(abs(x))[::-1]) |
"""


def _steps() -> dict[str, list[list[Step]]]:
    """By the kind taken, the steps of each line of the table."""
    found: dict[str, list[list[Step]]] = {kind: [] for kind in KINDS}
    for line in _TABLE.strip().splitlines():
        kinds, phrase, expression, values = (field.strip() for field in line.split('|'))
        takes, gives = kinds.split()
        filled = [Step(takes, gives, phrase.replace('{k}', k), expression.replace('{k}', k)) for k in values or ' ']
        found[takes].append(filled)
    return found


STEPS = _steps()


@register('code')
@dataclass(kw_only=True)
class Code(ProceduralTask):
    """Write a function f of one value that does `level` (min, max) steps, shown with `examples` values of it.

    The program runs in the sandbox against hidden values, and must return the exact type and value for all of them.
    Two problems whose functions do the same are one problem, however they are described: the key is what the function
    makes of a fixed set of values, the probes. They are among the hidden ones, and on them no step is idle.

    `comments` is 'none', 'some' (a third of the references say behind each line what it does, and programs are right
    with or without) or 'all' (all do, and a program with a line that says nothing earns nothing).
    """

    level: tuple[int, int] = (1, 2)
    examples: int = 2
    comments: str = field(default='none', repr=False)  # no part of the seed: the problems are the same

    def __post_init__(self) -> None:
        super().__post_init__()
        self.level = self._interval('level', 1, 6)
        self._integer('examples', 1, 3)
        if self.comments not in COMMENTS:
            raise InputError(
                f'task {self.name!r}: comments is {self.comments!r}{did_you_mean(self.comments, COMMENTS)}'
            )

    def draw(self, rng: random.Random) -> tuple[str, list[Step]]:
        while True:
            steps = _compose(rng, uniform(rng, *self.level))
            results = _behaviour(steps)
            if results is not None:
                return hashlib.blake2b(f'{steps[0].takes} {results}'.encode(), digest_size=16).hexdigest(), steps

    def pose(self, key: str, problem: list[Step], rng: random.Random) -> Prompt:
        kind = problem[0].takes
        values: list[Any] = []
        while len(values) < self.examples + TESTS:
            value = _value(kind, rng)
            if value not in values and value not in _probes(kind):
                values.append(value)
        shown, hidden = values[: self.examples], [*values[self.examples :], *_probes(kind), EMPTY[kind]]
        described = ', '.join(step.phrase for step in problem)
        said = COMMENTS[self.comments] > 0 and rng.random() < COMMENTS[self.comments]
        lines = [f'x = {step.expression}' for step in problem[:-1]] + [f'return {problem[-1].expression}']
        body = [f'    {line}{f"  # {s.phrase}" if said else ""}' for line, s in zip(lines, problem, strict=True)]
        return Prompt(
            text='\n'.join([f'Write f(x) for {KINDS[kind]} x: {described}.', *(_example(problem, x) for x in shown)]),
            reference='\n'.join(['def f(x):', *body]),
            key=key,
            info={'tests': [f'assert repr(f({x!r})) == {repr(_apply(problem, x))!r}' for x in hidden]},
        )

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        program = completion.strip()
        if len(completion) > LONGEST:
            return Verdict(0.0, reason='the program is too long')
        if not program.rpartition('\n')[2].startswith((' ', '\t')):
            return Verdict(0.0, reason='the last line is not part of a function')
        if self.comments == 'all' and not all(COMMENT.search(line) for line in program.splitlines()[1:]):
            return Verdict(0.0, reason='a line without a comment')
        return grade(program, prompt.info['tests'], TIMEOUT)


def _example(steps: list[Step], value: Any) -> str:
    return f'f({value!r}) == {_apply(steps, value)!r}'


def _compose(rng: random.Random, level: int) -> list[Step]:
    """So many steps, each of which takes what the one before gives; every line of the table is as likely."""
    kind = rng.choices(list(KINDS), weights=[2, 2, 1])[0]
    steps: list[Step] = []
    for _ in range(level):
        steps.append(rng.choice(rng.choice(STEPS[kind])))
        kind = steps[-1].gives
    return steps


def _behaviour(steps: list[Step]) -> str | None:
    """What the steps make of the probes, or None where that is trivial, or too long, or one or two steps are idle."""
    kind, results = steps[0].takes, _on_probes(steps[0].takes, steps)
    shown = [repr(result) for result in results]
    if len(set(shown)) < DIFFERENT or max(map(len, shown)) > SHOWN:
        return None
    places = range(len(steps))
    for left_out in [*itertools.combinations(places, 1), *itertools.combinations(places, 2)]:
        if _on_probes(kind, [step for i, step in enumerate(steps) if i not in left_out]) == results:
            return None
    return '\n'.join(shown)


def _on_probes(kind: str, steps: list[Step]) -> list[Any]:
    """What the steps make of the probes of a kind; empty where they do not fit together."""
    kinds = [kind, *(step.gives for step in steps)]
    if any(step.takes != before for step, before in zip(steps, kinds, strict=False)):
        return []
    return [_apply(steps, probe) for probe in _probes(kind)]


@functools.cache
def _probes(kind: str) -> list[Any]:
    """Values that tell problems apart; the same in every process."""
    rng = random.Random(f'probes {kind}')
    return [_value(kind, rng) for _ in range(PROBES)]


def _apply(steps: list[Step], value: Any) -> Any:
    for step in steps:
        value = _function(step.expression)(value)
    return value


@functools.cache
def _function(expression: str) -> Callable[[Any], Any]:
    return eval(f'lambda x: {expression}')


def _value(kind: str, rng: random.Random) -> Any:
    if kind == 'list':
        return [uniform(rng, -4, 9) for _ in range(uniform(rng, 3, 7))]
    if kind == 'text':
        return ''.join(rng.choices('aabbccddeeABCDE', k=uniform(rng, 4, 8)))
    return uniform(rng, -99, 999)
