"""Attention against the NumPy reference: both kinds, masks, chunks, rotary embedding, YaRN."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import model.attention
from model.attention import GroupedQueryAttention, LatentAttention, attend
from model.config import ModelConfig
from model.layers import rotary_frequencies, rotate, softmax_scale, yarn_magnitude
from model.sharding import make_mesh
from model.splash import splash_attention
from tests import reference
from tests.tiny import packed, randomized, tiny

DEEPSEEK_V3 = ModelConfig(
    num_attention_heads=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    rope_theta=10000.0,
    rope_factor=40.0,
    original_max_position_embeddings=4096,
    rope_beta_fast=32,
    rope_beta_slow=1,
    rope_mscale=1.0,
    rope_mscale_all_dim=1.0,
)
# A context so short that the ramp covers several of few pairs, and multipliers that do not cancel.
YARN = dict(
    rope_factor=8.0,
    rope_theta=100.0,
    original_max_position_embeddings=64,
    rope_beta_fast=8.0,
    rope_mscale=1.3,
    rope_mscale_all_dim=0.7,
)


@pytest.mark.parametrize(
    'changes',
    [
        dict(),
        dict(q_lora_rank=7),
        dict(q_lora_rank=7, qk_rope_head_dim=8, **YARN),
        dict(attention='gqa', num_key_value_heads=1),
        dict(attention='gqa', num_key_value_heads=2),
        dict(attention='gqa', num_key_value_heads=4, head_dim=8, **YARN),
    ],
    ids=['latent', 'query latent', 'latent yarn', 'multi-query', 'grouped', 'multi-head yarn'],
)
def test_attention_is_the_reference(changes):
    config = tiny(**changes)
    kind = LatentAttention if config.attention == 'mla' else GroupedQueryAttention
    module = kind(config)
    batch = packed(rows=3)
    x = np.random.default_rng(1).normal(size=(3, 12, config.hidden_size)).astype(np.float32)
    arguments = (x, batch['positions'], batch['segments'], None, None)
    declared = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments))['params']
    params = randomized(declared)
    assert set(params) == (
        {'q_proj', 'k_proj', 'v_proj', 'o_proj'}
        if config.attention == 'gqa'
        else {'kv_a_proj_with_mqa', 'kv_a_layernorm', 'kv_b_proj', 'o_proj'}
        | ({'q_a_proj', 'q_a_layernorm', 'q_b_proj'} if config.q_lora_rank else {'q_proj'})
    )
    out, entries = jax.jit(lambda p: module.apply({'params': p}, *arguments))(params)
    weights = reference.float64(params)
    seen = 0
    for row, columns in reference.documents(batch['segments']):
        one = reference.latent_attention if config.attention == 'mla' else reference.grouped_query_attention
        expected, cached = one(weights, np.float64(x[row, columns]), np.arange(len(columns)), config)
        np.testing.assert_allclose(out[row, columns], expected, atol=2e-5)
        np.testing.assert_allclose(
            entries['latent' if config.attention == 'mla' else 'key'][row, columns], cached, atol=2e-5
        )
        seen += len(columns)
    assert 20 < seen < 36  # the batch is neither empty nor full


def masked_softmax(query, key, value, segments, scale):
    """The same attention with whole logits, without chunks."""
    sharing = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, sharing, axis=2), jnp.repeat(value, sharing, axis=2)
    logits = jnp.einsum('bthd,bshd->bhts', query, key) * scale
    order = jnp.arange(query.shape[1])
    mask = (order[:, None] >= order[None])[None] & (segments[:, :, None] == segments[:, None])
    return jnp.einsum('bhts,bshv->bthv', jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf), axis=-1), value)


@pytest.mark.parametrize(
    ('length', 'backend', 'ways'),
    [(300, 'cpu', 1), (600, 'cpu', 1), (512, 'cpu', 2), (384, 'tpu', 1), (512, 'tpu', 2)],
    ids=['chunks of 128', 'chunks of 256', 'length split', 'kernel', 'kernel, length split'],
)
def test_no_way_to_compute_it_changes_attention(length, backend, ways, monkeypatch):
    monkeypatch.setattr(model.attention, 'platform', lambda: backend)
    monkeypatch.setattr(model.attention, 'splash_attention', functools.partial(splash_attention, interpret=True))
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, length, 4, 3)).astype(np.float32)
    key, value = (rng.normal(size=(2, length, 2, w)).astype(np.float32) for w in (3, 2))
    # Segments that end inside a chunk, at its edge (256) and after it; padding at the end of the second row.
    segments = np.ones((2, length), np.int32)
    segments[0, 256:] = 2
    segments[1, 100:] = 2
    segments[1, 290:] = 0
    weight = rng.normal(size=(2, length, 4, 2)).astype(np.float32) * (segments > 0)[..., None, None]

    def both(function):
        def total(*operands):
            out = function(*operands, segments, 0.7)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)

    def own(query, key, value, segments, scale):
        """One device's part of the queries over all keys."""
        token, whole = PartitionSpec(None, 'context'), PartitionSpec()
        along = ('context',) if ways > 1 else ()
        return jax.shard_map(
            lambda q, k, v, q_segments, k_segments: attend(q, k, v, (q_segments, k_segments), scale, along),
            mesh=make_mesh({'context': ways}, jax.devices()[:ways]),
            in_specs=(token, whole, whole, token, whole),
            out_specs=token,
            check_vma=False,
        )(query, key, value, segments, segments)

    (_, out), gradients = both(own)
    # What padding gets to see is of no account.
    out = jnp.where((segments > 0)[..., None, None], out, 0)
    (_, expected), expected_gradients = both(masked_softmax)
    expected = jnp.where((segments > 0)[..., None, None], expected, 0)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_attention_survives_huge_logits():
    x = jnp.full((1, 3, 1, 4), 1e3)
    segments = jnp.ones((1, 3), jnp.int32)
    out = attend(x, x, x, (segments, segments), 1.0)
    np.testing.assert_allclose(out, x, rtol=1e-6)


