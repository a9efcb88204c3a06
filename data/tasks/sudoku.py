"""Sudoku: fill the grid. Small ones fit small models, and a full-size one is there to grow into."""

import functools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from data.errors import InputError
from data.tasks import Part, ProceduralTask, Prompt, Verdict, lines, register

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size of the grid: rows and columns of a box
MOST_BLANKS = {4: 10, 6: 24, 9: 54}  # beyond this, hardly any grid has a puzzle with one solution
MAX_DIGS = 100


@register('sudoku')
@dataclass(kw_only=True)
class Sudoku(ProceduralTask):
    """Fill the `blanks` of a grid of `size` 4, 6 or 9; the puzzle has one solution.

    A completion is the full grid, a row of digits a line and nothing else. It is judged by the rules and the given
    digits. Parts are rows: 1 if the row keeps its given digits and clashes nowhere. The split is by the solved grid,
    since puzzles of one grid share their solution.
    """

    size: int = 4
    blanks: tuple[int, int] = (4, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.size) is not int or self.size not in BOXES:
            raise InputError(f'task {self.name!r}: size must be one of {", ".join(map(str, BOXES))}, got {self.size!r}')
        self.blanks = self._interval('blanks', 1, MOST_BLANKS[self.size])

    def draw(self, rng: random.Random) -> tuple[str, list[int]]:
        grid = next(_fillings([0] * self.size**2, self.size, rng))
        return '\n'.join(_rows(grid, self.size)), grid

    def pose(self, key: str, problem: list[int], rng: random.Random) -> Prompt:
        rows = _rows(self._dig(problem, rng), self.size)
        return Prompt(text='\n'.join(['Solve the sudoku.', *rows]), reference=key, key=key, info={'rows': rows})

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        given = prompt.info['rows']
        found = lines(completion, len(given))
        if len(found) != len(given):
            return Verdict(0.0, reason=f'expected {len(given)} lines')
        right = _right_rows([line.text for line in found], given)
        parts = tuple(
            Part(f'row {i + 1}', float(ok), line.start, line.end)
            for i, (line, ok) in enumerate(zip(found, right, strict=True))
        )
        wrong = [part.name for part in parts if not part.score]
        return Verdict(float(not wrong), parts, f'wrong: {", ".join(wrong)}' if wrong else '')

    def _dig(self, grid: list[int], rng: random.Random) -> list[int]:
        """The grid with blanks (0) such that one solution remains."""
        least, most = self.blanks
        target = rng.randint(least, most)
        for _ in range(MAX_DIGS):
            cells, dug = list(grid), 0
            for cell in rng.sample(range(len(cells)), len(cells)):
                cells[cell] = 0
                if len(list(islice(_fillings(cells, self.size), 2))) == 1:
                    dug += 1
                else:
                    cells[cell] = grid[cell]
                if dug == target:
                    return cells
            if dug >= least:
                return cells
        raise InputError(f'task {self.name!r}: found no puzzle of size {self.size} with {least} blanks; ask for fewer')


def _rows(cells: list[int], size: int) -> list[str]:
    text = ''.join(map(str, cells)).replace('0', '.')
    return [text[i : i + size] for i in range(0, len(text), size)]


@functools.cache
def _units(size: int) -> list[tuple[int, int, int]]:
    """For each cell its row, column and box, numbered from 0 to 3 * size - 1 together."""
    high, wide = BOXES[size]
    return [(r, size + c, 2 * size + r // high * high + c // wide) for r in range(size) for c in range(size)]


def _fillings(cells: list[int], size: int, rng: random.Random | None = None) -> Iterator[list[int]]:
    """Every way to fill the zeros of `cells` by the rules, in a random order if `rng` is given."""
    cells, units, taken = list(cells), _units(size), [0] * (3 * size)
    blanks = [i for i, digit in enumerate(cells) if not digit]
    digits = list(range(1, size + 1))
    everything = sum(1 << digit for digit in digits)

    def put(cell: int, digit: int) -> None:
        """Put the digit into the cell or, the second time, take it out again."""
        for unit in units[cell]:
            taken[unit] ^= 1 << digit

    def search() -> Iterator[list[int]]:
        if not blanks:
            yield list(cells)
            return
        fewest = size + 1
        for blank in blanks:  # the cell with the fewest candidates, so that dead ends show early
            row, column, box = units[blank]
            candidates = everything & ~(taken[row] | taken[column] | taken[box])
            if candidates.bit_count() < fewest:
                fewest, cell, free = candidates.bit_count(), blank, candidates
                if fewest <= 1:
                    break
        blanks.remove(cell)
        for digit in rng.sample(digits, size) if rng else digits:
            if free >> digit & 1:
                cells[cell] = digit
                put(cell, digit)
                yield from search()
                put(cell, digit)
        blanks.append(cell)

    for cell, digit in enumerate(cells):
        if digit:
            put(cell, digit)
    yield from search()


def _right_rows(rows: list[str], given: list[str]) -> list[bool]:
    """For each row whether it is full, keeps its given digits and shares no digit with its columns and boxes."""
    size = len(given)
    rows = [row if _keeps(row, clues) else '?' * size for row, clues in zip(rows, given, strict=True)]
    places = [(unit, rows[cell // size][cell % size]) for cell, units in enumerate(_units(size)) for unit in units]
    count = Counter(places)
    clashing = {i // (3 * size) for i, place in enumerate(places) if count[place] > 1}
    return [i not in clashing and '?' not in row for i, row in enumerate(rows)]


def _keeps(row: str, clues: str) -> bool:
    digits = '123456789'[: len(clues)]
    return len(row) == len(clues) and all(d in digits and c in ('.', d) for d, c in zip(row, clues, strict=True))
