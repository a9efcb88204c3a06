"""The whole life of a small model on two CPU cores: pre-training, mid-training, fine-tuning, reinforcement learning.

Variants: `configs/demo.py:study` adds the control arms and seeds behind the tables of the README.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import add_stage, base

SHORT, LONG = 256, 1024  # context of pre-training, and four times that after mid-training


def get_config(variant: str = '') -> ConfigDict:
    """The config; `variant` is '' or 'study'."""
    config = base('demo')
    config.tokenizer.update(source='stdlib', vocab_size=2048)
    config.model.update(
        hidden_size=256,
        num_hidden_layers=3,
        first_k_dense_replace=0,
        intermediate_size=512,
        num_attention_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=128,
        max_position_embeddings=LONG,
        original_max_position_embeddings=SHORT,
        head_chunk=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    config.sources.update(
        stdlib={'type': 'stdlib'},
        instructions={'type': 'stdlib_instructions'},
    )
    config.evaluations.update(
        bits_per_byte={'type': 'text', 'source': {'type': 'stdlib', 'split': 'heldout'}, 'length': SHORT},
    )
    add_stage(
        config,
        'pretrain',
        'pretrain',
        steps=600,
        batch_size=16,
        sequence_length=SHORT,
        save_every=200,
        mixture=((0.0, {'stdlib': 1.0}),),
        evaluations=('bits_per_byte',),
        optimizer={'learning_rate': 0.01, 'decay': 0.3},
    )
    return config
