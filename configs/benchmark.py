"""The shape at which train steps are compared with other trainers: latent attention, 8 experts, 2 a token.

python -m train.benchmark --config=configs/benchmark.py

`configs/benchmark.py:DIR` reads tokens that `data.prepare` wrote to a folder, by the same tokenizer.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import add_stage, base


def get_config(variant: str = '') -> ConfigDict:
    """The config: 4 layers of width 256, 8 rows of 256 tokens, float32; `variant` is a folder of tokens."""
    config = base('benchmark')
    config.tokenizer.update(sources=('text',), vocab_size=8192)
    config.model.update(
        hidden_size=256,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        intermediate_size=1024,
        num_attention_heads=8,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=256,
        scan_layers=False,
    )
    config.sources.text = ConfigDict({'type': 'arrayrecord', 'path': variant} if variant else {'type': 'stdlib'})
    add_stage(
        config,
        'pretrain',
        'pretrain',
        steps=100,
        batch_size=8,
        sequence_length=256,
        mixture=((0.0, {'text': 1.0}),),
        optimizer={'name': 'adamw', 'learning_rate': 0.001},
    )
    return config
