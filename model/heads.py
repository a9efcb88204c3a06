"""From hidden states to what objectives may see: log-probabilities and entropies, in chunks, never whole logits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from model.sharding import per_device, splits

Statistics = dict[str, jax.Array]


def score(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array | float, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores target tokens under softmax(hidden . head / temperature), `chunk` tokens of logits a device at a time.

    The backward pass computes a chunk's logits again, so that those of one chunk are all that ever exist. Each device
    takes its own tokens, and its part of the vocabulary where that is split; the head's gradient is summed over chunks
    and devices in the dtype of the head.

    Args:
        hidden: [B, T, D]; head: [V, D]; targets: int32 [B, T]; chunk: tokens.

    Returns:
        float32 [B, T] each: log-probability of the target, entropy in nats, log partition function. Entropy and
        temperature carry no gradient.
    """
    own = functools.partial(_score_chunks, chunk=chunk, vocabulary=splits('vocab', head.shape[0]))
    axes = (('batch', 'length', None), ('vocab', None), ('batch', 'length'), ())
    return per_device(own, axes, (2, 2, 2))(hidden, head, targets, jnp.asarray(temperature, jnp.float32))


def _score_chunks(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: jax.Array,
    chunk: int,
    vocabulary: tuple[str, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`score` of one device's tokens; a chunk is a span of columns."""
    batch, length, width = hidden.shape
    span = max(1, min(length, chunk // batch))
    while length % span:
        span -= 1
    if span == length:
        return _score(hidden, head, targets, temperature, vocabulary)

    def step(_: None, x: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array, jax.Array]]:
        return None, _score(x[0], head, x[1], temperature, vocabulary)

    columns = hidden.reshape(batch, length // span, span, width).swapaxes(0, 1)
    _, out = lax.scan(step, None, (columns, targets.reshape(batch, length // span, span).swapaxes(0, 1)))
    logprob, entropy, partition = (x.swapaxes(0, 1).reshape(batch, length) for x in out)
    return logprob, entropy, partition


def _logits(hidden: jax.Array, head: jax.Array, temperature: jax.Array | float) -> jax.Array:
    head = head.astype(hidden.dtype)
    return jnp.einsum('btd,vd->btv', hidden, head, preferred_element_type=jnp.float32) / temperature


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _score(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: jax.Array | float,
    vocabulary: tuple[str, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`vocabulary`: the mesh axis that splits the rows of the head, () where all of them are here."""
    logits = _logits(hidden, head, temperature)
    largest = logits.max(-1, keepdims=True)
    if vocabulary:
        largest = lax.pmax(largest, vocabulary)
    shifted = logits - largest
    weights = jnp.exp(shifted)
    total = _summed(weights.sum(-1), vocabulary)
    logsum = jnp.log(total)
    if vocabulary:
        targets = targets - lax.axis_index(vocabulary) * head.shape[0]
    here = (targets >= 0) & (targets < head.shape[0])
    picked = jnp.take_along_axis(shifted, jnp.where(here, targets, 0)[..., None], axis=-1)[..., 0]
    picked = _summed(jnp.where(here, picked, 0.0), vocabulary)
    # Entropy: -sum p log p with log p = shifted - logsum.
    entropy = logsum - _summed(jnp.sum(weights * shifted, axis=-1), vocabulary) / total
    return picked - logsum, entropy, logsum + largest[..., 0]


def _summed(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.psum(x, axes) if axes else x


def _score_forward(
    hidden: Any, head: Any, targets: Any, temperature: Any, vocabulary: tuple[str, ...]
) -> tuple[Any, tuple[Any, ...]]:
    out = _score(hidden, head, targets, temperature, vocabulary)
    return out, (hidden, head, targets, temperature, out[2])


def _score_backward(
    vocabulary: tuple[str, ...], saved: tuple[Any, ...], gradients: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[Any, ...]:
    """Logits again, and one pass over them: probability * (d partition - d logprob), plus d logprob at the target."""
    hidden, head, targets, temperature, partition = saved
    # The results are the same on all devices that split the vocabulary: each has a share of their gradient.
    d_logprob, _, d_partition = (_summed(x, vocabulary)[..., None] for x in gradients)
    probability = jnp.exp(_logits(hidden, head, temperature) - partition[..., None])
    first = lax.axis_index(vocabulary) * head.shape[0] if vocabulary else 0
    at_target = (jnp.arange(head.shape[0]) + first)[None, None] == targets[..., None]
    d_logits = (probability * (d_partition - d_logprob) + jnp.where(at_target, d_logprob, 0.0)) / temperature
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jnp.einsum('btv,vd->btd', d_logits, head.astype(hidden.dtype))
    # As the transpose of what is wanted: it is the small factor that XLA:CPU then has to transpose.
    d_head = jnp.einsum('btd,btv->dv', hidden, d_logits, preferred_element_type=jnp.float32).T.astype(head.dtype)
    return d_hidden, d_head, None, jnp.zeros_like(temperature)


_score.defvjp(_score_forward, _score_backward)


def same_segment(segments: jax.Array, distance: int) -> jax.Array:
    """bool [B, T]: whether token t and token t - distance stand in one segment, and not in padding."""
    earlier = jnp.pad(segments, ((0, 0), (distance, 0)))[:, : segments.shape[1]]
    return (segments == earlier) & (segments > 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Output:
    """What a forward pass gives. Per-token results are aligned with the token they speak of.

    Attributes:
        hidden: normed last states [B, T, D].
        multi_token: normed states of the multi-token modules, [B, T, D] each; those of module k (from 1) at token t
            predict token t + k + 1.
        head: [V, D], the language head (the embedding, where tied), in the dtype its gradient is summed in.
        tokens, segments: int32 [B, T], what was read.
        temperature: float32 scalar that divides the logits.
        statistics: of the expert layers, stacked [layers, ...] (see `experts.MixtureOfExperts`); empty if dense.
        entries: what the tokens add to the cache, stacked [layers, B, T, ...].
        chunk: tokens whose logits exist at one time.
    """

    hidden: jax.Array
    multi_token: tuple[jax.Array, ...]
    head: jax.Array
    tokens: jax.Array
    segments: jax.Array
    temperature: jax.Array
    statistics: Statistics
    entries: dict[str, jax.Array]
    chunk: int = dataclasses.field(metadata={'static': True})

    @property
    def logits(self) -> jax.Array:
        """float32 [B, T, V]; at token t they predict token t + 1. For sampling and inspection, not for losses."""
        return _logits(self.hidden, self.head, self.temperature)

    @property
    def expert_ids(self) -> jax.Array:
        """int32 [B, T, layers, k]: the experts each token chose, in the layers that have experts."""
        return jnp.moveaxis(self.statistics['expert_ids'], 0, 2)

    def _predictions(self, hidden: jax.Array, distance: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        targets = jnp.roll(self.tokens, -distance, axis=1)
        same = same_segment(self.segments, distance)
        scores = score(hidden, self.head, targets, self.temperature, self.chunk)
        logprob, entropy, partition = (jnp.where(same, jnp.roll(x, distance, axis=1), 0.0) for x in scores)
        return logprob, entropy, partition

    @functools.cached_property
    def _next(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self._predictions(self.hidden, 1)

    @property
    def logprob(self) -> jax.Array:
        """float32 [B, T]: log-probability of token t given those before it; 0 at the first token of a segment."""
        return self._next[0]

    @property
    def entropy(self) -> jax.Array:
        """float32 [B, T]: entropy, in nats, of the distribution token t was drawn from; carries no gradient."""
        return self._next[1]

    @property
    def log_partition(self) -> jax.Array:
        """float32 [B, T]: log of the partition function of the distribution of token t, for the z-loss."""
        return self._next[2]

    @functools.cached_property
    def multi_token_logprob(self) -> tuple[jax.Array, ...]:
        """For each multi-token module k: float32 [B, T], log-probability of token t predicted from t - k - 1."""
        return tuple(self._predictions(h, k + 2)[0] for k, h in enumerate(self.multi_token))
