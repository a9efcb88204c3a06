"""From hidden states to what objectives may see: log-probabilities and entropies, in chunks, never whole logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from model.sharding import gathered, per_device, splits

Statistics = dict[str, jax.Array]


class Split(NamedTuple):
    """How a device scores its tokens.

    Attributes:
        chunk: tokens whose logits exist at one time.
        vocabulary: the mesh axis that splits the rows of the head, () where all of them are here.
        storage: the mesh axes over which its columns are stored in parts.
    """

    chunk: int
    vocabulary: tuple[str, ...]
    storage: tuple[str, ...]


HEAD = ('vocab', 'embed')  # logical axes of a head as it is stored
TOKEN = ('batch', 'length', None)  # and of arrays over tokens


def score(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array | float, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores target tokens under softmax(hidden . head / temperature), `chunk` tokens of logits a device at a time.

    The backward pass computes a chunk's logits again, so that those of one chunk are all that ever exist. Each device
    takes its own tokens, and its part of the vocabulary where that is split; the head is gathered in the dtype of
    `hidden`, and its gradient summed over chunks and devices in its own.

    Args:
        hidden: [B, T, D]; head: [V, D]; targets: int32 [B, T, K]; chunk: tokens.

    Returns:
        float32 [B, T, K] log-probabilities of the targets; [B, T, 1] each, entropy in nats and log partition function.
        Entropy and temperature carry no gradient.
    """
    own = functools.partial(_score, split=_split(head, chunk))
    return per_device(own, (TOKEN, HEAD, TOKEN, ()), (2, 2, 2))(hidden, head, targets, jnp.float32(temperature))


