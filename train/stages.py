"""What differs between stages. A stage kind is a value: its defaults, its objective and its stream.

Adding a kind is one entry in KINDS (or one call of `register`); the loop does not change.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data.errors import InputError, did_you_mean
from data.mixture import as_dict
from data.packing import empty_batch
from data.sources import open_source
from data.stream import Prefetch, RowStream, Stream
from data.tasks import get_task
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.transformer import Model, Variables
from train.objectives import Objective, clipped_policy_gradient, joined, next_token, regularizers
from train.rollout import RolloutStream


@dataclasses.dataclass(frozen=True)
class Context:
    """What a kind may build its stream from.

    Attributes:
        name: of the stage; config: its fields; sources: all sources of the run by name; seed: of the stage.
        models: the other models the stage names (`models.reference`, ...), each with its variables, by role.
        rows: the rows of the global batch that this process builds; all by default.
    """

    name: str
    config: Mapping[str, Any]
    sources: Mapping[str, Any]
    model: Model
    tokenizer: Tokenizer
    seed: int
    models: Mapping[str, tuple[Model, Variables]]
    rows: Sequence[int] | None = None

    @property
    def stream_seed(self) -> int:
        """A seed of this stage's own, so that stages do not see the same problems."""
        return zlib.crc32(f'{self.seed} {self.name}'.encode())


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of stage.

    Attributes:
        defaults: fields beyond COMMON.
        objective, stream: how they are made.
        extra: of the stage's config, the float32 arrays its batches hold beyond those of `data.packing.empty_batch`,
            each with its number of dimensions (2: one number a token, 0: one for the batch).
        on_policy: whether the stream samples, from `prompts` prompts `samples` answers of up to `max_tokens` tokens.
    """

    defaults: Mapping[str, Any]
    objective: Callable[[Mapping[str, Any]], Objective]
    stream: Callable[[Context], Stream]
    extra: Callable[[Mapping[str, Any]], Mapping[str, int]] = lambda _: {}
    on_policy: bool = False


COMMON: dict[str, Any] = {
    'kind': '',
    # NAME or NAME@STEP; the path (with a slash) of an imported model or of another run's stage; '' starts from scratch.
    'parent': '',
    'models': {'reference': ''},  # other checkpoints the stage needs
    'model': {},  # fields of the model that change from this stage on, such as rope_theta
    'seed': -1,  # -1: the run's
    'steps': 100,
    'batch_size': 16,  # rows of a step
    'sequence_length': 256,  # tokens of a row
    'microbatches': 1,  # a step's rows are taken in this many parts, gradients accumulated
    'save_every': 100,
    'keep': 2,
    'keep_optimizer': False,  # take over the parent's optimizer state
    'evaluations': (),
    'optimizer': {
        'name': 'muon',
        'learning_rate': 0.01,
        'schedule': 'wsd',
        'warmup': 0.02,
        'decay': 0.2,
        'final': 0.1,
        'weight_decay': 0.1,
        'beta1': 0.9,
        'beta2': 0.95,
        'epsilon': 1e-8,
        'muon_beta': 0.95,
        'clip': 1.0,
    },
    'loss': {'multi_token': 0.0, 'z_loss': 0.0, 'sequence_balance': 1e-4, 'batch_balance': 0.0},
}


def _rows(context: Context, split_documents: bool) -> Stream:
    c = context.config
    named = {name for _, weights in c['mixture'] for name in as_dict(weights)}
    for name in named - set(context.sources):
        raise InputError(f'stages.{context.name}.mixture: no source {name!r}{did_you_mean(name, context.sources)}')
    stream = RowStream(
        {name: open_source(context.sources[name]) for name in sorted(named)},
        c['mixture'],
        context.tokenizer,
        rows=c['batch_size'],
        sequence_length=c['sequence_length'],
        steps=c['steps'],
        seed=context.stream_seed,
        split_documents=split_documents,
        rows_here=context.rows,
    )
    return Prefetch(stream)


def _rollouts(context: Context) -> Stream:
    task = as_dict(context.config['task'])
    reference = context.models.get('reference')
    if context.config['loss']['kl_coefficient'] and reference is None:
        raise InputError(f'stages.{context.name}.models.reference is empty: expected a stage, for loss.kl_coefficient')
    return RolloutStream(
        context.model,
        context.tokenizer,
        get_task(task.pop('name'), split='train', **task),
        context.config,
        context.stream_seed,
        reference,
    )


_MIXTURE: dict[str, Any] = {'mixture': ()}

KINDS: dict[str, Kind] = {
    'pretrain': Kind(_MIXTURE, lambda _: next_token(), lambda context: _rows(context, split_documents=True)),
    # Learning rate to zero without a new warmup (Hu et al. 2024, section 4; OLMo 2, section 4).
    'midtrain': Kind(
        {**_MIXTURE, 'optimizer': {'schedule': 'linear', 'warmup': 0.0}},
        lambda _: next_token(),
        lambda context: _rows(context, split_documents=True),
    ),
    'sft': Kind(
        {**_MIXTURE, 'optimizer': {'schedule': 'linear'}},
        lambda _: next_token(),
        lambda context: _rows(context, split_documents=False),
    ),
    'grpo': Kind(
        {
            'task': {'name': ''},
            'reward': 'verifier',  # or 'format', 'random': control arms
            'algorithm': 'grpo',  # or 'dr_grpo', 'rejection' (rejection-sampling fine-tuning)
            'prompts': 32,
            'samples': 8,
            'temperature': 1.0,
            'max_tokens': 64,
            'optimizer': {'schedule': 'constant', 'weight_decay': 0.0},
            'loss': {'clip_low': 0.2, 'clip_high': 0.28, 'kl_coefficient': 0.0},
        },
        lambda config: clipped_policy_gradient(config['loss']),
        _rollouts,
        extra=lambda config: {
            **dict.fromkeys(('advantage', 'behavior_logprob'), 2),
            **({'reference_logprob': 2} if config['models']['reference'] else {}),
            'temperature': 0,
        },
        on_policy=True,
    ),
}


def register(name: str, kind: Kind) -> None:
    """Adds a stage kind."""
    KINDS[name] = kind


def get_kind(name: str) -> Kind:
    """The kind of that name, or InputError with the nearest known one."""
    if name not in KINDS:
        raise InputError(f'stage kind {name!r}{did_you_mean(name, KINDS)}')
    return KINDS[name]


def stage_objective(stage: Mapping[str, Any], model: ModelConfig) -> Objective:
    """What a stage minimises: its kind's objective, with the terms that any stage may add."""
    extra = regularizers(stage['loss'], model.num_nextn_predict_layers, model.is_moe)
    return joined(get_kind(stage['kind']).objective(stage), extra)


def batch_shapes(stage: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a stage's batches: most [batch_size, sequence_length], without any data read."""
    shape = (stage['batch_size'], stage['sequence_length'])
    shapes = {name: jax.ShapeDtypeStruct(shape, x.dtype) for name, x in empty_batch(1, 1, 0).items()}
    extra = get_kind(stage['kind']).extra(stage)
    return shapes | {name: jax.ShapeDtypeStruct(shape[:rank], np.float32) for name, rank in extra.items()}


def stage_defaults(kind: str) -> dict[str, Any]:
    """All fields of a stage of that kind, with their defaults."""

    def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
        both = {**base, **more}
        for name, value in base.items():
            if isinstance(value, dict):
                both[name] = merged(value, more.get(name, {}))
        return both

    return {**merged(COMMON, get_kind(kind).defaults), 'kind': kind}
