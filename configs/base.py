"""What every config is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from model.config import ModelConfig
from model.sharding import MESH_AXES
from train.stages import stage_defaults


def base(name: str) -> ConfigDict:
    """A config without stages: the model's defaults, one device axis that takes all devices, a trained tokenizer."""
    config = ConfigDict()
    config.name = name
    config.seed = 0
    model = dataclasses.asdict(ModelConfig())
    vocabulary = model.pop('vocab_size')  # stated with the tokenizer
    config.model = ConfigDict(model)
    # path: a folder with tokenizer.json; empty: train one on `sources`.
    config.tokenizer = ConfigDict({'path': '', 'sources': (), 'vocab_size': vocabulary})
    config.mesh = ConfigDict({axis: -1 if axis == 'data' else 1 for axis in MESH_AXES})
    config.sources = ConfigDict()
    config.evaluations = ConfigDict()
    config.stages = ConfigDict()
    return config


def add_stage(config: ConfigDict, name: str, kind: str, **fields: Any) -> None:
    """Adds a stage: the defaults of its kind, with `fields` over them (mappings are merged one level deep)."""
    stage = ConfigDict(stage_defaults(kind))
    for field, value in fields.items():
        if isinstance(value, dict) and field not in ('task', 'model'):
            stage[field].update(value)
        elif isinstance(value, dict):
            stage[field] = ConfigDict(value)
        elif field in stage:
            stage[field] = value
        else:
            raise ValueError(f'stages.{name}.{field} is no field of kind {kind}')
    config.stages[name] = stage
