"""Schedules at exact steps, and which weights an optimizer treats how."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import model_config, one_device

from data.errors import InputError
from model.transformer import Model, is_declared
from train.learn.objectives import next_token
from train.learn.optimizer import learning_rate, make_optimizer
from train.learn.step import initial_state, make_step, trained
from train.stages import COMMON, stage_defaults

SETTINGS: dict[str, Any] = COMMON['optimizer']


def rates(steps: int, **changes: Any) -> list[float]:
    schedule = learning_rate({**SETTINGS, 'learning_rate': 1.0, **changes}, steps)
    return [round(float(schedule(step)), 6) for step in range(steps + 1)]


def test_warmup_stable_decay() -> None:
    expected = [0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates(10, schedule='wsd', warmup=0.2, decay=0.4) == expected


def test_wsd_that_only_decays_starts_at_the_peak() -> None:
    assert rates(4, schedule='wsd', warmup=0.0, decay=1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_cosine_ends_at_its_final_share() -> None:
    found = rates(12, schedule='cosine', warmup=2 / 12, final=0.1)
    assert found[:3] == [0.5, 0.75, 1.0]
    for step in range(2, 13):
        expected = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (step - 2) / 10))
        assert found[step] == pytest.approx(expected, abs=1e-5)


def test_linear_goes_to_zero_and_constant_stays() -> None:
    assert rates(4, schedule='linear', warmup=0.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates(5, schedule='linear', warmup=0.2) == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates(4, schedule='constant', warmup=0.5) == [0.5, 0.75, 1.0, 1.0, 1.0]


def test_midtraining_goes_on_at_full_rate_and_to_zero_with_the_moments_it_found() -> None:
    stage = stage_defaults('midtrain')
    assert stage['keep_optimizer'] and not stage_defaults('sft')['keep_optimizer']
    assert rates(4, **{**stage['optimizer'], 'learning_rate': 1.0}) == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(('field', 'value'), [('schedule', 'cosin'), ('name', 'adam')])
def test_an_unknown_choice_is_named(field: str, value: str) -> None:
    with pytest.raises(InputError, match=f"optimizer.{field} is '{value}': expected"):
        changed = {**SETTINGS, field: value}
        learning_rate(changed, 10)
        make_optimizer(changed, Model(model_config()).declared['params'])


def named(tree: Any, **options: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, **options)}


@pytest.fixture(scope='module')
def declared() -> Any:
    """Two expert layers behind a dense one, a multi-token module, an untied head: every kind of weight."""
    config = model_config(
        first_k_dense_replace=1, num_hidden_layers=3, num_nextn_predict_layers=1, tie_word_embeddings=False
    )
    return Model(config).declared['params']


def update(declared: Any, gradient_of: Any, **changes: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The first update, the parameters (all ones) and the declarations, by path."""
    optimizer = make_optimizer({**SETTINGS, 'clip': 0.0, **changes}, declared)
    parameters = jax.tree.map(lambda x: jnp.ones(x.value.shape), declared, is_leaf=is_declared)
    gradient = jax.tree.map(gradient_of, declared, is_leaf=is_declared)
    updates, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(gradient, parameters)
    updates = jax.tree.map(lambda x: 0.1 * x, updates)  # a learning rate of 0.1
    return named(updates), named(parameters), named(declared, is_leaf=is_declared)


def random_gradient(weight: Any) -> np.ndarray:
    return np.random.default_rng(weight.value.size).normal(size=weight.value.shape).astype(np.float32)


def test_only_matrices_and_embeddings_decay(declared: Any) -> None:
    for name in ('adamw', 'muon'):
        # Without a gradient, what is left of an update is the decay: learning rate times weight_decay times weight.
        updates, _, weights = update(declared, lambda x: jnp.zeros(x.value.shape), name=name, weight_decay=0.5)
        for path, x in updates.items():
            expected = 0.0 if weights[path].role == 'vector' else -0.1 * 0.5
            np.testing.assert_allclose(np.asarray(x), expected, atol=1e-7, err_msg=f'{name} {path}')
        assert {x.role for x in weights.values()} >= {'matrix', 'embedding', 'router', 'vector'}


