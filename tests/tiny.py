"""Models of a few hundred weights for the model's tests, batches for them, and programs compiled once for all tests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.transformer import Model, is_declared

SIZES = dict(
    vocab_size=53,
    hidden_size=16,
    num_hidden_layers=3,
    intermediate_size=24,
    num_attention_heads=4,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    head_dim=6,
    moe_intermediate_size=12,
)
EVERYTHING = dict(q_lora_rank=7, n_group=4, topk_group=2, num_nextn_predict_layers=2, routed_scaling_factor=1.7)


def tiny(**changes: Any) -> ModelConfig:
    """The defaults, shrunk."""
    return ModelConfig(**{**SIZES, **changes})


def randomized(declared: Any, seed: int = 0, deviation: float = 0.3) -> Any:
    """Variables in which nothing is left at a value that hides a fault: norm scales differ, router biases are not 0."""
    rng = np.random.default_rng(seed)

    def leaf(x: Any) -> np.ndarray:
        shape = x.value.shape if is_declared(x) else x.shape
        values = deviation * rng.normal(size=shape)
        return (values + (is_declared(x) and x.init == 'ones')).astype(np.float32)

    return jax.tree.map(leaf, declared, is_leaf=is_declared)


def packed(
    rows: int = 2, length: int = 12, seed: int = 0, vocabulary: int = SIZES['vocab_size']
) -> dict[str, np.ndarray]:
    """A batch of rows that hold two or three documents (one may be a single token) and a padded end."""
    rng = np.random.default_rng(seed)
    out = {name: np.zeros((rows, length), np.int32) for name in ('tokens', 'positions', 'segments')}
    # What stands in the padding must not matter, so it is not zero.
    out['tokens'][:] = rng.integers(vocabulary, size=(rows, length))
    for row in range(rows):
        inner = np.sort(rng.choice(np.arange(1, length - 3), size=1 + row % 2, replace=False))
        ends = [*inner, rng.integers(length - 3, length)]
        start = 0
        for segment, end in enumerate(ends, start=1):
            out['segments'][row, start:end] = segment
            out['positions'][row, start:end] = np.arange(end - start)
            start = end
    return out


def everything(output: Any) -> dict[str, Any]:
    """All that an output says."""
    return {
        'logits': output.logits,
        'logprob': output.logprob,
        'entropy': output.entropy,
        'log_partition': output.log_partition,
        'multi_token_logprob': list(output.multi_token_logprob),
        'statistics': output.statistics,
        'entries': output.entries,
    }


@functools.cache
def program(config: ModelConfig) -> Any:
    """(variables, batch, temperature) -> `everything`, compiled."""

    def run(variables: Any, batch: Any, temperature: Any) -> dict[str, Any]:
        depths = config.num_nextn_predict_layers > 0
        return everything(Model(config).apply(variables, **batch, temperature=temperature, multi_token=depths))

    return jax.jit(run)


def evaluate(config: ModelConfig, variables: Any, batch: Any, temperature: float = 1.0) -> dict[str, Any]:
    """`everything` a model says of a batch, as NumPy arrays."""
    return jax.device_get(program(config)(variables, batch, np.float32(temperature)))


COEFFICIENTS = dict(logprob=-1.0, multi_token=-0.3, z=0.01, sequence_balance=0.1, batch_balance=0.1)


def loss_of(said: Any, segments: Any, xp: Any = jnp) -> Any:
    """A loss with every differentiable part of an output in it, from `everything` or from `reference.batch`."""
    real = (np.asarray(segments) > 0).sum() if xp is np else xp.sum(segments > 0)
    total = COEFFICIENTS['logprob'] * xp.sum(said['logprob']) + COEFFICIENTS['z'] * xp.sum(said['log_partition'] ** 2)
    for ahead in said['multi_token_logprob']:
        total = total + COEFFICIENTS['multi_token'] * xp.sum(ahead)
    total = total / real
    for name in ('sequence_balance', 'batch_balance'):
        statistics = said['statistics']
        if isinstance(statistics, list):
            total = total + COEFFICIENTS[name] * sum(layer[name] for layer in statistics)
        elif statistics:
            total = total + COEFFICIENTS[name] * xp.sum(statistics[name])
    return total


def gradient_function(config: ModelConfig) -> Any:
    """(params, balance, batch) -> (loss, gradients), not yet compiled."""

    def loss(params: Any, balance: Any, batch: Any) -> Any:
        variables = {'params': params, 'balance': balance}
        depths = config.num_nextn_predict_layers > 0
        return loss_of(everything(Model(config).apply(variables, **batch, multi_token=depths)), batch['segments'])

    return jax.value_and_grad(loss)


@functools.cache
def gradient_program(config: ModelConfig) -> Any:
    """`gradient_function`, compiled for one device."""
    return jax.jit(gradient_function(config))


def loss_and_gradients(config: ModelConfig, variables: Any, batch: Any) -> tuple[float, Any]:
    """`loss_of` a batch and its gradient by every parameter, as NumPy arrays."""
    return jax.device_get(gradient_program(config)(variables['params'], variables['balance'], batch))


def assert_trees_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Leaf by leaf, relative to the largest number of each leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        scale = max(float(np.abs(b).max(initial=0.0)), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))
