"""The whole model against the NumPy reference, and against itself computed in other ways: nothing may depend on how."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from model import cache as latent_cache
from model.adapters import merge_adapters
from model.config import ModelConfig
from model.heads import same_segment, score
from model.sharding import make_mesh, partition_spec
from model.transformer import Model, is_declared, layer_parts
from tests import reference
from tests.tiny import (
    EVERYTHING,
    assert_trees_close,
    evaluate,
    loss_and_gradients,
    loss_of,
    packed,
    randomized,
    tiny,
)

FULL = tiny(**EVERYTHING)
DENSE = tiny(n_routed_experts=0, num_hidden_layers=2, attention='gqa', tie_word_embeddings=True)
SOFTMAX = tiny(
    scoring_func='softmax',
    norm_topk_prob=False,
    first_k_dense_replace=0,
    num_hidden_layers=2,
    n_shared_experts=0,
    tie_word_embeddings=True,
    rope_factor=4.0,
    original_max_position_embeddings=16,
)
# For gradients, whose programs take long to compile: two scanned expert layers and one module.
LEARNING = tiny(**{**EVERYTHING, 'num_nextn_predict_layers': 1}, num_hidden_layers=2, first_k_dense_replace=0)


# For initial values: few weights.
SMALLEST = dataclasses.replace(DENSE, n_routed_experts=8, first_k_dense_replace=0, initializer_range=0.05)


@functools.cache
def variables_of(config):
    return randomized(Model(config).declared)


# Against the reference.


@pytest.mark.parametrize('config', [FULL, DENSE, SOFTMAX], ids=['full', 'dense gqa tied', 'softmax yarn tied'])
def test_outputs_are_the_reference(config):
    batch, temperature = packed(rows=3), 1.3
    said = evaluate(config, variables_of(config), batch, temperature)
    weights = reference.float64(variables_of(config))
    expected = reference.batch(weights, batch['tokens'], batch['segments'], config, temperature)
    real = batch['segments'] > 0
    np.testing.assert_allclose(said['logits'][real], expected['logits'][real], atol=1e-4)
    for name in ('logprob', 'entropy', 'log_partition'):
        np.testing.assert_allclose(said[name], expected[name], atol=1e-4, err_msg=name)
    assert len(said['multi_token_logprob']) == config.num_nextn_predict_layers
    for ahead, expected_ahead in zip(said['multi_token_logprob'], expected['multi_token_logprob'], strict=True):
        assert np.count_nonzero(expected_ahead) > 3
        np.testing.assert_allclose(ahead, expected_ahead, atol=1e-4)
    assert bool(said['statistics']) == config.is_moe
    for layer, statistics in enumerate(expected['statistics']):
        for name, value in statistics.items():
            np.testing.assert_allclose(said['statistics'][name][layer], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    'config', [LEARNING, pytest.param(SOFTMAX, marks=pytest.mark.slow)], ids=['full', 'softmax yarn tied']
)
def test_gradients_are_those_of_the_reference(config):
    """The derivative along a random direction, by central differences of the reference in float64."""
    batch, variables = packed(rows=8), variables_of(config)
    loss, gradients = loss_and_gradients(config, variables, batch)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))  # every weight is used
    direction = randomized(Model(config).declared['params'], seed=1)

    def reference_loss(step):
        params = jax.tree.map(lambda p, d: np.float64(p) + step * d, variables['params'], direction)
        weights = {'params': params, 'balance': reference.float64(variables['balance'])}
        return loss_of(reference.batch(weights, batch['tokens'], batch['segments'], config), batch['segments'], np)

    np.testing.assert_allclose(loss, reference_loss(0.0), rtol=1e-5)
    slope = (reference_loss(1e-6) - reference_loss(-1e-6)) / 2e-6
    along = sum(np.vdot(np.float64(g), d) for g, d in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True))
    np.testing.assert_allclose(along, slope, rtol=1e-4)


def test_adapters_are_low_rank_changes_of_every_matrix():
    """W + alpha / r A B, put together here weight by weight in float64, is the model and is what merging gives."""
    model = Model(dataclasses.replace(FULL, lora_rank=3, lora_alpha=6.0))
    variables = {**variables_of(FULL), 'params': randomized(model.declared['params'], seed=2)}
    weights, matrices = reference.float64(variables), 0

    def merge(tree, declared):
        nonlocal matrices
        for name, weight in declared.items():
            if not is_declared(weight):
                merge(tree[name], weight)
            elif weight.role == 'matrix' and '_lora_' not in name:
                a, b = tree.pop(f'{name}_lora_a'), tree.pop(f'{name}_lora_b')
                stacked = [axis for axis in weight.axes if axis in ('layers', 'experts')]
                stack = a.shape[: len(stacked)]
                product = a.reshape(*stack, -1, 3) @ b.reshape(*stack, 3, -1)
                tree[name] = tree[name] + 6 / 3 * product.reshape(tree[name].shape)
                assert declared[f'{name}_lora_a'].init == 'normal' and declared[f'{name}_lora_b'].init == 'zeros'
                matrices += 1

    merge(weights['params'], model.declared['params'])
    plain, merged = merge_adapters(model, variables)
    assert plain.paths == Model(FULL).paths and matrices > 30
    assert_trees_close(jax.device_get(merged), weights, tolerance=1e-6)
    assert merge_adapters(plain, merged) == (plain, merged)
    batch = packed(rows=3)
    said = evaluate(model.config, variables, batch)
    expected = reference.batch(weights, batch['tokens'], batch['segments'], FULL)
    np.testing.assert_allclose(said['logprob'], expected['logprob'], atol=2e-4)
    for ahead, other in zip(said['multi_token_logprob'], expected['multi_token_logprob'], strict=True):
        np.testing.assert_allclose(ahead, other, atol=2e-4)
    alone = evaluate(FULL, jax.device_get(merged), batch)
    real = batch['segments'] > 0
    np.testing.assert_allclose(said['logits'][real], alone['logits'][real], atol=1e-5 * np.abs(alone['logits']).max())


def test_experts_that_are_given_are_taken():
    batch, variables = packed(rows=3), variables_of(FULL)
    free = evaluate(FULL, variables, batch)
    own = np.moveaxis(free['statistics']['expert_ids'][: FULL.num_moe_layers], 0, 2)
    again = evaluate(FULL, variables, {**batch, 'expert_ids': own})
    assert_trees_close(again, free, tolerance=1e-6)
    others = (own + 1) % FULL.n_routed_experts
    others[:, ::3] = -1
    said = evaluate(FULL, variables, {**batch, 'expert_ids': others})
    used = np.moveaxis(said['statistics']['expert_ids'][: FULL.num_moe_layers], 0, 2)
    np.testing.assert_array_equal(used[others >= 0], others[others >= 0])
    np.testing.assert_array_equal(used[:, ::3, 0], own[:, ::3, 0])  # the first layer sees the same at those places
    for layer in range(FULL.num_moe_layers):
        load = np.bincount(used[batch['segments'] > 0][:, layer].ravel(), minlength=FULL.n_routed_experts)
        np.testing.assert_array_equal(said['statistics']['load'][layer], load)
    assert np.abs(said['logprob'] - free['logprob']).max() > 1e-2
    with pytest.raises(ValueError, match=r'expert_ids have shape \(3, 12, 1, 2\): expected \(3, 12, 2, 2\)'):
        Model(FULL).apply(variables, batch['tokens'], expert_ids=own[:, :, :1])


# What speaks of which token.


def test_logprobs_stand_at_the_token_they_are_of():
    batch = packed(rows=3)
    said = evaluate(FULL, variables_of(FULL), batch)
    all_logprobs = reference.log_softmax(np.float64(said['logits']))
    segments, tokens = batch['segments'], batch['tokens']
    firsts = 0
    for row in range(3):
        for t in range(12):
            first = t == 0 or segments[row, t] != segments[row, t - 1]
            firsts += first
            silent = first or segments[row, t] == 0
            expected = 0 if silent else all_logprobs[row, t - 1, tokens[row, t]]
            np.testing.assert_allclose(said['logprob'][row, t], expected, atol=1e-5)
            assert (said['entropy'][row, t] == 0) == silent
            assert (said['log_partition'][row, t] == 0) == silent
    assert firsts > 6


def test_other_tokens_are_scored_in_the_place_of_the_one_that_is_there():
    config = dataclasses.replace(DENSE, value_head=True, head_chunk=12)
    variables = {**variables_of(DENSE), 'params': {**variables_of(DENSE)['params']}}
    variables['params']['value_head'] = head = np.linspace(-1, 1, config.hidden_size).astype(np.float32)
    batch = packed(rows=3)
    ids = np.random.default_rng(1).integers(config.vocab_size, size=(3, 12, 4)).astype(np.int32)
    ids[..., 0] = batch['tokens']

    @jax.jit
    def run(variables, batch):
        out = Model(config).apply(variables, **batch, temperature=1.3)
        return out.logits, out.logprob, out.logprob_of(ids), out.top(5), out.value, out.hidden

    logits, logprob, of, (top, top_logprob), value, hidden = map(jax.device_get, run(variables, batch))
    logprobs = np.roll(reference.log_softmax(np.float64(logits)), 1, axis=1)  # at the token they are of
    logprobs *= np.asarray(same_segment(batch['segments'], 1))[..., None]
    np.testing.assert_allclose(of, np.take_along_axis(logprobs, ids, -1), atol=1e-5)
    np.testing.assert_allclose(of[..., 0], logprob, atol=1e-6)
    expected = np.argsort(-logprobs, kind='stable')[..., :5]
    np.testing.assert_array_equal(top, np.where(logprobs.any(-1, keepdims=True), expected, 0))
    np.testing.assert_allclose(top_logprob, np.take_along_axis(logprobs, expected, -1), atol=1e-5)
    np.testing.assert_allclose(value, np.float64(hidden) @ head, atol=1e-5)
    # The head begins with zeros, and a model without one says so.
    assert Model(config).declared['params']['value_head'].init == 'zeros'
    with pytest.raises(ValueError, match=r'model.value_head is False: expected True'):
        jax.eval_shape(lambda: Model(DENSE).apply(variables_of(DENSE), **batch).value)


def test_multi_token_modules_speak_from_their_place_in_a_segment_on():
    batch = packed(rows=3)
    said = evaluate(FULL, variables_of(FULL), batch)
    for k, ahead in enumerate(said['multi_token_logprob'], start=1):
        place = np.where(batch['segments'] > 0, batch['positions'], 0)
        np.testing.assert_array_equal(ahead != 0, place > k)


def test_nothing_sees_what_comes_later_or_stands_in_another_segment():
    batch = packed(rows=3, seed=3)
    before = evaluate(FULL, variables_of(FULL), batch)
    row, t = 0, 2
    assert 1 < np.sum(batch['segments'][row] == batch['segments'][row, t]) < 11
    changed = {**batch, 'tokens': batch['tokens'].copy()}
    changed['tokens'][row, t] = (changed['tokens'][row, t] + 1) % FULL.vocab_size
    after = evaluate(FULL, variables_of(FULL), changed)
    may_change = np.zeros((3, 12), bool)
    may_change[row, t:] = (batch['segments'][row] == batch['segments'][row, t])[t:]
    moved = np.abs(before['logits'] - after['logits']).max(-1) > 0
    np.testing.assert_array_equal(moved, may_change)
    for name in ('logprob', 'multi_token_logprob'):
        for a, b in zip(np.reshape(before[name], (-1, 3, 12)), np.reshape(after[name], (-1, 3, 12)), strict=True):
            assert not (a != b)[~may_change].any()


def test_same_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0]])
    np.testing.assert_array_equal(same_segment(segments, 1)[0], [0, 1, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(same_segment(segments, 2)[0], [0, 0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(same_segment(segments[:, :1], 2)[0], [0])


# Computed in another way.


def test_packed_documents_are_as_if_alone():
    batch = packed(rows=3, seed=5)
    variables = variables_of(FULL)
    together = evaluate(FULL, variables, batch)
    places = list(reference.documents(batch['segments']))
    assert 6 < len(places) <= 9
    sums = {name: 0.0 for name in ('load', 'entropy', 'sequence_balance')}
    for first in range(0, 9, 3):
        alone = {name: np.zeros((3, 12), np.int32) for name in batch}
        for i, (row, columns) in enumerate(places[first : first + 3]):
            for name in ('tokens', 'positions'):
                alone[name][i, : len(columns)] = batch[name][row, columns]
            alone['segments'][i, : len(columns)] = 1
        apart = evaluate(FULL, variables, alone)
        for i, (row, columns) in enumerate(places[first : first + 3]):
            for name in ('logits', 'logprob', 'entropy', 'log_partition'):
                np.testing.assert_allclose(together[name][row, columns], apart[name][i, : len(columns)], atol=2e-5)
            for a, b in zip(together['multi_token_logprob'], apart['multi_token_logprob'], strict=True):
                np.testing.assert_allclose(a[row, columns], b[i, : len(columns)], atol=2e-5)
        for name in sums:
            sums[name] = sums[name] + apart['statistics'][name]
    np.testing.assert_array_equal(together['statistics']['load'], sums['load'])
    for name, value in sums.items():
        np.testing.assert_allclose(together['statistics'][name], value, rtol=1e-5, err_msg=name)


def test_positions_and_segments_have_defaults():
    tokens = np.arange(36, dtype=np.int32).reshape(3, 12)
    batch = {
        'tokens': tokens,
        'positions': np.broadcast_to(np.arange(12, dtype=np.int32), (3, 12)),
        'segments': np.ones((3, 12), np.int32),
    }
    given = evaluate(DENSE, variables_of(DENSE), batch)
    default = evaluate(DENSE, variables_of(DENSE), {'tokens': tokens})
    np.testing.assert_array_equal(given['logprob'], default['logprob'])
    with pytest.raises(ValueError, match=r'\(12,\).*\[batch, length\]'):
        Model(DENSE).apply(variables_of(DENSE), tokens[0])


@pytest.mark.parametrize(
    'changes',
    [
        dict(scan_layers=False, remat='dots', head_chunk=32),
        pytest.param(dict(scan_layers=False), marks=pytest.mark.slow),
        pytest.param(dict(remat='dots'), marks=pytest.mark.slow),
        pytest.param(dict(remat='full'), marks=pytest.mark.slow),
        pytest.param(dict(remat='full', scan_layers=False), marks=pytest.mark.slow),
        pytest.param(dict(head_chunk=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_how_it_is_computed_changes_nothing(changes):
    batch, variables = packed(rows=8), variables_of(LEARNING)
    expected = loss_and_gradients(LEARNING, variables, batch)
    assert_trees_close(loss_and_gradients(dataclasses.replace(LEARNING, **changes), variables, batch), expected)


@pytest.mark.parametrize('chunk', [1, 6, 14, 20])
def test_chunked_head_is_the_whole_head(chunk):
    """Rows of 12 in chunks of 1, 3, 6 (7 does not divide 12) and 6 (of 10) columns."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, 12, 4)).astype(np.float32), rng.normal(size=(11, 4)).astype(np.float32)
    targets = rng.integers(11, size=(2, 12, 3)).astype(np.int32)
    weights = [rng.normal(size=(2, 12, size)).astype(np.float32) for size in (3, 1, 1)]

    def both(chunk):
        def total(hidden, head):
            out = score(hidden, head, targets, 0.7, chunk)
            return sum(jnp.sum(w * x) for w, x in zip(weights, out, strict=True)), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, head)

    (value, out), gradients = both(chunk)
    (expected_value, expected), expected_gradients = both(1000)
    assert_trees_close((value, out, gradients), (expected_value, expected, expected_gradients))
    logits = np.float64(hidden) @ np.float64(head).T / 0.7
    logprobs = reference.log_softmax(logits)
    np.testing.assert_allclose(out[0], np.take_along_axis(logprobs, targets, -1), atol=1e-5)
    np.testing.assert_allclose(out[1], -(np.exp(logprobs) * logprobs).sum(-1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(out[2], np.log(np.exp(logits).sum(-1, keepdims=True)), atol=1e-5)

    def reference_total(step):  # along a direction, in float64
        moved = logits + step * (np.float64(hidden) @ np.float64(direction).T / 0.7)
        partition = np.log(np.exp(moved).sum(-1, keepdims=True))
        picked = np.take_along_axis(moved, targets, -1)
        return np.sum(weights[0] * (picked - partition)) + np.sum(weights[2] * partition)

    direction = rng.normal(size=head.shape)
    slope = (reference_total(1e-6) - reference_total(-1e-6)) / 2e-6
    np.testing.assert_allclose(np.sum(gradients[1] * direction), slope, rtol=1e-4)


def test_entropy_carries_no_gradient():
    hidden, head = jnp.ones((1, 2, 3)), jnp.linspace(-1, 1, 12).reshape(4, 3)
    gradient = jax.grad(lambda h: score(h, head, jnp.zeros((1, 2, 1), jnp.int32), 1.0, 100)[1].sum())(hidden)
    np.testing.assert_array_equal(gradient, 0 * hidden)


def test_a_tied_head_is_the_embedding():
    tied = Model(DENSE)
    untied = Model(dataclasses.replace(DENSE, tie_word_embeddings=False))
    assert 'lm_head' not in tied.declared['params'] and 'lm_head' in untied.declared['params']
    variables = variables_of(DENSE)
    doubled = {**variables['params'], 'lm_head': variables['params']['embed_tokens']}
    batch = packed(rows=3)
    same = evaluate(untied.config, {**variables, 'params': doubled}, batch)
    np.testing.assert_allclose(evaluate(DENSE, variables, batch)['logits'], same['logits'], atol=1e-6)


def test_bfloat16_stays_near_float32():
    config = dataclasses.replace(SOFTMAX, dtype='bfloat16')
    batch = packed(rows=3)
    narrow, wide = (evaluate(c, variables_of(SOFTMAX), batch) for c in (config, SOFTMAX))
    assert narrow['logits'].dtype == narrow['logprob'].dtype == np.float32
    assert narrow['entries']['latent'].dtype == jnp.bfloat16
    difference = np.abs(narrow['logprob'] - wide['logprob'])
    # A token near the edge between two experts may be sent elsewhere, so not every one is near.
    assert np.isfinite(difference).all() and 0 < np.median(difference[difference > 0]) < 0.1


# Decoding.


@pytest.mark.parametrize('config', [FULL, DENSE, SOFTMAX], ids=['mla', 'gqa', 'mla yarn'])
def test_decoding_from_the_cache_is_the_full_pass(config):
    """Prompts of different lengths, prefilled once and continued twice each, one token at a time."""
    model, variables = Model(config), variables_of(config)
    rng = np.random.default_rng(0)
    lengths, slots, more, samples = np.array([3, 7, 1]), 7, 5, 2
    room = slots + more
    places = np.broadcast_to(np.arange(room, dtype=np.int32), (3, room))

    def full_pass(tokens, ends):
        batch = {'tokens': tokens, 'positions': places, 'segments': (places < ends[:, None]).astype(np.int32)}
        return evaluate(config, variables, batch, 0.7)

    prompts = rng.integers(config.vocab_size, size=(3, room)).astype(np.int32)
    continuations = rng.integers(config.vocab_size, size=(3, samples, more)).astype(np.int32)
    prefilled = full_pass(prompts, lengths)
    entries = {name: x[:, :, :slots] for name, x in prefilled['entries'].items()}
    counts = [count for _, _, count in layer_parts(config)]
    cache = latent_cache.empty(entries, counts, 3 * samples, room)
    cache = latent_cache.begun(cache, latent_cache.repeated(entries, samples), np.arange(3 * samples))
    row_lengths = np.repeat(lengths, samples).astype(np.int32)

    @jax.jit
    def step(variables, cache, token, index):
        slot = jnp.arange(room)[None]
        valid = (slot < row_lengths[:, None]) | ((slot >= slots) & (slot < slots + index))
        position = row_lengths[:, None] + index
        out = model.apply(model.in_parts(variables), token, position, jnp.ones_like(token), 0.7, cache, valid)
        return out.logits[:, 0], latent_cache.written(cache, out.entries, slots + index)

    decoded = [np.repeat(prefilled['logits'][np.arange(3), lengths - 1], samples, axis=0)]
    for index in range(more):
        logits, cache = step(variables, cache, continuations.reshape(-1, more)[:, index, None], np.int32(index))
        decoded.append(np.asarray(logits))
    found = reference.log_softmax(np.stack(decoded, axis=1)).reshape(3, samples, more + 1, -1)

    for s in range(samples):
        tokens = prompts.copy()
        for row, length in enumerate(lengths):
            tokens[row, length : length + more] = continuations[row, s]
        expected = reference.log_softmax(full_pass(tokens, lengths + more)['logits'])
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(found[row, s], expected[row, length - 1 : length + more], atol=5e-5)
    assert np.abs(found[:, 0, -1] - found[:, 1, -1]).max() > 1e-2  # the two samples of a prompt went different ways
    per_token = sum(x.shape[0] * int(np.prod(x.shape[3:])) for part in cache for x in part.values())
    assert per_token == config.cache_elements_per_token


# On a mesh.


@pytest.fixture(scope='module')
def one_device_mesh():
    return make_mesh({'data': 1}, jax.devices()[:1])


def test_initial_values_do_not_depend_on_the_mesh(one_device_mesh):
    model = Model(SMALLEST)
    alone = model.init(3, one_device_mesh)
    spread = model.init(3, make_mesh({'fsdp': 2, 'tensor': 2}, jax.devices()[:4]))
    assert not spread['params']['layers']['mlp']['experts_up_proj'].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(alone), jax.device_get(spread))


def test_initial_values(one_device_mesh):
    params, others = (Model(SMALLEST).init(seed, one_device_mesh)['params'] for seed in (0, 1))
    matrix = np.asarray(params['layers']['mlp']['experts_gate_proj'])
    assert matrix.shape == (2, 8, 16, 12) and matrix.dtype == np.float32
    assert matrix.std() == pytest.approx(0.05, rel=0.05) and abs(matrix.mean()) < 5e-3
    same_shape = params['layers']['mlp']['experts_up_proj']
    for other in (matrix[::-1], matrix[:, ::-1], same_shape, others['layers']['mlp']['experts_gate_proj']):
        assert np.corrcoef(matrix.ravel(), np.ravel(other))[0, 1] < 0.1  # layers, experts, weights, seeds differ
    np.testing.assert_array_equal(params['norm'], 1)
    balance = Model(SMALLEST).init(0, one_device_mesh)['balance']
    np.testing.assert_array_equal(balance['layers']['mlp']['bias'], np.zeros((2, 8)))


def test_mesh_sizes():
    mesh = make_mesh({'data': -1, 'tensor': 2})
    assert dict(mesh.shape) == {'slice': 1, 'data': 4, 'fsdp': 1, 'expert': 1, 'tensor': 2, 'context': 1}
    with pytest.raises(ValueError, match=r'mesh.pipeline is no mesh axis'):
        make_mesh({'pipeline': 2})
    with pytest.raises(ValueError, match=r'data 3 .*= 3: expected the 8 devices'):
        make_mesh({'data': 3})
    with pytest.raises(ValueError, match=r'expected the 8 devices'):
        make_mesh({'data': -1, 'fsdp': 3})


def test_an_axis_that_does_not_divide_is_left_out():
    shape = {'data': 1, 'fsdp': 4, 'expert': 2, 'tensor': 2, 'context': 1}
    assert partition_spec((16, 3), ('embed', 'heads'), shape) == PartitionSpec(('fsdp', 'expert'), None)
    assert partition_spec((12, 4), ('embed', 'heads'), shape) == PartitionSpec(('fsdp',), ('tensor',))
    assert partition_spec((6,), ('embed',), shape) == PartitionSpec(('expert',))
    assert partition_spec((5, 5), (None, 'embed'), shape) == PartitionSpec(None, None)


# The config.


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(attention='mha'), r"model.attention is 'mha': expected one of mla, gqa"),
        (dict(scoring_func='relu'), r'model.scoring_func .*sigmoid, softmax'),
        (dict(bias_update_rule='adam'), r'model.bias_update_rule .*sign, bounded, none'),
        (dict(remat='all'), r'model.remat .*none, dots, full'),
        (dict(dtype='float16'), r'model.dtype .*float32, bfloat16'),
        (dict(hidden_size=0), r'model.hidden_size is 0: expected a positive'),
        (dict(head_chunk=0), r'model.head_chunk is 0'),
        (dict(qk_rope_head_dim=5), r'model.qk_rope_head_dim is 5: expected an even'),
        (dict(attention='gqa', head_dim=5), r'model.head_dim is 5: expected an even'),
        (dict(attention='gqa', num_key_value_heads=3), r'model.num_key_value_heads is 3: expected a divisor of .*=4'),
        (dict(rope_factor=0.5), r'model.rope_factor is 0.5'),
        (dict(num_nextn_predict_layers=-1), r'model.num_nextn_predict_layers is -1'),
        (dict(num_experts_per_tok=9), r'model.num_experts_per_tok is 9: expected 1 to n_routed_experts=8'),
        (dict(num_experts_per_tok=0), r'model.num_experts_per_tok is 0'),
        (dict(n_group=3), r'model.n_group is 3: expected a divisor'),
        (dict(n_group=8), r'model.n_group is 8: expected groups of two'),
        (dict(n_group=2, topk_group=3), r'model.topk_group is 3'),
        (
            dict(n_group=4, topk_group=1, num_experts_per_tok=3),
            r'model.num_experts_per_tok is 3: expected at most the 2',
        ),
    ],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_a_misspelt_field_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r'model.kv_lora_rnak is no field of the model: did you mean kv_lora_rank\?'):
        ModelConfig.from_dict({'kv_lora_rnak': 3})
    with pytest.raises(ValueError, match=r'model.zzz is no field of the model$'):
        ModelConfig.from_dict({'zzz': 3})
    assert ModelConfig.from_dict(FULL.to_dict()) == FULL


