"""Attention: multi-head latent attention, grouped-query attention as the alternative, the masked softmax of both."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from model.backend import platform
from model.cache import Entries
from model.layers import Module, rotate, softmax_scale
from model.sharding import constrain, mesh_in_use, partition_spec, per_device, splits
from model.splash import splash_attention

MASKED = -1e30  # finite, so that a row with nothing to attend to gives no NaN
LATENT_EPSILON = 1e-6  # of the latents' norms, whatever rms_norm_eps is: so it is in every published model of this kind


# Logical axes of arrays over tokens [B, T, D], and over tokens and heads [B, T, H, D].
TOKENS, HEADS = ('batch', 'length', None), ('batch', 'length', 'heads', None)
LARGEST = 'largest_logits'  # the collection in which layers leave what QK-clip has to know, for those who ask for it


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: tuple[jax.Array, jax.Array],
    scale: float,
    along: tuple[str, ...] = (),
) -> jax.Array:
    """Causal attention within segments.

    Args:
        query: [B, T, H, D]; key: [B, S, G, D]; value: [B, S, G, V]; G divides H, H / G query heads share a key head.
        segments: int32 [B, T] of the queries and [B, S] of the keys; tokens see earlier tokens of their own segment
            alone.
        scale: factor on the logits.
        along: the mesh axis over which the length is split: the queries are then this device's T of all S tokens. ():
            they are all there are, and S is T.

    Returns:
        [B, T, H, V] in the dtype of `value`; the softmax is in float32.
    """
    batch, length, heads, width = query.shape
    query = query * scale
    if platform() == 'tpu' and length % 128 == 0:
        return splash_attention(query, key, value, segments, along)
    grouped = query.reshape(batch, length, key.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    offset = lax.axis_index(along) * length if along else None
    mixed = _attend(grouped, key.swapaxes(1, 2), value.swapaxes(1, 2), segments, offset)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def largest_logits(
    query: jax.Array,
    key: jax.Array,
    segments: tuple[jax.Array, jax.Array],
    scale: float,
    along: tuple[str, ...],
    over: tuple[str, ...],
) -> jax.Array:
    """The largest logit of each head over the pairs of tokens in which one sees the other: float32 [H].

    Arguments as of `attend`, and `over`: the mesh axes over which rows and queries are split. No gradient comes of it.
    No kernel of attention tells this number, so all logits are computed a second time.
    """
    grouped = lax.stop_gradient(query * scale).reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    grouped, key = grouped.transpose(0, 2, 3, 1, 4), lax.stop_gradient(key).swapaxes(1, 2)
    seen = (jnp.where(segments[0] > 0, segments[0], -1), segments[1])  # padding sees nothing here
    offset = lax.axis_index(along) * query.shape[1] if along else None
    found = []
    for chunk in _chunks(query.shape[1], offset, key.shape[2]):
        logits = _logits(grouped, key, seen, offset, chunk)
        found.append(logits.reshape(*grouped.shape[:3], -1, chunk[2]).max((0, 3, 4)))
    largest = functools.reduce(jnp.maximum, found).reshape(-1)
    return lax.pmax(largest, over) if over else largest


# The way without a kernel. Queries are taken in chunks, each against the keys up to its own end, so that much of the
# masked upper half of the logits is never computed (where the place of the queries is known only when the program
# runs, each chunk takes all keys). The backward pass has the outputs and the log of each softmax's sum to go by and
# computes the weights again (Dao et al. 2022, section 3.1): memory grows linearly in length.
# Heads stand before tokens, so that no quadratic array needs transposing: query [B, G, N, T, D], where N query heads
# share each of G key heads; key [B, G, S, D]; value [B, G, S, V].


def _chunks(length: int, offset: jax.Array | None, keys: int) -> list[tuple[int, int, int]]:
    """Start and end of each chunk of queries, and how many keys it may see at most."""
    size = 128 if length <= 512 else 256  # smaller ones skip more of the masked half, larger ones are fewer
    ends = [(start, min(start + size, length)) for start in range(0, length, size)]
    return [(start, end, end if offset is None else keys) for start, end in ends]


def _logits(
    query: jax.Array,
    key: jax.Array,
    segments: tuple[jax.Array, jax.Array],
    offset: jax.Array | None,
    chunk: tuple[int, int, int],
) -> jax.Array:
    """Masked logits of a chunk of queries against the keys it may see: [B, G, N * (end - start), keys]."""
    start, end, seen = chunk
    shared = query.shape[2]
    logits = _product('bgtd,bgsd->bgts', _rows(query, start, end), key[:, :, :seen])
    place = jnp.arange(start, end)[:, None] + (0 if offset is None else offset)
    causal = jnp.arange(seen)[None, :] <= place
    mask = causal[None] & (segments[0][:, start:end, None] == segments[1][:, None, :seen])
    return jnp.where(jnp.tile(mask, (1, shared, 1))[:, None], logits, MASKED)


def _rows(x: jax.Array, start: int, end: int) -> jax.Array:
    """Tokens `start` to `end` of the query heads that share a key head, one below the other: [B, G, N * tokens, D]."""
    return x[:, :, :, start:end].reshape(*x.shape[:2], -1, x.shape[-1])


def _joined(pieces: list[jax.Array], shared: int) -> jax.Array:
    """What `_rows` took apart."""
    return jnp.concatenate([x.reshape(*x.shape[:2], shared, -1, x.shape[-1]) for x in pieces], axis=3)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attend(query: jax.Array, key: jax.Array, value: jax.Array, segments: Any, offset: jax.Array | None) -> jax.Array:
    return _attend_forward(query, key, value, segments, offset)[0]


def _attend_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: Any, offset: jax.Array | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    mixed, logsums = [], []
    for chunk in _chunks(query.shape[3], offset, key.shape[2]):
        logits = _logits(query, key, segments, offset, chunk)
        largest = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(-1, keepdims=True)
        out = _product('bgts,bgsv->bgtv', weights.astype(value.dtype), value[:, :, : chunk[2]])
        mixed.append((out / total).astype(value.dtype))
        logsums.append(largest + jnp.log(total))
    output = _joined(mixed, query.shape[2])
    return output, (query, key, value, segments, offset, output, _joined(logsums, query.shape[2]))


def _attend_backward(saved: tuple[Any, ...], gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    query, key, value, segments, offset, output, logsums = saved
    through = jnp.sum(gradient.astype(jnp.float32) * output, axis=-1, keepdims=True)
    d_query = []
    # Transposed, [B, G, D, S]: so the quadratic arrays enter their products as they lie.
    d_key = jnp.zeros(key.swapaxes(2, 3).shape, jnp.float32)
    d_value = jnp.zeros(value.swapaxes(2, 3).shape, jnp.float32)
    for chunk in _chunks(query.shape[3], offset, key.shape[2]):
        start, end, seen = chunk
        weights = jnp.exp(_logits(query, key, segments, offset, chunk) - _rows(logsums, start, end))
        d_mixed = _rows(gradient, start, end)
        d_weights = _product('bgtv,bgsv->bgts', d_mixed, value[:, :, :seen])
        d_logits = (weights * (d_weights - _rows(through, start, end))).astype(key.dtype)
        d_query.append(_product('bgts,bgsd->bgtd', d_logits, key[:, :, :seen]).astype(query.dtype))
        d_key = d_key.at[..., :seen].add(_product('bgtd,bgts->bgds', _rows(query, start, end), d_logits))
        d_value = d_value.at[..., :seen].add(_product('bgtv,bgts->bgvs', d_mixed, weights.astype(value.dtype)))
    d_key, d_value = d_key.swapaxes(2, 3).astype(key.dtype), d_value.swapaxes(2, 3).astype(value.dtype)
    return _joined(d_query, query.shape[2]), d_key, d_value, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_cached(
    query: jax.Array, cached: jax.Array, new: jax.Array, valid: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Attention weights of one new token a row over the cached tokens and itself.

    The new token's entry is not in the cache yet: layers only read the cache, which is written once for all of them.

    Args:
        query: [B, G, N, D] (N query heads share each of G key heads); cached: [B, S, G, D]; new: [B, G, D].
        valid: bool [B, S], which cache slots the row may see.

    Returns:
        Weights [B, G, N, S] on the cached tokens and [B, G, N, 1] on the new one, float32.
    """
    # The cache stands on the left, as it lies: the other way around it would be transposed for every token.
    past = jnp.einsum('bsgd,bgnd->bgsn', cached, query, preferred_element_type=jnp.float32).swapaxes(2, 3) * scale
    present = jnp.einsum('bgnd,bgd->bgn', query, new, preferred_element_type=jnp.float32)[..., None] * scale
    logits = jnp.concatenate([jnp.where(valid[:, None, None], past, MASKED), present], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)
    return weights[..., :-1], weights[..., -1:]


