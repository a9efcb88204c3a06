"""The model: blocks, the scan over layers, multi-token prediction, initialisation, and its size and cost."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.attention import LARGEST, Entries, GroupedQueryAttention, LatentAttention
from model.cache import Cache
from model.config import ModelConfig
from model.experts import MixtureOfExperts, Statistics, updated_bias
from model.heads import HEAD, Output
from model.layers import Declared, FeedForward, Module, looked_up
from model.sharding import constrain, named_sharding

Variables = dict[str, Any]  # {'params': trained weights, 'balance': router biases}: plain dictionaries of arrays


class Block(Module):
    """Attention and a feed-forward (dense or experts), each behind a norm and added to the stream."""

    experts: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: Entries | None,
        chosen: jax.Array | None,
        positions: jax.Array,
        segments: jax.Array,
        valid: jax.Array | None,
    ) -> tuple[jax.Array, tuple[Entries, Statistics]]:
        c = self.config
        attention = LatentAttention if c.attention == 'mla' else GroupedQueryAttention
        h = self.norm('input_layernorm', x)
        mixed, entries = attention(c, name='self_attn')(h, positions, segments, cache, valid)
        x = x + mixed
        h = self.norm('post_attention_layernorm', x)
        statistics: Statistics = {}
        if self.experts:
            out, statistics = MixtureOfExperts(c, name='mlp')(h, segments, chosen)
        else:
            out = FeedForward(c, width=c.intermediate_size, name='mlp')(h)
        return constrain(x + out, 'batch', 'length', None), (entries, statistics)


def _policy(remat: str) -> Any:
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == 'dots' else None


class MultiTokenModule(Module):
    """One depth of multi-token prediction (DeepSeek-V3, equations 21 to 23): it reads what the head reads of the depth
    before it (behind that one's last norm, as the released weights expect) and the embedding of the token `depth`
    places ahead, and predicts the token after that one."""

    depth: int = 1

    @nn.compact
    def __call__(
        self, stream: jax.Array, embedded: jax.Array, positions: jax.Array, segments: jax.Array
    ) -> tuple[jax.Array, Statistics]:
        c = self.config
        ahead = jnp.roll(embedded, -self.depth, axis=1)
        joined = jnp.concatenate([self.norm('hnorm', stream), self.norm('enorm', ahead)], axis=-1)
        x = joined @ self.weight('eh_proj', (2 * c.hidden_size, c.hidden_size), (None, 'embed'))
        # What lies past the end of a segment must reach neither attention nor loads: it becomes padding.
        last = jnp.pad(segments, ((0, 0), (0, self.depth)))[:, self.depth :]
        segments = jnp.where(last == segments, segments, 0)
        block = nn.remat(Block, policy=_policy(c.remat)) if c.remat != 'none' else Block
        x, (_, statistics) = block(c, experts=c.is_moe, name='block')(x, None, None, positions, segments, None)
        return self.norm('norm', x, multiplier=c.head_multiplier), statistics


class Transformer(Module):
    """The whole network, as a Linen module. `Model` below is the door for everyone else."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        temperature: jax.Array,
        cache: Cache | None,
        valid: jax.Array | None,
        expert_ids: jax.Array | None,
        multi_token: bool,
    ) -> Output:
        c = self.config
        shape = (c.vocab_size, c.hidden_size)
        embedding = self.weight('embed_tokens', shape, HEAD, inputs=0, role='embedding', gather=False)
        embedded = constrain(looked_up(embedding, tokens, HEAD, jnp.dtype(c.dtype)), 'batch', 'length', None)
        head = embedding
        if not c.tie_word_embeddings:
            head = self.weight('lm_head', shape, HEAD, inputs=0, role='embedding', gather=False)

        if cache is None:
            x, entries, statistics = self.whole(embedded, expert_ids, positions, segments)
        else:
            x, entries, statistics = self.in_parts(embedded, cache, positions, segments, valid)
        hidden = self.norm('norm', x, multiplier=c.head_multiplier)
        value = None
        if c.value_head:
            value = self.weight('value_head', (c.hidden_size,), (None,), inputs=0, init='zeros', role='vector')

        ahead: list[jax.Array] = []
        stream = hidden
        for depth in range(1, c.num_nextn_predict_layers + 1) if multi_token else ():
            module = MultiTokenModule(c, depth=depth, name=f'multi_token_{depth}')
            stream, more = module(stream, embedded, positions, segments)
            ahead.append(stream)
            if c.is_moe:
                layer = {key: x[None] for key, x in more.items()}  # the trunk may have no expert layer of its own
                statistics = {
                    key: jnp.concatenate([statistics[key], x]) if statistics else x for key, x in layer.items()
                }
        modules = tuple(ahead)
        return Output(hidden, modules, head, tokens, segments, temperature, statistics, entries, c.head_chunk, value)

    def whole(
        self, x: jax.Array, expert_ids: jax.Array | None, positions: jax.Array, segments: jax.Array
    ) -> tuple[jax.Array, Entries, Statistics]:
        """All layers over tokens with none before them."""
        c, entries, statistics = self.config, [], {}
        chosen = None if expert_ids is None else jnp.moveaxis(expert_ids, 2, 0)
        for name, count, experts in (('dense_layers', c.num_dense_layers, False), ('layers', c.num_moe_layers, True)):
            if count:
                stack = _stack(c, count, c.remat)(c, experts=experts, name=name)
                x, (new, statistics) = stack(x, None, chosen if experts else None, positions, segments, None)
                entries.append(new)
        return x, _joined(entries), statistics

    def in_parts(
        self, x: jax.Array, cache: Cache, positions: jax.Array, segments: jax.Array, valid: jax.Array | None
    ) -> tuple[jax.Array, Entries, Statistics]:
        """All layers over one more token a row, part by part of the cache; weights are those of `Model.in_parts`."""
        entries, statistics = [], []
        weights, biases = self.variables['params'], self.variables['balance']
        for part, (name, _, count) in enumerate(layer_parts(self.config)):
            own = {'params': weights[name][part], 'balance': biases[name][part] if name in biases else {}}
            stack = _stack(self.config, count, 'none')(self.config, experts=name == 'layers', parent=None)
            x, (new, more) = stack.apply(own, x, cache[part], None, positions, segments, valid)
            entries.append(new)
            statistics += [more] if more else []
        return x, _joined(entries), _joined(statistics) if statistics else {}


