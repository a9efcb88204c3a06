"""The shape of a model: one frozen dataclass in the DeepSeek / Hugging Face vocabulary, validated when made."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Every size and switch of the transformer. Field names are those of DeepSeek-V3's Hugging Face config.

    Raises:
        ValueError: a field contradicts another; the message names it and says what was expected.
    """

    vocab_size: int = 4096
    hidden_size: int = 192
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1  # this many first layers have a dense feed-forward
    intermediate_size: int = 512  # width of a dense feed-forward
    # Attention: 'mla' is multi-head latent attention (DeepSeek-V2, section 2.1), 'gqa' grouped-query attention.
    attention: str = 'mla'
    num_attention_heads: int = 4
    q_lora_rank: int = 0  # 0: queries are projected directly
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    num_key_value_heads: int = 2  # 'gqa' only
    head_dim: int = 48  # 'gqa' only
    # Mixture of experts (DeepSeekMoE). n_routed_experts=0 gives a dense model.
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    moe_intermediate_size: int = 192
    scoring_func: str = 'sigmoid'  # or 'softmax'
    norm_topk_prob: bool = True
    # How groups are ranked: 'noaux_tc' by their two best biased scores (DeepSeek-V3), 'group_limited_greedy' by their
    # best one, without a bias (DeepSeek-V2); 'greedy' knows no groups and no bias (DeepSeek-V2-Lite).
    topk_method: str = 'noaux_tc'
    routed_scaling_factor: float = 1.0
    n_group: int = 1  # experts stand in n_group groups; a token may use topk_group of them
    topk_group: int = 1
    bias_update_rule: str = 'sign'  # 'sign' (DeepSeek-V3), 'bounded' (Moonlight) or 'none'
    bias_update_speed: float = 1e-3
    # Multi-token prediction (DeepSeek-V3, section 2.2): extra modules that share embedding and head.
    num_nextn_predict_layers: int = 0
    # Rotary position embedding and YaRN. rope_factor=1 switches YaRN off.
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_mscale: float = 1.0
    rope_mscale_all_dim: float = 1.0
    original_max_position_embeddings: int = 4096
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    # The number of inputs at which initializer_range and learning rates hold as they are; matrices with others, and the
    # head, have theirs scaled for what suits one width to suit all (see `model.layers.by_width`), in a model that has
    # it from its first stage on. 0: nothing is scaled.
    base_width: int = 0
    tie_word_embeddings: bool = False
    value_head: bool = False  # one more number a token, for reward models and critics
    # Low-rank adapters beside every matrix (LoRA: Hu et al. 2021), of this rank and weighed by lora_alpha / lora_rank.
    lora_rank: int = 0
    lora_alpha: float = 16.0
    # How it is computed.
    dtype: str = 'float32'  # of activations and of weights as they are used; parameters are kept in float32
    # In which the gradients of experts and of `kv_b_proj` cross the network; those of embedding, head and router do in
    # float32, those of other projections in `dtype`.
    gradient_dtype: str = 'float32'
    # Rows that a device sends another in one round of expert dispatch, as a multiple of the balanced number of all: a
    # bound on memory. What is more goes into further rounds; no token is dropped.
    round_capacity: float = 0.5
    remat: str = 'none'  # 'none', 'dots' (keep matmul results) or 'full' (recompute each block)
    scan_layers: bool = True
    head_chunk: int = 8192  # tokens of a device whose logits exist at one time

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense feed-forward: the first ones, or all of them without routed experts."""
        return min(self.first_k_dense_replace, self.num_hidden_layers) if self.is_moe else self.num_hidden_layers

    @property
    def num_moe_layers(self) -> int:
        """Mixture-of-experts layers of the trunk (the multi-token modules have one more each)."""
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def is_moe(self) -> bool:
        """Whether there are routed experts at all."""
        return self.n_routed_experts > 0

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.attention == 'mla' else self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of one head's value."""
        return self.v_head_dim if self.attention == 'mla' else self.head_dim

    @property
    def rope_dim(self) -> int:
        """Width of the rotated part of a head."""
        return self.qk_rope_head_dim if self.attention == 'mla' else self.head_dim

    @property
    def head_multiplier(self) -> float:
        """What logits are multiplied by (Yang et al. 2022, table 8), in the first scale of the norm before the head."""
        return self.base_width / self.hidden_size if self.base_width else 1.0

    @property
    def cache_elements_per_token(self) -> int:
        """Numbers cached for one token over all layers (DeepSeek-V2, table 1)."""
        if self.attention == 'mla':
            return (self.kv_lora_rank + self.qk_rope_head_dim) * self.num_hidden_layers
        return 2 * self.num_key_value_heads * self.head_dim * self.num_hidden_layers

    def __post_init__(self) -> None:
        def expect(condition: bool, field: str, expected: str) -> None:
            if not condition:
                raise ValueError(f'model.{field} is {getattr(self, field)!r}: expected {expected}')

        for field, choices in _CHOICES.items():
            expect(getattr(self, field) in choices, field, 'one of ' + ', '.join(choices))
        for field in ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size'):
            expect(getattr(self, field) > 0, field, 'a positive number')
        expect(self.rope_dim % 2 == 0, 'qk_rope_head_dim' if self.attention == 'mla' else 'head_dim', 'an even number')
        expect(self.rope_factor >= 1, 'rope_factor', '1 (no YaRN) or more')
        expect(self.round_capacity > 0, 'round_capacity', 'a positive number')
        expect(self.head_chunk > 0, 'head_chunk', 'a positive number of tokens')
        for field in ('num_nextn_predict_layers', 'lora_rank', 'base_width'):
            expect(getattr(self, field) >= 0, field, '0 or more')
        if self.attention == 'gqa':
            divides = self.num_attention_heads % self.num_key_value_heads == 0
            expect(divides, 'num_key_value_heads', f'a divisor of num_attention_heads={self.num_attention_heads}')
        if self.is_moe:
            experts, k = self.n_routed_experts, self.num_experts_per_tok
            expect(0 < k <= experts, 'num_experts_per_tok', f'1 to n_routed_experts={experts}')
            expect(experts % self.n_group == 0, 'n_group', f'a divisor of n_routed_experts={experts}')
            expect(0 < self.topk_group <= self.n_group, 'topk_group', f'1 to n_group={self.n_group}')
            if self.topk_method != 'noaux_tc':
                rule = f"'none' with topk_method={self.topk_method!r}, which has no bias"
                expect(self.bias_update_rule == 'none', 'bias_update_rule', rule)
            if self.topk_method == 'greedy':
                expect(self.n_group == 1, 'n_group', "1 with topk_method='greedy'")
            if self.n_group > 1:
                two = self.topk_method == 'group_limited_greedy' or experts // self.n_group >= 2
                expect(two, 'n_group', 'groups of two experts or more')
                room = self.topk_group * (experts // self.n_group)
                expect(k <= room, 'num_experts_per_tok', f'at most the {room} experts of topk_group groups')

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Builds a config from a mapping; an unknown field raises ValueError with the nearest known one."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 1)
                raise ValueError(
                    f'model.{name} is no field of the model' + (f': did you mean {near[0]}?' if near else '')
                )
        return cls(**dict(values))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary, for JSON."""
        return dataclasses.asdict(self)


_CHOICES = {
    'attention': ('mla', 'gqa'),
    'scoring_func': ('sigmoid', 'softmax'),
    'topk_method': ('noaux_tc', 'greedy', 'group_limited_greedy'),
    'bias_update_rule': ('sign', 'bounded', 'none'),
    'dtype': ('float32', 'bfloat16'),
    'gradient_dtype': ('float32', 'bfloat16'),
    'remat': ('none', 'dots', 'full'),
}
