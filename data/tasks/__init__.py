"""Tasks: endless problems with verifiers, split into train and held-out by the problem itself.

A task is one file of this package: a dataclass whose fields are its options, decorated with `@register(name)`. It is
found by being there.
"""

import functools
import hashlib
import importlib
import pkgutil
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

from data.errors import InputError, did_you_mean

SPLITS = ('train', 'heldout')
HELDOUT_ONE_IN = 10
MAX_DRAWS = 10_000  # before an option set is declared to have no problem in the split
DRAWS = 16  # for each problem wanted that is unlike the others, before a task is said to have no more
BLANK = ' \t\r\n'
ANSWER = 'Answer:'
ILLEGAL = 'an illegal move'


@dataclass(frozen=True)
class Prompt:
    """One problem. `key` is its canonical text, which decides the split; `info` is JSON-able and all `verify` needs."""

    text: str
    reference: str
    key: str
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A judged step: `completion[start:end]` earned `score` in [0, 1]. A missing step has start == end."""

    name: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Verdict:
    """`score` in [0, 1] for the whole completion; `reason` is a short line when the score is below 1."""

    score: float
    parts: tuple[Part, ...] = ()
    reason: str = ''


class Task(Protocol):
    name: ClassVar[str]

    def prompt(self, index: int) -> Prompt: ...

    def verify(self, prompt: Prompt, completion: str) -> Verdict: ...


@dataclass(frozen=True)
class Turn:
    """What one side said. `role` is that of a chat message; `done` means that nobody is to say more."""

    role: str
    text: str
    done: bool = False


@runtime_checkable
class Environment(Protocol):
    """A task of several turns: the model speaks, the environment replies, until one of them ends it.

    `turns` is how often the model may speak at most. `verify` judges a transcript that is a single completion; `judge`
    any. Both are pure functions of what they are given: nothing is remembered between calls.
    """

    name: ClassVar[str]
    turns: int

    def prompt(self, index: int) -> Prompt: ...

    def reply(self, prompt: Prompt, transcript: Sequence[Turn]) -> Turn: ...

    def judge(self, prompt: Prompt, transcript: Sequence[Turn]) -> Verdict: ...

    def verify(self, prompt: Prompt, completion: str) -> Verdict: ...


@runtime_checkable
class Game(Protocol):
    """A task for two sides, both played by models, which move in turn, the first side first.

    A move is a turn's whole text; one that did not end by itself is given as '', which is no legal move anywhere. An
    illegal move ends the game, lost by its side, with reason ILLEGAL. Both methods are pure functions, as above.
    """

    name: ClassVar[str]

    def prompt(self, index: int) -> Prompt: ...

    def show(self, prompt: Prompt, moves: Sequence[str]) -> Turn:
        """What the side to move is told of the position; `done` when the game is over."""

    def judge(self, prompt: Prompt, moves: Sequence[str]) -> tuple[Verdict, Verdict]:
        """Verdicts on the first side and on the second: 1 and 0, 0 and 1, or 0.5 each; outcomes +1, 0, -1 as scores."""

    def verify(self, prompt: Prompt, completion: str) -> Verdict: ...


@runtime_checkable
class Proposable(Protocol):
    """A task whose problems can be written down by somebody else. `invitation` asks for one."""

    name: ClassVar[str]
    invitation: ClassVar[str]

    def prompt(self, index: int) -> Prompt: ...

    def parse(self, text: str) -> Prompt | None:
        """The problem that a text poses; None where it is none that this task's options and split allow."""

    def proposal(self, prompt: Prompt) -> str:
        """The text that poses a problem, which `parse` takes back."""

    def verify(self, prompt: Prompt, completion: str) -> Verdict: ...


@runtime_checkable
class Comparable(Protocol):
    """A task that knows of two answers to a problem which is better."""

    def prompt(self, index: int) -> Prompt: ...

    def pair(self, prompt: Prompt) -> tuple[str, str]:
        """A better answer and a worse one."""


@runtime_checkable
class Criticizable(Protocol):
    """A task that knows what a principle has to say of answers."""

    principle: ClassVar[str]

    def prompt(self, index: int) -> Prompt: ...

    def criticism(self, prompt: Prompt) -> tuple[str, str, str]:
        """An answer, a critique of it by the principle, and the answer revised."""


@dataclass(kw_only=True)
class SplitTask:
    """What every task shares: a split by the hash of the problem, and checks of its options, which are its fields."""

    name: ClassVar[str]
    split: str = 'train'

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f'task {self.name!r}: unknown split {self.split!r}{did_you_mean(self.split, SPLITS)}')

    def in_split(self, key: str) -> bool:
        """Whether the problem `key` belongs to this task's split, which options and index have no say in."""
        return (key_hash(key) % HELDOUT_ONE_IN == 0) == (self.split == 'heldout')

    def _boolean(self, option: str) -> None:
        if type(value := getattr(self, option)) is not bool:
            raise InputError(f'task {self.name!r}: {option} must be True or False, got {value!r}')

    def _integer(self, option: str, low: int, high: int) -> int:
        """The option's value, checked to lie in [low, high]."""
        value = getattr(self, option)
        if type(value) is not int or not low <= value <= high:
            raise InputError(f'task {self.name!r}: {option} must be an integer in [{low}, {high}], got {value!r}')
        return value

    def _interval(self, option: str, low: int, high: int) -> tuple[int, int]:
        """The option's inclusive (min, max) pair within [low, high]; a single integer n stands for (n, n)."""
        value = getattr(self, option)
        pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
        if len(pair) != 2 or any(type(n) is not int for n in pair) or not low <= pair[0] <= pair[1] <= high:
            raise InputError(
                f'task {self.name!r}: {option} must be an integer or (min, max) in [{low}, {high}], got {value!r}'
            )
        return pair


