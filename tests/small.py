"""The real configuration made small: what the tests of train/ run, and a config file for the commands they start."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import demo
from data.mixture import as_dict
from model.config import ModelConfig
from model.sharding import make_mesh
from train.learn.step import Layout

VOCABULARY = 400  # that of `text.small_tokenizer`
# Each the child of the one before.
STAGES = ('pretrain', 'midtrain', 'sft', 'grpo')


def get_config(variant: str = '') -> ConfigDict:
    """The demo with few steps of few tokens, without evaluations. A variant is a JSON Lines file to pre-train on."""
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
        scan_layers=True,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
    )
    for name in set(config.stages) - set(STAGES):
        del config.stages[name]
    for stage in config.stages.values():
        stage.update(steps=5, batch_size=8, sequence_length=64, microbatches=1, save_every=2, evaluations=())
    config.stages.midtrain.update(sequence_length=128, model=ConfigDict({'rope_theta': 2 * config.model.rope_theta}))
    config.sources.arithmetic_chat.operations = (1, 1)
    config.stages.sft.update(mixture=((0.0, {'arithmetic_chat': 1.0}),), sequence_length=96)
    config.stages.grpo.update(prompts=4, samples=2, max_tokens=16, microbatches=2)
    config.stages.grpo.task = ConfigDict({**config.stages.grpo.task.to_dict(), 'operations': 1})
    if variant:
        config.sources = ConfigDict({**config.sources.to_dict(), 'lines': {'type': 'jsonl', 'path': variant}})
        config.stages.pretrain.mixture = ((0.0, {'lines': 1.0}),)
    return config


def model_config(**changes: Any) -> ModelConfig:
    """The small model, with other fields where asked."""
    fields = {**as_dict(get_config().model.to_dict()), 'vocab_size': VOCABULARY}
    return dataclasses.replace(ModelConfig.from_dict(fields), **changes)


def placed(batch: dict[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
    """A batch as a step takes it."""
    rows, length = batch['tokens'].shape
    return Layout(mesh, rows, length, microbatches).place(batch, range(rows))


@functools.cache
def one_device() -> Mesh:
    """A mesh of one of the eight fake devices."""
    return make_mesh({}, jax.devices()[:1])
