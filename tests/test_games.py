"""Games of two sides: the rules against a search of all lines, and who said what."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from text import small_tokenizer

from data.chat import render_chat
from data.tasks import ILLEGAL, Game, Prompt, get_task
from train.act.games import play_games
from train.sampler import Completion, row_keys


@functools.cache
def wins(heaps: tuple[int, ...]) -> bool:
    """Whether the side to move wins, by trying everything."""
    return any(not wins(after) for after in followers(heaps))


def followers(heaps: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(*heaps[:i], left, *heaps[i + 1 :]) for i, stones in enumerate(heaps) for left in range(stones)]


def move(heaps: tuple[int, ...], after: tuple[int, ...]) -> str:
    ((heap, taken),) = [(i, a - b) for i, (a, b) in enumerate(zip(heaps, after, strict=True)) if a != b]
    return f'{taken} from {"abcdef"[heap]}'


def test_winning_moves_are_those_of_a_full_search() -> None:
    """Of all positions of three heaps of up to 4: what `verify` accepts leaves a loss, and it accepts all of these."""
    task, easy = get_task('nim', most=4), get_task('nim', most=4, goal='legal')
    for heaps in itertools.product(range(5), repeat=3):
        prompt = Prompt('', '', '', {'heaps': list(heaps)})
        for after in followers(heaps):
            assert task.verify(prompt, move(heaps, after)).score == float(not wins(after))
            assert easy.verify(prompt, move(heaps, after)).score == 1
        assert task.verify(prompt, f'{heaps[0] + 1} from a').reason == ILLEGAL
    assert all(wins(tuple(task.prompt(index).info['heaps'])) for index in range(50))


@given(st.integers(0, 10**6), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=60, deadline=None)
def test_outcomes_are_zero_sum(index: int, rng: random.Random, fair: bool) -> None:
    """Whatever is played; the last to move is the winner of a fair game and the loser of a foul one."""
    task = get_task('nim', heaps=4, most=4)
    assert isinstance(task, Game)
    prompt = task.prompt(index)
    heaps, moves = tuple(prompt.info['heaps']), []
    while not task.show(prompt, moves).done:
        first, second = task.judge(prompt, moves)
        assert first.score == second.score == 0.5 and first.reason == 'unfinished'
        after = rng.choice(followers(heaps))
        moves.append(
            move(heaps, after) if fair or rng.random() < 0.7 else rng.choice(['', '9 from a', '0 from b', 'a'])
        )
        heaps = after
    first, second = task.judge(prompt, moves)
    assert {first.score, second.score} == {0.0, 1.0}
    foul = ILLEGAL in (first.reason, second.reason)
    assert not (fair and foul)
    assert [first, second][(len(moves) - 1) % 2].score == float(not foul)


class Script:
    """Says what a function makes of the position shown last; keeps the keys that it was given."""

    def __init__(self, answer: Callable[[tuple[int, ...]], str], stopped: bool = True):
        self.answer, self.stopped = answer, stopped
        self.keys: list[tuple[int, ...]] = []
        self.rows: list[int] = []

    def __call__(self, tokens: list[list[int]], keys: jax.Array) -> list[list[Completion]]:
        tokenizer = small_tokenizer()
        self.rows.append(len(tokens))
        said = []
        for row, prompt in enumerate(tokens):
            assert prompt[-1] == tokenizer.control('<|assistant|>')
            self.keys.append(tuple(np.asarray(jax.random.key_data(keys[row, 0])).tolist()))
            shown = tokenizer.decode(prompt).split('Nim: ')[-1].split(' ')
            text = self.answer(tuple(int(heap[1:]) for heap in shown))
            ids = [*tokenizer.encode(text), *([tokenizer.end_id] if self.stopped else [])]
            said.append([Completion(text, ids, [-0.5] * len(ids), self.stopped)])
        return said


def best(heaps: tuple[int, ...]) -> str:
    return move(heaps, next((after for after in followers(heaps) if not wins(after)), followers(heaps)[0]))


def worst(heaps: tuple[int, ...]) -> str:
    return move(heaps, next((after for after in followers(heaps) if wins(after)), followers(heaps)[-1]))


def test_each_side_reads_the_other_and_learns_its_own_words() -> None:
    """Two perfect players, and a perfect one against one that throws games away, from five starts each."""
    task = get_task('nim', most=4)
    assert isinstance(task, Game)
    prompts = [task.prompt(index) for index in range(5)]
    strong, weak = Script(best), Script(worst)
    players = [(strong, strong)] * 5 + [(weak, strong)] * 5
    keys = row_keys(0, range(10), 1)[:, 0]
    sides = play_games([(task, prompt) for prompt in prompts * 2], players, small_tokenizer(), keys)
    tokenizer = small_tokenizer()
    for number, (first, second) in enumerate(sides):
        prompt = prompts[number % 5]
        assert first is not None
        if number < 5:  # every start is a win for the first side
            assert first.verdict.score == 1 and (second is None or second.verdict.score == 0)
        moves: list[str] = []
        chats: list[list[dict[str, str]]] = [[], []]
        while not (shown := task.show(prompt, moves)).done:
            heaps = tuple(int(heap[1:]) for heap in shown.text[5:].split(' '))
            text = players[number][len(moves) % 2].answer(heaps)
            chats[len(moves) % 2] += [{'role': 'user', 'content': shown.text}, {'role': 'assistant', 'content': text}]
            moves.append(text)
        for side, chat in zip((first, second), chats, strict=True):
            assert (side is None) == (not chat)
            if side is not None:
                tokens, mask = render_chat(chat, tokenizer)
                assert side.prompt + side.tokens == tokens
                assert [0] * len(side.prompt) + list(map(int, side.learnt)) == mask
                assert len(side.logprobs) == sum(mask) and side.turns == len(chat) // 2
    # As many rows as powers of two, filled up by repeating the last one: else no two share a key.
    assert all(rows & (rows - 1) == 0 for script in (strong, weak) for rows in script.rows)
    turns = sum(side.turns for both in sides for side in both if side is not None)
    assert len({*strong.keys, *weak.keys}) == turns


def test_a_foul_ends_the_game() -> None:
    """A move that is none, and one that the limit ended, however good."""
    task = get_task('nim')
    assert isinstance(task, Game)
    good = Script(best)
    games = [(task, task.prompt(index)) for index in range(3)]
    for fouls in (Script(lambda _: 'I pass'), Script(best, stopped=False)):
        keys = row_keys(0, range(3), 1)[:, 0]
        for first, second in play_games(games, [(fouls, good)] * 3, small_tokenizer(), keys):
            assert first is not None and first.verdict.reason == ILLEGAL and first.turns == 1
            assert second is None
        for first, second in play_games(games, [(good, fouls)] * 3, small_tokenizer(), keys):
            assert first is not None and first.verdict.score == 1 and first.turns == 1
            assert second is None or (second.verdict.score == 0 and second.turns == 1)
