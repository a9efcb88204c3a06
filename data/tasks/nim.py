"""Nim: two players take stones from heaps; whoever takes the last one wins."""

import functools
import operator
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from data.errors import InputError, did_you_mean
from data.tasks import BLANK, ILLEGAL, ProceduralTask, Prompt, Turn, Verdict, register, uniform

MOVE = re.compile(r'([1-9]) from ([a-f])')
GOALS = ('win', 'legal')

Heaps = Sequence[int]


@register('nim')
@dataclass(kw_only=True)
class Nim(ProceduralTask):
    """Take stones by moves like `2 from b`, in turn, from `heaps` heaps of at most `most` stones.

    A game for two sides (see `data.tasks.Game`): an illegal move loses. As a task of one turn, its reference and its
    verdict follow `goal`: 'win', the moves after which the exclusive or of all heaps is 0, with which a side that keeps
    to them wins (Bouton 1901); 'legal', any legal move, which is what a beginner learns first.

    Starts of goal 'win' are wins for the first side. Held out are starts: play may pass through any position.
    """

    heaps: int = 3
    most: int = 7
    goal: str = 'win'

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer('heaps', 1, 6)
        self._integer('most', 1, 9)
        if self.goal not in GOALS:
            raise InputError(f'task {self.name!r}: goal is {self.goal!r}{did_you_mean(self.goal, GOALS)}')

    def draw(self, rng: random.Random) -> tuple[str, Heaps]:
        heaps: Heaps = ()
        while not (_balance(heaps) if self.goal == 'win' else sum(heaps)):
            heaps = [uniform(rng, 0, self.most) for _ in range(self.heaps)]
        return ' '.join(map(str, sorted(filter(None, heaps)))), heaps

    def pose(self, key: str, problem: Heaps, rng: random.Random) -> Prompt:
        moves = [f'{n} from {chr(97 + heap)}' for heap, stones in enumerate(problem) for n in range(1, stones + 1)]
        moves = [move for move in moves if self.goal == 'legal' or not _balance(_after(problem, move) or ())]
        return Prompt(_shown(problem), rng.choice(moves), key, {'heaps': list(problem)})

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        heaps = _after(prompt.info['heaps'], completion)
        if heaps is None:
            return Verdict(0.0, reason=ILLEGAL)
        if self.goal == 'win' and _balance(heaps):
            return Verdict(0.0, reason='the other side can win')
        return Verdict(1.0)

    def show(self, prompt: Prompt, moves: Sequence[str]) -> Turn:
        """The heaps that the moves have left."""
        heaps, illegal = _played(prompt, moves)
        return Turn('user', _shown(heaps), done=illegal or not any(heaps))

    def judge(self, prompt: Prompt, moves: Sequence[str]) -> tuple[Verdict, Verdict]:
        """Whoever moved last has won, or lost by an illegal move; a draw while there are stones."""
        heaps, illegal = _played(prompt, moves)
        if any(heaps) and not illegal:
            return Verdict(0.5, reason='unfinished'), Verdict(0.5, reason='unfinished')
        lost = Verdict(0.0, reason=ILLEGAL if illegal else 'lost')
        first_wins = len(moves) % 2 == int(not illegal)
        return (Verdict(1.0), lost) if first_wins else (lost, Verdict(1.0))


def _balance(heaps: Heaps) -> int:
    """The exclusive or of the heaps: 0 where the side to move loses against best play."""
    return functools.reduce(operator.xor, heaps, 0)


def _shown(heaps: Heaps) -> str:
    return 'Nim: ' + ' '.join(f'{chr(97 + heap)}{stones}' for heap, stones in enumerate(heaps))


def _after(heaps: Heaps, text: str) -> Heaps | None:
    """The heaps after a move, None where it is illegal."""
    move = MOVE.fullmatch(text.strip(BLANK))
    heap = ord(move[2]) - 97 if move else len(heaps)
    if move is None or heap >= len(heaps) or int(move[1]) > heaps[heap]:
        return None
    return [stones - int(move[1]) * (i == heap) for i, stones in enumerate(heaps)]


def _played(prompt: Prompt, moves: Sequence[str]) -> tuple[Heaps, bool]:
    """The heaps that legal moves have left, and whether the last move was illegal."""
    heaps = prompt.info['heaps']
    for move in moves:
        if (after := _after(heaps, move)) is None:
            return heaps, True
        heaps = after
    return heaps, False
