"""Evaluations beside other checkpoints: ratings against a direct maximisation of the likelihood, tournaments of players
whose strength is known, and the KL to another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_games import Script, best, worst
from test_rollout import model
from text import small_tokenizer

from data.errors import InputError
from data.tasks import Game, different, get_task
from train.act.episodes import chat_prompt
from train.checkpoint import Checkpoints
from train.evaluate import checked, evaluate
from train.measure.elo import DRAWS, elo, standing, tournament
from train.sampler import row_keys, sample_tokens

NIM = {'name': 'nim', 'heaps': 2, 'most': 3}


def reference(wins: np.ndarray) -> np.ndarray:
    """Newton's method on the log-likelihood of the games and of the drawn ones, the first rating held at 0."""
    n = len(wins)
    theta = np.zeros(n)
    for _ in range(100):
        gradient, hessian = np.zeros(n), np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                if i != j:
                    p = 1 / (1 + np.exp(theta[j] - theta[i]))
                    won, games = wins[i, j] + DRAWS / 2, wins[i, j] + wins[j, i] + DRAWS
                    gradient[i] += won - games * p
                    hessian[i, i] += games * p * (1 - p)
                    hessian[i, j] -= games * p * (1 - p)
        theta[1:] += 0.5 * np.linalg.solve(hessian[1:, 1:], gradient[1:])
    return 400 / np.log(10) * (theta - theta.mean())


def test_ratings_are_the_most_likely_ones() -> None:
    rng = np.random.default_rng(0)
    many = rng.integers(0, 20, (3, 5, 5)) * (1 - np.eye(5))
    many[2, 4] = 12 * (np.arange(5) < 4)  # the last one wins everything
    many[2, :, 4] = 0
    for wins, rated in zip(many, elo(many), strict=True):
        np.testing.assert_allclose(rated, reference(wins), atol=1e-4)
        order = rng.permutation(5)
        np.testing.assert_allclose(elo(wins[np.ix_(order, order)]), rated[order], atol=1e-4)
    assert elo(many)[2].argmax() == 4 and np.isfinite(elo(many)).all()
    # Two players: the odds, with a draw more; equal ones are equal.
    gap = np.diff(elo(np.array([[0.0, 30.0], [10.0, 0.0]])))
    np.testing.assert_allclose(gap, -400 * np.log10(30.5 / 10.5), atol=1e-6)
    np.testing.assert_allclose(elo(np.full((4, 4), 3.0)), 0, atol=1e-9)


