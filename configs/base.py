"""What every config is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from model.config import ModelConfig
from model.sharding import MESH_AXES
from train.stages import stage_defaults

SEEDS = (0, 1, 2)  # of every experiment
# Muon's updates have full size however faint the gradient: of a policy gradient, mostly noise.
ADAM = {'name': 'adamw', 'schedule': 'linear', 'warmup': 0.1, 'beta2': 0.99}


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
    config.topology = ''  # the TPU slice meant for it, such as v5p:2x2x4; only `train.compile` reads it
    config.mesh = ConfigDict({axis: -1 if axis == 'data' else 1 for axis in MESH_AXES})
    config.device_hour_price = 0.0  # dollars, from which the report tells what stages cost; 0: it does not
    config.wandb = ''  # a project of Weights & Biases that metrics go to as well
    config.sources = ConfigDict()
    config.evaluations = ConfigDict()
    config.stages = ConfigDict()
    return config


def small(name: str, context: int) -> ConfigDict:
    """A config for two CPU cores: a model of about a million parameters beside its embeddings, half of them active."""
    config = base(name)
    config.model.update(
        hidden_size=128,
        num_hidden_layers=3,
        first_k_dense_replace=0,
        num_attention_heads=4,
        kv_lora_rank=48,
        qk_nope_head_dim=24,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=2,
        moe_intermediate_size=96,
        max_position_embeddings=context,
        original_max_position_embeddings=context,
        head_chunk=2048,
        rope_theta=500.0,
        tie_word_embeddings=True,
        scan_layers=False,
        initializer_range=0.05,
    )
    return config


def longer_base(base: float, times: float, rotated: int) -> float:
    """The base of the rotary embedding for so many times the context (bloc97 2023, "NTK-aware" scaling).

    Of `rotated` dimensions the slowest pair is slowed as many times, and the fastest left alone.
    """
    return float(base * times ** (rotated / (rotated - 2)))


def experiment(file: str, variant: str, variants: Iterable[str], context: int = 512) -> ConfigDict:
    """A `small` config for one of the experiments of a file in configs/.

    Raises:
        ValueError: no such variant.
    """
    if variant not in variants:
        raise ValueError(f'configs/{file}.py:{variant}: expected one of {", ".join(variants)}')
    return small(f'{file}_{variant}', context)


def large(name: str, topology: str, vocabulary: int, expert: int = 1) -> ConfigDict:
    """A config of the DeepSeek family for many chips, its sizes to be filled in.

    Activations in bfloat16, weights and optimizer in float32, each block computed again in the backward pass; weights
    are sharded over all chips, experts first over `expert` of them. The user names the data: `sources.text.path`
    (ArrayRecord shards, as `data.prepare` writes them) and `tokenizer.path`.
    """
    config = base(name)
    config.topology = topology
    config.tokenizer.vocab_size = vocabulary
    config.mesh.update(data=1, fsdp=-1, expert=expert)
    config.sources.text = ConfigDict({'type': 'arrayrecord', 'path': ''})
    config.model.update(
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        dtype='bfloat16',
        remat='full',
        head_chunk=1024,
        round_capacity=0.125,
    )
    return config


def add_large_stage(
    config: ConfigDict, name: str, kind: str, *, tokens: float, warmup: int, optimizer: dict[str, Any], **fields: Any
) -> None:
    """Adds a stage of so many tokens, warmed up over so many steps, on the source `text` of a `large` config."""
    fields = {'sequence_length': 4096, 'save_every': 1000, 'mixture': ((0.0, {'text': 1.0}),), **fields}
    steps = round(tokens / (fields['batch_size'] * fields['sequence_length']))
    add_stage(config, name, kind, steps=steps, optimizer={**optimizer, 'warmup': warmup / steps}, **fields)


def shortened(config: ConfigDict, share: float, *names: str) -> dict[str, Any]:
    """The config with the named stages alone, and a share of their steps and of what evaluations judge them on."""
    for name in list(config.stages):
        if name not in names:
            del config.stages[name]
        elif 'steps' in config.stages[name]:
            config.stages[name].steps = max(2, round(share * config.stages[name].steps))
    for evaluation in config.evaluations.values():
        field, usual = ('documents', 16) if evaluation['type'] == 'text' else ('items', 128)
        evaluation[field] = max(2, round(share * (evaluation.get(field) or usual)))
    return dict(config.to_dict())


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
