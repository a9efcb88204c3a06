"""Small parts: how a weight is declared, the norm, rotary position embedding with YaRN, the dense feed-forward."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.sharding import Axes, constrain, gathered

STACKED = ('layers', 'experts')  # axes along which independent weights are stacked, the first ones
LORA_A, LORA_B = '_lora_a', '_lora_b'  # what follows a weight's name in those of its adapter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Declared(nn.meta.AxisMetadata):
    """A weight with what is known of it where it is declared. Boxes leaves during `init`; plain arrays after that.

    Attributes:
        value: the array (or its shape, under `jax.eval_shape`).
        axes: logical axis names, one a dimension; 'layers' and 'experts' stack independent weights.
        inputs: how many of the dimensions that stack nothing are inputs of the matmul (the first ones); 0 for vectors.
        init: 'normal', 'ones' or 'zeros'.
        scale: standard deviation of the normal initializer, or what ones are multiplied by.
        role: 'matrix', 'embedding', 'router' or 'vector': how an optimizer may treat it.
        rates: factors on its learning rate with AdamW and with Muon (see `by_width`).
    """

    value: Any
    axes: tuple[str | None, ...] = dataclasses.field(metadata={'static': True})
    inputs: int = dataclasses.field(metadata={'static': True})
    init: str = dataclasses.field(metadata={'static': True})
    scale: float = dataclasses.field(metadata={'static': True})
    role: str = dataclasses.field(metadata={'static': True})
    rates: tuple[float, float] = dataclasses.field(metadata={'static': True})

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Declared:
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        axes = (*self.axes[:index], params[nn.PARTITION_NAME], *self.axes[index:])
        return dataclasses.replace(self, axes=axes)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        return dataclasses.replace(self, axes=(*self.axes[:index], *self.axes[index + 1 :]))


class Module(nn.Module):
    """A Linen module that declares each weight once: shape, logical axes and initializer in one line."""

    config: ModelConfig

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        inputs: int = 1,
        init: str = 'normal',
        role: str = 'matrix',
        gather: bool = True,
        cast: bool = True,
        multiplier: float = 1.0,
    ) -> jax.Array:
        """Returns the weight in the compute dtype, gathered for use (vectors and routers stay in float32).

        With `gather` False it comes as it is stored: in float32, each device with its part. With `cast` False it is in
        the dtype in which its gradient shall be summed over devices. The multiplier is one on its first values and its
        learning rate. With lora_rank a matrix has an adapter, which is
        added to it where and as it is stored: each device makes its part, and no token is multiplied by more.
        """

        def parameter(
            name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], inputs: int, init: str
        ) -> jax.Array:
            # `init` runs under eval_shape alone: values come from sharding-aware initialisation (see transformer.py).
            size, adamw = by_width(shape, axes, inputs, self.config.base_width)
            scale = size * multiplier * (self.config.initializer_range if init == 'normal' else 1.0)
            rates, zeros = (adamw * multiplier, size * multiplier), functools.partial(jnp.zeros, shape, jnp.float32)
            return self.param(name, lambda _: Declared(zeros(), axes, inputs, init, scale, role, rates))  # type: ignore[return-value]

        value, rank = parameter(name, shape, axes, inputs, init), self.config.lora_rank
        if role == 'matrix' and rank:
            stacked = sum(axis in STACKED for axis in axes)
            cut = stacked + inputs
            a = parameter(name + LORA_A, (*shape[:cut], rank), (*axes[:cut], None), inputs, 'normal')
            size_b, axes_b = (*shape[:stacked], rank, *shape[cut:]), (*axes[:stacked], None, *axes[cut:])
            b = parameter(name + LORA_B, size_b, axes_b, 1, 'zeros')
            value = constrain(adapted(value, a, b, stacked, self.config), *axes)
        dtype = jnp.float32 if role in ('vector', 'router', 'embedding') else jnp.dtype(self.config.dtype)
        if not gather:
            return value
        return gathered(value.astype(dtype if cast else self.config.gradient_dtype), axes)

    def norm(self, name: str, x: jax.Array, epsilon: float | None = None, multiplier: float = 1.0) -> jax.Array:
        """Root-mean-square norm over the last axis, in float32, with a learned scale; rms_norm_eps if no epsilon."""
        shape, axes = x.shape[-1:], (None,)
        scale = self.weight(name, shape, axes, inputs=0, init='ones', role='vector', multiplier=multiplier)
        return rms_norm(x, scale, self.config.rms_norm_eps if epsilon is None else epsilon)


def by_width(shape: tuple[int, ...], axes: Axes, inputs: int, base: int) -> tuple[float, float]:
    """How first values and learning rates change with a weight's sizes, so that what suits a narrow model suits a wide
    one: factors on initializer_range and on Muon's rate (one number), and on AdamW's.

    A matrix and each of its updates shall have a spectral norm that goes with sqrt(outputs / inputs): then activations,
    and their changes in a step, have one size at every width (Yang, Simon and Bernstein 2023, condition 1).
    - Independent normal values of deviation s have the norm s (sqrt(inputs) + sqrt(outputs)), and Muon's update, all
      of whose singular values are alike and whose root mean square is 0.2, the norm 0.2 sqrt(max(inputs, outputs)):
      both are multiplied by sqrt(base / inputs min(1, outputs / inputs)).
    - AdamW's update has entries near one and few directions, and a norm of sqrt(inputs outputs): base / inputs.

    That is the maximal update parametrization (Yang et al. 2022, "Tensor Programs V", table 3): routers, whose outputs
    are few, follow from it as well. Weights without inputs (embeddings, which are heads too, norms, biases) keep both
    factors at 1; the multiplier that heads need, base / hidden_size, is in the scale of the norm before them
    (`ModelConfig.head_multiplier`), where a tied embedding has its full size and no head has to know of it.

    Args:
        shape, axes, inputs: as of `Module.weight`.
        base: inputs at which nothing changes for a square matrix; 0 for factors of 1.
    """
    own = [size for size, axis in zip(shape, axes, strict=True) if axis not in STACKED]
    if not base or not inputs:
        return 1.0, 1.0
    into, out = math.prod(own[:inputs]), math.prod(own[inputs:])
    return math.sqrt(base / into * min(1.0, out / into)), base / into


def looked_up(table: jax.Array, tokens: jax.Array, axes: Axes, dtype: jnp.dtype) -> jax.Array:
    """Rows of a float32 table with those logical axes, in `dtype`: tokens [...] -> [..., width].

    The table crosses the network in that dtype, but its gradient is summed in float32: left to itself, a lookup in a
    table that was cast adds up the rows' gradients in the dtype of the cast.
    """
    lookup = jax.custom_vjp(lambda table, tokens: gathered(table.astype(dtype), axes)[tokens])

    def backward(tokens: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
        rows = jnp.zeros(table.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
        return constrain(rows, *axes), None

    lookup.defvjp(lambda table, tokens: (lookup(table, tokens), tokens), backward)
    return lookup(table, tokens)


def adapted(weight: Any, a: Any, b: Any, stacked: int, config: ModelConfig) -> jax.Array:
    """W + alpha / r A B (Hu et al. 2021, equation 3); the `stacked` first dimensions stack independent weights.

    Args:
        weight: [stack..., inputs..., outputs...]; a: [stack..., inputs..., r]; b: [stack..., r, outputs...]; float32.
    """
    stack = tuple(range(stacked))
    product = jax.lax.dot_general(a, b, (((a.ndim - 1,), (stacked,)), (stack, stack)))
    return weight + config.lora_alpha / config.lora_rank * product


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in float32 (Zhang and Sennrich 2019, eq. 4)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def yarn_magnitude(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 m ln(s) + 1 (Peng et al. 2023, eq. 22, with DeepSeek's multiplier m)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_frequencies(config: ModelConfig) -> jax.Array:
    """Angular frequency of each rotated pair, float32 [rope_dim / 2], in radians a token.

    Without YaRN theta^(-2i/d) (Su et al. 2021, section 3.2.2). With it, "NTK by parts" (Peng et al. 2023, section 3.2):
    pairs that turn more than beta_fast times over the original context keep their frequency, those that turn fewer than
    beta_slow times are slowed by the factor, and a linear ramp over the pair index joins them, as in DeepSeek-V3.
    """
    dim = config.rope_dim
    plain = config.rope_theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if config.rope_factor <= 1:
        return plain

    def pair_that_turns(times: float) -> float:
        length = config.original_max_position_embeddings
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(config.rope_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.rope_beta_slow)), dim - 1)
    ramp = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / max(high - low, 0.001), 0, 1)
    return plain / config.rope_factor * ramp + plain * (1 - ramp)


def rotate(x: jax.Array, positions: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotates pairs (i, i + d/2) of the last axis by position; x [B, T, ..., rope_dim], positions int32 [B, T]."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(config)[None, None]
    scale = yarn_magnitude(config.rope_factor, config.rope_mscale)
    scale /= yarn_magnitude(config.rope_factor, config.rope_mscale_all_dim)
    shape = angles.shape[:2] + (1,) * (x.ndim - 3) + angles.shape[2:]
    cos, sin = (jnp.cos(angles) * scale).reshape(shape), (jnp.sin(angles) * scale).reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def softmax_scale(config: ModelConfig) -> float:
    """1 / sqrt(head width), times YaRN's magnitude squared where YaRN is on (DeepSeek-V3 applies it to both sides)."""
    scale = config.qk_head_dim**-0.5
    if config.attention == 'mla' and config.rope_mscale_all_dim:
        scale *= yarn_magnitude(config.rope_factor, config.rope_mscale_all_dim) ** 2
    return scale


@jax.custom_vjp
def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., D] @ weight [D, F], with its weight gradient as x^T g rather than JAX's (g^T x)^T.

    Where g comes out of an activation function XLA:CPU fuses that into the transposition, and computes its exponentials
    one by one down the columns; x is at hand.
    """
    return x @ weight


def _project_forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ weight, (x, weight)


def _project_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    return gradient @ weight.T, jnp.einsum('...d,...f->df', x, gradient)


project.defvjp(_project_forward, _project_backward)


class FeedForward(Module):
    """Gated feed-forward, down(silu(gate x) * up x) (Shazeer 2020, "SwiGLU")."""

    width: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, hidden_size] -> the same shape."""
        hidden = self.config.hidden_size
        gate = self.weight('gate_proj', (hidden, self.width), ('embed', 'mlp'))
        up = self.weight('up_proj', (hidden, self.width), ('embed', 'mlp'))
        down = self.weight('down_proj', (self.width, hidden), ('mlp', 'embed'))
        inner = jax.nn.silu(project(x, gate)) * project(x, up)
        return constrain(inner, 'batch', 'length', 'mlp') @ down