class Attention(Module):
    """What both kinds share: attention on each device and, where it is asked for, the largest logit of each head."""

    @property
    def asked(self) -> bool:
        return self.is_mutable_collection(LARGEST) and not self.is_initializing()

    @property
    def over(self) -> tuple[str, ...] | None:
        """The mesh axes that split no heads, None if nobody asks."""
        split = splits('heads', self.config.num_attention_heads)
        return tuple(a for a, size in mesh_in_use().items() if size > 1 and a not in split) if self.asked else None

    @property
    def by_head(self) -> PartitionSpec | None:
        """How what is known of each head is split over the mesh."""
        heads = self.config.num_attention_heads
        return partition_spec((heads,), ('heads',), mesh_in_use()) if self.asked and mesh_in_use() else None

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segments: tuple[jax.Array, jax.Array],
        along: tuple[str, ...],
        over: tuple[str, ...] | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """What each device makes of its share: `attend`, and `largest_logits` unless `over` is None."""
        scale = softmax_scale(self.config)
        mixed = attend(query, key, value, segments, scale, along)
        return mixed, None if over is None else largest_logits(query, key, segments, scale, along, over)

    def leave(self, largest: jax.Array | None) -> None:
        if largest is not None:
            self.sow(LARGEST, 'heads', largest, reduce_fn=lambda _, x: x, init_fn=lambda: None)


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, section 2.1; equations 37 to 47 of its appendix).

    Keys and values of all heads are expanded from one normed latent of kv_lora_rank numbers, beside one rotated key
    shared by all heads. Decoding stays in the latent space: the expansion is absorbed into query and output.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, segments: jax.Array, cache: Entries | None, valid: jax.Array | None
    ) -> tuple[jax.Array, Entries]:
        """x [B, T, hidden_size] -> (output, entries {'latent': [B, T, kv_lora_rank + qk_rope_head_dim]}).

        With a cache {'latent': [B, S, ...]} and `valid` [B, S], T is 1: one decoding step.
        """
        c = self.config
        heads, nope, rank = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
        if c.q_lora_rank:
            low = x @ self.weight('q_a_proj', (c.hidden_size, c.q_lora_rank), ('embed', None))
            low = self.norm('q_a_layernorm', low, LATENT_EPSILON)
            q_up = self.weight('q_b_proj', (c.q_lora_rank, heads, c.qk_head_dim), ('embed', 'heads', None))
        else:
            low, q_up = x, self.weight('q_proj', (c.hidden_size, heads, c.qk_head_dim), ('embed', 'heads', None))
        query = constrain(jnp.einsum('btr,rhd->bthd', low, q_up), 'batch', 'length', 'heads', None)
        q_nope, q_rope = query[..., :nope], rotate(query[..., nope:], positions, c)

        down = x @ self.weight('kv_a_proj_with_mqa', (c.hidden_size, rank + c.qk_rope_head_dim), ('embed', None))
        latent = self.norm('kv_a_layernorm', down[..., :rank], LATENT_EPSILON)
        k_rope = rotate(down[..., rank:], positions, c)
        kv_up = self.weight('kv_b_proj', (rank, heads, nope + c.v_head_dim), ('embed', 'heads', None), cast=False)
        output = self.weight('o_proj', (heads, c.v_head_dim, c.hidden_size), ('heads', None, 'embed'), inputs=2)
        entries = {'latent': jnp.concatenate([latent, k_rope], axis=-1)}

        if cache is None:
            own = functools.partial(self._expand_and_attend, along=splits('length', x.shape[1]), over=self.over)
            mix = per_device(own, (HEADS, TOKENS, TOKENS, (None, 'heads', None), TOKENS[:2]), (0, self.by_head))
            mixed, largest = mix(jnp.concatenate([q_nope, q_rope], axis=-1), latent, k_rope, kv_up, segments)
            self.leave(largest)
        else:
            assert valid is not None
            kv_up = kv_up.astype(x.dtype)
            absorbed = jnp.einsum('bthd,rhd->bthr', q_nope, kv_up[..., :nope])
            query = jnp.concatenate([absorbed, q_rope], axis=-1)[
                :, 0, None
            ]  # one shared key head: [B, 1, H, rank+rope]
            new = entries['latent'][:, 0, None]
            past, present = attend_cached(query, cache['latent'][:, :, None], new, valid, softmax_scale(c))
            dtype = entries['latent'].dtype
            mixed = jnp.einsum('bgns,bsr->bnr', past.astype(dtype), cache['latent'])[..., :rank]
            mixed = mixed + present[:, 0].astype(dtype) * latent
            mixed = jnp.einsum('bhr,rhv->bhv', mixed, kv_up[..., nope:])[:, None]
        return jnp.einsum('bthv,hvm->btm', mixed, output), entries

    def _expand_and_attend(
        self,
        query: jax.Array,
        latent: jax.Array,
        k_rope: jax.Array,
        kv_up: jax.Array,
        segments: jax.Array,
        along: tuple[str, ...],
        over: tuple[str, ...] | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """One device's queries over all keys. Where the length is split, what the devices gather are the latents, some
        hundred numbers a token (a ring would hide no more than that behind its many steps); each expands them."""
        nope, keys = self.config.qk_nope_head_dim, segments
        if along:
            latent, k_rope, keys = (lax.all_gather(x, along, axis=1, tiled=True) for x in (latent, k_rope, segments))
        expanded = jnp.einsum('btr,rhd->bthd', latent, kv_up.astype(latent.dtype))
        shared = jnp.broadcast_to(k_rope[:, :, None], (*expanded.shape[:3], k_rope.shape[-1]))
        key = jnp.concatenate([expanded[..., :nope], shared], axis=-1)
        return self.attend(query, key, expanded[..., nope:], (segments, keys), along, over)


class GroupedQueryAttention(Attention):
    """Grouped-query attention (Ainslie et al. 2023); one key-value head is multi-query, as many as heads multi-head."""

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, segments: jax.Array, cache: Entries | None, valid: jax.Array | None
    ) -> tuple[jax.Array, Entries]:
        """As `LatentAttention`, with entries {'key', 'value'} of shape [B, T, num_key_value_heads, head_dim]."""
        c = self.config
        heads, groups, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim

        def project(name: str, count: int) -> jax.Array:
            weight = self.weight(name, (c.hidden_size, count, width), ('embed', 'heads', None))
            return constrain(jnp.einsum('btm,mhd->bthd', x, weight), 'batch', 'length', 'heads', None)

        query, key = rotate(project('q_proj', heads), positions, c), rotate(project('k_proj', groups), positions, c)
        value = project('v_proj', groups)
        output = self.weight('o_proj', (heads, width, c.hidden_size), ('heads', None, 'embed'), inputs=2)
        if cache is None:
            own = functools.partial(self._gather_and_attend, along=splits('length', x.shape[1]), over=self.over)
            mix = per_device(own, (HEADS, HEADS, HEADS, TOKENS[:2]), (0, self.by_head))
            mixed, largest = mix(query, key, value, segments)
            self.leave(largest)
        else:
            assert valid is not None
            grouped = query[:, 0].reshape(-1, groups, heads // groups, width)
            past, present = attend_cached(grouped, cache['key'], key[:, 0], valid, softmax_scale(c))
            mixed = jnp.einsum('bgns,bsgd->bgnd', past.astype(value.dtype), cache['value'])
            mixed = (mixed + present.astype(value.dtype) * value[:, 0, :, None]).reshape(-1, 1, heads, width)
        return jnp.einsum('bthv,hvm->btm', mixed, output), {'key': key, 'value': value}

    def _gather_and_attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segments: jax.Array,
        along: tuple[str, ...],
        over: tuple[str, ...] | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        keys = segments
        if along:
            key, value, keys = (lax.all_gather(x, along, axis=1, tiled=True) for x in (key, value, segments))
        return self.attend(query, key, value, (segments, keys), along, over)
