"""Sudoku, one digit a turn."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from data.tasks import ILLEGAL, Prompt, Turn, Verdict, register
from data.tasks.sudoku import Sudoku

MOVE = re.compile(r'row ([1-9]) column ([1-9]): ([1-9])')


@register('sudoku_moves')
@dataclass(kw_only=True)
class SudokuMoves(Sudoku):
    """Fill a sudoku by moves like `row 2 column 3: 4`; after each the grid is shown again.

    An illegal move, one that writes over a digit or leaves the puzzle's solution, ends the game. The score is the share
    of blanks filled by then if `partial`, else 1 for a full grid and 0 for any other.
    """

    partial: bool = False

    @property
    def turns(self) -> int:
        """As many as there may be blanks."""
        return self.blanks[1]

    def reply(self, prompt: Prompt, transcript: Sequence[Turn]) -> Turn:
        """The grid after the last move; nothing more once the game is over."""
        rows, over = self._played(prompt, transcript)
        return Turn('user', '\n'.join(rows), done=over or '.' not in ''.join(rows))

    def judge(self, prompt: Prompt, transcript: Sequence[Turn]) -> Verdict:
        """By the grid that the moves led to."""
        rows, over = self._played(prompt, transcript)
        blanks, left = (''.join(grid).count('.') for grid in (prompt.info['rows'], rows))
        share = 1 - left / blanks
        reason = ILLEGAL if over else f'{left} blanks left' if left else ''
        return Verdict(share if self.partial or share == 1.0 else 0.0, reason=reason)

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        """A completion of full rows solves it at once, as in `sudoku`; one of a single move is a transcript of one."""
        if MOVE.fullmatch(completion.strip()):
            return self.judge(prompt, [Turn('assistant', completion)])
        return super().verify(prompt, completion)

    def _played(self, prompt: Prompt, transcript: Sequence[Turn]) -> tuple[list[str], bool]:
        """The grid after the model's moves, up to the first illegal one, and whether there was one."""
        rows, solved = list(prompt.info['rows']), prompt.key.split('\n')
        for turn in transcript:
            if turn.role != 'assistant':
                continue
            move = MOVE.fullmatch(turn.text.strip())
            if move is None:
                return rows, True
            row, column = int(move[1]) - 1, int(move[2]) - 1
            if row >= self.size or column >= self.size or rows[row][column] != '.' or solved[row][column] != move[3]:
                return rows, True
            rows[row] = rows[row][:column] + move[3] + rows[row][column + 1 :]
        return rows, False
