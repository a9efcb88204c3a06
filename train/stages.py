"""What differs between stages. A stage kind is a value: its defaults, its objective and its stream. Some do not train:
they make records, or merge checkpoints.

Adding a kind is one entry in KINDS (or one call of `register`); the loop does not change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from data.errors import InputError, did_you_mean
from data.packing import empty_batch
from data.stream import Stream
from model.config import ModelConfig
from train.act.make import MAKE, Maker
from train.act.recipes import attempts, labels, revisions, rewrites
from train.act.signs import LIMITS
from train.learn.merge import merge_weights
from train.learn.objectives import Objective, joined, next_token, regularizers
from train.learn.policy import distillation, policy_gradient
from train.learn.preference import WITHOUT_REFERENCE, bradley_terry, kahneman_tversky, preference, process_reward
from train.learn.streams import Context, distilled, games, making, proposals, records, rollout_stamps, rollouts, rows

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of stage.

    Attributes:
        defaults: fields, of a stage that trains those beyond COMMON.
        objective, stream: how they are made, of a stage that trains; without them it learns to go on with documents.
        extra: of the stage's config, the arrays its batches hold beyond those of `data.packing.empty_batch`.
        on_policy: whether the stream samples, from `prompts` prompts `samples` answers of up to `max_tokens` tokens.
        make: how records are made, of a stage that makes some.
        merge: of the stage's config, the weights of the checkpoints in `parents`, of a stage that averages them.
    """

    defaults: Mapping[str, Any]
    objective: Callable[[Mapping[str, Any]], Objective] = lambda _: next_token()
    stream: Callable[[Context], Stream] = lambda context: rows(context, split_documents=True)
    extra: Callable[[Mapping[str, Any]], Shapes] = lambda _: {}
    on_policy: bool = False
    make: Callable[[Context], Maker] | None = None
    merge: Callable[[Mapping[str, Any]], list[float]] | None = None

    @property
    def trains(self) -> bool:
        return self.make is None and self.merge is None


COMMON: dict[str, Any] = {
    'kind': '',
    # NAME or NAME@STEP; the path (with a slash) of an imported model or of another run's stage; '' starts from scratch.
    'parent': '',
    # What evaluations of the parent have to say before the stage begins: see `train.launch.edges.pass_gate`.
    'gate': {},
    'models': {},  # other checkpoints the stage needs, by role
    'model': {},  # fields of the model that change from this stage on, such as rope_theta
    # A regular expression; parameters whose path, such as layers/self_attn/q_proj, it is not found in stay as they are.
    'trainable': '',
    'seed': -1,  # -1: the run's
    'steps': 100,
    'batch_size': 16,  # rows of a step
    'sequence_length': 256,  # tokens of a row
    'microbatches': 1,  # a step's rows are taken in this many parts, gradients accumulated
    'save_every': 100,
    'keep': 2,
    # Seconds after which a step, with what follows it, is taken to hang: the process ends with status 75. 0: never.
    'step_deadline': 0.0,
    # Steps between comparisons of the state's copies on several devices, as before every save. 0: none at all.
    'compare_every': 100,
    # Steps between those that are taken twice, from the same state, for the results to be compared. 0: none.
    'replay_every': 1000,
    'keep_optimizer': False,  # take over the parent's optimizer state
    'evaluations': (),
    'evaluate_every': 0,  # steps between evaluations on the way; 0: only at the end
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
    # Limits of metrics: a number that one is not to be above, or {'above': x, 'below': y, 'then': what to do}: 'alarm',
    # an event; 'stop' the run; or 'rewind' by `guard.back` steps, to go on without their updates.
    'alarms': {'experts/starved': 0.5},
    # Against spikes: see `train.learn.health`.
    'guard': {
        # 0: off. 6 is usual, in stages that predict text: losses of pairs and rewards have longer tails. The compiled
        # update is another program with it, which rounds differently.
        'sigma': 0.0,
        'window': 128,
        'patience': 8,
        'policy': 'skip',
        'back': 100,
    },
    # Heads whose attention logits get larger have their query and key weights scaled down: see `model.clip`. 0: none.
    'qk_clip': 0.0,
    'loss': {'multi_token': 0.0, 'z_loss': 0.0, 'sequence_balance': 1e-4, 'batch_balance': 0.0},
}


