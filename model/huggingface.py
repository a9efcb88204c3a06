"""Hugging Face's names and fields for models with latent attention: what a hub folder says, in our words and back.

Pure: nothing is read or written here. Three architectures are known, all of one shape: `DeepseekV3ForCausalLM` (V3, R1,
Moonlight, Kimi K2), `DeepseekV2ForCausalLM` (V2, V2-Lite) and `Glm4MoeLiteForCausalLM`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from model.config import ModelConfig
from model.layers import STACKED
from model.transformer import Model, is_declared

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What is fixed in an architecture's code. topk_methods: the first is meant where a config names none."""

    model_type: str
    scoring_func: str
    topk_methods: tuple[str, ...]


ARCHITECTURES = {
    'DeepseekV3ForCausalLM': Architecture('deepseek_v3', 'sigmoid', ('noaux_tc',)),
    'DeepseekV2ForCausalLM': Architecture('deepseek_v2', 'softmax', ('greedy', 'group_limited_greedy')),
    'Glm4MoeLiteForCausalLM': Architecture('glm4_moe_lite', 'sigmoid', ('noaux_tc',)),
}

# Fields of the same name and meaning on both sides.
_SHARED = (
    'vocab_size hidden_size num_hidden_layers intermediate_size num_attention_heads kv_lora_rank qk_nope_head_dim '
    'qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok n_shared_experts moe_intermediate_size '
    'routed_scaling_factor norm_topk_prob max_position_embeddings rms_norm_eps'
).split()
# Fields whose other values change the computation in ways that are not supported.
_FIXED = {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'moe_layer_freq': 1}
_FIXED_ROPE = {'partial_rotary_factor': 1.0, 'truncate': True, 'attention_factor': None}
# Fields of ours that say nothing about what the weights compute, or nothing with latent attention.
_FREE = (
    'num_key_value_heads head_dim initializer_range base_width bias_update_rule bias_update_speed '
    'num_nextn_predict_layers dtype gradient_dtype remat scan_layers head_chunk lora_alpha'
).split()
_YARN = 'rope_beta_fast rope_beta_slow rope_mscale rope_mscale_all_dim original_max_position_embeddings'.split()


def architecture_of(fields: Fields) -> str:
    """The architecture that a hub `config.json` names; ValueError if it is none of `ARCHITECTURES`."""
    named = fields.get('architectures') or ['nothing']
    if named[0] not in ARCHITECTURES:
        raise ValueError(f'architectures is {named[0]}: expected one of {", ".join(ARCHITECTURES)}')
    return str(named[0])


def config_from_hub(fields: Fields, multi_token: int = 0) -> ModelConfig:
    """Our config for a hub `config.json`.

    Args:
        fields: the file's content; rotary settings as `rope_scaling` (hub files) or `rope_parameters` (transformers 5).
        multi_token: how many multi-token modules the files hold; configs often name one that is not there.

    Raises:
        ValueError: a field is missing, or has a value that is not supported; the message names it.
    """
    name = architecture_of(fields)
    architecture = ARCHITECTURES[name]
    _expect(fields, _FIXED)
    # One key and value head a query head: that is what the latent expands to.
    _expect(fields, {'num_key_value_heads': _required(fields, 'num_attention_heads')})
    _expect(fields, {'scoring_func': architecture.scoring_func})
    ours: dict[str, Any] = {field: _required(fields, field) for field in _SHARED}
    method = fields.get('topk_method') or architecture.topk_methods[0]
    if method not in architecture.topk_methods:
        raise ValueError(f'topk_method is {method!r}: expected {" or ".join(architecture.topk_methods)} in a {name}')
    if ours['n_shared_experts'] < 1:
        raise ValueError(f'n_shared_experts is {ours["n_shared_experts"]}: expected 1 or more in a {name}')
    if architecture.scoring_func == 'softmax':
        # DeepSeek's own code then leaves the scaling factor out, transformers the norm: no published model has it.
        _expect(fields, {'norm_topk_prob': False})
        ours['bias_update_rule'] = 'none'
    if method != 'greedy':
        ours |= {field: _required(fields, field) for field in ('n_group', 'topk_group')}
    return ModelConfig(
        **ours,
        **_rotary_from_hub(fields),
        first_k_dense_replace=_dense_layers(fields, name),
        q_lora_rank=fields.get('q_lora_rank') or 0,
        scoring_func=architecture.scoring_func,
        topk_method=method,
        tie_word_embeddings=bool(fields.get('tie_word_embeddings', False)),
        initializer_range=fields.get('initializer_range', 0.02),
        num_nextn_predict_layers=multi_token,
    )