def test_a_dense_model_has_no_router_and_needs_no_valid_one():
    config = tiny(n_routed_experts=0, n_group=5, num_experts_per_tok=7)
    declared = Model(config).declared
    assert declared['balance'] == {} and 'layers' not in declared['params']
    assert config.num_dense_layers == 3 and config.num_moe_layers == 0


def test_expert_layers_may_be_in_the_multi_token_modules_alone():
    config = tiny(first_k_dense_replace=9, num_nextn_predict_layers=2, num_hidden_layers=1)
    run = functools.partial(Model(config).apply, multi_token=True)
    output = jax.eval_shape(run, variables_of(config), packed()['tokens'])
    assert output.statistics['load'].shape == (2, 8)


# Size and cost.


def test_counts_and_cost():
    config = tiny(num_nextn_predict_layers=1)
    model = Model(config)
    params = variables_of(config)['params']
    counts = model.parameter_counts
    assert counts['total'] == sum(x.size for x in jax.tree.leaves(params))
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    module = sum(x.size for x in jax.tree.leaves(params['multi_token_1']))
    assert counts['active'] == counts['total'] - module - 2 * 6 * expert  # 6 of 8 experts idle in each of two layers
    # Without length, two FLOPs a matmul weight: all but the norms, and for each position the head once.
    vectors = sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(params) if 'norm' in str(path))
    vectors -= sum(
        x.size for path, x in jax.tree_util.tree_leaves_with_path(params['multi_token_1']) if 'norm' in str(path)
    )
    forward = 2 * (counts['active'] - config.vocab_size * config.hidden_size)
    assert model.flops_per_token(0, backward=False) == pytest.approx(forward, rel=2 * vectors / counts['active'])
    per_position = 3 * 4 * (config.qk_head_dim + config.v_head_dim)  # layers, heads, widths
    grown = model.flops_per_token(200, backward=False) - model.flops_per_token(0, backward=False)
    assert grown == pytest.approx(2 * per_position * 100)
    assert model.flops_per_token(200) > 3 * model.flops_per_token(200, backward=False)  # the module trains as well