def _arrays(c: Mapping[str, Any], *names: str) -> Shapes:
    """float32, one number a token."""
    return {name: jax.ShapeDtypeStruct((c['batch_size'], c['sequence_length']), np.float32) for name in names}


def _scalars(*names: str) -> Shapes:
    return {name: jax.ShapeDtypeStruct((), np.float32) for name in names}


def _rollout_arrays(c: Mapping[str, Any]) -> Shapes:
    scalars = ('temperature', *(('answers',) if c['weighting'] != 'token' else ()))
    return _arrays(c, 'advantage', 'behavior_logprob', *rollout_stamps(c)) | _scalars(*scalars)


def _teacher_arrays(c: Mapping[str, Any]) -> Shapes:
    shape = (c['batch_size'], c['sequence_length'], c['top'])
    return {
        'teacher_ids': jax.ShapeDtypeStruct(shape, np.int32),
        'teacher_logprob': jax.ShapeDtypeStruct(shape, np.float32),
    }


_MIXTURE: dict[str, Any] = {'mixture': ()}
_TUNING: dict[str, Any] = {**_MIXTURE, 'optimizer': {'schedule': 'linear'}}
_RECORDS: dict[str, Any] = {**_TUNING, 'records': 16}  # a step
_OTHERS = {'reference': '', 'reward': '', 'teacher': ''}  # models that a stage may name that samples


def _preference(variant: str, beta: float, **loss: Any) -> Kind:
    """A stage that learns from pairs of answers (see `train.learn.preference`)."""
    reference = variant not in WITHOUT_REFERENCE
    return Kind(
        {
            **_RECORDS,
            **({'models': {'reference': ''}} if reference else {}),
            'loss': {'variant': variant, 'beta': beta, 'label_smoothing': 0.0, 'gamma': 0.0, 'nll': 0.0, **loss},
        },
        lambda c: preference(c['loss']),
        lambda context: records(context, 'pair', reference),
        extra=lambda c: _arrays(c, 'target', 'margin', *(('reference_logprob',) if reference else ())),
    )


def _reinforcement(
    loss: Mapping[str, Any] | None = None,
    stream: Callable[[Context], Stream] = rollouts,
    **fields: Any,
) -> Kind:
    """A stage that learns from its own answers. Each method is a choice among these fields."""
    defaults = {
        'models': _OTHERS,
        'task': {'name': ''},
        'levels': (),  # options of the task, one mapping a level of difficulty, which `curriculum` chooses from
        'curriculum': 'uniform',  # or 'solve_rate'
        'reward': 'verifier',  # or 'format', 'random': control arms; 'none'. A reward model adds its own
        'strict': {},  # options of a stricter verifier, asked for the gap to the reward alone
        'alarms': LIMITS,
        'process_coefficient': 0.0,  # times the score of each judged step, where it ends
        'algorithm': 'grpo',  # see `train.act.algorithms`
        'weighting': 'token',  # tokens count alike in the batch; or 'answer': answers do; or 'constant': 1 / max_tokens
        'problems': 0,  # of each level, posed again and again; 0: always new ones
        'prompts': 32,
        'samples': 8,
        'temperature': 1.0,
        'max_tokens': 64,
        'epochs': 1,
        'minibatches': 1,  # updates in one pass over a rollout
        'refills': 0,
        'overlong_buffer': 0,
        'records': '',  # of its answers, for other stages to draw on: 'right', those that the verifier takes, or 'all'
        'replay_experts': False,  # the experts that the sampler chose are used in the update (Zheng et al. 2025)
        'discount': 1.0,
        'gae_lambda': 1.0,
        'kl_reward': 0.0,  # penalty in the reward; with kl_target it adapts so that an answer's KL comes to that
        'kl_target': 0.0,
        'kl_horizon': 10_000,
        'optimizer': {'schedule': 'constant', 'weight_decay': 0.0},
        **fields,
        'loss': {
            'surrogate': 'clip',
            'ratio': 'token',
            'clip_low': 0.2,
            'clip_high': 0.28,
            'dual_clip': 0.0,
            'importance': 'none',
            'importance_cap': 2.0,
            'kl_coefficient': 0.0,
            'kl_estimator': 'k3',
            'value_coefficient': 0.0,
            'value_clip': 0.2,
            **(loss or {}),
        },
    }
    return Kind(defaults, lambda c: policy_gradient(c['loss']), stream, extra=_rollout_arrays, on_policy=True)


