"""Wordgraph: a story whose quantities depend on one another; work out the one that is asked for.

Every line of the answer is judged, so a right answer with a wrong step earns nothing.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.tasks import Part, ProceduralTask, Prompt, Verdict, lines, register, split_answer, uniform

COLORS = 'red blue green black white brown gold gray'.split()
PEOPLE = """
Ann Ben Carl Dan Eve Fay Gus Hal Ian Jane Kate Lee Mia Ned Olga Pam Rob Sam Tom Uma Vera Walt Zoe Adam Beth Cora Dave
Emma Fred Gina Hugo Ivan Jack Kim Lily Mark Nora Otto Paul Rosa Sara Tina Una Vic Will Ruth Amy Bob Clara Dora Eric
Frank Greg Helen Jim Lucy
""".split()


@dataclass(frozen=True)
class Theme:
    """Sentences of a story: {a} is what they define, {b} and {c} the quantities and {n} the number it depends on."""

    names: list[str]
    question: str
    given: str
    more: str
    fewer: str
    times: str
    together: str
    minus: str


def _counted(names: list[str]) -> Theme:
    return Theme(
        names,
        question='How many {a} are there?',
        given='There are {n} {a}.',
        more='There are {n} more {a} than {b}.',
        fewer='There are {n} fewer {a} than {b}.',
        times='There are {n} times as many {a} as {b}.',
        together='There are as many {a} as {b} and {c} together.',
        minus='There are as many {a} as {b} minus {c}.',
    )


THEMES = (
    _counted([f'{color} {thing}' for color in COLORS for thing in 'bags cups hats books pens boxes balls'.split()]),
    _counted([f'{color} {animal}' for color in COLORS for animal in 'cows hens pigs cats dogs goats ducks'.split()]),
    Theme(
        PEOPLE,
        question='How many coins does {a} have?',
        given='{a} has {n} coins.',
        more='{a} has {n} more coins than {b}.',
        fewer='{a} has {n} fewer coins than {b}.',
        times='{a} has {n} times as many coins as {b}.',
        together='{a} has as many coins as {b} and {c} together.',
        minus='{a} has as many coins as {b} minus {c}.',
    ),
    Theme(
        [f'{color} {thing}' for color in COLORS for thing in 'tower tree wall gate mast house rock'.split()],
        question='How tall is the {a}?',
        given='The {a} is {n} feet tall.',
        more='The {a} is {n} feet taller than the {b}.',
        fewer='The {a} is {n} feet shorter than the {b}.',
        times='The {a} is {n} times as tall as the {b}.',
        together='The {a} is as tall as the {b} and the {c} together.',
        minus='The {a} is as tall as the {b} minus the {c}.',
    ),
    Theme(
        [f'{color} {thing}' for color in COLORS for thing in 'road path river wire rope train wagon'.split()],
        question='How long is the {a}?',
        given='The {a} is {n} feet long.',
        more='The {a} is {n} feet longer than the {b}.',
        fewer='The {a} is {n} feet shorter than the {b}.',
        times='The {a} is {n} times as long as the {b}.',
        together='The {a} is as long as the {b} and the {c} together.',
        minus='The {a} is as long as the {b} minus the {c}.',
    ),
)

OPERATORS = {'more': '+', 'fewer': '-', 'times': '*', 'together': '+', 'minus': '-'}
MOST_OPERATIONS = 20
MOST_DISTRACTORS = 12  # 20 operations have at most 21 given quantities, and a theme has 56 names


@dataclass
class Node:
    """A quantity: given (no `kind`), or made from the nodes with the numbers `operands` and, if need be, a number."""

    value: int
    kind: str = 'given'
    operands: tuple[int, ...] = ()
    number: int = 0

    def equation(self, nodes: list['Node'], commuted: bool = False) -> str:
        """Like `3+4=7`, in the order of the sentence or, with `commuted`, the same for 3+4 and 4+3."""
        terms = [nodes[i].value for i in self.operands]
        if len(terms) == 1:
            terms.append(self.number)
        operator = OPERATORS[self.kind]
        if commuted and operator != '-':
            terms.sort()
        return f'{terms[0]}{operator}{terms[1]}={self.value}'


@register('wordgraph')
@dataclass(kw_only=True)
class WordGraph(ProceduralTask):
    """A random dependency graph of `operations` quantities to work out, all of them needed, told out of order.

    `distractors` more can be worked out but are not needed. Values lie in [0, max_value]. A completion has a line
    `name = 3+4=7` for each needed quantity, operands in the order of the sentence and never before they are known
    themselves, then the final answer. True lines about distractors do no harm.
    """

    operations: tuple[int, int] = (1, 3)
    max_value: int = 99
    distractors: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.operations = self._interval('operations', 1, MOST_OPERATIONS)
        self._integer('max_value', 10, 10**9)
        self._integer('distractors', 0, MOST_DISTRACTORS)

    def draw(self, rng: random.Random) -> tuple[str, list[Node]]:
        nodes: list[Node] = []
        unused: list[int] = []  # quantities that nothing depends on yet: in the end only the one that is asked for
        for remaining in reversed(range(uniform(rng, *self.operations))):
            rng.shuffle(unused)
            # All the rest must be used up by `remaining` operations that take at most two and leave one.
            used = uniform(rng, max(0, len(unused) - remaining), min(2, len(unused)))
            operands = [unused.pop() for _ in range(used)]
            while len(operands) < 2 and (not operands or rng.random() < 0.4):
                operands.append(self._other(nodes, operands, rng))
            unused = [i for i in unused if i not in operands]
            nodes.append(self._combine(nodes, operands, rng))
            unused.append(len(nodes) - 1)
        # Names and the order of telling have no part in the key, nor do distractors.
        key = '; '.join(sorted(node.equation(nodes, commuted=True) for node in nodes if node.operands))
        return key, nodes

    def pose(self, key: str, problem: list[Node], rng: random.Random) -> Prompt:
        nodes, asked = list(problem), len(problem) - 1
        for _ in range(self.distractors):
            operands = rng.sample(range(len(nodes)), uniform(rng, 1, 2))
            nodes.append(self._combine(nodes, operands, rng))
        theme = rng.choice(THEMES)
        names = rng.sample(theme.names, len(nodes))
        told = rng.sample(range(len(nodes)), len(nodes))
        sentences = [_sentence(theme, nodes[i], [names[i], *(names[j] for j in nodes[i].operands)]) for i in told]
        steps: dict[int, dict[str, Any]] = {
            i: {
                'name': names[i],
                'line': f'{names[i]} = {nodes[i].equation(nodes)}',
                'after': [names[j] for j in nodes[i].operands if nodes[j].operands],
                'needed': i <= asked,
            }
            for i in told
            if nodes[i].operands
        }
        answer = str(nodes[asked].value)
        order = _ready_order([i for i in told if i in steps and i <= asked], nodes)
        return Prompt(
            text=' '.join([*sentences, theme.question.format(a=names[asked])]),
            reference='\n'.join([*(steps[i]['line'] for i in order), f'Answer: {answer}']),
            key=key,
            info={'steps': list(steps.values()), 'answer': answer},
        )

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        steps = {step['name']: step for step in prompt.info['steps']}
        body, answer = split_answer(completion)
        found = lines(body, len(steps))
        known: set[str] = set()
        parts = []
        wrong = len(found) > len(steps)
        for line in found[: len(steps)]:
            name = line.text.partition(' = ')[0]
            step = steps.get(name)
            right = (
                step is not None and name not in known and step['line'] == line.text and known.issuperset(step['after'])
            )
            if right:
                known.add(name)
            wrong |= not right
            if step is None or step['needed']:
                parts.append(Part(name if step else 'extra', float(right), line.start, line.end))
        missing = [name for name, step in steps.items() if step['needed'] and name not in known]
        seen = {part.name for part in parts}
        parts += [Part(name, 0.0, len(body), len(body)) for name in missing if name not in seen]
        if answer != prompt.info['answer']:
            reason = 'no final answer' if answer is None else 'wrong answer'
        elif missing or wrong:
            reason = f'missing or wrong: {", ".join(missing)}' if missing else 'a wrong or repeated line'
        else:
            return Verdict(1.0, tuple(parts))
        return Verdict(0.0, tuple(parts), reason)

    def _other(self, nodes: list[Node], operands: list[int], rng: random.Random) -> int:
        """A node that is not among the operands: a new given quantity, or any that is there already."""
        others = [i for i in range(len(nodes)) if i not in operands]
        if others and rng.random() < 0.5:
            return others[uniform(rng, 0, len(others) - 1)]
        # Small beginnings leave room to add and multiply. From 2 on, because '1 coins' is not English.
        nodes.append(Node(uniform(rng, 2, max(2, self.max_value // 3))))
        return len(nodes) - 1

    def _combine(self, nodes: list[Node], operands: list[int], rng: random.Random) -> Node:
        """A node made of one or two others, with a result in [0, max_value]. One operation always fits."""
        first, *rest = operands
        a = nodes[first].value
        if rest:
            b = nodes[rest[0]].value
            if a + b <= self.max_value and rng.random() < 0.5:
                return Node(a + b, 'together', (first, rest[0]))
            return Node(a - b, 'minus', (first, rest[0])) if a >= b else Node(b - a, 'minus', (rest[0], first))
        room = self.max_value - a
        fits: list[Callable[[], Node]] = []
        if room >= 2:
            fits.append(lambda: Node(a + (n := uniform(rng, 2, room)), 'more', (first,), n))
        if a > 2:
            fits.append(lambda: Node(a - (n := uniform(rng, 2, a - 1)), 'fewer', (first,), n))
        if 0 < a <= self.max_value // 2:
            fits.append(lambda: Node(a * (n := uniform(rng, 2, min(9, self.max_value // a))), 'times', (first,), n))
        return fits[uniform(rng, 0, len(fits) - 1)]()


def _sentence(theme: Theme, node: Node, names: list[str]) -> str:
    template: str = getattr(theme, node.kind)
    return template.format(n=node.number or node.value, **dict(zip('abc', names, strict=False)))


def _ready_order(told: list[int], nodes: list[Node]) -> list[int]:
    """The order of a reader who works out, again and again, the first sentence whose quantities are all known."""
    waiting, order = list(told), []
    while waiting:
        ready = next(i for i in waiting if not any(j in waiting for j in nodes[i].operands))
        waiting.remove(ready)
        order.append(ready)
    return order
