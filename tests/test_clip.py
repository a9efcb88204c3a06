"""QK-clip: the largest logits against the NumPy reference, what clipping makes of them, and on any mesh alike."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from typing import Any

import jax
import numpy as np
import optax
import pytest
from test_sharding import GROUPED, LATENT, OBJECTIVES, batch, devices

from data.errors import InputError
from model.attention import LARGEST, GroupedQueryAttention, LatentAttention
from model.clip import clipped
from model.config import ModelConfig
from model.transformer import Model
from tests import reference
from tests.tiny import packed, randomized, tiny
from train.learn.health import check_clip
from train.learn.step import Layout, initial_state, make_step
from train.stages import stage_defaults

LIMIT = 4.2  # some heads of the models below are above it
CONFIGS = {
    'latent': tiny(),
    'query latent, yarn': tiny(q_lora_rank=7, rope_factor=8.0, original_max_position_embeddings=8),
    'grouped': tiny(attention='gqa', num_key_value_heads=2),
}


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_no_logit_of_the_reference_is_above_the_limit_behind_it(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = (LatentAttention if config.attention == 'mla' else GroupedQueryAttention)(config)
    rows = packed(rows=3)
    x = np.random.default_rng(1).normal(size=(3, 12, config.hidden_size)).astype(np.float32)
    arguments = (x, rows['positions'], rows['segments'], None, None)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments))
    assert set(variables) == {'params'}
    measure = jax.jit(lambda p: module.apply({'params': p}, *arguments, mutable=[LARGEST])[1][LARGEST])

    def expected_of(params: Any) -> np.ndarray:
        """Of each head, from the logits that the reference makes, head after head."""
        logits: dict[int, list[float]] = defaultdict(list)
        calls = iter(range(10**6))

        def attend(query: Any, keys: Any, values: Any, scale: float) -> Any:
            logits[next(calls) % config.num_attention_heads].append((keys @ query * scale).max())
            return reference.softmax(keys @ query * scale) @ values

        monkeypatch.setattr(reference, 'attend', attend)
        one = reference.latent_attention if config.attention == 'mla' else reference.grouped_query_attention
        for row, columns in reference.documents(rows['segments']):
            one(reference.float64(params), np.float64(x[row, columns]), np.arange(len(columns)), config)
        return np.array([max(logits[head]) for head in range(config.num_attention_heads)])

    params = randomized(variables['params'])
    largest, expected = measure(params), expected_of(params)
    np.testing.assert_allclose(largest['heads'], expected, rtol=1e-5)
    limit = float(np.median(expected))
    assert 0 < limit < expected.max()
    after = jax.device_get(clipped(params, largest, limit, config))
    np.testing.assert_allclose(expected_of(after), np.minimum(expected, limit), rtol=1e-5)
    for name, x_after in after.items():
        heads = {'q_proj': 1, 'q_b_proj': 1, 'kv_b_proj': 1}.get(name)
        same = np.flatnonzero(expected <= limit)
        kept = (params[name], x_after) if heads is None else (params[name][:, same], x_after[:, same])
        np.testing.assert_array_equal(*kept)


def stepped(config: ModelConfig, sizes: dict[str, int], microbatches: int) -> tuple[Any, dict[str, Any]]:
    """Parameters and metrics after a step that changes nothing but what is clipped."""
    model, mesh = Model(config), devices(**sizes)
    variables = jax.tree.map(
        lambda x, to: jax.device_put(x, to.sharding), randomized(model.declared, deviation=0.3), model.shapes(mesh)
    )
    with jax.set_mesh(mesh):
        step = jax.jit(make_step(model, OBJECTIVES['pretrain'], optax.sgd(0.0), qk_clip=LIMIT))
        rows = batch()
        layout = Layout(mesh, *rows['tokens'].shape, microbatches)
        placed = layout.place(rows, range(layout.rows))
        state, metrics = step(initial_state(variables, optax.sgd(0.0)), placed)
    return jax.device_get(state['params']), jax.device_get(metrics)


@pytest.mark.slow
@pytest.mark.parametrize('config', [LATENT, GROUPED], ids=['latent', 'grouped'])
def test_every_mesh_clips_alike(config: ModelConfig) -> None:
    before = randomized(Model(config).declared, deviation=0.3)['params']
    expected, metrics = stepped(config, {}, 1)
    assert 0 < metrics['attention/clipped'] < 1 and metrics['attention/largest_logit'] > LIMIT
    changed = [
        jax.tree_util.keystr(path)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(expected), strict=True)
        if (x != y).any()
    ]
    assert changed and all('self_attn' in name for name in changed)
    ways = {'data': 2, 'tensor': 2, 'context': 2}
    for found, said in (stepped(config, ways, 1), stepped(config, {}, 2)):
        for name in ('attention/clipped', 'attention/largest_logit'):
            np.testing.assert_allclose(said[name], metrics[name], rtol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected)


def test_it_is_for_stages_in_which_all_weights_learn() -> None:
    stage = {**stage_defaults('sft'), 'qk_clip': 100.0}
    check_clip(stage, tiny())
    for wrong, model, said in (
        ({'qk_clip': -1.0}, tiny(), 'qk_clip is -1.0: expected a logit above 0'),
        ({'trainable': 'mlp'}, tiny(), 'expected a stage in which all weights learn'),
        ({}, dataclasses.replace(tiny(), lora_rank=2), 'without adapters'),
    ):
        with pytest.raises(InputError, match=said):
            check_clip({**stage, **wrong}, model)


@pytest.mark.parametrize('changes', [{'remat': 'full'}, {'scan_layers': False}], ids=str)
def test_how_layers_are_computed_changes_no_logit(changes: dict[str, Any]) -> None:
    variables, rows = randomized(Model(LATENT).declared), packed()

    def largest(config: ModelConfig) -> Any:
        apply = functools.partial(Model(config).apply, multi_token=True, largest_logits=True)
        return jax.jit(lambda v: apply(v, **rows).largest_logits)(variables)

    expected = largest(LATENT)
    assert len(jax.tree.leaves(expected)) == 3  # of the dense layer, the layer with experts and the module
    found = largest(dataclasses.replace(LATENT, **changes))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, expected)