_VALUE = {'value_head': True}
_JUDGES: dict[str, Any] = {
    'samples': 4,
    'judges': {},
}  # answers a prompt; specs of `train.act.recipes`.JUDGES

KINDS: dict[str, Kind] = {
    'pretrain': Kind(_MIXTURE),
    'midtrain': Kind(
        {
            **_MIXTURE,
            # A branch of a run at a constant rate, which goes on with its moments and its rate (Hu et al. 2024, section
            # 4; Hagele et al. 2024). Behind a run whose rate has come down, or weights alone, say False.
            'keep_optimizer': True,
            'optimizer': {
                'schedule': 'linear',  # to zero (OLMo 2, section 4; Bergsma et al. 2025, "Straight to zero")
                'warmup': 0.0,  # a new one is for runs whose rate has come down (Ibrahim et al. 2024)
            },
        }  # the stream is the stage's own: its seed and name decide the order (OLMo 2, section 4)
    ),
    'sft': Kind(
        {**_TUNING, 'weighting': 'token'},  # or 'example': every record counts the same, however long
        lambda _: next_token(),
        lambda context: rows(context, split_documents=False),
    ),
    # Preferences; a reward model, which judges whole answers, and one that judges their steps.
    'dpo': _preference('sigmoid', 0.1),
    'simpo': _preference('simpo', 2.0, gamma=1.0),
    'orpo': _preference('orpo', 0.1, nll=1.0),
    'kto': Kind(
        {**_RECORDS, 'models': {'reference': ''}, 'loss': {'beta': 0.1, 'desirable': 1.0, 'undesirable': 1.0}},
        lambda c: kahneman_tversky(c['loss']),
        lambda context: records(context, 'judged', reference=True),
        extra=lambda c: _arrays(c, 'target', 'reference_logprob') | _scalars('baseline'),
    ),
    'reward_model': Kind(
        {**_RECORDS, 'model': _VALUE, 'loss': {'center': 0.01}},
        lambda c: bradley_terry(c['loss']),
        lambda context: records(context, 'pair', reference=False),
        extra=lambda c: _arrays(c, 'target', 'margin'),
    ),
    'process_reward_model': Kind(
        {**_RECORDS, 'model': _VALUE},
        lambda c: process_reward(c['loss']),
        lambda context: records(context, 'steps', reference=False),
        extra=lambda c: _arrays(c, 'target'),
    ),
    'distill': Kind(
        {**_TUNING, 'models': {'teacher': ''}, 'top': 32, 'loss': {'beta': 0.0}},
        lambda c: distillation(c['loss']),
        distilled,
        extra=_teacher_arrays,
    ),
    # Reinforcement learning. GRPO is here as it is used today: DAPO's clip and mean over tokens, and no KL penalty.
    'grpo': _reinforcement(),
    'dr_grpo': _reinforcement({'clip_high': 0.2}, algorithm='dr_grpo', weighting='constant'),
    'dapo': _reinforcement(refills=2, overlong_buffer=16),
    'gspo': _reinforcement({'ratio': 'sequence', 'clip_low': 3e-4, 'clip_high': 4e-4}, weighting='answer'),
    'cispo': _reinforcement({'surrogate': 'cispo', 'clip_low': 1.0, 'clip_high': 4.0}),
    'rloo': _reinforcement(algorithm='rloo'),
    'reinforce_plus_plus': _reinforcement(algorithm='reinforce_plus_plus'),
    'ppo': _reinforcement(
        {'clip_high': 0.2, 'value_coefficient': 0.1}, model=_VALUE, algorithm='gae', gae_lambda=0.95, minibatches=4
    ),
    'on_policy_distill': _reinforcement(algorithm='reverse_kl', reward='none'),
    # Two sides of a game, against itself or against opponents: `models.opponent...` and its own last `pool` saves.
    'self_play': _reinforcement(
        stream=games, models={**_OTHERS, 'opponent': ''}, algorithm='dr_grpo', opponent_share=0.5, pool=2, keep=3
    ),
    # The model proposes the problems that it solves, and earns something for those that it solves sometimes; a
    # proposal that is none, or not new, has `invalid_reward`. `posed` of `prompts` problems are the task's own.
    'proposer_solver': _reinforcement(stream=proposals, invalid_reward=-0.5, proposal_reward='half', posed=0),
    # What does not train: records by one or several models (see `train.act.recipes`), and averages of checkpoints.
    'attempts': Kind(
        {
            **MAKE,
            **_JUDGES,
            'rule': 'majority',
            'quorum': 1,
            'weights': {},
            'truth': '',  # a judge who is asked and has no vote: the report says how often the others are right
            'select': 'all',
            'format': 'chat',
        },
        make=making(attempts),
    ),
    'revise': Kind({**MAKE, 'principles': '', 'rounds': 1}, make=making(revisions)),
    # `template` is one of `data.rewriting.TEMPLATES`, or a text with {text} in it; the reply becomes a 'text', the
    # 'question' that the text answers, or a 'prompt' for another stage to answer.
    'rewrite': Kind({**MAKE, **_JUDGES, 'template': 'rephrase', 'into': 'text'}, make=making(rewrites)),
    'label': Kind({**MAKE, **_JUDGES, 'principles': ''}, make=making(labels)),
    'merge': Kind({'parents': (), 'weights': (), 'decay': 1.0, 'evaluations': ()}, merge=merge_weights),
}


