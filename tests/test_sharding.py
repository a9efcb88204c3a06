"""What eight devices compute together is what one computes alone: losses, gradients, router biases, sampled answers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from small import placed

from model.config import ModelConfig
from model.sharding import make_mesh, named_sharding
from model.transformer import Model
from tests.tiny import EVERYTHING, assert_trees_close, packed, randomized, tiny
from train.learn.objectives import Objective, joined, next_token, regularizers, total_loss
from train.learn.policy import policy_gradient
from train.learn.step import initial_state, make_step
from train.stages import stage_defaults

REGULARIZERS = {'multi_token': 0.3, 'z_loss': 0.01, 'sequence_balance': 0.1, 'batch_balance': 0.1}
SURROGATE = {**stage_defaults('grpo')['loss'], 'kl_coefficient': 0.1}
# Rounds of dispatch hold less than a fair share, so that there are several.
LATENT = tiny(**{**EVERYTHING, 'num_nextn_predict_layers': 1}, num_hidden_layers=2, round_capacity=0.3, value_head=True)
GROUPED = tiny(attention='gqa', num_hidden_layers=1, first_k_dense_replace=0, scoring_func='softmax', value_head=True)


def preferences() -> Objective:
    """Of the first two segments of each row the first is preferred: -log sigmoid of the difference (as in DPO)."""

    def pairs(segments: jax.Array) -> jax.Array:
        return ((segments == 1).any(-1) & (segments == 2).any(-1)).astype(jnp.float32)

    def terms(output: Any, batch: Any) -> Any:
        segments = batch['segments']
        sums = [jnp.sum(output.logprob * (segments == number), axis=-1) for number in (1, 2)]
        loss = -jnp.sum(jax.nn.log_sigmoid(0.1 * (sums[0] - sums[1])) * pairs(segments))
        return {'preference': loss}, {}

    return Objective(lambda batch: {'preference': pairs(batch['segments']).sum()}, terms, {'preference': 1.0})


def distillation() -> Objective:
    """All that an output says of other tokens than those that are there, and the values."""

    def terms(output: Any, batch: Any) -> Any:
        weight = batch['loss_weight']
        ids, logprobs = output.top(3)
        told = (0.1 * logprobs + 0.01 * ids).sum(-1) + jnp.square(output.value)
        given = jnp.sum(batch['teacher_logprob'] * output.logprob_of(batch['teacher_ids']), axis=-1)
        return {'distillation': jnp.sum(weight * (told + given))}, {}

    return Objective(lambda batch: {'distillation': batch['loss_weight'].sum()}, terms, {'distillation': 1.0})


OBJECTIVES = {
    'pretrain': joined(next_token(), regularizers(REGULARIZERS, depths=1, is_moe=True)),
    'pairs': preferences(),
    'distillation': distillation(),
    'grpo': policy_gradient(SURROGATE),
}


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """Rows of two or three documents with all that the objectives ask for."""
    rng = np.random.default_rng(5)
    made: dict[str, np.ndarray] = dict(packed(rows=8, length=16))
    shape, real = made['tokens'].shape, made['segments'] > 0
    made['loss_weight'] = (rng.uniform(0.2, 1, size=shape) * real).astype(np.float32)
    made['advantage'] = rng.normal(size=shape).astype(np.float32)
    for name in ('behavior_logprob', 'reference_logprob'):
        made[name] = rng.uniform(-5, -3, size=shape).astype(np.float32)
    made['teacher_ids'] = rng.integers(LATENT.vocab_size, size=(*shape, 3)).astype(np.int32)
    # Every other token is sent to given experts.
    made['expert_ids'] = (rng.integers(7, size=(*shape, 1, 1)) + np.arange(2)).astype(np.int32)
    made['expert_ids'][:, ::2] = -1
    made['teacher_logprob'] = rng.normal(size=(*shape, 3)).astype(np.float32)
    return made


def run(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """For each objective the loss and all gradients; one program, as compiling is what takes the time."""
    model = Model(config)

    def loss(params: Any, balance: Any, data: Any, shares: jax.Array) -> jax.Array:
        variables = {'params': params, 'balance': balance}
        depths = config.num_nextn_predict_layers > 0
        given = (data['tokens'], data['positions'], data['segments'])
        output = model.apply(variables, *given, multi_token=depths, expert_ids=data['expert_ids'])
        losses = [
            total_loss(
                objective,
                objective.terms(output, data)[0],
                objective.denominators({k: x[None] for k, x in data.items()}),
            )
            for name, objective in OBJECTIVES.items()
            if depths or name != 'pretrain'
        ]
        return jnp.dot(jnp.stack(losses), shares[-len(losses) :])

    shapes = model.shapes(mesh)
    variables = jax.tree.map(
        lambda x, to: jax.device_put(x, to.sharding), randomized(model.declared, deviation=0.3), shapes
    )
    sharded = {
        name: jax.device_put(x, named_sharding(mesh, x.shape, ('batch', 'length', None, None)[: x.ndim]))
        for name, x in batch().items()
    }
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda x: x.sharding, shapes)['params']
        program = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
        return {
            name: jax.device_get(program(variables['params'], variables['balance'], sharded, share))
            for name, share in zip(OBJECTIVES, np.eye(len(OBJECTIVES), dtype=np.float32), strict=True)
        }


def devices(**sizes: int) -> Mesh:
    return make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values(), 1]))])


@functools.cache
def alone(config: ModelConfig) -> dict[str, Any]:
    return run(config, devices())


ALONE = [{axis: 2} for axis in ('slice', 'data', 'fsdp', 'tensor', 'context')]
COMBINED = [
    {'data': 2, 'fsdp': 2, 'expert': 2},
    {'slice': 2, 'fsdp': 4},
    {'fsdp': 2, 'tensor': 2, 'context': 2},
    {'slice': 2, 'expert': 2, 'context': 2},
]


@pytest.mark.parametrize(
    'sizes',
    [
        {'expert': 2, 'tensor': 2, 'context': 2},
        *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [{'expert': 4}, *ALONE, *COMBINED]),
    ],
    ids=str,
)
def test_many_devices_are_as_one(sizes: dict[str, int]) -> None:
    found, expected = run(LATENT, devices(**sizes)), alone(LATENT)
    for name, (loss, gradients) in expected.items():
        assert loss > 0.1
        np.testing.assert_allclose(found[name][0], loss, rtol=1e-5, err_msg=name)
        assert_trees_close(found[name][1], gradients, tolerance=1e-5)


@pytest.mark.slow
def test_many_devices_are_as_one_with_grouped_queries() -> None:
    found, expected = run(GROUPED, devices(fsdp=2, tensor=2, context=2)), alone(GROUPED)
    for name in ('pairs', 'distillation', 'grpo'):
        np.testing.assert_allclose(found[name][0], expected[name][0], rtol=1e-5, err_msg=name)
        assert_trees_close(found[name][1], expected[name][1], tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [{'fsdp': 2, 'expert': 2, 'tensor': 2}, {'data': 4, 'context': 2}], ids=str)
def test_many_devices_are_as_one_with_adapters(sizes: dict[str, int]) -> None:
    adapted = dataclasses.replace(LATENT, lora_rank=4, lora_alpha=1.0)  # larger weights would blow rounding up
    found, expected = run(adapted, devices(**sizes)), alone(adapted)
    for name, (loss, gradients) in expected.items():
        np.testing.assert_allclose(found[name][0], loss, rtol=1e-5, err_msg=name)
        assert_trees_close(found[name][1], gradients, tolerance=1e-5)


def test_what_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r'mesh.tensor is 8: expected a divisor of num_attention_heads=4'):
        Model(LATENT).shapes(devices(tensor=8))
    with pytest.raises(ValueError, match=r'mesh.tensor is 4: expected a divisor of num_key_value_heads=2'):
        Model(GROUPED).shapes(devices(tensor=4))
    with pytest.raises(ValueError, match=r'mesh.expert is 2: expected a divisor of n_routed_experts=7'):
        Model(tiny(n_routed_experts=7)).shapes(devices(expert=2))
    with pytest.raises(ValueError, match=r'sequence_length 12 is no multiple of mesh.context = 8'):
        placed(packed(rows=2), devices(context=8))


@pytest.mark.slow
def test_router_biases_come_from_the_global_load() -> None:
    """From a shard's loads each replica would make biases of its own, and a resumed run would go on with one's."""
    model = Model(LATENT)

    def stepped(mesh: Mesh) -> list[np.ndarray]:
        optimizer = optax.sgd(0.1)
        variables = jax.tree.map(
            lambda x, to: jax.device_put(x, to.sharding), randomized(model.declared, deviation=0.1), model.shapes(mesh)
        )
        with jax.set_mesh(mesh):
            state = initial_state(variables, optimizer)
            step = jax.jit(make_step(model, OBJECTIVES['pretrain'], optimizer))
            for _ in range(2):
                state, _ = step(state, placed(batch(), mesh))
        for bias in jax.tree.leaves(state['balance']):
            copies = [np.asarray(shard.data) for shard in bias.addressable_shards]
            assert all((copy == copies[0]).all() for copy in copies)
        return jax.device_get(jax.tree.leaves(state['balance']))

    one = stepped(devices())
    assert all(np.abs(bias - before).max() > 0 for bias, before in zip(one, [0] * len(one), strict=True))
    for found, expected in zip(stepped(devices(data=2, expert=2, context=2)), one, strict=True):
        np.testing.assert_array_equal(found, expected)
