"""Self-play: each side has its own baseline, opponents do not learn, and a resumed stage meets the same ones."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import players  # noqa: F401  (registers the game)
import pytest
from test_rollout import model, tokenizer

from data.errors import InputError
from data.tasks import get_task
from train.act.algorithms import Trajectory
from train.act.rollout import RolloutStream
from train.act.self_play import SelfPlayStream
from train.checkpoint import Checkpoints
from train.measure.scoring import Other
from train.stages import stage_defaults

STARTS, SAMPLES = 3, 4
SETTINGS = {'prompts': STARTS, 'samples': SAMPLES, 'batch_size': 2 * STARTS * SAMPLES, 'sequence_length': 256}
SETTINGS |= {'max_tokens': 32, 'temperature': 1.3, 'save_every': 1, 'opponent_share': 0.0}


def stream(folder: Path | None = None, task: str = 'parity', **changes: Any) -> SelfPlayStream:
    others = changes.pop('others', {})
    settings = {**stage_defaults('self_play'), **SETTINGS, **changes}
    return SelfPlayStream(model()[0], tokenizer(), [get_task(task)], settings, 11, others, (), (), folder=folder)


@functools.cache
def other() -> Any:
    """The variables of a model that is a little different."""
    return jax.tree.map(lambda x: 1.05 * x, model()[1])


def drawn(made: RolloutStream) -> list[list[Trajectory]]:
    """The groups of its first rollout, with their advantages."""
    groups: list[list[Trajectory]] = []
    inner = made._minibatches
    made._minibatches = lambda given, turn: groups.extend(given) or inner(given, turn)  # type: ignore
    made.next(0, model()[1])
    return groups


def test_each_side_has_its_own_baseline() -> None:
    """Advantages in float64; of a game that both sides took part in throughout, they cancel out."""
    groups = drawn(stream())
    games = {number: [g for g in groups if g[0].group == number] for number in range(STARTS)}
    apart = 0
    for first, second in (pair for pair in games.values() if len(pair) == 2):
        earned = [np.array([t.rewards.sum() for t in side]) for side in (first, second)]
        for side, returns in zip((first, second), earned, strict=True):
            expected = returns - np.asarray(returns, np.float64).mean()
            for trajectory, value in zip(side, expected, strict=True):
                np.testing.assert_allclose(trajectory.stamps['advantage'], np.full(trajectory.count, value), atol=1e-12)
        assert {*earned[0], *earned[1]} <= {0.0, 1.0}
        assert len(first) == SAMPLES  # of the second side there are fewer, where the first made a foul
        if len(second) == SAMPLES:
            np.testing.assert_array_equal(earned[0] + earned[1], 1.0)
            sums = [[t.stamps['advantage'][0] for t in side] for side in (first, second)]
            np.testing.assert_allclose(np.sum(sums, 0), 0.0, atol=1e-12)
        # A baseline over both sides is another thing.
        apart += abs(earned[0].mean() - np.concatenate(earned).mean()) > 0.1
    assert apart


def test_no_word_of_the_other_side_is_learnt() -> None:
    batch, state = stream().next(0, model()[1])
    end, assistant = tokenizer().end_id, tokenizer().control('<|assistant|>')
    rows = zip(batch['tokens'], batch['segments'], batch['loss_weight'], batch['behavior_logprob'], strict=True)
    spans = 0
    for tokens, segments, weight, logprob in rows:
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            learnt = np.diff([0, *(weight[inside] > 0)])
            begins, ends = np.flatnonzero(learnt > 0), np.flatnonzero(learnt < 0)
            assert 1 <= len(begins) <= 2  # each side speaks twice at most
            assert all(tokens[inside][begins - 1] == assistant)
            assert all(tokens[inside][ends[:-1] - 1] == end)  # after a word that does not end nobody speaks
            assert (logprob[inside][weight[inside] > 0] < 0).all() and not logprob[inside][weight[inside] == 0].any()
            spans += len(begins)
    said = state['metrics']
    assert spans > STARTS * SAMPLES and 1 <= said['play/moves'] <= 4 and 0 < said['play/first'] < 1
    assert 'play/opponent' not in said and 0 <= said['play/illegal'] < 1


def test_opponents_are_met_on_both_sides_and_do_not_learn() -> None:
    """What is stamped as this model's was sampled by it: its own log-probabilities are found there again."""
    made = stream(others={'opponent': Other(model()[0], other())}, opponent_share=1.0)
    groups = drawn(made)
    assert 2 <= len(groups) <= STARTS and len({group[0].group for group in groups}) == len(groups)
    prompts = [tokenizer().decode(group[0].prompt) for group in groups]
    sides = {text.rstrip()[-1] for text in prompts}
    assert sides == {'0', '1'}  # it is shown the start, or what one move has left
    segments = [t for group in groups for t in group]
    scored = stream(others={'reference': Other(*model())}, opponent_share=0.0)
    scored._score([segments], model()[1])
    for t in segments:
        np.testing.assert_allclose(t.stamps['reference_logprob'], t.logprobs, atol=1e-4)
    _, state = stream(others={'opponent': Other(model()[0], other())}, opponent_share=1.0).next(0, model()[1])
    assert 0 <= state['metrics']['play/opponent'] <= 1 and 'play/first' not in state['metrics']


def test_a_resumed_stage_meets_the_same_opponents(tmp_path: Path) -> None:
    """The pool is read from the stage's checkpoints: steps that follow are the same, bit for bit."""
    settings: dict[str, Any] = {'opponent_share': 1.0, 'pool': 2, 'keep': 3}
    first = stream(tmp_path, **settings)
    checkpoints = Checkpoints(tmp_path / 'checkpoints', keep=3)
    scaled = [jax.tree.map(lambda x, n=n: x * (1 + 0.05 * n), model()[1]) for n in range(5)]
    told, states = [], []
    for step, variables in enumerate(scaled):
        batch, state = first.next(step, variables)
        told.append(batch)
        states.append(json.loads(json.dumps(state)))
        if step + 1 < len(scaled):
            following = {**scaled[step + 1], 'optimizer': {}}
            checkpoints.save(step + 1, following, states[-1], {'stage': 'play'})  # type: ignore[arg-type]
    checkpoints.close()
    assert [state['pool'] for state in states] == [[], [1], [1, 2], [2, 3], [3, 4]]
    resumed = stream(tmp_path, **settings)
    resumed.restore(states[3])
    again, state = resumed.next(4, scaled[4])
    for name, x in told[4].items():
        np.testing.assert_array_equal(x, again[name], err_msg=name)
    assert state['pool'] == [3, 4] and 'play/opponent' in state['metrics']
    # With other weights in the place of step 3 the games are others.
    resumed.restore(states[3])
    resumed._pool = {3: scaled[0]}
    changed, _ = resumed.next(4, scaled[4])
    assert any((x != changed[name]).any() for name, x in told[4].items())


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'task': 'arithmetic'}, "task.name is 'arithmetic': expected a game of two sides, such as nim"),
        ({'refills': 2}, 'refills is 2: expected 0'),
        ({'pool': 3}, 'pool is 3: expected 0 or more and less than keep, which is 3'),
        ({'pool': 0, 'opponent_share': 0.5}, 'opponent_share is 0.5: expected 0, as pool is 0'),
        ({'batch_size': 23}, 'batch_size is 23: expected at least 24'),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        stream(**changes)
