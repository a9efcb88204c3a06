"""Moonlight-16B-A3B: 16 billion parameters, 3 billion of them active for a token.

DeepSeek-V2-Lite with other routing. Sizes are those of `config.json` of moonshotai/Moonlight-16B-A3B on Hugging Face;
how it was trained is from its report (Liu et al. 2025, arXiv 2502.16982, section 3.3): 5.2 trillion tokens in rows of
8,192, in batches of 4,096 rows (2,048 over the first 200 billion tokens, which a stage does not do), then 500 billion
tokens of better data, with Muon throughout.

`configs/moonlight.py:long` adds a stage `long`, which was not published: rows of 131,072 tokens split over the
`context` axis of the mesh, with YaRN.

    python -m train.compile --config=configs/moonlight.py
    python -m train.compile --config=configs/moonlight.py --topology=v6e:4x4
    python -m train.compile --config=configs/moonlight.py:long --stage=long
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs import deepseek_v2_lite
from configs.base import add_large_stage

LENGTH, LONG = 8192, 131_072


def get_config(variant: str = '') -> ConfigDict:
    """The config; `variant` is '' or 'long'."""
    if variant not in ('', 'long'):
        raise ValueError(f'configs/moonlight.py:{variant}: expected no variant, or long')
    config = deepseek_v2_lite.get_config()
    config.name = 'moonlight'
    config.tokenizer.vocab_size = 163_840
    config.model.update(
        intermediate_size=11_264,
        scoring_func='sigmoid',
        norm_topk_prob=True,
        routed_scaling_factor=2.446,
        bias_update_rule='bounded',
        bias_update_speed=0.001,
        rope_theta=50_000.0,
        original_max_position_embeddings=LENGTH,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
    )
    rows: dict[str, Any] = {
        'batch_size': 4096,
        'microbatches': 256,  # a row at a time on each of 16 chips
        'sequence_length': LENGTH,
        'loss': {'sequence_balance': 0.001},
    }
    rate = {'learning_rate': 4.2e-4, 'schedule': 'cosine', 'final': 0.1}
    add_large_stage(config, 'pretrain', 'pretrain', tokens=5.2e12, warmup=1000, optimizer=rate, **rows)
    better: dict[str, Any] = {'parent': 'pretrain', 'keep_optimizer': False, 'optimizer': {'learning_rate': 1e-4}}
    add_large_stage(config, 'cooldown', 'midtrain', tokens=5e11, warmup=100, **better, **rows)
    if variant:
        config.topology = 'v5p:4x4x4'
        config.mesh.context = 16
        longer: dict[str, Any] = {'batch_size': 16, 'microbatches': 4, 'sequence_length': LONG}
        model = {'rope_factor': LONG / LENGTH, 'max_position_embeddings': LONG}
        rate = {'learning_rate': 1e-5}
        end: dict[str, Any] = {**better, 'parent': 'cooldown', 'model': model, 'optimizer': rate, **rows, **longer}
        add_large_stage(config, 'long', 'midtrain', tokens=2e9, warmup=10, **end)
    return config
