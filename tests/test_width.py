"""What is scaled for a model's width, and the coordinate check: with it, activations change alike at every width."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from small import model_config, one_device
from test_optimizer import named, random_gradient, update

from model.layers import by_width
from model.transformer import Block, Model, is_declared
from train.learn.objectives import next_token
from train.learn.optimizer import make_optimizer
from train.learn.step import make_step
from train.stages import COMMON

BASE = 64
DENSE: dict[str, Any] = {'n_routed_experts': 0, 'attention': 'gqa', 'head_dim': 8}
EXPERTS: dict[str, Any] = {'first_k_dense_replace': 0}
BAND = 0.15  # of the slope of log change over log width that counts as flat


def wide(width: int, base: int, **changes: Any) -> Model:
    """Two layers of that width: with as many more heads, and as much more of all else."""
    heads = width // 8
    sizes = {'num_attention_heads': heads, 'num_key_value_heads': heads // 2, 'kv_lora_rank': width // 2}
    sizes |= {'hidden_size': width, 'intermediate_size': 2 * width, 'moe_intermediate_size': width // 2}
    return Model(model_config(**sizes, num_hidden_layers=2, initializer_range=0.01, base_width=base, **changes))


def coordinates(model: Model, variables: Any, tokens: np.ndarray) -> dict[str, jax.Array]:
    """What each layer adds to the stream, what the head reads (before the multiplier), and logits."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    stack, found = 'layers' if model.config.is_moe else 'dense_layers', {}
    x = variables['params']['embed_tokens'][tokens]
    for layer in range(2):
        own = {name: jax.tree.map(lambda w, i=layer: w[i], kept.get(stack, {})) for name, kept in variables.items()}
        block = Block(model.config, experts=model.config.is_moe, parent=None)
        y, _ = block.apply(own, x, None, None, places, jnp.ones_like(tokens), None)
        found[f'layer {layer}'], x = y - x, y
    output = model.apply(variables, tokens)
    return {**found, 'hidden': output.hidden / model.config.head_multiplier, 'logits': output.logits}


def changes(model: Model, name: str, rate: float, steps: int = 4) -> dict[str, float]:
    """How far each coordinate moves in some steps: a root mean square."""
    optimizer, rng = (
        make_optimizer({**COMMON['optimizer'], 'name': name}, model.declared['params']),
        np.random.default_rng(0),
    )
    tokens = rng.integers(400, size=(1, 4, 32)).astype(np.int32)
    batch = {'tokens': tokens, 'positions': tokens * 0 + np.arange(32, dtype=np.int32), 'segments': tokens * 0 + 1}
    batch['loss_weight'] = np.ones(tokens.shape, np.float32)
    step = make_step(model, next_token(), optimizer)

    def first(x: Any) -> np.ndarray:
        if not is_declared(x):
            return np.zeros(x.shape, np.float32)
        drawn = rng.normal(size=x.value.shape) if x.init == 'normal' else np.ones(x.value.shape)
        return (x.scale * drawn).astype(np.float32)

    @jax.jit
    def moved(variables: Any) -> dict[str, jax.Array]:
        state = {**variables, 'optimizer': optimizer.init(variables['params']), 'step': jnp.zeros((), jnp.int32)}
        state = lax.scan(lambda s, _: (step(s, batch, rate)[0], None), state, length=steps)[0]
        pairs = [coordinates(model, v, tokens[0]) for v in (variables, {n: state[n] for n in variables})]
        return jax.tree.map(lambda before, after: jnp.sqrt(jnp.mean(jnp.square(after - before))), *pairs)

    return {n: float(x) for n, x in moved(jax.tree.map(first, model.declared, is_leaf=is_declared)).items()}


def slopes(name: str, rate: float, base: int, widths: tuple[int, ...], **fields: Any) -> dict[str, float]:
    found = [changes(wide(width, base, **fields), name, rate) for width in widths]
    return {n: float(np.polyfit(np.log(widths), np.log([x[n] for x in found]), 1)[0]) for n in found[0]}


