"""Objectives against float64 NumPy, and a step whose loss does not depend on how its batch is laid out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from small import model_config, one_device, placed

from data.packing import RowWriter, empty_batch
from model.config import ModelConfig
from model.heads import Output
from model.sharding import make_mesh
from model.transformer import Model
from train.learn.objectives import (
    Objective,
    joined,
    next_token,
    regularizers,
    segment_count,
    total_loss,
)
from train.learn.policy import policy_gradient
from train.learn.step import initial_state, make_step
from train.stages import stage_defaults

SURROGATE = {**stage_defaults('grpo')['loss'], 'kl_coefficient': 0.1}
LOSSES = {'multi_token': 0.3, 'z_loss': 1e-3, 'sequence_balance': 1e-2, 'batch_balance': 0.0}


# Terms against straight-line NumPy, for a model that is nothing but its last hidden states.


def fake_output(seed: int = 0) -> tuple[Output, dict[str, np.ndarray]]:
    """An output of random states over two rows of two segments and padding, with a batch to judge it by."""
    generator = np.random.default_rng(seed)
    rows, length, width, vocabulary = 2, 12, 5, 11
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 3 + [2] * 9], np.int32)
    first = np.diff(segments, axis=1, prepend=0) != 0
    tokens = generator.integers(0, vocabulary, (rows, length)).astype(np.int32)
    batch = {
        'tokens': tokens,
        'segments': segments,
        'loss_weight': ((segments > 0) & ~first & (generator.random((rows, length)) < 0.8)).astype(np.float32),
        'advantage': generator.normal(size=(rows, length)).astype(np.float32),
        'behavior_logprob': generator.normal(-2.4, 0.5, (rows, length)).astype(np.float32),
        'reference_logprob': generator.normal(-2.4, 0.5, (rows, length)).astype(np.float32),
    }
    output = Output(
        hidden=jnp.asarray(generator.normal(size=(rows, length, width)), jnp.float32),
        multi_token=(jnp.asarray(generator.normal(size=(rows, length, width)), jnp.float32),),
        head=jnp.asarray(generator.normal(size=(vocabulary, width)), jnp.float32),
        tokens=jnp.asarray(tokens),
        segments=jnp.asarray(segments),
        temperature=jnp.float32(0.7),
        value_head=None,
        statistics={'sequence_balance': jnp.array([1.5, 2.0]), 'batch_balance': jnp.array([1.1, 1.2])},
        entries={},
        chunk=8,
    )
    return output, batch


def reference_scores(output: Output, hidden: jax.Array, distance: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probability, entropy and log partition of every token, predicted from `distance` tokens before it."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(output.head, np.float64).T / float(output.temperature)
    partition = np.log(np.exp(logits).sum(-1))
    logprobs = logits - partition[..., None]
    entropy = -(np.exp(logprobs) * logprobs).sum(-1)
    shape = output.tokens.shape
    result = (np.zeros(shape), np.zeros(shape), np.zeros(shape))
    for row in range(shape[0]):
        for t in range(distance, shape[1]):
            before, token = t - distance, int(output.tokens[row, t])
            if output.segments[row, t] > 0 and output.segments[row, t] == output.segments[row, before]:
                result[0][row, t] = logprobs[row, before, token]
                result[1][row, t] = entropy[row, before]
                result[2][row, t] = partition[row, before]
    return result


def assert_close(value: Any, expected: float) -> None:
    np.testing.assert_allclose(float(value), expected, rtol=1e-5)


def test_next_token_is_the_weighted_mean_of_the_reference() -> None:
    output, batch = fake_output()
    logprob, _, _ = reference_scores(output, output.hidden, 1)
    objective = next_token()
    terms, metrics = objective.terms(output, batch)
    expected = -(logprob * batch['loss_weight']).sum()
    assert_close(terms['next_token'], expected)
    assert_close(metrics['next_token_loss'][1], batch['loss_weight'].sum())
    assert_close(total_loss(objective, terms, objective.denominators(batch)), expected / batch['loss_weight'].sum())


def test_weights_scale_what_a_token_counts() -> None:
    output, batch = fake_output()
    logprob, _, _ = reference_scores(output, output.hidden, 1)
    batch['loss_weight'] = batch['loss_weight'] * np.random.default_rng(1).random(batch['loss_weight'].shape)
    objective = next_token()
    loss = total_loss(objective, objective.terms(output, batch)[0], objective.denominators(batch))
    assert_close(loss, -(logprob * batch['loss_weight']).sum() / batch['loss_weight'].sum())


def test_clipped_policy_gradient_is_the_reference() -> None:
    output, batch = fake_output()
    logprob, entropy, _ = reference_scores(output, output.hidden, 1)
    weight, advantage = batch['loss_weight'].astype(np.float64), batch['advantage'].astype(np.float64)
    ratio = np.exp(logprob - batch['behavior_logprob'])
    surrogate = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage)
    gap = batch['reference_logprob'] - logprob
    kl = np.exp(gap) - gap - 1
    objective = policy_gradient(SURROGATE)
    terms, metrics = objective.terms(output, batch)
    assert_close(terms['policy'], -(surrogate * weight).sum())
    assert_close(terms['kl'], (kl * weight).sum())
    assert_close(metrics['entropy'][0], (entropy * weight).sum())
    clipped = (ratio * advantage > surrogate + 1e-6) * weight
    assert 0 < clipped.sum() < weight.sum()
    assert_close(metrics['clipped_share'][0], clipped.sum())
    loss = total_loss(objective, terms, objective.denominators(batch))
    assert_close(loss, (-(surrogate * weight).sum() + 0.1 * (kl * weight).sum()) / weight.sum())


def test_a_clipped_ratio_has_no_gradient_and_an_open_one_has() -> None:
    """Both sides of both bounds: what is clipped is what would go on in the direction the advantage asks for."""
    objective = policy_gradient({**SURROGATE, 'kl_coefficient': 0.0})
    ones = jnp.ones((1, 1))

    def surrogate(logprob: jax.Array, advantage: float) -> jax.Array:
        class Scored:
            entropy = jnp.zeros((1, 1))

        Scored.logprob = logprob * ones  # type: ignore[attr-defined]
        batch = {'loss_weight': ones, 'advantage': advantage * ones, 'behavior_logprob': jnp.zeros((1, 1))}
        return objective.terms(Scored, batch)[0]['policy']  # type: ignore[arg-type]

    def slope(ratio: float, advantage: float) -> float:
        return float(jax.grad(surrogate)(jnp.log(ratio), advantage))

    assert slope(1.3, 1.0) == 0.0 and slope(0.7, -1.0) == 0.0
    assert_close(slope(1.3, -1.0), 1.3)
    assert_close(slope(0.7, 1.0), -0.7)
    assert_close(slope(1.1, 2.0), -2.2)


def test_regularizers_are_the_reference() -> None:
    output, batch = fake_output()
    _, _, partition = reference_scores(output, output.hidden, 1)
    ahead, _, _ = reference_scores(output, output.multi_token[0], 2)
    config = {'multi_token': 0.3, 'z_loss': 0.01, 'sequence_balance': 0.02, 'batch_balance': 0.03}
    objective = regularizers(config, depths=1, is_moe=True)
    terms, _ = objective.terms(output, batch)
    segments = batch['segments']
    within = np.zeros(segments.shape)
    within[:, 2:] = (segments[:, 2:] == segments[:, :-2]) & (segments[:, 2:] > 0)
    weight = batch['loss_weight'] * within
    assert_close(terms['multi_token'], -(ahead * weight).sum())
    assert_close(terms['z_loss'], (partition**2 * batch['loss_weight']).sum())
    # The balance losses come from the router: 4 segments, one microbatch, summed over layers.
    expected = (
        0.3 * -(ahead * weight).sum() / weight.sum()
        + 0.01 * (partition**2 * batch['loss_weight']).sum() / batch['loss_weight'].sum()
        + 0.02 * 3.5 / 4
        + 0.03 * 2.3
    )
    microbatches = {name: x[None] for name, x in batch.items()}
    assert objective.multi_token
    assert_close(total_loss(objective, terms, objective.denominators(microbatches)), expected)


def test_regularizers_leave_out_what_the_model_lacks() -> None:
    everything = {'multi_token': 0.3, 'z_loss': 0.01, 'sequence_balance': 0.02, 'batch_balance': 0.03}
    assert set(regularizers(everything, depths=0, is_moe=False).coefficients) == {'z_loss'}
    nothing = regularizers(dict.fromkeys(everything, 0.0), depths=1, is_moe=True)
    assert not nothing.coefficients and not nothing.multi_token


def test_segments_are_counted_one_by_one() -> None:
    segments = jnp.array([[[1, 1, 2, 2, 0, 0], [0, 0, 0, 0, 0, 0]], [[1, 2, 3, 3, 3, 0], [1, 1, 1, 1, 1, 1]]])
    assert float(segment_count({'segments': segments})) == 6


@pytest.mark.parametrize('main', [next_token(), policy_gradient(SURROGATE)], ids=['next_token', 'policy'])
def test_a_batch_without_weight_has_loss_zero_and_no_gradient(main: Objective) -> None:
    output, batch = fake_output()
    batch['loss_weight'] = np.zeros_like(batch['loss_weight'])
    batch['behavior_logprob'] = np.full_like(batch['behavior_logprob'], -1e4)  # a ratio that overflows
    objective = joined(main, regularizers({**LOSSES, 'sequence_balance': 0.0}, depths=1, is_moe=True))

    def loss(hidden: jax.Array) -> jax.Array:
        terms, _ = objective.terms(Output(**{**vars_of(output), 'hidden': hidden}), batch)
        return total_loss(objective, terms, objective.denominators(batch))

    value, gradient = jax.value_and_grad(loss)(output.hidden)
    assert float(value) == 0.0
    assert not np.asarray(gradient).any()


def vars_of(output: Output) -> dict[str, Any]:
    names = ('hidden', 'multi_token', 'head', 'tokens', 'segments', 'temperature', 'statistics', 'entries')
    names += ('value_head', 'chunk')
    return {name: getattr(output, name) for name in names}


# One set of segments through the whole step, laid out in several ways.


@functools.cache
def documents() -> tuple[dict[str, np.ndarray], ...]:
    """Eleven segments of 3 to 16 tokens, with everything an objective may ask of a token."""
    generator = np.random.default_rng(0)
    made = []
    for length in (16, 15, 13, 12, 11, 9, 8, 7, 5, 4, 3):
        made.append(
            {
                'tokens': generator.integers(0, 400, length).astype(np.int32),
                'loss_weight': (generator.random(length) < 0.7).astype(np.float32),
                'advantage': generator.normal(size=length).astype(np.float32),
                'behavior_logprob': generator.normal(-6.0, 0.3, length).astype(np.float32),
                'reference_logprob': generator.normal(-6.0, 0.3, length).astype(np.float32),
            }
        )
    return tuple(made)


def laid_out(rows: int, length: int) -> dict[str, np.ndarray]:
    """The documents packed, each into the first row with room; rows of 16 take one each and are padding beyond."""
    batch = empty_batch(rows, length, pad_id=0)
    extra = ('advantage', 'behavior_logprob', 'reference_logprob')
    batch |= {name: np.zeros((rows, length), np.float32) for name in extra}
    batch['temperature'] = np.asarray(0.9, np.float32)
    writers = [RowWriter({name: x for name, x in batch.items() if x.ndim}, row) for row in range(rows)]
    for document in documents():
        size = len(document['tokens'])
        needed = length if length == 16 else size
        row = next(i for i, writer in enumerate(writers) if writer.space >= needed)
        start = length - writers[row].space
        writers[row].write(document['tokens'], document['loss_weight'])
        for name in extra:
            batch[name][row, start : start + size] = document[name]
    return batch


@functools.cache
def stepped(rows: int, length: int, microbatches: int, mesh: Mesh) -> dict[str, float]:
    """The metrics of one step from the same weights, under both objectives at once (compilation is what takes time)."""
    main = joined(next_token(), policy_gradient(SURROGATE))
    config = model_config(num_nextn_predict_layers=1, num_hidden_layers=1, initializer_range=0.2)
    objective = joined(main, regularizers(LOSSES, depths=1, is_moe=True))
    model, optimizer = Model(config), optax.sgd(0.0)
    with jax.set_mesh(mesh):
        variables = place_like(initial_values(config), model.shapes(mesh))
        batch = placed(laid_out(rows, length), mesh, microbatches)
        state = initial_state(variables, optimizer)
        _, metrics = jax.jit(make_step(model, objective, optimizer))(state, batch)
        return {name: float(value) for name, value in jax.device_get(metrics).items()}


@functools.cache
def initial_values(config: ModelConfig) -> Any:
    return jax.device_get(Model(config).init(0, one_device()))


def place_like(values: Any, shapes: Any) -> Any:
    return jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), values, shapes)


# Rows, their length, microbatches, and whether eight devices share rows (data) and weights (fsdp).
LAYOUTS = {
    'padded_in_four_microbatches': (16, 16, 4, False),
    'eight_devices': (8, 32, 1, True),
    'padded': (16, 16, 1, False),
    'four_microbatches': (4, 32, 4, False),
    'padded_on_eight_devices_in_two_microbatches': (16, 16, 2, True),
}


@pytest.mark.parametrize(
    'layout', [*list(LAYOUTS)[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[2:])]
)
def test_loss_does_not_depend_on_layout_accumulation_or_devices(layout: str) -> None:
    rows, length, microbatches, many = LAYOUTS[layout]
    packed = stepped(4, 32, 1, one_device())
    other = stepped(rows, length, microbatches, make_mesh({'data': 4, 'fsdp': 2}) if many else one_device())
    assert packed['next_token_loss'] > 1 and packed['kl'] > 0.01
    for name in ('loss', 'next_token_loss', 'multi_token_loss', 'kl', 'entropy'):
        np.testing.assert_allclose(other[name], packed[name], rtol=1e-5, err_msg=name)
    assert other.keys() == packed.keys()
    for name, value in packed.items():  # of sums whose rounding is larger than they are, such as gradients
        np.testing.assert_allclose(other[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
