"""Routing, balancing and the grouped matmul against the NumPy reference and dense sums."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

import model.grouped
from model.dispatch import Exchange, run_experts, run_experts_apart
from model.experts import MixtureOfExperts, route, routing_statistics, updated_bias
from model.grouped import grouped_matmul, plan_blocks
from model.sharding import make_mesh
from model.transformer import Model
from tests import reference
from tests.tiny import packed, randomized, tiny
from train.learn.objectives import Objective
from train.learn.step import initial_state, make_step


def same_choice(ids, weights, expected_ids, expected_weights):
    """As sets: the order of a token's experts is of no account."""
    order, expected_order = np.argsort(ids), np.argsort(expected_ids)
    assert np.asarray(ids)[order].tolist() == np.asarray(expected_ids)[expected_order].tolist()
    np.testing.assert_allclose(np.asarray(weights)[order], np.asarray(expected_weights)[expected_order], rtol=1e-5)


@pytest.mark.parametrize('scoring', ['sigmoid', 'softmax'])
@pytest.mark.parametrize(
    'changes',
    [
        dict(),
        dict(num_experts_per_tok=1, norm_topk_prob=False),
        dict(num_experts_per_tok=3, routed_scaling_factor=2.5),
        dict(n_group=4, topk_group=2, num_experts_per_tok=3, norm_topk_prob=False, routed_scaling_factor=2.5),
        dict(n_group=2, topk_group=1, num_experts_per_tok=4),
        dict(n_group=4, topk_group=2, topk_method='group_limited_greedy', bias_update_rule='none'),
        dict(num_experts_per_tok=8),
    ],
)
def test_router_is_the_reference(scoring, changes):
    config = tiny(scoring_func=scoring, **changes)
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(50, 8))
    scores = 1 / (1 + np.exp(-logits)) if scoring == 'sigmoid' else np.exp(reference.log_softmax(logits))
    bias = 0.5 * rng.normal(size=8)
    ids, weights = jax.jit(functools.partial(route, config=config))(np.float32(scores), np.float32(bias))
    for t in range(50):
        same_choice(ids[t], weights[t], *reference.route(scores[t], bias, config))
    if config.norm_topk_prob:
        np.testing.assert_allclose(weights.sum(-1), config.routed_scaling_factor, rtol=1e-5)


def test_bias_chooses_and_does_not_weigh():
    config = tiny(num_experts_per_tok=2, norm_topk_prob=False)
    scores = jnp.array([0.9, 0.8, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1])
    ids, weights = route(scores, jnp.array([0, -1.0, 0, 1.0, 0, 0, 0, 0]), config)
    same_choice(ids, weights, [0, 3], [0.9, 0.2])


def test_groups_are_ranked_by_their_two_best():
    config = tiny(n_group=2, topk_group=1, num_experts_per_tok=2, norm_topk_prob=False)
    # The first group has the best expert and the larger sum of all; the second has the two best together.
    scores = jnp.array([0.9, 0.3, 0.3, 0.3, 0.7, 0.6, 0.0, 0.0])
    same_choice(*route(scores, jnp.zeros(8), config), [4, 5], [0.7, 0.6])


def test_masked_groups_lose_to_negative_scores():
    """A mask of zeros would let experts of other groups beat the kept ones whose biased score is below zero."""
    config = tiny(n_group=2, topk_group=1, num_experts_per_tok=3, norm_topk_prob=False)
    scores = jnp.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    bias = jnp.array([-9.0, -9, -9, -9, -5, -5, -5, -5])
    same_choice(*route(scores, bias, config), [5, 6, 7], [0.6, 0.7, 0.8])


