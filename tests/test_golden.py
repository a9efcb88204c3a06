"""Objectives and advantages against what TRL and verl return for the same numbers (tests/golden/README.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.act.algorithms import (
    Trajectory,
    adapted,
    generalized_advantage,
    group_relative,
    leave_one_out,
    overlong_penalty,
    reinforce_plus_plus_baseline,
)
from train.learn.objectives import Objective, total_loss
from train.learn.policy import KL_ESTIMATORS, distillation, policy_gradient
from train.learn.preference import bradley_terry, kahneman_tversky, preference
from train.stages import stage_defaults

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'golden.json').read_text())


@pytest.fixture(autouse=True)
def float64() -> Any:
    """The libraries were run in float64; so are we, or rounding would hide small differences."""
    with jax.enable_x64(True):
        yield


def case(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, np.ndarray]]:
    """Inputs, arguments and outputs."""
    found = GOLDEN['cases'][name]
    arrays = [
        {key: np.asarray(x) for key, x in d.items()} for d in (GOLDEN['inputs'][found['inputs']], found['outputs'])
    ]
    return arrays[0], found['arguments'], arrays[1]


def loss_and_gradient(
    objective: Objective, batch: Mapping[str, Any], output: Callable[[jax.Array], Any], x: np.ndarray
) -> tuple[float, np.ndarray]:
    """The loss and its gradient with respect to x, of which `output` makes what a model would give."""
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}

    def loss(x: jax.Array) -> jax.Array:
        below = objective.denominators({n: a[None] if a.ndim else a for n, a in arrays.items()})
        return total_loss(objective, objective.terms(output(x), arrays)[0], below)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(x))
    return float(value), np.array(gradient)


def close(a: Any, b: Any, what: str = '') -> None:
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9, err_msg=what)


# Preferences: a pair a row, the chosen answer in the first half.


def at_last(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Numbers [rows] on the last learnt tokens of [rows, T]."""
    placed = np.zeros(mask.shape)
    for row, value in enumerate(values):
        placed[row, np.flatnonzero(mask[row])[-1]] = value
    return placed


