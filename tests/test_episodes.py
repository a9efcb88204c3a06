"""Exchanges with environments: who said what is told apart, nothing that the environment said is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from text import small_tokenizer

from data.chat import render_chat
from data.tasks import Environment, Prompt, Turn, get_task
from train.act.algorithms import Trajectory
from train.act.episodes import Episode, play
from train.act.rollout import _segment
from train.sampler import Completion, row_keys


class Script:
    """Says what is written for each problem and sample, turn by turn; keeps what it was shown, and with which key."""

    def __init__(self, lines: Sequence[Sequence[Sequence[str]]], starts: Sequence[Sequence[int]]):
        self.lines, self.starts = lines, [list(start) for start in starts]
        self.seen: list[tuple[list[int], tuple[int, ...]]] = []

    def __call__(self, tokens: list[list[int]], keys: jax.Array) -> list[list[Completion]]:
        tokenizer = small_tokenizer()
        said = []
        for row, prompt in enumerate(tokens):
            group = []
            for sample in range(keys.shape[1]):
                self.seen.append((prompt, tuple(np.asarray(jax.random.key_data(keys[row, sample])).tolist())))
                problem = next(i for i, start in enumerate(self.starts) if prompt[: len(start)] == start)
                turn = prompt.count(tokenizer.control('<|assistant|>')) - 1
                options = [script for script in self.lines[problem] if len(script) > turn]
                # Later turns come one sample at a time: the script is found by what was said before.
                spoken = tokenizer.decode(prompt[len(self.starts[problem]) :])
                script = options[sample] if turn == 0 else next(s for s in options if spoken.startswith(s[0]))
                ids = [*tokenizer.encode(script[turn]), tokenizer.end_id]
                group.append(Completion(script[turn], ids, [-0.5] * len(ids), True))
            said.append(group)
        return said


def chat_start(prompt: Prompt) -> list[int]:
    return render_chat([{'role': 'user', 'content': prompt.text}], small_tokenizer(), add_generation_prompt=True)[0]


def played(name: str, scripts: Any, index: int = 3, **options: Any) -> tuple[list[Episode], Prompt, Script]:
    task = get_task(name, **options)
    assert isinstance(task, Environment)
    prompt = task.prompt(index)
    script = Script([scripts(prompt)], [chat_start(prompt)])
    (group,) = play([task], [prompt], small_tokenizer(), script, row_keys(0, [index], len(script.lines[0])))
    return group, prompt, script


def calculated(prompt: Prompt) -> list[list[str]]:
    left, operator, right = prompt.info['tree']
    return [
        [f'{left}{operator}{right}=', f'Answer: {prompt.info["answer"]}'],
        ['what now', 'Answer: 1'],
        [f'Answer: {prompt.info["answer"]}'],
        ['100+1=', '101*2=', '7-9=', 'Answer: no'],
    ]


def test_a_tool_is_asked_and_what_it_says_is_not_learnt() -> None:
    group, prompt, script = played('calculator', calculated, operations=1, turns=3)
    assert [e.verdict.score for e in group] == [1.0, 0.0, 1.0, 0.0]
    assert [e.turns for e in group] == [2, 2, 1, 3]  # the last one was not let speak a fourth time
    tokenizer = small_tokenizer()
    for episode, lines in zip(group, script.lines[0], strict=True):
        own = [t for t, mine in zip(episode.tokens, episode.learnt, strict=True) if mine]
        assert own == [t for line in lines[: episode.turns] for t in [*tokenizer.encode(line), tokenizer.end_id]]
        assert len(episode.logprobs) == len(own)
    others = tokenizer.decode([t for t, mine in zip(group[3].tokens, group[3].learnt, strict=True) if not mine])
    assert others == '101202'
    keys = [key for _, key in script.seen]
    # Where fewer samples go on, rows are filled up with the last one; no two different ones share a key.
    assert len(set(keys)) == len({(tuple(tokens), key) for tokens, key in script.seen}) >= 7


def test_an_exchange_is_the_chat_that_a_reader_would_write() -> None:
    group, prompt, script = played('calculator', calculated, operations=1, turns=3)
    left, operator, right = prompt.info['tree']
    chat = [
        {'role': 'user', 'content': prompt.text},
        {'role': 'assistant', 'content': f'{left}{operator}{right}='},
        {'role': 'tool', 'content': prompt.info['answer']},
        {'role': 'assistant', 'content': f'Answer: {prompt.info["answer"]}'},
    ]
    tokens, mask = render_chat(chat, small_tokenizer())
    assert group[0].prompt + group[0].tokens == tokens
    e = group[0]
    t = Trajectory(e.prompt, e.tokens, e.learnt, e.logprobs, 0, 0, np.zeros(len(e.logprobs)), np.zeros(1, bool), True)
    segment = _segment(t, {'advantage': np.arange(1, len(e.logprobs) + 1)})
    np.testing.assert_array_equal(segment.loss_weight, mask)
    assert segment.stamps['advantage'][np.array(mask) == 0].max() == 0
    assert segment.stamps['advantage'][np.array(mask) == 1].tolist() == list(range(1, t.count + 1))


def moves(prompt: Prompt) -> list[str]:
    rows, solved = prompt.info['rows'], prompt.key.split('\n')
    places = [(r, c) for r, row in enumerate(rows) for c, digit in enumerate(row) if digit == '.']
    return [f'row {r + 1} column {c + 1}: {solved[r][c]}' for r, c in places]


@pytest.mark.parametrize('partial', [False, True])
def test_sudoku_a_move_a_turn(partial: bool) -> None:
    def scripts(prompt: Prompt) -> list[list[str]]:
        right = moves(prompt)
        return [right, [right[1], right[0], right[1]], ['I pass'], [right[2][:-1] + 'x']]

    group, prompt, script = played('sudoku_moves', scripts, blanks=5, partial=partial)
    assert [e.verdict.score for e in group] == ([1.0, 0.4, 0.0, 0.0] if partial else [1.0, 0.0, 0.0, 0.0])
    assert [e.turns for e in group] == [5, 3, 1, 1]
    shown = small_tokenizer().decode([t for t, own in zip(group[0].tokens, group[0].learnt, strict=True) if not own])
    assert shown.count('.') == 4 + 3 + 2 + 1


def test_what_no_move_or_question_may_do() -> None:
    task = get_task('calculator', operations=1)
    prompt = task.prompt(0)
    for text in ('1+1', '1+1=\n2+2=', '9' * 13 + '+1=', '2**3=', '٣+1=', ''):
        assert task.reply(prompt, [Turn('assistant', text)]).text.startswith('Ask like')  # type: ignore[attr-defined]
    assert task.verify(prompt, prompt.reference).score == 1