def test_a_tournament_puts_players_in_order() -> None:
    """A perfect player wins from every start on its own side, and on the other against one that throws games away."""
    task = get_task('nim', split='heldout', most=4)
    assert isinstance(task, Game)
    starts = [task.prompt(index) for index in range(6)]
    wins = tournament([Script(worst), Script(best), Script(best)], task, starts, 2, small_tokenizer(), 0)
    assert wins.shape == (6, 3, 3) and not wins.diagonal(axis1=1, axis2=2).any()
    np.testing.assert_array_equal((wins + wins.swapaxes(1, 2))[:, 0, 1:], 4)
    np.testing.assert_array_equal(wins[:, 1, 2], 2)  # whoever moves first wins
    assert (wins[:, 1, 0] >= 2).all() and (wins[:, 1, 0] > 2).any()
    np.testing.assert_array_equal(wins[:, 1, 0], wins[:, 2, 0])
    said = standing(['weak', 'strong', 'this'], wins)
    rated = said['details']['elo']
    assert rated['weak'] == [0.0, 0.0, 0.0] and rated['strong'][0] == pytest.approx(said['value'])
    assert 0 <= said['low'] <= said['value'] <= said['high'] and said['value'] > 0
    expected = elo(wins.sum(0))
    assert said['value'] == pytest.approx(expected[2] - expected[0], abs=1e-3)
    assert said['details']['win_rates']['strong'] == [0.5] * 3 and said['details']['games'] == 3 * 6 * 4
    assert said['details']['win_rate'][0] == pytest.approx((wins[:, 2, 0].mean() / 4 + 0.5) / 2, abs=1e-4)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a stage of three checkpoints."""
    folder = tmp_path_factory.mktemp('run')
    small_tokenizer().save(folder / 'tokenizer')
    checkpoints = Checkpoints(folder / 'play' / 'checkpoints', keep=3)
    for step in (2, 4, 5):
        state = jax.tree.map(lambda x, step=step: x * (1 + 0.1 * step), model()[1])
        checkpoints.save(step, {**state, 'optimizer': {}}, {}, {'stage': 'play'})
    checkpoints.close()
    (folder / 'play' / 'config.json').write_text(json.dumps({'model': model()[0].config.to_dict()}))
    return folder


def measured(workdir: Path, **fields: Any) -> dict[str, Any]:
    spec = {'type': 'elo', 'task': NIM, 'items': 2, 'max_tokens': 4, **fields}
    return evaluate(*model(), small_tokenizer(), spec, workdir=workdir)


def test_a_checkpoint_is_rated_beside_others(workdir: Path) -> None:
    """A model that knows no move loses on every first side, whoever it is: all are equal."""
    said = measured(workdir, opponents=('play',), every=2)
    assert list(said['details']['elo']) == ['play@2', 'play@4', 'this'] and said['items'] == 2
    assert said['value'] == pytest.approx(0, abs=1e-3) and said['details']['win_rate'] == [0.5] * 3
    assert said['metric'] == 'Elo above play@2 (temperature 1, 1 samples)' and said['unit'] == 'Elo'
    named = measured(workdir, opponents=('play@4', f'{workdir}/play'), temperature=0.0)
    assert list(named['details']['elo']) == ['play@4', f'{workdir}/play', 'this']


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'opponents': ()}, 'evaluation elo: expected a game as task, such as nim, and opponents'),
        ({'opponents': ('play',), 'task': {'name': 'arithmetic'}}, 'expected a game as task'),
        ({'opponents': ('plai',)}, 'plai: expected a stage folder'),
        ({'opponents': ('play@3',)}, 'checkpoints/3'),
        ({'opponents': ('play',), 'every': 3}, 'play has no checkpoint at a multiple of every=3 steps'),
    ],
)
def test_what_cannot_be_rated_is_named(fields: dict[str, Any], message: str, workdir: Path) -> None:
    with pytest.raises(InputError, match=message):
        measured(workdir, **fields)


def test_opponents_have_to_be_stages_of_the_run() -> None:
    spec = {'type': 'elo', 'task': NIM, 'opponents': ('play@2', '../other/stage')}
    assert checked(spec, ('play',))['every'] == 0
    with pytest.raises(InputError, match="opponents: no stage 'play'; did you mean 'plays'"):
        checked(spec, ('plays',))


def test_kl_is_the_mean_log_ratio_over_own_answers(workdir: Path) -> None:
    """Of a model to itself it is 0; to another one what unpacked, unpadded passes over the same answers say."""
    (own, variables), tokenizer = model(), small_tokenizer()
    other = jax.tree.map(lambda x: x * 1.4, variables)
    spec = {'type': 'kl', 'task': NIM, 'items': 2, 'samples': 3, 'max_tokens': 4, 'reference': 'play@4'}
    assert evaluate(own, other, tokenizer, spec, workdir=workdir)['value'] == pytest.approx(0, abs=1e-5)
    said = evaluate(own, variables, tokenizer, spec, workdir=workdir)
    task = get_task('nim', split='heldout', **{k: v for k, v in NIM.items() if k != 'name'})
    prompts = [chat_prompt(prompt, tokenizer) for prompt in different(task, 2)]
    settings = {'samples': 3, 'temperature': 1.0, 'max_tokens': 4}
    answers = sample_tokens(own, variables, tokenizer, prompts, **settings, keys=row_keys(0, range(2), 3))
    logprob = jax.jit(lambda v, tokens: own.apply(v, tokens).logprob)
    expected = [
        np.mean(
            [
                sum(
                    sign * np.asarray(logprob(v, np.array([[*prompt, *a.tokens]])), np.float64)[0, -n:].sum()
                    for sign, v in ((1, variables), (-1, other))
                )
                for a in group
                if (n := len(a.tokens))
            ]
        )
        for prompt, group in zip(prompts, answers, strict=True)
    ]
    assert said['details']['scores'] == pytest.approx(expected, abs=2e-4)
    assert said['value'] == pytest.approx(np.mean(expected), abs=2e-4) and abs(said['value']) > 0.01
    with pytest.raises(InputError, match="evaluation kl: reference: no stage 'plai'; did you mean 'play'"):
        checked({**spec, 'reference': 'plai'}, ['play'])