def pair_batch(x: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    masks = [x['chosen_mask'], x['rejected_mask']]
    rows, half = masks[0].shape
    both = lambda first, second: np.concatenate([first, second], axis=1)  # noqa: E731
    nothing = np.zeros((rows, half))
    return {
        'segments': np.repeat([[1, 2]], half, axis=1).repeat(rows, axis=0),
        'loss_weight': both(*masks).astype(float),
        'reference_logprob': both(at_last(x['chosen_reference'], masks[0]), at_last(x['rejected_reference'], masks[1])),
        'target': both(at_last(np.ones(rows), masks[0]), nothing),
        'margin': both(at_last(x['margin'], masks[0]), nothing),
    }


@pytest.mark.parametrize(
    ('name', 'variant', 'changed'),
    [
        ('dpo_sigmoid', 'sigmoid', {}),
        ('dpo_hinge', 'hinge', {}),
        ('dpo_ipo', 'ipo', {}),
        ('dpo_sigmoid_norm', 'normalized', {}),
        ('dpo_robust', 'robust', {}),
        ('cdpo', 'sigmoid', {}),
        ('simpo', 'simpo', {}),
        ('orpo', 'orpo', {}),
        ('dpo_sigmoid_sft', 'sigmoid', {'nll': 0.5}),
    ],
)
def test_preference_losses(name: str, variant: str, changed: dict[str, Any]) -> None:
    x, arguments, expected = case(name)
    settings = stage_defaults('dpo')['loss'] | {'variant': variant, 'beta': arguments['beta']}
    settings |= {'label_smoothing': arguments.get('label_smoothing', 0.0), 'gamma': arguments.get('simpo_gamma', 0.0)}
    batch = pair_batch(x)
    objective = preference({**settings, **changed})
    logprob = np.concatenate([x['chosen_logprob'], x['rejected_logprob']], axis=1)
    loss, gradient = loss_and_gradient(objective, batch, lambda p: SimpleNamespace(logprob=p), logprob)
    both = [expected[f'gradient_{side}_logprob'] for side in ('chosen', 'rejected')]
    if name == 'orpo':  # TRL's likelihood term reads the prompt as well; ours, `nll`, the answer alone
        read = x['chosen_valid'] / x['chosen_valid'].sum()
        loss -= (x['chosen_logprob'] * read).sum()
        gradient[:, : read.shape[1]] -= read
    close(loss, expected['loss'])
    close(gradient, np.concatenate(both, axis=1))


@pytest.mark.parametrize('name', ['reward_bradley_terry', 'reward_margin', 'reward_centered'])
def test_reward_model_losses(name: str) -> None:
    """The answers' values stand on their stop tokens; what stands elsewhere must not matter."""
    x, arguments, expected = case(name)
    batch = pair_batch(x)
    if 'margin' not in arguments:
        batch['margin'] *= 0
    objective = bradley_terry({'center': arguments.get('center_rewards_coefficient', 0.0)})
    rewards = np.concatenate([x['chosen_reward'], x['rejected_reward']])

    def output(r: jax.Array) -> Any:
        count = len(r) // 2
        last = [at_last(np.ones(count), x[f'{side}_mask']) for side in ('chosen', 'rejected')]
        value = jnp.concatenate([r[:count, None] * last[0], r[count:, None] * last[1]], axis=1)
        return SimpleNamespace(value=value + 7.0 * (np.concatenate(last, axis=1) == 0))

    loss, gradient = loss_and_gradient(objective, batch, output, rewards)
    close(loss, expected['loss'])
    both = [expected[f'gradient_{side}_reward'] for side in ('chosen', 'rejected')]
    close(gradient, np.concatenate(both))


@pytest.mark.parametrize('name', ['kto', 'kto_clamped'])
def test_kahneman_tversky(name: str) -> None:
    x, arguments, expected = case(name)
    mismatched = x['mismatched'] - x['mismatched_reference']
    sign = -1 if arguments.get('swap_mismatched') else 1
    batch = {
        'segments': np.ones_like(x['valid']),
        'loss_weight': x['valid'].astype(float),
        'reference_logprob': at_last(x['reference'], x['valid']),
        'target': at_last(2.0 * x['desirable'] - 1, x['valid']),
        'baseline': np.maximum(sign * mismatched.mean(), 0.0),
    }
    weights = {'desirable': arguments['desirable_weight'], 'undesirable': arguments['undesirable_weight']}
    objective = kahneman_tversky({'beta': arguments['beta'], **weights})
    loss, gradient = loss_and_gradient(objective, batch, lambda p: SimpleNamespace(logprob=p), x['logprob'])
    close(loss, expected['loss'])
    close(gradient, expected['gradient_logprob'])


# Policy gradients: an answer a row.

WEIGHTING = {
    'token-mean': 'token',
    'seq-mean-token-mean': 'answer',
    'seq-mean-token-sum-norm': 'constant',
    'dapo': 'token',
    'grpo': 'answer',
    'dr_grpo': 'constant',
    'cispo': 'token',
}
POLICY: dict[str, dict[str, Any]] = {  # verl's plain loss has a dual clip of 3
    'verl_ppo_token_mean': {'dual_clip': 3.0},
    'verl_ppo_seq_mean_token_mean': {'dual_clip': 3.0},
    'verl_ppo_seq_mean_token_sum_norm': {'dual_clip': 3.0},
    'verl_ppo_dual_clip': {'dual_clip': 1.5},
    'verl_ppo_token_advantage': {'dual_clip': 3.0},
    'verl_ppo_truncated': {'dual_clip': 3.0, 'importance': 'truncate', 'importance_cap': 2.0},
    'verl_gspo': {'ratio': 'sequence'},
    'verl_cispo': {'surrogate': 'cispo', 'clip_low': 1.0},
    'verl_cispo_two_sided': {'surrogate': 'cispo'},
    'trl_grpo_policy': {},
    'trl_dr_grpo_policy': {},
    'trl_dapo_policy': {},
    'trl_cispo_policy': {'surrogate': 'cispo', 'clip_low': 1.0, 'clip_high': 0.28},  # TRL caps at 1.28, not 1 + 1.28
    'trl_gspo_grpo_policy': {'ratio': 'sequence'},
    'trl_penalty_policy': {'kl_coefficient': 0.1},
    'trl_truncated_policy': {'importance': 'truncate', 'importance_cap': 1.5},
}


def rollout_batch(x: Mapping[str, np.ndarray], weighting: str, advantage: str) -> dict[str, np.ndarray]:
    mask = x['mask'].astype(float)
    rows, length = mask.shape
    longest = {'token': 1.0, 'answer': mask.sum(1, keepdims=True), 'constant': length}[weighting]
    spread = x[advantage] if x[advantage].ndim == 2 else np.repeat(x[advantage][:, None], length, axis=1)
    batch = {
        'segments': np.ones_like(x['mask']),
        'loss_weight': mask / longest,
        'advantage': spread,
        'behavior_logprob': x['sampler_logprob'],
        'old_logprob': x['old_logprob'],
        'reference_logprob': x['reference_logprob'],
    }
    return batch | ({'answers': np.float64(rows)} if weighting != 'token' else {})


@pytest.mark.parametrize('name', POLICY)
def test_policy_losses(name: str) -> None:
    """TRL's constant is its longest completion, 10, where verl's is the width of the batch, 7."""
    x, arguments, expected = case(name)
    weighting = WEIGHTING[arguments.get('aggregation', arguments.get('loss_type', 'grpo'))]
    clips = {'clip_low': arguments.get('clip_ratio_low', arguments.get('epsilon', 0.2))}
    clips['clip_high'] = arguments.get('clip_ratio_high', arguments.get('epsilon_high', 0.28))
    settings = {**stage_defaults('grpo')['loss'], 'importance': 'none', **clips, **POLICY[name]}
    batch = rollout_batch(x, weighting, arguments.get('advantage', 'advantage'))
    if settings['importance'] == 'none':
        batch['behavior_logprob'] = x['old_logprob']
    if name == 'trl_dr_grpo_policy':
        batch['loss_weight'] = batch['loss_weight'] * 7 / 10

    def output(p: jax.Array) -> Any:
        return SimpleNamespace(logprob=p, entropy=jnp.asarray(x['entropy']))

    loss, gradient = loss_and_gradient(policy_gradient(settings), batch, output, x['logprob'])
    close(loss, expected['loss'])
    close(gradient, expected['gradient_logprob'])


@pytest.mark.parametrize('name', ['verl_value_token_mean', 'verl_value_seq_mean_token_mean'])
def test_value_losses(name: str) -> None:
    x, arguments, expected = case(name)
    batch = rollout_batch(x, WEIGHTING[arguments['loss_agg_mode']], 'advantage')
    batch |= {'advantage': 0 * x['value'], 'old_value': x['value'], 'value_target': x['return']}
    settings = {**stage_defaults('grpo')['loss'], 'value_coefficient': 1.0, 'value_clip': arguments['cliprange_value']}

    # A state's value stands at the token before it, so a token is put before all.
    batch = {n: np.pad(a, ((0, 0), (1, 0))) if a.ndim else a for n, a in batch.items()}
    batch['segments'][:, 0] = 1
    old = {n: np.pad(x[n], ((0, 0), (1, 0))) for n in ('logprob', 'entropy')}

    def padded(v: jax.Array) -> Any:
        value = jnp.pad(v, ((0, 0), (0, 1)))
        return SimpleNamespace(value=value, **{n: jnp.asarray(a) for n, a in old.items()})

    loss, gradient = loss_and_gradient(policy_gradient(settings), batch, padded, x['value_prediction'])
    close(loss, expected['loss'])
    close(gradient, expected['gradient_value_prediction'])


@pytest.mark.parametrize(('name', 'estimator'), [('verl_kl_k1', 'k1'), ('verl_kl_k2', 'k2'), ('verl_kl_k3', 'k3')])
def test_kl_estimators(name: str, estimator: str) -> None:
    x, _, expected = case(name)
    gap = jnp.asarray(x['reference_logprob'] - x['logprob'])
    close(KL_ESTIMATORS[estimator](gap), expected['estimate'])
    close(-jax.vmap(jax.vmap(jax.grad(KL_ESTIMATORS[estimator])))(gap), expected['gradient_logprob'])


# Advantages.


def trajectories(x: Mapping[str, np.ndarray], rewards: np.ndarray, mask: np.ndarray) -> list[list[Trajectory]]:
    """The eight answers in their two groups, without the tokens that an environment wrote."""
    made = []
    for row in range(8):
        own = np.flatnonzero(mask[row])
        tokens = [0] * len(own)
        stamps = {'old_value': x['value'][row, own]}
        made.append(
            Trajectory(
                [0], tokens, [True] * len(own), [0.0] * len(own), row // 4, row % 4,
                rewards[row, own], np.ones(len(own), bool), True, None, stamps,
            )
        )  # fmt: skip
    return [made[:4], made[4:]]


def placed(groups: list[list[Trajectory]], name: str, mask: np.ndarray) -> np.ndarray:
    whole = np.zeros(mask.shape)
    for row, t in enumerate(t for group in groups for t in group):
        whole[row, np.flatnonzero(mask[row])] = t.stamps[name]
    return whole


@pytest.mark.parametrize('name', ['verl_gae', 'verl_gae_undiscounted'])
def test_generalized_advantage(name: str) -> None:
    """Observation tokens are skipped, advantages whitened."""
    x, arguments, expected = case(name)
    groups = trajectories(x, x[arguments['reward']], x['mask'])
    generalized_advantage(groups, {'discount': arguments['gamma'], 'gae_lambda': arguments['lam']})
    mask = x['mask']
    close(placed(groups, 'advantage', mask) * mask, expected['advantage'] * mask)
    close(placed(groups, 'value_target', mask) * mask, expected['return'] * mask)


@pytest.mark.parametrize(
    ('name', 'ours'),
    [
        ('verl_dr_grpo', lambda r: group_relative(r, False)),
        ('trl_dr_grpo', lambda r: group_relative(r, False)),
        ('verl_rloo', leave_one_out),
        ('trl_rloo', leave_one_out),
    ],
)
def test_group_advantages(name: str, ours: Callable[[np.ndarray], np.ndarray]) -> None:
    x, _, expected = case(name)
    found = ours(x['reward'].reshape(2, 4)).reshape(-1)
    wanted = expected['advantage']
    close(found, wanted if wanted.ndim == 1 else (wanted * x['mask']).sum(1) / x['mask'].sum(1))


@pytest.mark.parametrize(('name', 'epsilon'), [('verl_grpo', 1e-6), ('trl_grpo', 1e-4)])
def test_normalised_group_advantages(name: str, epsilon: float) -> None:
    """The libraries divide by the sample's deviation (n - 1), the paper's formula and ours by the population's."""
    x, _, expected = case(name)
    rewards = x['reward'].reshape(2, 4)
    factor = (rewards.std(1) + 1e-6) / (rewards.std(1, ddof=1) + epsilon)
    found = (group_relative(rewards, True) * factor[:, None]).reshape(-1)
    wanted = expected['advantage']
    close(found, wanted if wanted.ndim == 1 else (wanted * x['mask']).sum(1) / x['mask'].sum(1))


def test_reinforce_plus_plus_baseline() -> None:
    x, _, expected = case('verl_reinforce_plus_plus_baseline')
    groups = trajectories(x, x['outcome_reward'], x['mask'])
    reinforce_plus_plus_baseline(groups, {})
    close(placed(groups, 'advantage', x['mask']), expected['advantage'] * x['mask'])


def test_kl_controller_and_overlong_penalty() -> None:
    x, a, expected = case('verl_kl_controller')
    coefficient, values = a['kl_coefficient'], []
    for kl in x['observed']:
        coefficient = adapted(coefficient, kl, a['target'], a['steps'], a['horizon'])
        values.append(coefficient)
    close(values, expected['coefficient'])
    x, a, expected = case('trl_overlong')
    limit, buffer = a['max_completion_len'], a['soft_punish_cache']
    close([overlong_penalty(int(n), limit, buffer) for n in x['length']], expected['reward'])


# Distillation.


@pytest.mark.parametrize('name', ['gkd_beta_0.0', 'gkd_beta_0.1', 'gkd_beta_0.5', 'gkd_beta_1.0'])
def test_distillation(name: str) -> None:
    """With every token of the vocabulary named."""
    x, arguments, expected = case(name)
    weight = x['mask'].astype(float) if 'labels' not in x else (x['labels'] != -100).astype(float)
    teacher = jax.nn.log_softmax(jnp.asarray(x['teacher_logits']), axis=-1)
    ids = np.broadcast_to(np.arange(teacher.shape[-1]), teacher.shape)
    batch = {
        'loss_weight': weight,
        'teacher_ids': ids,
        'teacher_logprob': teacher,
        'segments': np.ones_like(x['labels']),
    }
    objective = distillation({'beta': arguments['beta']})

    def output(logits: jax.Array) -> Any:
        return SimpleNamespace(logprob_of=lambda ids: jnp.take_along_axis(jax.nn.log_softmax(logits, -1), ids, -1))

    loss, gradient = loss_and_gradient(objective, batch, output, x['student_logits'])
    close(loss, expected['loss'])
    close(gradient, expected['gradient_student_logits'])
