"""Proposer and solver: who earns what, and what is trained on."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import players  # noqa: F401  (registers the task)
import pytest
from test_rollout import model, tokenizer

from data.errors import InputError
from data.tasks import Proposable, get_task
from train.act.algorithms import Trajectory
from train.act.proposer import ProposerStream, hardness, learnability
from train.stages import stage_defaults

PROPOSALS, SAMPLES = 16, 4
SETTINGS = {'prompts': PROPOSALS, 'samples': SAMPLES, 'batch_size': PROPOSALS * (SAMPLES + 1), 'sequence_length': 64}
SETTINGS |= {'max_tokens': 32, 'temperature': 1.8, 'algorithm': 'dr_grpo'}


def stream(task: str = 'parity', **changes: Any) -> ProposerStream:
    settings = {**stage_defaults('proposer_solver'), **SETTINGS, **changes}
    return ProposerStream(model()[0], tokenizer(), [get_task(task)], settings, 11, {}, (), ())


@functools.cache
def rollout() -> tuple[list[list[Trajectory]], dict[str, Any]]:
    """The groups of a rollout with their advantages, and the state that came with them."""
    made, kept = stream(), []
    inner = made._minibatches
    made._minibatches = lambda groups, turn: kept.extend(groups) or inner(groups, turn)  # type: ignore
    _, state = made.next(0, model()[1])
    return kept, state


def said(trajectory: Trajectory) -> str:
    return tokenizer().decode([token for token in trajectory.tokens if token != tokenizer().end_id])


def test_learnability_is_highest_at_a_half() -> None:
    np.testing.assert_allclose([learnability(p) for p in (0, 0.25, 0.5, 0.75, 1)], [0, 0.5, 1, 0.5, 0])
    np.testing.assert_allclose([hardness(p) for p in (0, 0.25, 0.5, 1)], [0, 0.75, 0.5, 0])


def test_each_role_earns_its_own() -> None:
    """Recomputed in float64 from what was said: proposals by the solve rate of their problem, answers by the verifier;
    advantages by each group's mean."""
    (*answers, proposals), state = rollout()
    task = get_task('parity')
    assert isinstance(task, Proposable) and len(proposals) == PROPOSALS
    keys = [found.key if t.stopped and (found := task.parse(said(t))) else '' for t in proposals]
    different = list(dict.fromkeys(key for key in keys if key))
    assert 1 < len(different) == len(answers) < PROPOSALS  # some are invalid, or twice the same
    rates = {}
    for key, group in zip(different, answers, strict=True):
        assert len(group) == SAMPLES and key in tokenizer().decode(group[0].prompt)
        scores = [float(t.stopped and len(said(t).encode()) % 2 == 0) for t in group]
        assert [t.rewards.sum() for t in group] == scores
        rates[key] = np.float64(np.mean(scores))
    new = [key != '' and key not in keys[:i] for i, key in enumerate(keys)]
    earned = [1 - abs(2 * rates[key] - 1) if first else -0.5 for key, first in zip(keys, new, strict=True)]
    np.testing.assert_allclose([t.rewards.sum() for t in proposals], earned, atol=1e-12)
    assert len(set(earned)) > 1 and len(different) < sum(key != '' for key in keys)
    for group in (*answers, proposals):
        returns = np.array([t.rewards.sum() for t in group], np.float64)
        for trajectory, value in zip(group, returns - returns.mean(), strict=True):
            np.testing.assert_allclose(trajectory.stamps['advantage'], value, atol=1e-12)
            assert all(trajectory.learnt)
    metrics = state['metrics']
    assert metrics['proposer/valid'] == pytest.approx(np.mean([bool(key) for key in keys]))
    assert metrics['proposer/distinct'] == len(different) / PROPOSALS
    assert metrics['proposer/solve_rate'] == pytest.approx(np.mean(list(rates.values())))
    assert metrics['proposer/reward'] == pytest.approx(np.mean(earned))


def test_some_problems_may_be_the_tasks_own() -> None:
    """It comes first, earns nothing as proposal, and is solved as the others are; here what is hard earns most."""
    made, kept = stream(posed=1, proposal_reward='hard'), []
    inner = made._minibatches
    made._minibatches = lambda groups, turn: kept.extend(groups) or inner(groups, turn)  # type: ignore
    _, state = made.next(0, model()[1])
    *answers, proposals = kept
    assert len(proposals) == PROPOSALS - 1
    task = get_task('parity')
    assert isinstance(task, Proposable)
    own = [task.prompt(number).key for number in range(1)]
    asked = [tokenizer().decode(group[0].prompt) for group in answers]
    assert all(key in text for key, text in zip(own, asked[:1], strict=True))
    keys = [found.key if t.stopped and (found := task.parse(said(t))) else '' for t in proposals]
    new = [key for i, key in enumerate(keys) if key and key not in own + keys[:i]]
    assert len(answers) == 1 + len(new) > 1
    rates = {key: np.mean([t.rewards.sum() for t in group]) for key, group in zip(new, answers[1:], strict=True)}
    first = [key in rates and key not in keys[:i] for i, key in enumerate(keys)]
    earned = [hardness(rates[key]) if fresh else -0.5 for key, fresh in zip(keys, first, strict=True)]
    np.testing.assert_allclose([t.rewards.sum() for t in proposals], earned, atol=1e-12)
    assert state['metrics']['proposer/distinct'] == len(new) / len(proposals)


def test_tokens_of_both_roles_are_counted() -> None:
    groups, state = rollout()
    everything = [t for group in groups for t in group]
    tokens = sum(t.count for t in everything)
    assert state['metrics']['rollout/sampled_tokens'] == tokens > sum(t.count for t in everything[:-PROPOSALS])
    read = tokens + sum(len(group[0].prompt) for group in groups)
    assert state['flops'] == read * model()[0].flops_per_token(SETTINGS['sequence_length'], backward=False)


def test_a_step_repeats_itself() -> None:
    """From the state alone, which JSON has carried."""
    first = stream()
    batch, before = first.next(0, model()[1])
    later, _ = first.next(1, model()[1])
    resumed = stream()
    resumed.restore(json.loads(json.dumps(before)))
    again, _ = resumed.next(1, model()[1])
    for name, x in later.items():
        np.testing.assert_array_equal(x, again[name], err_msg=name)
    assert any((x != batch[name]).any() for name, x in later.items())


def test_where_nothing_is_proposed_nothing_is_solved() -> None:
    """A model that knows no arithmetic is punished evenly: nothing to be learnt, and nothing breaks."""
    batch, state = stream('arithmetic').next(0, model()[1])
    assert state['metrics']['proposer/valid'] == 0 and state['metrics']['proposer/reward'] == -0.5
    assert 'proposer/solve_rate' not in state['metrics'] and not batch['segments'].any()
    assert state['sample']['prompt'] == 'Propose an expression to compute.'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'task': 'sudoku'}, "task.name is 'sudoku': expected a task that takes proposals, such as arithmetic"),
        ({'levels': ({'digits': 1},)}, 'levels is .*: expected none, as the proposer decides'),
        ({'refills': 1}, 'refills is 1: expected none'),
        ({'posed': 16}, 'posed is 16: expected 0 or more, and fewer than prompts, 16'),
        ({'proposal_reward': 'hrd'}, "proposal_reward is 'hrd'.*did you mean 'hard'"),
        ({'batch_size': 79}, 'batch_size is 79: expected at least 80'),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        stream(**changes)