def test_muon_touches_matrices_alone(declared: Any) -> None:
    """A matrix's update is near orthogonal, whatever its gradient; all others get AdamW's first step, its sign.

    Five Newton-Schulz iterations bring all but the smallest singular values near to one.
    """
    updates, _, weights = update(declared, random_gradient, name='muon', weight_decay=0.0)
    matrices = 0
    for path, x in updates.items():
        weight, array = weights[path], np.asarray(x)
        if weight.role != 'matrix':
            expected = -0.1 * np.sign(random_gradient(weight))
            np.testing.assert_allclose(array, expected, rtol=1e-3, atol=1e-4, err_msg=path)
            continue
        stacked = [i for i, axis in enumerate(weight.axes) if axis in ('layers', 'experts')]
        own = [size for i, size in enumerate(weight.value.shape) if i not in stacked]
        rows, columns = int(np.prod(own[: weight.inputs])), int(np.prod(own[weight.inputs :]))
        each = array.reshape(-1, rows, columns)
        assert len(each) == np.prod([weight.value.shape[i] for i in stacked], initial=1)
        for matrix in each:  # every layer and expert is a matrix of its own
            singular = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * np.sqrt(max(rows, columns)))
            assert np.median(singular) > 0.6 and singular.max() < 1.3, path
            matrices += 1
    assert matrices > 20


def test_adamw_is_the_textbook(declared: Any) -> None:
    updates, parameters, weights = update(
        declared, random_gradient, name='adamw', weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8
    )
    for path, x in updates.items():
        gradient = random_gradient(weights[path]).astype(np.float64)
        decay = 0.0 if weights[path].role == 'vector' else 0.1
        expected = -0.1 * (gradient / (np.sqrt(gradient**2) + 1e-8) + decay * np.asarray(parameters[path]))
        np.testing.assert_allclose(np.asarray(x), expected, rtol=1e-4, atol=1e-6, err_msg=path)


def test_clipping_is_by_the_global_norm(declared: Any) -> None:
    """AdamW forgets the size of a gradient but for epsilon, so epsilon shows it."""
    large = {'name': 'adamw', 'weight_decay': 0.0, 'epsilon': 1e3, 'clip': 1.0}
    updates, _, weights = update(declared, lambda x: jnp.full(x.value.shape, 7.0), **large)
    norm = 7.0 * np.sqrt(sum(weight.value.size for weight in weights.values()))
    for path, x in updates.items():
        np.testing.assert_allclose(np.asarray(x), -0.1 * (7 / norm) / 1e3, rtol=1e-3, err_msg=path)


@pytest.mark.parametrize('expression', ['self_attn/o_proj|value_head', '/gate$'])
def test_only_what_is_trainable_moves(expression: str) -> None:
    """It moves as it would among the others, router biases with the routers alone; there are no moments of the rest."""
    model = Model(model_config(num_hidden_layers=1, first_k_dense_replace=0, value_head=True))
    objective = dataclasses.replace(
        next_token(),
        terms=lambda out, batch: ({'next_token': jnp.sum(jnp.square(out.value - 1) - out.logprob)}, {}),
    )
    tokens = np.random.default_rng(0).integers(400, size=(1, 2, 16)).astype(np.int32)
    batch = {'tokens': tokens, 'positions': tokens * 0 + np.arange(16, dtype=np.int32), 'segments': tokens * 0 + 1}
    batch['loss_weight'] = np.ones(tokens.shape, np.float32)

    settings = {**SETTINGS, 'name': 'adamw', 'clip': 0.0, 'epsilon': 1e-3}  # a larger one forgives rounding

    def stepped(expression: str) -> Any:
        optimizer = make_optimizer(settings, trained(model.declared['params'], expression))
        state = initial_state(model.init(0, one_device()), optimizer, expression)
        return state, jax.jit(make_step(model, objective, optimizer, expression))(state, batch, 0.1)[0]

    (before, after), (_, whole) = stepped(expression), stepped('')
    start, end, among = (named(state['params']) for state in (before, after, whole))
    moved = {path for path in start if (start[path] != end[path]).any()}
    assert moved == set(named(trained(before['params'], expression))) and moved
    for path in moved:
        np.testing.assert_allclose(end[path], among[path], rtol=1e-5, atol=1e-6)
    bias = after['balance']['layers']['mlp']['bias']
    assert bool(np.abs(bias).max() > 0) == ('gate' in expression)
    moments = {path for path, x in named(after['optimizer']).items() if x.ndim}
    assert moments and not [path for path in moments if not any(path.endswith(m) for m in moved)]