def config_to_hub(config: ModelConfig, architecture: str = '') -> dict[str, Any]:
    """The hub `config.json` of a model; without a name the architecture is that of DeepSeek with the same router.

    Raises:
        ValueError: the architecture cannot express the config; the message names the field.
    """
    if not architecture:
        architecture = 'DeepseekV2ForCausalLM' if config.scoring_func == 'softmax' else 'DeepseekV3ForCausalLM'
    for field, wanted in (('attention', config.attention == 'mla'), ('n_routed_experts', config.is_moe)):
        if not wanted:
            raise ValueError(f'model.{field} is {getattr(config, field)!r}: no {architecture} has that')
    fields: dict[str, Any] = {
        'architectures': [architecture],
        'model_type': ARCHITECTURES[architecture].model_type,
        **{field: getattr(config, field) for field in _SHARED},
        **_FIXED,
        'num_key_value_heads': config.num_attention_heads,
        'q_lora_rank': config.q_lora_rank or None,
        'n_group': config.n_group,
        'topk_group': config.topk_group,
        'topk_method': config.topk_method,
        'scoring_func': config.scoring_func,
        'first_k_dense_replace': config.first_k_dense_replace,
        'num_nextn_predict_layers': config.num_nextn_predict_layers,
        'tie_word_embeddings': config.tie_word_embeddings,
        'initializer_range': config.initializer_range,
        'rope_theta': config.rope_theta,
        'rope_scaling': None,
    }
    if architecture == 'Glm4MoeLiteForCausalLM':
        fields['mlp_layer_types'] = ['dense'] * config.num_dense_layers + ['sparse'] * config.num_moe_layers
    else:
        fields['rope_interleave'] = True
    if config.rope_factor > 1:
        fields['rope_scaling'] = {
            'type': 'yarn',
            'factor': config.rope_factor,
            **{field.removeprefix('rope_'): getattr(config, field) for field in _YARN},
        }
    # Whatever does not come back as it was, the architecture has no word for.
    back = config_from_hub(fields, config.num_nextn_predict_layers)
    free = {*_FREE, *(_YARN if config.rope_factor == 1 else ())}
    then = back.to_dict()
    for name, now in config.to_dict().items():
        if now != then[name] and name not in free:
            raise ValueError(f'model.{name} is {now!r}: expected {then[name]!r} in a {architecture}')
    return fields


def _required(fields: Fields, name: str) -> Any:
    if fields.get(name) is None:
        raise ValueError(f'{name} is missing')
    return fields[name]


def _expect(fields: Fields, expected: Fields) -> None:
    """Raises ValueError for a field that is there and says something else."""
    for name, value in expected.items():
        if fields.get(name) is not None and fields[name] != value:
            raise ValueError(f'{name} is {fields[name]!r}: expected {value!r}, all that is supported')


def _dense_layers(fields: Fields, architecture: str) -> int:
    if architecture != 'Glm4MoeLiteForCausalLM':
        return int(_required(fields, 'first_k_dense_replace'))
    kinds = fields.get('mlp_layer_types')
    if kinds is None:
        return int(fields.get('first_k_dense_replace', 1))
    if kinds != sorted(kinds) or len(kinds) != fields['num_hidden_layers'] or set(kinds) > {'dense', 'sparse'}:
        raise ValueError(
            f'mlp_layer_types is {kinds}: expected dense layers, then sparse ones, num_hidden_layers in all'
        )
    return int(kinds.count('dense'))


