"""Arithmetic: reduce an expression over + - * one operation at a time."""

import random
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, TypeAlias

from data.tasks import Part, ProceduralTask, Prompt, Verdict, final_answer, lines, register, split_answer, uniform

# A number, or [left, operator, right]: lists, so that it survives a trip through JSON.
Tree: TypeAlias = int | list[Any]

# Operators whose result may stand to the right of an operator in such a way that its parentheses, if any, are needed:
# never a + (b + c), which is a + b + c.
RIGHT_OF = {'+': '*', '-': '+-*', '*': '+-'}
MAX_JUDGED_LINES = 256


@register('arithmetic')
@dataclass(kw_only=True)
class Arithmetic(ProceduralTask):
    """Compute an expression like 2*(3+4) of `operations` operations on numbers of at most `digits` digits.

    It is written without spaces, each of which would be a token. Every intermediate value lies in [0, max_value]. The
    score is that of the final answer alone; parts judge each line with an equals sign: 1 if it is a legal reduction of
    what the earlier lines left, in any order, done right.
    With `worked`, the answer must be worked out: a wrong or missing line scores nothing. Where few answers are common,
    a policy rewarded for the answer alone soon writes lines that lead nowhere, and guesses.
    """

    operations: tuple[int, int] = (1, 3)
    digits: int = 2
    max_value: int = 99
    worked: bool = field(default=False, repr=False)  # no part of the seed: it changes the verdict, not the problem

    def __post_init__(self) -> None:
        super().__post_init__()
        self.operations = self._interval('operations', 1, 20)
        self._integer('digits', 1, 9)
        self._integer('max_value', 1, 10**9)
        self._boolean('worked')

    def draw(self, rng: random.Random) -> tuple[str, Tree]:
        tree = self._grow(rng, uniform(rng, *self.operations), self.max_value)[0]
        return _canonical(tree), tree

    def pose(self, key: str, problem: Tree, rng: random.Random) -> Prompt:
        steps: list[str] = []
        answer = str(_reduce_all(problem, steps))
        return Prompt(
            text=f'Compute {_render(problem)}.',
            reference='\n'.join([*steps, f'Answer: {answer}']),
            key=key,
            info={'tree': problem, 'answer': answer},
        )

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        tree = prompt.info['tree']
        parts = []
        for line in lines(split_answer(completion)[0], MAX_JUDGED_LINES)[:MAX_JUDGED_LINES]:
            if '=' in line.text:
                reduced = _reduce(tree, line.text)
                tree = tree if reduced is None else reduced
                parts.append(Part('step', float(reduced is not None), line.start, line.end))
        # Compared as text: '042', '42.0' and a million digits are all simply not '42'.
        answer = final_answer(completion)
        if self.worked and (not isinstance(tree, int) or any(part.score < 1 for part in parts)):
            return Verdict(0.0, tuple(parts), 'a wrong or missing step')
        if answer == prompt.info['answer']:
            return Verdict(1.0, tuple(parts))
        return Verdict(0.0, tuple(parts), 'no final answer' if answer is None else 'wrong answer')

    def _grow(
        self, rng: random.Random, operations: int, bound: int, operators: str = '+-*', least: int = 1
    ) -> tuple[Tree, int]:
        """A tree with so many operations, its root among `operators`, and its value, which is at most `bound`.

        A lone number is at least `least` if the bound lets it: there is little to learn from a factor of 1.
        """
        if operations == 0:
            high = min(bound, 10**self.digits - 1)
            value = uniform(rng, min(least, high), high)
            return value, value
        operator = operators[uniform(rng, 0, len(operators) - 1)]
        on_left = uniform(rng, 0, operations - 1)
        left, right = (on_left, '+-*'), (operations - 1 - on_left, RIGHT_OF[operator])
        if operator == '-':
            a, x = self._grow(rng, left[0], bound, left[1])
            b, y = self._grow(rng, right[0], max(x - 1, 0), right[1])  # differences of 0 would breed products of 0
            return [a, '-', b], x - y
        # The side grown first takes what it likes of the bound, so each side is the first half of the time.
        left_first = rng.random() < 0.5
        first, second = (left, right) if left_first else (right, left)
        if operator == '+':
            a, x = self._grow(rng, first[0], bound, first[1])
            b, y = self._grow(rng, second[0], bound - x, second[1])
        else:  # a first factor above the square root would leave 1 for the other, nearly always
            a, x = self._grow(rng, first[0], isqrt(bound), first[1], least=2)
            b, y = self._grow(rng, second[0], bound // max(x, 1), second[1], least=2)
        return [a, operator, b] if left_first else [b, operator, a], _apply(x, operator, y)


def _apply(left: int, operator: str, right: int) -> int:
    if operator == '+':
        return left + right
    return left - right if operator == '-' else left * right


def _reduce_all(tree: Tree, steps: list[str]) -> int:
    """The value of the tree; appends its reductions, left to right and innermost first."""
    if isinstance(tree, int):
        return tree
    left, operator, right = _reduce_all(tree[0], steps), tree[1], _reduce_all(tree[2], steps)
    value = _apply(left, operator, right)
    steps.append(f'{left}{operator}{right}={value}')
    return value


def _reduce(tree: Tree, step: str) -> Tree | None:
    """The tree after the reduction that `step` states, or None if it states none that is possible now."""
    if isinstance(tree, int):
        return None
    left, operator, right = tree
    if isinstance(left, int) and isinstance(right, int):
        value = _apply(left, operator, right)
        return value if step == f'{left}{operator}{right}={value}' else None
    if (reduced := _reduce(left, step)) is not None:
        return [reduced, operator, right]
    if (reduced := _reduce(right, step)) is not None:
        return [left, operator, reduced]
    return None


def _render(tree: Tree) -> str:
    if isinstance(tree, int):
        return str(tree)
    left, operator, right = tree
    before, after = _render(left), _render(right)
    if operator == '*' and isinstance(left, list) and left[1] in '+-':
        before = f'({before})'
    if isinstance(right, list) and right[1] in '+-':
        after = f'({after})'
    return f'{before}{operator}{after}'


def _canonical(tree: Tree) -> str:
    """Equal for expressions that differ by commutation only, so that 3+4 and 4+3 land in one split."""
    if isinstance(tree, int):
        return str(tree)
    left, operator, right = tree
    sides = [_canonical(left), _canonical(right)]
    if operator != '-':
        sides.sort()
    return f'({sides[0]}{operator}{sides[1]})'