def test_activations_change_alike_at_every_width() -> None:
    found = slopes('adamw', 0.002, BASE, (32, 128), **DENSE)
    assert all(abs(slope) < BAND for slope in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize(('name', 'rate'), [('adamw', 0.002), ('muon', 0.005)])
@pytest.mark.parametrize('fields', [DENSE, EXPERTS], ids=['dense', 'experts'])
def test_so_they_do_in_every_part_and_not_without(name: str, rate: float, fields: dict[str, Any], tied: bool) -> None:
    fields = {**fields, 'tie_word_embeddings': tied}
    with_it, without = (slopes(name, rate, base, (32, 64, 128, 256), **fields) for base in (BASE, 0))
    assert all(abs(slope) < BAND for slope in with_it.values()), with_it
    # The head's norm hides how the stream grows that it reads.
    assert all(slope > 3 * BAND for n, slope in without.items() if n != 'hidden'), without


def test_sizes_and_rates_by_shape() -> None:
    """Spectral norms of first values and of both optimizers' updates go with sqrt(outputs / inputs)."""
    for into, out in ((64, 64), (256, 64), (64, 256), (1024, 8), (16, 512)):
        size, adamw = by_width((3, into, out // 2, 2), ('experts', None, None, None), 1, BASE)
        spectral = math.sqrt(out / into)
        drawn = np.random.default_rng(0).normal(size=(into, out)) * size
        # s (sqrt(inputs) + sqrt(outputs)), up to twice as much as s sqrt(max(inputs, outputs)).
        assert 1 <= np.linalg.norm(drawn, 2) / (math.sqrt(BASE) * spectral) < 2.1
        assert size * math.sqrt(max(into, out)) == pytest.approx(math.sqrt(BASE) * spectral)
        assert adamw * math.sqrt(into * out) == pytest.approx(BASE * spectral)
    assert by_width((64, 64), (None, None), 1, BASE) == by_width((7, 9), (None, None), 1, 0) == (1.0, 1.0)


def test_what_each_weight_is_given() -> None:
    model = Model(
        model_config(hidden_size=128, base_width=32, num_nextn_predict_layers=1, lora_rank=4, value_head=True)
    )
    weights = named(model.declared['params'], is_leaf=is_declared)
    quarter = 0
    for path, weight in weights.items():
        if path.endswith("['norm']"):  # the trunk's last one, and the module's: those before a head
            assert (weight.rates, weight.init, weight.scale) == ((0.25, 0.25), 'ones', 0.25)
            quarter += 1
        elif weight.role in ('vector', 'embedding'):
            assert weight.rates == (1.0, 1.0), path
            assert weight.scale == (0.05 if weight.init == 'normal' else 1.0), path
        else:
            stack = sum(axis in ('layers', 'experts') for axis in weight.axes)
            inputs = math.prod(weight.value.shape[stack : stack + weight.inputs])
            assert weight.rates[0] == pytest.approx(32 / inputs), path
            assert weight.init == 'zeros' or weight.scale == pytest.approx(weight.rates[1] * 0.05), path
    assert quarter == 2 and {x.role for x in weights.values()} == {'matrix', 'embedding', 'router', 'vector'}


def test_a_model_begins_with_what_is_declared() -> None:
    model = Model(model_config(hidden_size=128, base_width=32, num_hidden_layers=1, **DENSE))
    first = named(model.init(0, one_device())['params'])
    for path, weight in named(model.declared['params'], is_leaf=is_declared).items():
        spread = np.sqrt(np.mean(np.square(first[path])))
        assert spread == pytest.approx(weight.scale, rel=1e-6 if weight.init == 'ones' else 0.1), path
    assert first["['norm']"].tolist() == [0.25] * 128


def test_nothing_is_scaled_without_it() -> None:
    declared = Model(model_config(lora_rank=4, value_head=True)).declared['params']
    for path, weight in named(declared, is_leaf=is_declared).items():
        assert weight.rates == (1.0, 1.0), path
        assert weight.scale == (0.05 if weight.init == 'normal' else 1.0), path


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_updates_are_scaled_and_decay_is_not(name: str) -> None:
    """Both optimizers' first update with base_width, from the one without it."""
    found = []
    for base in (32, 0):
        model = Model(model_config(hidden_size=96, num_hidden_layers=1, base_width=base, **DENSE))
        found.append(update(model.declared['params'], random_gradient, name=name, weight_decay=0.5))
    (scaled, ones, weights), (plain, _, _) = found
    for path, weight in weights.items():
        decay = 0.0 if weight.role == 'vector' else -0.1 * 0.5 * np.asarray(ones[path])
        rate = weight.rates[name == 'muon' and weight.role == 'matrix']
        expected = rate * (np.asarray(plain[path]) - decay) + decay
        np.testing.assert_allclose(np.asarray(scaled[path]), expected, rtol=2e-4, atol=2e-6, err_msg=path)
