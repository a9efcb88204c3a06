"""DeepSeek-V3: 671 billion parameters, 37 billion of them active for a token.

Sizes are those of `config.json` of deepseek-ai/DeepSeek-V3 on Hugging Face; how it was trained is from its report (Liu
et al. 2024, arXiv 2412.19437, section 4.2): 14.8 trillion tokens in rows of 4,096, batches of 15,360 rows (grown from
3,072 over the first 469 billion tokens, which a stage does not do), AdamW. Its learning rate falls along a cosine to a
tenth over 4.3 trillion tokens and stays low for 500 billion: here it falls linearly, to zero, over both.

Pre-training knows no YaRN: the factor of 40 in `config.json` belongs to the extension of the context that follows.

    python -m train.compile --config=configs/deepseek_v3.py
    python -m train.compile --config=configs/deepseek_v3.py --topology=v5p:8x8x8 \\
        --config.stages.pretrain.batch_size=2048 --config.stages.pretrain.microbatches=1
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import add_large_stage, large


def get_config() -> ConfigDict:
    """The config."""
    config = large('deepseek_v3', 'v5p:8x8x16', vocabulary=129_280, expert=8)
    config.model.update(
        hidden_size=7168,
        num_hidden_layers=61,
        first_k_dense_replace=3,
        intermediate_size=18_432,
        num_attention_heads=128,
        q_lora_rank=1536,
        n_routed_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        routed_scaling_factor=2.5,
        n_group=8,
        topk_group=4,
        bias_update_rule='sign',
        bias_update_speed=0.001,
        num_nextn_predict_layers=1,
        initializer_range=0.006,
    )
    add_large_stage(
        config,
        'pretrain',
        'pretrain',
        tokens=14.8e12,
        warmup=2000,
        batch_size=15_360,
        microbatches=5,  # 3 rows at a time on each of 1,024 chips
        optimizer={'name': 'adamw', 'learning_rate': 2.2e-4, 'decay': 4.8 / 14.8},
        loss={'multi_token': 0.3, 'sequence_balance': 1e-4},
    )
    return config
