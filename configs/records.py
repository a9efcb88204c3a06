"""A small model on published records, curated: what `make records RECORDS=DIR` trains for a few steps.

`configs/records.py:DIR` names the folder that holds a folder of records for each source.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import add_stage, small

MIXTURE = {'c4': 0.5, 'wikipedia': 0.2, 'gsm8k': 0.1, 'math': 0.15, 'oasst': 0.05}


def get_config(variant: str = 'runs/records') -> ConfigDict:
    """The config; `variant` is the folder of the sources."""
    config = small('records', 256)
    config.tokenizer.update(sources=tuple(MIXTURE), vocab_size=2048)
    config.sources.update({name: {'type': 'arrayrecord', 'path': f'{variant}/{name}'} for name in MIXTURE})
    later = {**MIXTURE, 'gsm8k': 0.3, 'math': 0.45}  # more reasoning towards the end
    mixture = ((0.0, MIXTURE), (0.5, later))
    add_stage(config, 'midtrain', 'midtrain', steps=10, batch_size=8, sequence_length=256, mixture=mixture)
    return config