def most_probable(
    hidden: jax.Array, head: jax.Array, temperature: jax.Array | float, chunk: int, k: int
) -> tuple[jax.Array, jax.Array]:
    """The k tokens to which softmax(hidden . head / temperature) gives most, best first, chunked as in `score`.

    Returns:
        int32 [B, T, k] and their log-probabilities, float32 [B, T, k], without gradient.
    """
    split = _split(head, chunk)

    def own(hidden: jax.Array, head: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = _whole(head, hidden.dtype, split)

        def one(_: None, x: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
            best, ids = lax.top_k(_logits(x, whole, temperature), min(k, head.shape[0]))
            if split.vocabulary:  # the best of each device's best
                ids = ids + lax.axis_index(split.vocabulary) * head.shape[0]
                best, ids = (lax.all_gather(y, split.vocabulary, axis=2, tiled=True) for y in (best, ids))
                ids = jnp.take_along_axis(ids, lax.top_k(best, k)[1], axis=-1)
            return None, (ids, _score_chunk(x, whole, ids, temperature, split)[0])

        return _over_chunks(one, None, hidden, split.chunk)[1]

    given = lax.stop_gradient((hidden, head, jnp.float32(temperature)))
    return per_device(own, (TOKEN, HEAD, ()), (0, 0))(*given)


def _split(head: jax.Array, chunk: int) -> Split:
    return Split(chunk, splits('vocab', head.shape[0]), splits('embed', head.shape[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _score(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array, split: Split
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`score` of one device's tokens, with its part of the head."""
    whole = _whole(head, hidden.dtype, split)

    def one(_: None, x: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, ...]]:
        return None, _score_chunk(x[0], whole, x[1], temperature, split)

    return _over_chunks(one, None, (hidden, targets), split.chunk)[1]


def _over_chunks(
    function: Callable[[Any, Any], tuple[Any, Any]], start: Any, arrays: Any, chunk: int, reverse: bool = False
) -> tuple[Any, Any]:
    """`lax.scan` over chunks of tokens, which are spans of columns, of arrays [B, T, ...]; alike arrays come out."""
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    span = max(1, min(length, chunk // batch))
    while length % span:
        span -= 1
    if span == length:
        return function(start, arrays)
    parts = jax.tree.map(lambda x: x.reshape(batch, -1, span, *x.shape[2:]).swapaxes(0, 1), arrays)
    end, out = lax.scan(function, start, parts, reverse=reverse)
    return end, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, length, *x.shape[3:]), out)


def _whole(head: jax.Array, dtype: Any, split: Split) -> jax.Array:
    """All columns of a head, in the dtype it is used in."""
    head = head.astype(dtype)
    return lax.all_gather(head, split.storage, axis=1, tiled=True) if split.storage else head


def _logits(hidden: jax.Array, head: jax.Array, temperature: jax.Array | float) -> jax.Array:
    return jnp.einsum('btd,vd->btv', hidden, head, preferred_element_type=jnp.float32) / temperature


def _score_chunk(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array, split: Split
) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits = _logits(hidden, head, temperature)
    largest = logits.max(-1, keepdims=True)
    if split.vocabulary:
        largest = lax.pmax(largest, split.vocabulary)
    shifted = logits - largest
    weights = jnp.exp(shifted)
    total = _summed(weights.sum(-1, keepdims=True), split.vocabulary)
    logsum = jnp.log(total)
    if split.vocabulary:
        targets = targets - lax.axis_index(split.vocabulary) * head.shape[0]
    here = (targets >= 0) & (targets < head.shape[0])
    picked = jnp.take_along_axis(shifted, jnp.where(here, targets, 0), axis=-1)
    picked = _summed(jnp.where(here, picked, 0.0), split.vocabulary)
    # Entropy: -sum p log p with log p = shifted - logsum.
    entropy = logsum - _summed(jnp.sum(weights * shifted, axis=-1, keepdims=True), split.vocabulary) / total
    return picked - logsum, entropy, logsum + largest


def _summed(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.psum(x, axes) if axes else x


def _score_forward(hidden: Any, head: Any, targets: Any, temperature: Any, split: Split) -> tuple[Any, tuple[Any, ...]]:
    out = _score(hidden, head, targets, temperature, split)
    return out, (hidden, head, targets, temperature, out[2])


def _score_backward(
    split: Split, saved: tuple[Any, ...], gradients: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[Any, ...]:
    """Logits again, and one pass over them: probability * (d partition - d logprob), plus d logprob at the targets."""
    hidden, head, targets, temperature, partition = saved
    whole = _whole(head, hidden.dtype, split)
    first = lax.axis_index(split.vocabulary) * head.shape[0] if split.vocabulary else 0
    # The results are the same on all devices that split the vocabulary: each has a share of their gradient.
    d_logprob, _, d_partition = (_summed(x, split.vocabulary) for x in gradients)

    def one(total: jax.Array | float, x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, partition, d_logprob, d_partition = x
        probability = jnp.exp(_logits(hidden, whole, temperature) - partition)
        at_target = (jnp.arange(head.shape[0]) + first)[None, None, None] == targets[..., None]
        d_targets = jnp.where(at_target, d_logprob[..., None], 0.0).sum(2)
        d_logits = (probability * (d_partition - d_logprob.sum(-1, keepdims=True)) + d_targets) / temperature
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum('btv,vd->btd', d_logits, whole)
        # As the transpose of what is wanted: it is the small factor that XLA:CPU then has to transpose.
        return total + jnp.einsum('btd,btv->dv', hidden, d_logits, preferred_element_type=jnp.float32).T, d_hidden

    zero = jnp.zeros(whole.shape, jnp.float32)
    arrays = (hidden, targets, partition, d_logprob, d_partition)
    d_head, d_hidden = _over_chunks(one, zero, arrays, split.chunk, reverse=True)
    if split.storage:
        d_head = lax.psum_scatter(d_head, split.storage, scatter_dimension=1, tiled=True)
    return d_hidden, d_head.astype(head.dtype), None, jnp.zeros_like(temperature)


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
        head: [V, D], the language head (the embedding, where tied), as it is stored.
        tokens, segments: int32 [B, T], what was read.
        temperature: float32 scalar that divides the logits.
        statistics: of the expert layers, stacked [layers, ...] (see `experts.MixtureOfExperts`); empty if dense.
        entries: what the tokens add to the cache, stacked [layers, B, T, ...].
        chunk: tokens whose logits exist at one time.
        value_head: float32 [D], None where the model has none.
        largest_logits: of attention, by the paths of layers, float32 [layers, heads]; None where nobody asked.
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
    value_head: jax.Array | None = None
    largest_logits: Any = None

    @property
    def logits(self) -> jax.Array:
        """float32 [B, T, V]; at token t they predict token t + 1. For sampling and inspection, not for losses."""
        return _logits(self.hidden, gathered(self.head, HEAD).astype(self.hidden.dtype), self.temperature)

    @property
    def expert_ids(self) -> jax.Array:
        """int32 [B, T, layers, k]: the experts each token chose, in the trunk's layers that have experts."""
        ids = self.statistics['expert_ids']
        return jnp.moveaxis(ids[: len(ids) - len(self.multi_token)], 0, 2)

    @property
    def value(self) -> jax.Array:
        """float32 [B, T]: the value head's number for the tokens up to token t, itself included.

        Raises:
            ValueError: the model has no value head.
        """
        if self.value_head is None:
            raise ValueError('model.value_head is False: expected True, for what reads values')
        return jnp.einsum('btd,d->bt', self.hidden.astype(jnp.float32), self.value_head)

    def _aligned(self, x: jax.Array, distance: int) -> jax.Array:
        """What [B, T, ...] said of the token `distance` places on, at that token; 0 where it began a segment."""
        same = same_segment(self.segments, distance)
        return jnp.where(same.reshape(*same.shape, *(1 for _ in x.shape[2:])), jnp.roll(x, distance, axis=1), 0)

    def _predictions(self, hidden: jax.Array, distance: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        targets = jnp.roll(self.tokens, -distance, axis=1)[..., None]
        scores = score(hidden, self.head, targets, self.temperature, self.chunk)
        logprob, entropy, partition = (self._aligned(x[..., 0], distance) for x in scores)
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

    @property
    def likeliest(self) -> jax.Array:
        """int32 [B, T]: the most probable token in the place of token t; 0 at the first token of a segment."""
        return self.top(1)[0][..., 0]

    def logprob_of(self, ids: jax.Array) -> jax.Array:
        """float32 [B, T, K]: log-probabilities of tokens int32 [B, T, K] in the place of token t, as `logprob`."""
        targets = jnp.roll(ids, -1, axis=1)
        return self._aligned(score(self.hidden, self.head, targets, self.temperature, self.chunk)[0], 1)

    def top(self, k: int) -> tuple[jax.Array, jax.Array]:
        """The k most probable tokens in the place of token t, best first, and their log-probabilities: int32 and
        float32 [B, T, k]; 0 at the first token of a segment. They carry no gradient."""
        ids, logprobs = most_probable(self.hidden, self.head, self.temperature, self.chunk, k)
        return self._aligned(ids, 1), self._aligned(logprobs, 1)