def register(name: str, kind: Kind) -> None:
    """Adds a stage kind."""
    KINDS[name] = kind


def get_kind(name: str) -> Kind:
    """The kind of that name, or InputError with the nearest known one."""
    if name not in KINDS:
        raise InputError(f'stage kind {name!r}{did_you_mean(name, KINDS)}')
    return KINDS[name]


def training_kind(stage: Mapping[str, Any]) -> Kind:
    """The kind of a stage that trains, or InputError."""
    kind = get_kind(stage['kind'])
    if not kind.trains:
        raise InputError(f'a stage of kind {stage["kind"]!r} does not train')
    return kind


def stage_objective(stage: Mapping[str, Any], model: ModelConfig) -> Objective:
    """What a stage minimises: its kind's objective, with the terms that any stage may add."""
    extra = regularizers(stage['loss'], model.num_nextn_predict_layers, model.is_moe)
    return joined(get_kind(stage['kind']).objective(stage), extra)


def batch_shapes(stage: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a stage's batches: most [batch_size, sequence_length], without any data read."""
    shape = (stage['batch_size'], stage['sequence_length'])
    shapes = {name: jax.ShapeDtypeStruct(shape, x.dtype) for name, x in empty_batch(1, 1, 0).items()}
    return shapes | get_kind(stage['kind']).extra(stage)


def stage_defaults(kind: str) -> dict[str, Any]:
    """All fields of a stage of that kind, with their defaults."""

    def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
        both = {**base, **more}
        for name, value in base.items():
            if isinstance(value, dict):
                both[name] = merged(value, more.get(name, {}))
        return both

    chosen = get_kind(kind)
    return {**merged(COMMON if chosen.trains else {}, chosen.defaults), 'kind': kind}
