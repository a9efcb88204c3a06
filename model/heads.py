"""From hidden states to what objectives may see: log-probabilities and entropies, in chunks, never whole logits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Statistics = dict[str, jax.Array]


def score(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array | float, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores target tokens under softmax(hidden . head / temperature), `chunk` tokens of logits at a time.

    Rows stay whole (they are what a mesh shards); a chunk is a span of columns. The backward pass computes
    a chunk's logits again, so that those of one chunk are all that ever exists.

    Args:
        hidden: [B, T, D]; head: [V, D]; targets: int32 [B, T]; chunk: tokens.

    Returns:
        float32 [B, T] each: log-probability of the target, entropy in nats, log partition function. Entropy and
        temperature carry no gradient.
    """
    batch, length, width = hidden.shape
    span = max(1, min(length, chunk // batch))
    while length % span:
        span -= 1
    if span == length:
        return _score(hidden, head, targets, temperature)

    def step(_: None, x: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array, jax.Array]]:
        return None, _score(x[0], head, x[1], temperature)

    columns = hidden.reshape(batch, length // span, span, width).swapaxes(0, 1)
    _, out = lax.scan(step, None, (columns, targets.reshape(batch, length // span, span).swapaxes(0, 1)))
    logprob, entropy, partition = (x.swapaxes(0, 1).reshape(batch, length) for x in out)
    return logprob, entropy, partition


def _logits(hidden: jax.Array, head: jax.Array, temperature: jax.Array | float) -> jax.Array:
    return jnp.einsum('btd,vd->btv', hidden, head, preferred_element_type=jnp.float32) / temperature


@jax.custom_vjp
def _score(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array | float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits = _logits(hidden, head, temperature)
    largest = logits.max(-1, keepdims=True)
    shifted = logits - largest
    weights = jnp.exp(shifted)
    total = weights.sum(-1)
    logsum = jnp.log(total)
    picked = jnp.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    # Entropy: -sum p log p with log p = shifted - logsum.
    return picked - logsum, logsum - jnp.sum(weights * shifted, axis=-1) / total, logsum + largest[..., 0]


def _score_forward(hidden: Any, head: Any, targets: Any, temperature: Any) -> tuple[Any, tuple[Any, ...]]:
    out = _score(hidden, head, targets, temperature)
    return out, (hidden, head, targets, temperature, out[2])


def _score_backward(saved: tuple[Any, ...], gradients: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, ...]:
    """Logits again, and one pass over them: probability * (d partition - d logprob), plus d logprob at the target."""
    hidden, head, targets, temperature, partition = saved
    d_logprob, _, d_partition = (x[..., None] for x in gradients)
    probability = jnp.exp(_logits(hidden, head, temperature) - partition[..., None])
    at_target = jnp.arange(head.shape[0])[None, None] == targets[..., None]
    d_logits = (probability * (d_partition - d_logprob) + jnp.where(at_target, d_logprob, 0.0)) / temperature
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jnp.einsum('btv,vd->btd', d_logits, head)
    # As the transpose of what is wanted: it is the small factor that XLA:CPU then has to transpose.
    d_head = jnp.einsum('btd,btv->dv', hidden, d_logits).T
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
        head: [V, D], the language head (the embedding, where tied).
        tokens, segments: int32 [B, T], what was read.
        temperature: float32 scalar that divides the logits.
        statistics: of the expert layers, stacked [layers, ...] (see `experts.routing_statistics`); empty if dense.
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