def test_rotation_depends_on_distance_alone_and_keeps_length():
    config = tiny(qk_rope_head_dim=8)
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(i, j):
        return float(jnp.sum(rotate(query, jnp.array([[i]]), config) * rotate(key, jnp.array([[j]]), config)))

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3
    turned = rotate(query, jnp.array([[77]]), config)
    assert float(jnp.linalg.norm(turned)) == pytest.approx(float(np.linalg.norm(query)), rel=1e-5)
    np.testing.assert_array_equal(rotate(query, jnp.array([[0]]), config), query)


def test_a_larger_rotary_base_turns_slower():
    slow = rotary_frequencies(tiny(rope_theta=1e6, qk_rope_head_dim=8))
    np.testing.assert_allclose(slow, [1, 10**-1.5, 1e-3, 10**-4.5], rtol=1e-5)


def test_yarn_is_that_of_deepseek_v3():
    """Pairs up to 10 turn 32 times or more in 4096 tokens and stay; from 23 on they turn less than once."""
    found = np.float64(rotary_frequencies(DEEPSEEK_V3))
    np.testing.assert_allclose(found, reference.frequencies(DEEPSEEK_V3), rtol=1e-5)
    plain = 10000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(found[:11], plain[:11], rtol=1e-5)
    np.testing.assert_allclose(found[23:], plain[23:] / 40, rtol=1e-5)
    np.testing.assert_allclose(found[16], plain[16] * (7 / 13 + 6 / 13 / 40), rtol=1e-5)
    assert (np.diff(found) < 0).all()


def test_yarn_scales_of_deepseek_v3():
    assert yarn_magnitude(40, 1.0) == pytest.approx(1.3688879)
    assert yarn_magnitude(1, 1.0) == 1
    assert softmax_scale(DEEPSEEK_V3) == pytest.approx(192**-0.5 * 1.3688879**2)
    assert softmax_scale(DEEPSEEK_V3) == pytest.approx(0.1352337788608801, rel=1e-6)
    # With equal multipliers cosine and sine keep their size: the temperature is all in the softmax.
    x = np.ones((1, 1, 64), np.float32)
    assert float(jnp.linalg.norm(rotate(x, jnp.array([[5]]), DEEPSEEK_V3))) == pytest.approx(8, rel=1e-5)
    # Without mscale_all_dim it is all in cosine and sine, as in the YaRN paper.
    paper = dataclasses.replace(DEEPSEEK_V3, rope_mscale_all_dim=0.0)
    assert softmax_scale(paper) == pytest.approx(192**-0.5)
    assert float(jnp.linalg.norm(rotate(x, jnp.array([[5]]), paper))) == pytest.approx(8 * 1.3688879, rel=1e-5)


def test_yarn_off_is_plain_rotary():
    off = dataclasses.replace(DEEPSEEK_V3, rope_factor=1.0)
    np.testing.assert_allclose(rotary_frequencies(off), 10000.0 ** (-np.arange(32) / 32), rtol=1e-5)
    assert softmax_scale(off) == pytest.approx(1 / math.sqrt(192))
