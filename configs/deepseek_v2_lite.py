"""DeepSeek-V2-Lite: 15.7 billion parameters, 2.4 billion of them active for a token.

Sizes are those of `config.json` of deepseek-ai/DeepSeek-V2-Lite on Hugging Face; how it was trained is from its report
(Liu et al. 2024, arXiv 2405.04434, appendix B): 5.7 trillion tokens in rows of 4,096, batches of 4,608 rows, AdamW,
experts balanced by a loss on the scores. Its learning rate is cut to 0.316 of what it was after 80% and after 90% of
the tokens: here it falls linearly to zero over the last fifth.

    python -m train.compile --config=configs/deepseek_v2_lite.py
    python -m train.compile --config=configs/deepseek_v2_lite.py --topology=v6e:4x4 \\
        --config.stages.pretrain.microbatches=144
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import add_large_stage, large


def get_config() -> ConfigDict:
    """The config."""
    config = large('deepseek_v2_lite', 'v5p:2x2x4', vocabulary=102_400, expert=2)
    config.model.update(
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=10_944,
        num_attention_heads=16,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        moe_intermediate_size=1408,
        scoring_func='softmax',
        norm_topk_prob=False,
        bias_update_rule='none',
        initializer_range=0.006,
    )
    add_large_stage(
        config,
        'pretrain',
        'pretrain',
        tokens=5.7e12,
        warmup=2000,
        batch_size=4608,
        microbatches=72,  # 4 rows at a time on each of 16 chips
        optimizer={'name': 'adamw', 'learning_rate': 4.2e-4},
        loss={'sequence_balance': 0.001},
    )
    return config