def test_no_gradient_through_the_choice_or_the_bias():
    config = tiny(norm_topk_prob=False)
    scores = jnp.linspace(0.1, 0.8, 8)
    by_scores, by_bias = jax.grad(lambda s, b: route(s, b, config)[1].sum(), argnums=(0, 1))(scores, jnp.zeros(8))
    np.testing.assert_array_equal(by_scores, [0, 0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(by_bias, np.zeros(8))


@pytest.mark.parametrize(
    'changes',
    [
        dict(scoring_func='sigmoid', n_group=4, topk_group=2, n_shared_experts=2, routed_scaling_factor=1.7),
        dict(scoring_func='softmax', n_shared_experts=0, norm_topk_prob=False, num_experts_per_tok=3),
    ],
    ids=['sigmoid groups shared', 'softmax'],
)
def test_mixture_of_experts_is_the_reference(changes):
    config = tiny(**changes)
    layer = MixtureOfExperts(config)
    segments = packed(rows=3)['segments']
    x = np.random.default_rng(1).normal(size=(3, 12, config.hidden_size)).astype(np.float32)
    variables = randomized(dict(jax.eval_shape(lambda: layer.init(jax.random.key(0), x, segments))))
    out, statistics = jax.jit(layer.apply)(variables, x, segments)
    weights, bias = reference.float64(variables['params']), np.float64(variables['balance']['bias'])
    routed = []
    for row, columns in reference.documents(segments):
        expected, scores, chosen = reference.mixture_of_experts(weights, bias, np.float64(x[row, columns]), config)
        np.testing.assert_allclose(out[row, columns], expected, atol=2e-5)
        routed.append((scores, chosen))
    expected = reference.expert_statistics(routed, config)
    assert set(statistics) == {*expected, 'expert_ids'}
    for (row, columns), (_, chosen) in zip(reference.documents(segments), routed, strict=True):
        np.testing.assert_array_equal(np.sort(statistics['expert_ids'][row, columns]), np.sort(chosen))
    for name, value in expected.items():
        np.testing.assert_allclose(statistics[name], value, rtol=1e-5, err_msg=name)


# Statistics and balancing.

statistics_of = jax.jit(routing_statistics, static_argnums=3)
gradient_of = jax.jit(jax.jacrev(routing_statistics), static_argnums=3)


def test_padding_counts_nowhere():
    config = tiny()
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.1, 1, size=(2, 10, 8)).astype(np.float32)
    ids = rng.integers(8, size=(2, 10, 2)).astype(np.int32)
    segments = np.ones((2, 10), np.int32)
    segments[:, 6:] = 0
    padded = statistics_of(scores, ids, segments, config)
    cut = statistics_of(scores[:, :6], ids[:, :6], segments[:, :6], config)
    for name, value in cut.items():
        np.testing.assert_allclose(padded[name], value, rtol=1e-6, err_msg=name)
    assert padded['load'].sum() == 2 * 6 * 2
    nothing = statistics_of(scores, ids, 0 * segments, config)
    assert all(float(jnp.abs(value).sum()) == 0 for value in nothing.values())


def test_statistics_of_perfect_balance_and_of_collapse():
    config = tiny()
    segments = np.ones((1, 8), np.int32)
    even = np.stack([np.arange(8), (np.arange(8) + 1) % 8], axis=-1)[None].astype(np.int32)
    balanced = statistics_of(jnp.full((1, 8, 8), 0.5), even, segments, config)
    np.testing.assert_allclose(balanced['load'], 2)
    np.testing.assert_allclose(balanced['entropy'] / 8, np.log(8), rtol=1e-5)
    np.testing.assert_allclose([balanced['sequence_balance'], balanced['batch_balance']], 1, rtol=1e-5)
    scores = jnp.zeros((1, 8, 8)).at[..., :2].set(0.5)
    collapsed = statistics_of(scores, jnp.broadcast_to(jnp.arange(2), (1, 8, 2)), segments, config)
    np.testing.assert_allclose([collapsed['sequence_balance'], collapsed['batch_balance']], 8 / 2, rtol=1e-5)
    np.testing.assert_allclose(collapsed['entropy'] / 8, np.log(2), rtol=1e-5)


def test_sequence_balance_sees_what_the_batch_hides():
    """Two documents, each on experts of its own: even over the batch, collapsed within each."""
    config = tiny()
    segments = np.repeat([[1, 2]], 4, axis=1).astype(np.int32)
    segments.sort()
    first = np.arange(8)[None] < 4
    groups = np.where(first[..., None], np.arange(8) < 4, np.arange(8) >= 4)
    scores = jnp.where(groups, 0.25, 0.0)
    within = np.stack([np.arange(8) % 4, (np.arange(8) + 1) % 4], axis=-1)[None]
    ids = (within + np.where(first, 0, 4)[..., None]).astype(np.int32)
    found = statistics_of(scores, ids, segments, config)
    np.testing.assert_allclose(found['batch_balance'], 1, rtol=1e-5)
    np.testing.assert_allclose(found['sequence_balance'], 2 * 2, rtol=1e-5)  # the sum over the two documents


@pytest.mark.parametrize('name', ['sequence_balance', 'batch_balance'])
def test_balance_losses_push_scores_of_busy_experts_down(name):
    config = tiny(num_experts_per_tok=1)
    ids = jnp.zeros((1, 6, 1), jnp.int32).at[0, 0].set(3)
    gradient = gradient_of(jnp.full((1, 6, 8), 0.5), ids, jnp.ones((1, 6), jnp.int32), config)[name]
    assert (gradient[..., 0] > 0).all() and (gradient[..., 1:] < 0).sum() >= 6 * 6


@given(st.lists(st.integers(0, 1000), min_size=6, max_size=6), st.lists(st.floats(-1, 1), min_size=6, max_size=6))
@settings(deadline=None, max_examples=50)
def test_bias_update(load, bias):
    speed = 0.01
    before, load = np.float32([bias]), np.float32([load])
    steps = {}
    for rule in ('sign', 'bounded', 'none'):
        config = tiny(n_routed_experts=6, bias_update_rule=rule, bias_update_speed=speed)
        steps[rule] = np.float64(np.asarray(updated_bias(before, load, config)) - before)
    sign = np.sign(load.mean() - load)
    np.testing.assert_allclose(steps['sign'], speed * sign, atol=1e-6)  # the busy go down, the idle up
    np.testing.assert_allclose(steps['bounded'], speed * (sign - sign.mean()), atol=1e-6)
    np.testing.assert_allclose(steps['bounded'].sum(), 0, atol=1e-6)
    assert np.abs(steps['bounded']).max() <= 2 * speed + 1e-6
    np.testing.assert_array_equal(steps['none'], 0)


def test_bias_updates_balance_a_skewed_router():
    config = tiny(n_routed_experts=8, num_experts_per_tok=2, bias_update_speed=0.01)
    rng = np.random.default_rng(0)
    scores = jax.nn.sigmoid(rng.normal(size=(1, 256, 8)).astype(np.float32) + np.linspace(-1, 1, 8, dtype=np.float32))
    segments = np.ones((1, 256), np.int32)

    @jax.jit
    def step(bias):
        ids, _ = route(scores, bias[0], config)
        load = statistics_of(scores, ids, segments, config)['load'][None]
        return updated_bias(bias, load, config), load.max() / load.mean() - 1

    bias = jnp.zeros((1, 8))
    _, at_first = step(bias)
    for _ in range(100):
        bias, violation = step(bias)
    assert at_first > 1 and violation < 0.15


def test_each_layer_gets_its_own_loads():
    """The order of `statistics` is that of `updated_balance`: the trunk's layers, then the multi-token modules."""
    config = tiny(num_nextn_predict_layers=2, bias_update_speed=1.0)
    model = Model(config)
    balance = jax.tree.map(lambda x: jnp.zeros(x.shape), model.declared['balance'])
    load = jnp.ones((4, 8)).at[jnp.arange(4), jnp.arange(4)].set(100.0)  # in layer i expert i is busy
    updated = model.updated_balance(balance, load)
    rows = [
        *updated['layers']['mlp']['bias'],
        *(updated[f'multi_token_{k}']['block']['mlp']['bias'] for k in (1, 2)),
    ]
    np.testing.assert_array_equal(rows, np.ones((4, 8)) - 2 * np.eye(4, 8))


def test_given_experts_are_weighed_by_the_scores_of_now():
    config = tiny(num_experts_per_tok=3, routed_scaling_factor=1.7)
    rng = np.random.default_rng(3)
    scores, bias = rng.uniform(0.1, 1, size=(6, 8)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    given = np.stack([rng.permutation(8)[:3] for _ in range(6)]).astype(np.int32)
    given[2] = -1  # chooses by itself
    mix = rng.normal(size=(6, 3)).astype(np.float32)
    ids, weights = route(scores, bias, config, given)
    slopes = jax.grad(lambda s: jnp.sum(mix * route(s, bias, config, given)[1]))(scores)
    for t in range(6):
        chosen = given[t] if t != 2 else reference.route(np.float64(scores[t]), bias, config)[0]
        np.testing.assert_array_equal(ids[t], chosen)
        own, total = np.float64(scores[t])[chosen], np.float64(scores[t])[chosen].sum()
        np.testing.assert_allclose(weights[t], 1.7 * own / total, rtol=1e-6)
        expected = np.zeros(8)
        expected[chosen] = 1.7 * (mix[t] / total - (mix[t] * own).sum() / total**2)
        np.testing.assert_allclose(slopes[t], expected, atol=1e-5)


def test_max_violation_is_of_the_whole_batch_and_ignores_padding():
    """Each microbatch is lopsided, the batch is not; a stand-in for the model sends token i to expert i of four."""

    class Routing:
        def apply(self, variables, tokens, positions, segments, temperature, multi_token, expert_ids, largest_logits):
            load = (jax.nn.one_hot(tokens, 4) * (segments > 0)[..., None]).sum((0, 1))
            statistics = {'load': load[None], 'entropy': jnp.sum(0.5 * (segments > 0))[None]}
            return types.SimpleNamespace(statistics=statistics, loss=variables['params'], largest_logits=None)

        def updated_balance(self, balance, load):
            return balance + load

    one = jnp.ones(())
    objective = Objective(lambda batch: {'x': one}, lambda output, batch: ({'x': output.loss}, {}), {'x': 1.0})
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_step(Routing(), objective, optimizer))
    state = initial_state({'params': one, 'balance': jnp.zeros((1, 4))}, optimizer)

    def run(tokens, segments):
        tokens, segments = np.array(tokens, np.int32), np.array(segments, np.int32)
        after, metrics = step(state, {'tokens': tokens, 'positions': 0 * tokens, 'segments': segments})
        return after['balance'].tolist(), float(metrics['experts/max_violation'])

    real, cut = [[[1, 1, 1, 1]], [[1, 1, 1, 1]]], [[[1, 1, 1, 1]], [[1, 1, 0, 0]]]
    assert run([[[0, 0, 1, 1]], [[2, 2, 3, 3]]], real) == ([[2, 2, 2, 2]], 0)
    assert run([[[0, 0, 1, 1]], [[2, 2, 3, 3]]], cut) == ([[2, 2, 2, 0]], pytest.approx(2 / 1.5 - 1))
    assert run([[[0, 0, 0, 0]], [[0, 0, 3, 3]]], cut) == ([[6, 0, 0, 0]], 3)
    state['balance'] = jnp.array([[0.5, -2.0, 1.0, 0.0]])
    batch = {name: np.ones((1, 1, 4), np.int32) for name in ('tokens', 'positions', 'segments')}
    assert step(state, batch)[1]['experts/largest_bias'] == 2  # of those the step began with


# Dispatch and the grouped matmul.

planned = jax.jit(plan_blocks, static_argnums=(1, 2))


@given(st.data(), st.sampled_from([(1, 1, 1), (7, 3, 4), (24, 4, 8), (40, 16, 8), (5, 9, 8)]))
@settings(deadline=None, max_examples=60)
def test_plan_drops_nothing_and_mixes_nothing(data, shape):
    m, experts, block = shape
    # Few different experts, so that skew is common; `experts` itself means none.
    some = data.draw(st.lists(st.integers(0, experts), min_size=1, max_size=4))
    ids = np.array(data.draw(st.lists(st.sampled_from(some), min_size=m, max_size=m)), np.int32)
    slot, source, owner, blocks = (np.asarray(x) for x in planned(ids, experts, block))
    assert len(source) == len(owner) * block
    routed = np.flatnonzero(ids < experts)
    assert sorted(source[source < m].tolist()) == routed.tolist()  # each assignment once, and nothing else
    for assignment in routed:
        assert source[slot[assignment]] == assignment
        assert owner[slot[assignment] // block] == ids[assignment]
        assert slot[assignment] // block < blocks
    assert (slot[ids == experts] >= len(source)).all()
    # No more blocks in use than it takes.
    assert blocks == sum(-(-int((ids == e).sum()) // block) for e in range(experts))
    assert (source[blocks * block :] == m).all()


SKEWS = {
    'even': lambda rng, n, k, e: np.stack([rng.permutation(e)[:k] for _ in range(n)]),
    'all to one expert': lambda rng, n, k, e: np.full((n, k), 2),
    'all to the last': lambda rng, n, k, e: np.full((n, k), e - 1),
    'padding': lambda rng, n, k, e: np.where(np.arange(n)[:, None] % 3 == 0, e, rng.integers(e, size=(n, k))),
    'nothing but padding': lambda rng, n, k, e: np.full((n, k), e),
}


@pytest.mark.parametrize('backend', ['cpu', 'gpu', 'tpu'])
def test_grouped_matmul_is_a_matmul_by_each_rows_expert(backend, monkeypatch):
    monkeypatch.setattr(model.grouped, 'platform', lambda: backend)
    rng = np.random.default_rng(0)
    ids = np.array([1] * 9 + [3] * 2 + [4] * 5, np.int32)  # experts 0 and 2 have nothing, 4 is none
    _, source, owner, blocks = plan_blocks(ids, 4, 4)
    rows = (rng.normal(size=(len(source), 5)) * (np.asarray(source) < 16)[:, None]).astype(np.float32)
    weights = rng.normal(size=(4, 5, 3)).astype(np.float32)
    cotangent = rng.normal(size=(len(source), 3)).astype(np.float32)
    used = np.repeat(np.arange(len(owner)) < blocks, 4)

    def dense(rows, weights):
        return jnp.einsum('md,mdf->mf', rows, weights[np.repeat(owner, 4)]) * used[:, None]

    def both(function):
        out, pullback = jax.vjp(function, rows, weights)
        return out, *pullback(cotangent)

    with pltpu.force_tpu_interpret_mode():  # Pallas kernels run as plain JAX
        found = both(lambda rows, weights: grouped_matmul(rows, weights, owner, blocks))
    for a, b in zip(found, both(dense), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@functools.partial(jax.jit, static_argnames='block')
def blocked(x, ids, weights, gate_up, down, cotangent, block):
    out, pullback = jax.vjp(lambda *w: run_experts(w[0], ids, *w[1:], block), x, weights, gate_up, down)
    return out, *pullback(cotangent)


@jax.jit
def dense(x, ids, weights, gate_up, down, cotangent):
    def run(x, weights, gate_up, down):
        gate, up = jnp.split(jnp.einsum('nd,edf->nef', x, gate_up), 2, axis=-1)
        of_each = jnp.einsum('nef,efd->ned', jax.nn.silu(gate) * up, down)
        return jnp.einsum('ned,nk,nke->nd', of_each, weights, jax.nn.one_hot(ids, gate_up.shape[0]))

    out, pullback = jax.vjp(run, x, weights, gate_up, down)
    return out, *pullback(cotangent)


@pytest.mark.parametrize('block', [1, 8])
@pytest.mark.parametrize('skew', SKEWS)
def test_run_experts_is_the_dense_sum_forward_and_backward(skew, block):
    rng = np.random.default_rng(0)
    n, k, e, d, f = 21, 2, 5, 6, 4
    shapes = ((n, d), (n, k), (e, d, 2 * f), (e, f, d), (n, d))
    x, weights, gate_up, down, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    ids = SKEWS[skew](rng, n, k, e).astype(np.int32)
    found = blocked(x, ids, weights, gate_up, down, cotangent, block=block)
    expected = dense(x, ids, weights, gate_up, down, cotangent)
    for name, a, b in zip(('out', 'x', 'weights', 'gate_up', 'down'), found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, err_msg=name)


@functools.cache
def apart(rows):
    """`run_experts_apart` on two devices for each of four parts of the experts: its outputs and gradients, compiled."""
    exchange = Exchange('expert', 4, ('fsdp',), ('fsdp', 'expert'), rows, 8, 1, 'float32', 'float32')
    token, wide, narrow = (
        PartitionSpec(('fsdp', 'expert')),
        PartitionSpec('expert', 'fsdp'),
        PartitionSpec('expert', None, 'fsdp'),
    )
    run = jax.shard_map(
        functools.partial(run_experts_apart, exchange=exchange),
        mesh=make_mesh({'fsdp': 2, 'expert': 4}),
        in_specs=(token, token, token, wide, wide, narrow),
        out_specs=token,
        check_vma=False,
    )

    @jax.jit
    def both(x, ids, weights, gate_up, down, cotangent):
        out, pullback = jax.vjp(
            lambda x, weights, gate_up, down: run(x, ids, weights, *jnp.split(gate_up, 2, axis=-1), down),
            x,
            weights,
            gate_up,
            down,
        )
        return out, *pullback(cotangent)

    return both


@pytest.mark.parametrize('rows', [3, 10], ids=['many rounds', 'one round'])
def test_experts_on_other_devices_are_the_dense_sum_at_any_skew(rows):
    rng = np.random.default_rng(0)
    n, k, e, d, f = 40, 2, 8, 6, 4
    shapes = ((n, d), (n, k), (e, d, 2 * f), (e, f, d), (n, d))
    x, weights, gate_up, down, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    for skew, draw in SKEWS.items():
        ids = draw(rng, n, k, e).astype(np.int32)
        found = apart(rows)(x, ids, weights, gate_up, down, cotangent)
        expected = dense(x, ids, weights, gate_up, down, cotangent)
        for name, a, b in zip(('out', 'x', 'weights', 'gate_up', 'down'), found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-5, err_msg=f'{skew}: {name}')