@dataclass(kw_only=True)
class ProceduralTask(SplitTask):
    """A task that draws its problems from a seed. Subclasses are dataclasses, their fields are the options.

    `prompt(index)` is a pure function of (task, options, split, index), the same in every process.
    """

    def draw(self, rng: random.Random) -> tuple[str, Any]:
        """The key of a problem of either split, and whatever `pose` needs of it."""
        raise NotImplementedError

    def pose(self, key: str, problem: Any, rng: random.Random) -> Prompt:
        """The prompt of a drawn problem; called for problems of the right split only."""
        raise NotImplementedError

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        """Judge a completion. Work is linear in its length, whatever it holds."""
        raise NotImplementedError

    def prompt(self, index: int) -> Prompt:
        """Problem number `index` of the split; raises InputError if the options leave the split empty."""
        rng = random.Random(f'{self._seed} {index}')
        for _ in range(MAX_DRAWS):
            key, problem = self.draw(rng)
            if self.in_split(key):
                return self.pose(key, problem, rng)
        raise InputError(f'{self._seed}: no {self.split} problem in {MAX_DRAWS} draws; widen the options')

    @functools.cached_property
    def _seed(self) -> str:
        return repr(self)


def key_hash(key: str) -> int:
    """64 bits of a hash of a problem's key, the same in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), 'big')


def uniform(rng: random.Random, low: int, high: int) -> int:
    """An integer in [low, high], in a third of the time that `rng.randint` takes."""
    return low + int(rng.random() * (high - low + 1))


class Line(NamedTuple):
    text: str
    start: int
    end: int


def split_answer(completion: str) -> tuple[str, str | None]:
    """(what comes before the final answer, the final answer). It is None if the last line is not `Answer: X`."""
    text = completion.rstrip(BLANK)
    start = text.rfind('\n') + 1
    if not text.startswith(ANSWER, start):
        return text, None
    return text[:start], text[start + len(ANSWER) :].strip(BLANK)


def final_answer(completion: str) -> str | None:
    """The X of a completion whose last line is `Answer: X`, else None. Anything but white space after it fails."""
    return split_answer(completion)[1]


def lines(text: str, limit: int) -> list[Line]:
    """Lines of `text` with their places, blank ends stripped. One line beyond `limit` holds all the rest, so that a
    caller sees by the count that there were too many and hostile text costs no more than a scan.
    """
    body = text.strip(BLANK)
    start = len(text) - len(text.lstrip(BLANK))
    found = []
    for line in body.split('\n', limit) if body else ():
        found.append(Line(line, start, start + len(line)))
        start += len(line) + 1
    return found


def share_of_lines(completion: str, wanted: Mapping[str, str]) -> Verdict:
    """Judges an answer that lists things in any order: the score is the share of the lines `wanted` that are there.

    More lines than that score nothing, so that guessing twice never pays. Parts are named as `wanted` names its lines.
    """
    found = lines(completion, len(wanted))
    if len(found) > len(wanted):
        return Verdict(0.0, reason=f'more than {len(wanted)} lines')
    missing = dict(wanted)
    parts = []
    for line in found:
        name = missing.pop(line.text, None)
        parts.append(Part(name or 'wrong', float(name is not None), line.start, line.end))
    reason = f'{len(missing)} of {len(wanted)} not found' if missing else ''
    return Verdict((len(wanted) - len(missing)) / len(wanted), tuple(parts), reason)


_REGISTRY: dict[str, type] = {}
T = TypeVar('T', bound=type)


def register(name: str) -> Callable[[T], T]:
    """Class decorator that makes a task known by `name`."""

    def add(cls: T) -> T:
        if name in _REGISTRY:
            raise InputError(f'task {name!r} is registered twice: {_REGISTRY[name].__module__} and {cls.__module__}')
        cls.name = name  # type: ignore[attr-defined]
        _REGISTRY[name] = cls
        return cls

    return add


@functools.cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f'{__name__}.{module.name}')


def task_names() -> list[str]:
    """Names that `get_task` knows, sorted."""
    _discover()
    return sorted(_REGISTRY)


def get_task(name: str, split: str = 'train', **options: Any) -> Task:
    """The task `name` with its options. Raises InputError for an unknown name, option, split or a bad value."""
    if name not in task_names():
        raise InputError(f'unknown task {name!r}{did_you_mean(name, _REGISTRY)}')
    cls = _REGISTRY[name]
    known = {f.name for f in fields(cls)} - {'split'}
    for option in options:
        if option not in known:
            raise InputError(f'task {name!r}: unknown option {option!r}{did_you_mean(option, known)}')
    return cls(split=split, **options)


def different(task: Task, count: int) -> list[Prompt]:
    """The first `count` different problems of a task; fewer where its options leave fewer."""
    found: dict[str, Prompt] = {}
    for index in range(DRAWS * count):
        prompt = task.prompt(index)
        found.setdefault(prompt.text, prompt)
        if len(found) == count:
            break
    return list(found.values())