def _rotary_from_hub(fields: Fields) -> dict[str, Any]:
    """Our rotary fields, from either spelling."""
    rope = fields.get('rope_scaling') or fields.get('rope_parameters') or {}
    _expect(fields, {'partial_rotary_factor': 1.0})
    _expect(rope, _FIXED_ROPE)
    ours: dict[str, Any] = {'rope_theta': float(rope.get('rope_theta') or fields.get('rope_theta') or 10000.0)}
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    if kind not in ('default', 'yarn'):
        raise ValueError(f'the rotary embedding is of type {kind!r}: expected default or yarn')
    if kind == 'default':
        return ours
    scales = [rope.get('mscale') or 0.0, rope.get('mscale_all_dim') or 0.0]
    if not any(scales):
        scales = [1.0, 0.0]  # the paper's temperature, on cosine and sine alone
    elif not all(scales) and scales != [1.0, 0.0]:
        # DeepSeek's code and transformers then disagree on the size of cosine and sine.
        raise ValueError(f'mscale, mscale_all_dim are {scales}: expected both of them or neither')
    return {
        **ours,
        'rope_factor': float(_required(rope, 'factor')),
        'rope_beta_fast': float(rope.get('beta_fast') or 32),
        'rope_beta_slow': float(rope.get('beta_slow') or 1),
        'rope_mscale': float(scales[0]),
        'rope_mscale_all_dim': float(scales[1]),
        'original_max_position_embeddings': int(
            rope.get('original_max_position_embeddings') or _required(fields, 'max_position_embeddings')
        ),
    }


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our arrays, which stacks weights of layers and experts, and the hub tensors that it holds.

    Attributes:
        path: in the variables, 'params' or 'balance' first; shape: of the whole array.
        stacked: how many leading dimensions stack; names: of the hub tensors, in the order of those dimensions.
        inputs: how many dimensions of one weight are inputs of its matmul; 0 for what is not transposed.
        rotary: width of the rotated part at the end of the last dimension, 0 if there is none or it needs no care.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: int
    names: tuple[str, ...]
    inputs: int
    rotary: int

    @property
    def hub_shape(self) -> tuple[int, ...]:
        """Of each of the hub tensors."""
        shape = self.shape[self.stacked :]
        return (math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])) if self.inputs else shape

    def from_hub(self, tensor: np.ndarray) -> np.ndarray:
        """One weight as we keep it: inputs first, heads apart, rotated pairs as halves."""
        value = (tensor.T if self.inputs else tensor).reshape(self.shape[self.stacked :])
        return self._arranged(value, interleaved=True)

    def to_hub(self, value: np.ndarray) -> np.ndarray:
        """The hub tensor, contiguous."""
        value = self._arranged(value, interleaved=False)
        if self.inputs:
            value = value.reshape(math.prod(value.shape[: self.inputs]), -1).T
        return np.ascontiguousarray(value)

    def _arranged(self, value: np.ndarray, interleaved: bool) -> np.ndarray:
        """With the columns of the rotated part, and the rows of `eh_proj`, in the order of the other side."""
        if self.path[-1] == 'eh_proj':  # the hub has the embedding's rows before the stream's
            return np.concatenate(np.split(value, 2)[::-1])
        if not self.rotary:
            return value
        # DeepSeek's weights rotate pairs (2i, 2i + 1), ours (i, i + d/2).
        rest, rotated = value[..., : -self.rotary], value[..., -self.rotary :]
        pairs = rotated.reshape(*rotated.shape[:-1], *((-1, 2) if interleaved else (2, self.rotary // 2)))
        return np.concatenate([rest, pairs.swapaxes(-1, -2).reshape(rotated.shape)], axis=-1)


def leaves(model: Model, interleaved: bool = True) -> list[Leaf]:
    """All arrays of a model that the hub's files hold; `interleaved`: how those lay out rotated pairs."""
    c, found = model.config, []
    for place, x in jax.tree_util.tree_leaves_with_path(model.declared, is_leaf=is_declared):
        path = tuple(str(entry.key) for entry in place)
        if path[0] == 'balance' and c.topk_method != 'noaux_tc':
            continue  # no bias there; ours is zero
        value, axes, inputs = (x.value, x.axes, x.inputs) if is_declared(x) else (x, (), 0)
        stacked = sum(axis in STACKED for axis in axes)
        if path[0] == 'balance':
            stacked = int(path[1] == 'layers')
        places = itertools.product(*map(range, value.shape[:stacked]))
        rotary = c.qk_rope_head_dim if path[-1] in ('q_proj', 'q_b_proj', 'kv_a_proj_with_mqa') else 0
        names = tuple(_hub_name(path, index, c) for index in places)
        found.append(Leaf(path, value.shape, stacked, names, inputs, rotary * interleaved))
    return found


def _hub_name(path: tuple[str, ...], index: tuple[int, ...], c: ModelConfig) -> str:
    room, *rest = path[1:]
    if not rest:
        return 'lm_head.weight' if room == 'lm_head' else f'model.{room}.weight'
    if room.startswith('multi_token_'):  # layers behind the last one, numbered on
        layer = c.num_hidden_layers + int(room.rsplit('_', 1)[1]) - 1
        rest = rest[1:] if rest[0] == 'block' else ['shared_head', 'norm'] if rest == ['norm'] else rest
        expert = index
    else:
        layer = index[0] + (c.num_dense_layers if room == 'layers' else 0)
        expert = index[1:]
    last = rest[-1]
    if path[0] == 'balance':
        return f'model.layers.{layer}.mlp.gate.e_score_correction_bias'
    if last.startswith('experts_'):
        last = f'experts.{expert[0]}.{last.removeprefix("experts_")}'
    return '.'.join(['model.layers', str(layer), *rest[:-1], last, 'weight'])


def multi_token_modules(names: Mapping[str, Any], fields: Fields) -> int:
    """How many multi-token modules are among the tensors of a hub folder."""
    first = _required(fields, 'num_hidden_layers')
    return next(k for k in itertools.count() if f'model.layers.{first + k}.eh_proj.weight' not in names)


def copies(c: ModelConfig) -> dict[str, str]:
    """Tensors that multi-token layers of the hub repeat, with the name of the one they are equal to."""
    head = 'model.embed_tokens.weight' if c.tie_word_embeddings else 'lm_head.weight'
    found = {}
    for layer in range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers):
        found[f'model.layers.{layer}.embed_tokens.weight'] = 'model.embed_tokens.weight'
        found[f'model.layers.{layer}.shared_head.head.weight'] = head
    return found


def scale_block(fields: Fields) -> tuple[int, int]:
    """Rows and columns that share a scale in a folder of FP8 weights; ValueError for another quantisation."""
    kind = fields.get('quantization_config') or {}
    if kind and kind.get('quant_method') != 'fp8':
        raise ValueError(f'quantization_config.quant_method is {kind.get("quant_method")!r}: expected fp8')
    rows, columns = kind.get('weight_block_size') or (128, 128)
    return int(rows), int(columns)


def dequantized(weight: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """weight [M, N] times its block's scale, float32 (DeepSeek-V3, section 3.3.2); scales [M / rows, N / columns]."""
    out = weight.astype(np.float32)
    for i, scale in enumerate(scales.astype(np.float32)):
        out[i * block[0] : (i + 1) * block[0]] *= np.repeat(scale, block[1])[: out.shape[1]]
    return out
