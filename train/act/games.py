"""Games of two sides, each played by a model: what the other side said is read, never learnt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from data.tasks import Game, Prompt
from data.tokenizer import Tokenizer
from train.act.episodes import Episode, Exchange, Sample, chat_prompt, in_threads, speak

# What came of a game for its first and its second side; None for a side that never was to move.
Sides = tuple[Episode | None, Episode | None]


def play_games(
    games: Sequence[tuple[Game, Prompt]],
    players: Sequence[tuple[Sample, Sample]],
    tokenizer: Tokenizer,
    keys: jax.Array,
) -> list[Sides]:
    """Plays each game from its start to its end.

    Args:
        players: for each game who plays the first side and who the second.
        keys: [games], decide what is drawn.
    """
    boards = [_Board(game, prompt, tokenizer) for game, prompt in games]
    going, turn = list(range(len(boards))), 0
    while going := [i for i in going if boards[i].shown()]:
        moving: dict[Sample, dict[int, Exchange]] = {}  # games that are under way have all seen as many moves
        for i in going:
            moving.setdefault(players[i][turn % 2], {})[i] = boards[i].sides[turn % 2]
        for sample, exchanges in moving.items():
            speak(sample, exchanges, keys, turn)
        for i in going:
            boards[i].moved()
        turn += 1
    return in_threads(_Board.episodes, boards)


class _Board:
    """One game under way."""

    def __init__(self, game: Game, prompt: Prompt, tokenizer: Tokenizer):
        self._game, self._prompt, self._tokenizer = game, prompt, tokenizer
        self._moves: list[str] = []
        self.sides: list[Exchange] = []

    def shown(self) -> bool:
        """Tells the side to move of the position; False where the game is over."""
        position = self._game.show(self._prompt, self._moves)
        if position.done:
            return False
        if len(self._moves) < 2:
            start = dataclasses.replace(self._prompt, text=position.text)
            self.sides.append(Exchange(start, chat_prompt(start, self._tokenizer), self._tokenizer))
        else:
            self.sides[len(self._moves) % 2].tell(position)
        return True

    def moved(self) -> None:
        """Takes down what the side to move has said: one that the limit ended says nothing legal."""
        last = self.sides[len(self._moves) % 2].last
        self._moves.append(last.text if last.stopped else '')

    def episodes(self) -> Sides:
        """What came of it."""
        verdicts = self._game.judge(self._prompt, self._moves)
        played = [side.episode(verdict) for side, verdict in zip(self.sides, verdicts, strict=False)]
        return (played[0] if played else None, played[1] if len(played) > 1 else None)
