"""The real configuration made small: what every test of train/ runs, and a config file for commands under test."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import demo
from configs.base import add_stage
from data.mixture import as_dict
from model.config import ModelConfig
from model.sharding import make_mesh

VOCABULARY = 400  # that of `text.small_tokenizer`
KINDS = ('pretrain', 'midtrain', 'sft', 'grpo')


def get_config(variant: str = '') -> ConfigDict:
    """The demo's model, small, and one short stage of each kind, each the child of the one before."""
    config = demo.get_config()
    config.name = 'small'
    config.tokenizer.vocab_size = VOCABULARY
    config.model.update(
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        moe_intermediate_size=32,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
    )
    sums = {'name': 'arithmetic', 'operations': 1, 'digits': 1, 'max_value': 9}
    config.sources = ConfigDict(
        {
            'text': {'type': 'task', 'format': 'text', **sums},
            'chat': {'type': 'task', 'format': 'chat', **sums},
        }
    )
    first = {stage.kind: stage for stage in reversed(list(config.stages.values()))}
    config.stages = ConfigDict()
    config.evaluations = ConfigDict()
    parent = ''
    for kind in KINDS:
        add_stage(config, kind, kind)
        stage = config.stages[kind]
        for part in ('optimizer', 'loss'):
            if kind in first:
                stage[part].update(first[kind][part])
        stage.update(parent=parent, steps=4, batch_size=8, sequence_length=64, save_every=2, evaluations=())
        if 'mixture' in stage:
            stage.mixture = ((0.0, {'chat' if kind == 'sft' else 'text': 1.0}),)
        else:
            stage.update(task=ConfigDict(sums), prompts=4, samples=2, max_tokens=16)
        parent = kind
    return config


def model_config(**changes: Any) -> ModelConfig:
    """The small model, with other fields where asked."""
    fields = {**as_dict(get_config().model.to_dict()), 'vocab_size': VOCABULARY}
    return dataclasses.replace(ModelConfig.from_dict(fields), **changes)


@functools.cache
def one_device() -> Mesh:
    """A mesh of one of the eight fake devices."""
    return make_mesh({}, jax.devices()[:1])
