"""Arithmetic: reduce an expression over + - * one operation at a time."""

import ast
import random
import re
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, ClassVar, TypeAlias

from data.errors import InputError
from data.tasks import (
    BLANK,
    Part,
    ProceduralTask,
    Prompt,
    Verdict,
    final_answer,
    lines,
    register,
    split_answer,
    uniform,
)

# A number, or [left, operator, right]: lists, so that it survives a trip through JSON.
Tree: TypeAlias = int | list[Any]

# Operators whose result may stand to the right of an operator in such a way that its parentheses, if any, are needed:
# never a + (b + c), which is a + b + c.
RIGHT_OF = {'+': '*', '-': '+-*', '*': '+-'}
MAX_JUDGED_LINES = 256
EXPRESSION = re.compile(r'[0-9+*()-]{1,100}')
SYMBOLS: dict[type, str] = {ast.Add: '+', ast.Sub: '-', ast.Mult: '*'}


@register('arithmetic')
@dataclass(kw_only=True)
class Arithmetic(ProceduralTask):
    """Compute an expression like 2*(3+4) of `operations` operations on numbers of at most `digits` digits.

    It is written without spaces, each of which would be a token. Every intermediate value lies in [0, max_value]. The
    score is that of the final answer alone; parts judge each line with an equals sign: 1 if it is a legal reduction of
    what the earlier lines left, in any order, done right.
    With `worked`, the answer must be worked out: a wrong or missing line scores nothing. Where few answers are common,
    a policy rewarded for the answer alone soon writes lines that lead nowhere, and guesses. With `direct` the reference
    is the answer alone.
    """

    operations: tuple[int, int] = (1, 3)
    digits: int = 2
    max_value: int = 99
    worked: bool = field(default=False, repr=False)  # no part of the seed: it changes the verdict, not the problem
    direct: bool = field(default=False, repr=False)  # nor is this
    invitation: ClassVar[str] = 'Propose an expression to compute.'

    def __post_init__(self) -> None:
        super().__post_init__()
        self.operations = self._interval('operations', 1, 20)
        self._integer('digits', 1, 9)
        self._integer('max_value', 1, 10**9)
        self._boolean('worked')
        self._boolean('direct')
        if self.worked and self.direct:
            raise InputError("task 'arithmetic': direct is True: expected False where answers must be worked out")

    def draw(self, rng: random.Random) -> tuple[str, Tree]:
        tree = self._grow(rng, uniform(rng, *self.operations), self.max_value)[0]
        return _canonical(tree), tree

    def pose(self, key: str, problem: Tree, rng: random.Random) -> Prompt:
        steps: list[str] = []
        answer = str(_reduce_all(problem, steps))
        if self.direct:
            steps.clear()
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

    def parse(self, text: str) -> Prompt | None:
        """The problem of computing an expression, written as problems of this task are: `2*(3+4)`."""
        text = text.strip(BLANK)
        tree = _parse(text)
        if tree is None or _render(tree) != text or self._value(tree) is None:
            return None
        low, high = self.operations
        if not low <= sum(text.count(operator) for operator in RIGHT_OF) <= high:
            return None
        key = _canonical(tree)
        return self.pose(key, tree, random.Random(key)) if self.in_split(key) else None

    def proposal(self, prompt: Prompt) -> str:
        return _render(prompt.info['tree'])

    def _value(self, tree: Tree) -> int | None:
        """The value of a tree, None where it is none that could be drawn: by its shape, a number or a value."""
        if isinstance(tree, int):
            return tree if tree <= min(10**self.digits - 1, self.max_value) else None
        left, operator, right = tree
        if isinstance(right, list) and right[1] not in RIGHT_OF[operator]:
            return None
        x, y = self._value(left), self._value(right)
        value = -1 if x is None or y is None else _apply(x, operator, y)
        return value if 0 <= value <= self.max_value else None

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


def _parse(text: str) -> Tree | None:
    """The tree of a short expression over + - *, None where a text is no such thing."""

    def tree(node: ast.expr) -> Tree:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.BinOp(left, operator, right):
                return [tree(left), SYMBOLS[type(operator)], tree(right)]
        raise ValueError

    if not EXPRESSION.fullmatch(text):
        return None
    try:
        return tree(ast.parse(text, mode='eval').body)
    except (SyntaxError, ValueError, KeyError, MemoryError):  # the last from parentheses in parentheses
        return None


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