def _stack(config: ModelConfig, count: int, remat: str) -> Any:
    """`count` blocks of one kind. Weights are stacked along a first axis, whether or not the layers are scanned."""
    block: Any = Block
    if remat != 'none':
        block = nn.remat(Block, prevent_cse=not config.scan_layers, policy=_policy(remat))
    return nn.scan(
        block,
        variable_axes={'params': 0, 'balance': 0, LARGEST: 0},
        split_rngs={'params': True},
        in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=count,
        unroll=1 if config.scan_layers else count,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )


def layer_parts(config: ModelConfig) -> list[tuple[str, int, int]]:
    """How decoding cuts the layers: stack, first layer within it and how many. A loop over layers takes a whole stack,
    without one each layer stands alone: its weights and its cache are then cut out once, and not at every token."""
    stacks = [('dense_layers', config.num_dense_layers), ('layers', config.num_moe_layers)]
    return [
        (name, first, total if config.scan_layers else 1)
        for name, total in stacks
        if total
        for first in range(0, total, total if config.scan_layers else 1)
    ]


def _joined(parts: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Parts of a stack of layers as one."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as pure functions of its variables."""

    config: ModelConfig

    def apply(
        self,
        variables: Variables,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        temperature: jax.Array | float = 1.0,
        cache: Cache | None = None,
        valid: jax.Array | None = None,
        multi_token: bool = False,
        expert_ids: jax.Array | None = None,
        largest_logits: bool = False,
    ) -> Output:
        """Runs the network.

        Args:
            variables: {'params', 'balance'}.
            tokens: int32 [B, T].
            positions: int32 [B, T]; counted from 0 along the row when absent.
            segments: int32 [B, T] document ids, 0 for padding; one document a row when absent.
            temperature: divides the logits.
            cache, valid: for a decoding step (T = 1): the cache of tokens read before, S slots (see `model.cache`), and
                which of them, bool [B, S], a row may see. The variables are then those of `in_parts`.
            multi_token: also run the multi-token modules (training does).
            expert_ids: int32 [B, T, layers, k], as `Output.expert_ids` gives them: the experts that tokens are sent to
                in the trunk, whatever its routers would choose, weighed by the routers' scores; -1 where a token is to
                choose as ever. Loads count what was used.
            largest_logits: also say of each head how large the logits of attention get (see `model.clip`).

        Raises:
            ValueError: tokens or expert_ids of another shape.
        """
        if tokens.ndim != 2:
            raise ValueError(f'tokens have shape {tokens.shape}: expected [batch, length]')
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        if segments is None:
            segments = jnp.ones_like(tokens)
        expected = (*tokens.shape, self.config.num_moe_layers, self.config.num_experts_per_tok)
        if expert_ids is not None and expert_ids.shape != expected:
            raise ValueError(f'expert_ids have shape {expert_ids.shape}: expected {expected}')
        given = (tokens, positions, segments, jnp.asarray(temperature, jnp.float32), cache, valid, expert_ids)
        if not largest_logits:
            return Transformer(self.config).apply(variables, *given, multi_token)  # type: ignore[return-value]
        output, left = Transformer(self.config).apply(variables, *given, multi_token, mutable=[LARGEST])
        return dataclasses.replace(output, largest_logits=left[LARGEST])  # type: ignore[type-var]

    def in_parts(self, variables: Variables) -> Variables:
        """The variables as decoding takes them, with the layers' cut along `layer_parts`."""
        parts = layer_parts(self.config)

        def cut(collection: Any) -> Any:
            stacks = {
                name: [
                    jax.tree.map(lambda x, first=first, count=count: x[first : first + count], collection[name])
                    if name == part
                    else None
                    for part, first, count in parts
                ]
                for name in collection
                if name in ('dense_layers', 'layers')
            }
            return {**collection, **stacks}

        return {name: cut(collection) for name, collection in variables.items()}

    @property
    def adapter(self) -> tuple[int, float]:
        """Rank and weight of the adapters."""
        return self.config.lora_rank, self.config.lora_alpha

    @property
    def paths(self) -> set[str]:
        """Of all variables, written with slashes."""
        found: list[str] = []
        subtree(self.declared, found.append)
        return set(found)

    @functools.cached_property
    def declared(self) -> Variables:
        """Each weight as `layers.Declared`, with a ShapeDtypeStruct for its value. Router biases are bare."""

        def init() -> Any:
            token = jnp.zeros((1, 1), jnp.int32)
            one = jnp.ones((), jnp.float32)
            return Transformer(self.config).init(jax.random.key(0), token, token, token, one, None, None, None, True)

        # Outside any mesh: the one token above does not divide among devices.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            shapes = jax.eval_shape(init)
        return {'params': shapes['params'], 'balance': shapes.get('balance', {})}

    def shapes(self, mesh: jax.sharding.Mesh) -> Variables:
        """The variables as ShapeDtypeStructs that carry their shardings on the mesh.

        Raises:
            ValueError: heads or experts do not divide among the devices.
        """
        c = self.config
        shares = [('num_attention_heads', 'tensor')]
        shares += [('num_key_value_heads', 'tensor')] if c.attention == 'gqa' else []
        shares += [('n_routed_experts', 'expert'), ('moe_intermediate_size', 'tensor')] if c.is_moe else []
        for field, axis in shares:
            if getattr(c, field) % mesh.shape[axis]:
                raise ValueError(
                    f'mesh.{axis} is {mesh.shape[axis]}: expected a divisor of {field}={getattr(c, field)}'
                )

        def leaf(x: Any) -> jax.ShapeDtypeStruct:
            value = x.value if is_declared(x) else x
            axes = x.axes if is_declared(x) else (None,) * x.ndim
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=named_sharding(mesh, value.shape, axes))

        return jax.tree.map(leaf, self.declared, is_leaf=is_declared)

    def init(self, seed: int, mesh: jax.sharding.Mesh, given: Variables | None = None) -> Variables:
        """Fresh variables, each made sharded where it will live, with a key folded from its path.

        Values depend on the seed and the config alone, not on the mesh. Those that are `given`, some or all, are taken
        as they are.
        """
        there = dict(jax.tree_util.tree_leaves_with_path(given or {}))

        def leaf(path: Any, x: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
            if path in there:
                return there[path]
            if not is_declared(x) or x.init == 'zeros':
                return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
            if x.init == 'ones':
                return jnp.full(shape.shape, x.scale, shape.dtype, device=shape.sharding)
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(jax.tree_util.keystr(path).encode()))
            return _normal(key, shape.shape, x.scale, shape.sharding)

        return jax.tree_util.tree_map_with_path(leaf, self.declared, self.shapes(mesh), is_leaf=is_declared)

    def updated_balance(self, balance: Any, load: jax.Array) -> Any:
        """Router biases after a step whose global expert loads were `load` [expert layers, E].

        Layers stand in the order of `Output.statistics`: the trunk's, then those of the multi-token modules.
        """
        if not balance:
            return balance
        trunk = self.config.num_moe_layers
        updated = {}
        for name, branch in balance.items():
            if name == 'layers':
                rows = load[:trunk]
            else:
                rows = load[trunk + int(name.rsplit('_', 1)[1]) - 1]
            updated[name] = jax.tree.map(lambda bias, rows=rows: updated_bias(bias, rows, self.config), branch)
        return updated

    @functools.cached_property
    def parameter_counts(self) -> dict[str, int]:
        """Parameters: 'total', and 'active' (those one token passes through; multi-token modules left out of it)."""
        c, total, active = self.config, 0, 0
        for path, x in jax.tree_util.tree_leaves_with_path(self.declared['params'], is_leaf=is_declared):
            total += x.value.size
            if 'multi_token' not in jax.tree_util.keystr(path):
                routed = 'experts' in x.axes
                active += x.value.size * c.num_experts_per_tok // c.n_routed_experts if routed else x.value.size
        return {'total': total, 'active': active}

    def flops_per_token(self, length: float, backward: bool = True) -> float:
        """Model FLOPs for one token with `length / 2` tokens before it on average (Chowdhery et al. 2022, appendix B).

        Two a matmul parameter and two a pair of attended positions and head width, three times that with the backward
        pass. Recomputation, padding and the embedding lookup are not counted; multi-token modules are.
        """
        c, matmul = self.config, 0.0
        for path, x in jax.tree_util.tree_leaves_with_path(self.declared['params'], is_leaf=is_declared):
            name = jax.tree_util.keystr(path)
            if 'embed_tokens' in name and not c.tie_word_embeddings:
                continue
            share = c.num_experts_per_tok / c.n_routed_experts if 'experts' in x.axes else 1.0
            if not backward and 'multi_token' in name:
                share = 0.0
            matmul += x.value.size * share
        head = c.vocab_size * c.hidden_size
        modules = c.num_nextn_predict_layers if backward else 0
        layers = c.num_hidden_layers + modules
        attention = layers * c.num_attention_heads * (c.qk_head_dim + c.value_head_dim) * length / 2
        return 2.0 * (matmul + modules * head + attention) * (3 if backward else 1)


def subtree(tree: dict[str, Any], keep: Callable[[str], Any], above: str = '') -> dict[str, Any]:
    """The leaves of nested dictionaries whose paths, written with slashes, are to be kept."""
    kept: dict[str, Any] = {}
    for name, x in tree.items():
        if isinstance(x, dict):
            x = subtree(x, keep, f'{above}{name}/')
            kept |= {name: x} if x else {}
        elif keep(above + name):
            kept[name] = x
    return kept


def is_declared(x: Any) -> bool:
    """Whether a leaf is a `Declared` weight (for `is_leaf`)."""
    return isinstance(x, Declared)


@functools.lru_cache
def _normal_maker(shape: tuple[int, ...], sharding: Any) -> Any:
    """Compiled once for all weights of one shape and sharding."""
    return jax.jit(
        lambda key, deviation: deviation * jax.random.normal(key, shape, jnp.float32), out_shardings=sharding
    )


def _normal(key: jax.Array, shape: tuple[int, ...], deviation: float, sharding: Any) -> jax.Array:
    return _normal_maker(shape, sharding)(key, deviation)
