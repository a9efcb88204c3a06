"""The calls behind golden.json: each function here runs one function of TRL or verl on one set of inputs.

Nothing of the libraries is restated. Methods of trainers are called on bare objects that hold only the attributes they
read, with a stand-in model that returns the log-probabilities it is given. A call returns named tensors; `gradient_x`
is the gradient of the loss with respect to input x.
"""

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace as Bare
from typing import Any

import numpy as np
import torch
import trl
from tensordict import TensorDict
from torch.nn.functional import one_hot, pad
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.sdft import loss_utils as sdft
from trl.rewards import get_soft_overlong_punishment
from verl import DataProto
from verl.trainer.distillation.fsdp import losses as verl_distillation
from verl.trainer.ppo import core_algos, ray_trainer, rollout_corr_helper
from verl.utils import torch_functional
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.reward_manager.dapo import DAPORewardManager

Tensors = dict[str, torch.Tensor]
Call = Callable[..., Tensors]
CALLS: dict[Call, tuple[str, str, str]] = {}  # to the function it runs, the set of inputs, the precision


# Stand-ins for what the trainers read besides tensors.


class Accelerator(Bare):
    """One process on the CPU: everything gathered is what was given."""

    device, num_processes, process_index, sync_gradients = torch.device('cpu'), 1, 0, True

    def gather(self, x: Any, *_: Any, **__: Any) -> Any:
        return x

    gather_for_metrics = reduce = pad_across_processes = gather


def bare(trainer: type, config: type, options: dict[str, Any], **attributes: Any) -> Any:
    """A trainer that was never initialized: its settings, defaults included, and these attributes are all it has."""
    args = config(output_dir='.', use_cpu=True, bf16=False, report_to='none', **options)
    made = object.__new__(trainer)
    made.__dict__.update({**vars(args), 'args': args, 'accelerator': Accelerator(), 'aux_loss_enabled': False})
    made.__dict__.update(_metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1)
    made.__dict__.update(model=Bare(training=True, is_gradient_checkpointing=False), **attributes)
    return made


def runs(function: str, inputs: str, precision: str = 'float64') -> Callable[[Call], Call]:
    """Notes which library function a call runs, on which inputs, and the least precision on its way."""

    def note(call: Call) -> Call:
        CALLS[call] = (function, inputs, precision)
        return call

    return note


def graded(loss: torch.Tensor, x: Tensors, *names: str) -> Tensors:
    found = torch.autograd.grad(loss, [x[name] for name in names])
    return {'loss': loss, **{f'gradient_{name}': value for name, value in zip(names, found, strict=True)}}


def leaves(x: Tensors, *names: str) -> tuple[torch.Tensor, ...]:
    return tuple(x[name].requires_grad_() for name in names)


# Preferences and rewards (TRL).


def fused(logprob: torch.Tensor) -> Bare:
    """What a model with TRL's fused head returns; only the log-probabilities reach the losses here."""
    other = dict.fromkeys(('entropy', 'mean_logits'), torch.zeros_like(logprob))
    return Bare(log_probs=logprob, is_top1=torch.zeros_like(logprob, dtype=torch.bool), **other)


def shifted(mask: torch.Tensor) -> torch.Tensor:
    """Puts before the predicted tokens the first one, which nothing predicts."""
    return pad(mask, (1, 0))


SIDES = ('chosen_logprob', 'rejected_logprob')


@runs('trl.trainer.dpo_trainer.DPOTrainer._compute_loss', 'preference')
def dpo(x: Tensors, **options: Any) -> Tensors:
    mask = torch.cat([x['chosen_mask'], x['rejected_mask']])
    logprob = torch.cat(leaves(x, *SIDES)) * mask
    trainer = bare(trl.DPOTrainer, trl.DPOConfig, options, loss_types=options['loss_type'], precompute_ref_logps=True)
    trainer.loss_weights = trainer.loss_weights or [1.0]
    tokens = torch.ones_like(shifted(mask))
    references = {f'ref_{side}_logps': x[f'{side}_reference'] for side in ('chosen', 'rejected')}
    batch = {'input_ids': tokens, 'attention_mask': tokens, 'completion_mask': shifted(mask), **references}
    return graded(trainer._compute_loss(lambda **_: fused(logprob), batch, False), x, *SIDES)


@runs('trl.experimental.cpo.cpo_trainer.CPOTrainer.cpo_loss', 'preference')
def cdpo(x: Tensors, **options: Any) -> Tensors:
    """Conservative DPO: CPO's sigmoid loss, given log-ratios to the reference where it expects log-probabilities."""
    logprob = leaves(x, *SIDES)
    sides = zip(logprob, ('chosen', 'rejected'), strict=True)
    ratios = [(p * x[f'{side}_mask']).sum(1) - x[f'{side}_reference'] for p, side in sides]
    return graded(bare(CPOTrainer, CPOConfig, options).cpo_loss(*ratios)[0].mean(), x, *SIDES)


def concatenated(trainer: Any, x: Tensors) -> Tensors:
    """A whole loss of the trainers that read logits: a vocabulary of two gives token 0 the wanted log-probability."""

    def model(ids: torch.Tensor, **_: Any) -> Bare:
        p = torch.cat(leaves(x, *SIDES))
        logits = torch.stack([p, torch.log(-torch.expm1(p))], dim=-1)
        return Bare(logits=pad(logits, (0, 0, 0, 1)))

    batch = {}
    for side in ('chosen', 'rejected'):
        batch[f'{side}_input_ids'] = torch.zeros_like(shifted(x[f'{side}_mask']))
        batch[f'{side}_attention_mask'] = pad(x[f'{side}_valid'], (1, 0), value=1)
        batch[f'{side}_labels'] = torch.where(shifted(x[f'{side}_mask']) == 1, 0, -100)
    return graded(trainer.get_batch_loss_metrics(model, batch)[0], x, *SIDES)


@runs('trl.experimental.cpo.cpo_trainer.CPOTrainer.get_batch_loss_metrics', 'preference')
def cpo(x: Tensors, **options: Any) -> Tensors:
    return concatenated(bare(CPOTrainer, CPOConfig, options, is_encoder_decoder=False, pad_token_id=0), x)


@runs('trl.experimental.orpo.orpo_trainer.ORPOTrainer.get_batch_loss_metrics', 'preference', 'float32')
def orpo(x: Tensors, **options: Any) -> Tensors:
    return concatenated(bare(ORPOTrainer, ORPOConfig, options, is_encoder_decoder=False, padding_value=0), x)


@runs('trl.trainer.kto_trainer.KTOTrainer._compute_loss', 'single')
def kto(x: Tensors, swap_mismatched: bool = False, **options: Any) -> Tensors:
    (logprob,) = leaves(x, 'logprob')
    mismatched, reference = x['mismatched'], x['mismatched_reference']
    if swap_mismatched:  # a negative estimate of the divergence, which is cut at zero
        mismatched, reference = reference, mismatched
    kl = pad(mismatched[:, None], (x['valid'].shape[1] - 1, 0))
    ids = torch.ones_like(shifted(x['valid']))
    trainer = bare(trl.KTOTrainer, trl.KTOConfig, options, calculate_KL=options['loss_type'] == 'kto')
    trainer.precompute_ref_logps = True
    batch = {'input_ids': ids, 'attention_mask': ids, 'completion_mask': shifted(x['valid']), 'label': x['desirable']}
    batch |= {'KL_input_ids': 2 * ids, 'KL_attention_mask': ids, 'KL_completion_mask': ids}
    batch |= {'ref_logps': x['reference'], 'ref_KL_logps': reference}

    def model(input_ids: torch.Tensor, **_: Any) -> Bare:
        return fused(kl if input_ids[0, 0] == 2 else logprob * x['valid'])

    return graded(trainer._compute_loss(model, batch, False), x, 'logprob')


@runs('trl.trainer.reward_trainer.RewardTrainer.compute_loss', 'preference')
def reward_model(x: Tensors, margin: bool = False, **options: Any) -> Tensors:
    logits = torch.cat(leaves(x, 'chosen_reward', 'rejected_reward'))[:, None]
    batch = {'attention_mask': torch.ones(1), **({'margin': x['margin']} if margin else {})}
    loss = bare(trl.RewardTrainer, trl.RewardConfig, options).compute_loss(lambda **_: Bare(logits=logits), batch)
    return graded(loss, x, 'chosen_reward', 'rejected_reward')


# Advantages.


@runs('verl.trainer.ppo.core_algos.compute_*_advantage, by its registered name', 'rollout')
def verl_advantage(x: Tensors, estimator: str, reward: str = 'outcome_reward', **arguments: Any) -> Tensors:
    rewards = x[reward]
    if rewards.ndim == 1:  # one for each sequence: it goes to the last token
        rewards = one_hot(x['valid'].sum(1) - 1, x['valid'].shape[1]) * rewards[:, None]
    given = {'token_level_rewards': rewards, 'response_mask': x['mask']}
    if estimator == 'gae':
        given['values'] = x['value']
    elif estimator == 'remax':
        given['reward_baselines'] = x['reward_baseline']
    elif estimator != 'reinforce_plus_plus':
        given['index'] = x[arguments.pop('index', 'group')].numpy()
    if 'config' in arguments:
        arguments['config'] = Bare(**arguments['config'])
    advantage, returned = core_algos.get_adv_estimator_fn(estimator)(**given, **arguments)
    return {'advantage': advantage, 'return': returned}


def ragged(x: Tensors, values: torch.Tensor) -> list[list[Any]]:
    return [row[:length].tolist() for row, length in zip(values, x['valid'].sum(1), strict=True)]


def scored(trainer: type, config: type, options: dict[str, Any], x: Tensors, rewards: torch.Tensor) -> dict[str, Any]:
    """What _generate_and_score_completions returns when sampling, scoring and the models' forward passes are given."""
    ids = ragged(x, torch.ones_like(x['valid']))
    generated = (ids, ids, ragged(x, x['mask']), ids, ragged(x, x['sampler_logprob']), {}, None, None)
    options = {'per_device_train_batch_size': len(rewards), 'num_generations': 4, **options}
    names = [str(i) for i in range(rewards.shape[1])]
    logs = defaultdict(lambda: defaultdict(list), prompt=[], completion=[], advantages=[])
    made = bare(
        trainer, config, options, reward_func_names=names, reward_funcs=names, ref_model='reference', _logs=logs
    )
    made.reward_weights = torch.ones(len(names))
    made._generate = lambda _: generated if trainer is trl.GRPOTrainer else (ids, ids, ids)
    made._calculate_rewards = lambda *_: rewards

    def forward(model: Any, *_: Any, **__: Any) -> tuple:
        return x['reference_logprob' if model == 'reference' else 'old_logprob'], None, None

    made._get_per_token_logps_and_entropies = forward
    made._tokenizer = Bare(pad_token_id=0)
    made._pending_extra_logs, made._pending_metrics = {}, {}
    made.environment_factories = made.environments = made.tools = None
    return made._generate_and_score_completions([{'prompt': 'p'}] * len(rewards))


@runs('trl.trainer.grpo_trainer.GRPOTrainer._generate_and_score_completions', 'rollout')
def trl_group_advantage(x: Tensors, reward: str = 'reward', **options: Any) -> Tensors:
    return {
        'advantage': scored(trl.GRPOTrainer, trl.GRPOConfig, options, x, x[reward].reshape(len(x['reward']), -1))[
            'advantages'
        ]
    }


@runs('trl.trainer.rloo_trainer.RLOOTrainer._generate_and_score_completions', 'rollout')
def trl_rloo_advantage(x: Tensors, **options: Any) -> Tensors:
    return {'advantage': scored(trl.RLOOTrainer, trl.RLOOConfig, options, x, x['reward'][:, None])['advantages']}


@runs('trl.trainer.grpo_trainer.GRPOTrainer._generate_and_score_completions', 'rollout')
def trl_sampler_weight(x: Tensors, **options: Any) -> Tensors:
    options = {f'vllm_importance_sampling_{name}': value for name, value in options.items()}
    found = scored(trl.GRPOTrainer, trl.GRPOConfig, {'use_vllm': True, **options}, x, x['reward'][:, None])
    return {'weight': found['importance_sampling_ratio']}


@runs('verl.utils.torch_functional.masked_whiten', 'rollout')
def verl_whiten(x: Tensors, shift_mean: bool) -> Tensors:
    return {'whitened': torch_functional.masked_whiten(x['token_advantage'], x['mask'], shift_mean)}


# Policy, value, entropy and divergence terms.


def actor(loss_mode: str = 'vanilla', **changed: Any) -> ActorConfig:
    policy = PolicyLossConfig(loss_mode=loss_mode, **changed.pop('policy_loss', {}))
    return ActorConfig(strategy='fsdp', rollout_n=4, ppo_micro_batch_size_per_gpu=1, policy_loss=policy, **changed)


@runs('verl.trainer.ppo.core_algos.compute_policy_loss_*, by its registered name', 'rollout')
def verl_policy(
    x: Tensors,
    loss_mode: str,
    aggregation: str,
    advantage: str = 'advantage',
    weight: dict | None = None,
    **config: Any,
) -> Tensors:
    (logprob,) = leaves(x, 'logprob')
    advantages = x[advantage] if x[advantage].ndim == 2 else x[advantage][:, None].expand_as(logprob)
    weights = verl_sampler_weight(x, **weight)['weight'] if weight else None
    policy = PolicyLossConfig(loss_mode=loss_mode, **config.pop('policy_loss', {}))
    settings = ActorConfig(strategy='fsdp', rollout_n=4, ppo_micro_batch_size_per_gpu=1, policy_loss=policy, **config)
    loss, metrics = core_algos.get_policy_loss_fn(loss_mode)(
        x['old_logprob'], logprob, advantages, x['mask'], aggregation, settings, weights
    )
    counted = {k.removeprefix('actor/pg_'): torch.tensor(v) for k, v in metrics.items() if 'pg_' in k}
    return {**graded(loss, x, 'logprob'), **counted}


def trl_loss(trainer: type, config: type, options: dict[str, Any], x: Tensors, *names: str, **batch: Any) -> Tensors:
    found = (*leaves(x, 'logprob', 'entropy'), None)
    made = bare(trainer, config, options, _get_per_token_logps_and_entropies=lambda *_, **__: found)
    made.epsilon_low, made.epsilon_high = made.epsilon, made.epsilon if made.epsilon_high is None else made.epsilon_high
    made.current_gradient_accumulation_steps = made.args.steps_per_generation = 1
    made._entropy_bonus_enabled = 'entropy_coef' in options
    ids = torch.ones_like(x['valid'])
    batch |= {'prompt_ids': ids, 'prompt_mask': ids, 'completion_ids': ids, 'completion_mask': x['valid']}
    return graded(made._compute_loss(None, {**batch, 'advantages': x['advantage']}), x, *names)


@runs('trl.trainer.grpo_trainer.GRPOTrainer._compute_loss', 'rollout')
def trl_policy(x: Tensors, gradient: tuple[str, ...] = (), sampler: dict | None = None, **options: Any) -> Tensors:
    batch = {'tool_mask': x['mask'], 'num_items_in_batch': x['mask'].sum()}
    batch |= {'old_per_token_logps': x['old_logprob'], 'ref_per_token_logps': x['reference_logprob']}
    if sampler:
        batch['importance_sampling_ratio'] = trl_sampler_weight(x, **sampler)['weight']
        options['use_vllm'] = True
    return trl_loss(trl.GRPOTrainer, trl.GRPOConfig, options, x, 'logprob', *gradient, **batch)


@runs('trl.trainer.rloo_trainer.RLOOTrainer._compute_loss', 'rollout')
def trl_rloo_policy(x: Tensors, **options: Any) -> Tensors:
    old = (x['old_logprob'] * x['valid']).sum(1)
    return trl_loss(trl.RLOOTrainer, trl.RLOOConfig, options, x, 'logprob', old_logps=old)


@runs('verl.trainer.ppo.rollout_corr_helper.compute_rollout_correction_weights', 'rollout')
def verl_sampler_weight(x: Tensors, **options: Any) -> Tensors:
    log_ratio = x['old_logprob'] - x['sampler_logprob']
    return {'weight': rollout_corr_helper.compute_rollout_correction_weights(log_ratio, x['mask'], **options)[0]}


@runs('verl.trainer.ppo.rollout_corr_helper.compute_rollout_rejection_mask', 'rollout')
def verl_sampler_mask(x: Tensors, rollout_rs: str, rollout_rs_threshold: str) -> Tensors:
    log_ratio = x['old_logprob'] - x['sampler_logprob']
    kept, _ = rollout_corr_helper.compute_rollout_rejection_mask(log_ratio, x['mask'], rollout_rs, rollout_rs_threshold)
    return {'mask': kept}


@runs('verl.trainer.ppo.core_algos.compute_value_loss', 'rollout')
def verl_value(x: Tensors, cliprange_value: float, loss_agg_mode: str) -> Tensors:
    (prediction,) = leaves(x, 'value_prediction')
    loss, clipped = core_algos.compute_value_loss(
        prediction, x['return'], x['value'], x['mask'], cliprange_value, loss_agg_mode
    )
    return {**graded(loss, x, 'value_prediction'), 'clipped_fraction': clipped}


@runs('verl.trainer.ppo.core_algos.compute_entropy_loss, entropy_from_logits', 'distillation')
def verl_entropy(x: Tensors, loss_agg_mode: str) -> Tensors:
    (logits,) = leaves(x, 'student_logits')
    loss = core_algos.compute_entropy_loss(logits, x['mask'], loss_agg_mode)
    return {**graded(loss, x, 'student_logits'), 'entropy': torch_functional.entropy_from_logits(logits)}


@runs('verl.trainer.ppo.core_algos.kl_penalty', 'rollout')
def verl_divergence(x: Tensors, kl_penalty: str) -> Tensors:
    """The estimate at every token, and the gradient of the plain sum of them all."""
    (logprob,) = leaves(x, 'logprob')
    estimate = core_algos.kl_penalty(logprob, x['reference_logprob'], kl_penalty)
    return {'estimate': estimate, 'gradient_logprob': torch.autograd.grad(estimate.sum(), logprob)[0]}


@runs('verl.trainer.ppo.ray_trainer.apply_kl_penalty', 'rollout')
def verl_reward_penalty(x: Tensors, kl_penalty: str, kl_coefficient: float, target: float, horizon: int) -> Tensors:
    control = core_algos.AdaptiveKLController(kl_coefficient, target, horizon)
    names = {'response_mask': 'mask', 'token_level_scores': 'outcome_reward'}
    names |= {'old_log_probs': 'old_logprob', 'ref_log_prob': 'reference_logprob'}
    data = DataProto(batch=TensorDict({k: x[v] for k, v in names.items()}, batch_size=len(x['mask'])))
    data, metrics = ray_trainer.apply_kl_penalty(data, control, kl_penalty)
    observed = torch.tensor(metrics['actor/reward_kl_penalty'])
    return {
        'token_reward': data.batch['token_level_rewards'],
        'observed': observed,
        'next_coefficient': torch.as_tensor(control.value),
    }


@runs('verl.trainer.ppo.core_algos.AdaptiveKLController.update', 'divergence')
def verl_controller(x: Tensors, kl_coefficient: float, target: float, horizon: int, steps: int) -> Tensors:
    control = core_algos.AdaptiveKLController(kl_coefficient, target, horizon)
    values = []
    for observed in x['observed'].tolist():
        control.update(observed, steps)
        values.append(float(control.value))
    return {'coefficient': torch.tensor(values)}


@runs('trl.rewards.other_rewards.get_soft_overlong_punishment', 'length')
def trl_overlong(x: Tensors, max_completion_len: int, soft_punish_cache: int) -> Tensors:
    ids = [[0] * length for length in x['length'].tolist()]
    return {'reward': torch.tensor(get_soft_overlong_punishment(max_completion_len, soft_punish_cache)(ids))}


@runs('verl.workers.reward_manager.dapo.DAPORewardManager.__call__', 'length', 'float32')
def verl_overlong(x: Tensors, max_resp_len: int, buffer: int, penalty_factor: float) -> Tensors:
    """With a score of zero, what is left is the penalty, at each answer's last token (float32)."""
    count, width = len(x['length']), int(x['length'].max())
    mask = (torch.arange(width) < x['length'][:, None]).long()
    batch = {'prompts': mask[:, :1], 'responses': mask, 'attention_mask': torch.cat([mask[:, :1], mask], dim=1)}
    others = {'reward_model': [{'ground_truth': ''}] * count, 'data_source': [''] * count}
    manager = DAPORewardManager(
        tokenizer=Bare(decode=lambda *_, **__: '', eos_token='</s>'),
        num_examine=0,
        compute_score=lambda **_: 0.0,
        max_resp_len=max_resp_len,
        overlong_buffer_cfg=Bare(enable=True, len=buffer, penalty_factor=penalty_factor, log=False),
    )
    data = DataProto.from_dict(batch, {k: np.array(v, dtype=object) for k, v in others.items()})
    return {'reward': manager(data).sum(1)}


# Distillation.


@runs('trl.experimental.gkd.gkd_trainer.GKDTrainer.generalized_jsd_loss', 'distillation')
def gkd(x: Tensors, **options: Any) -> Tensors:
    (student,) = leaves(x, 'student_logits')
    loss = GKDTrainer.generalized_jsd_loss(student, x['teacher_logits'], x['labels'], **options)
    return graded(loss, x, 'student_logits')


@runs('trl.experimental.iw_opd.iw_opd_trainer.IWOPDTrainer.generalized_jsd_loss', 'distillation')
def top_k(x: Tensors, **options: Any) -> Tensors:
    (student,) = leaves(x, 'student_logits')
    loss = IWOPDTrainer.generalized_jsd_loss(student, x['teacher_logits'], x['labels'], **options)
    return graded(loss, x, 'student_logits')


@runs('trl.experimental.sdft.loss_utils.compute_topk_self_distillation_loss', 'distillation')
def student_top_k(x: Tensors, **options: Any) -> Tensors:
    (student,) = leaves(x, 'student_logits')
    losses = sdft.compute_topk_self_distillation_loss(student, x['teacher_logits'], **options)
    return {'losses': losses, 'gradient_student_logits': torch.autograd.grad(losses.sum(), student)[0]}


@runs('verl.trainer.distillation.fsdp.losses.compute_forward_kl_topk', 'distillation', 'float32')
def verl_teacher_top_k(x: Tensors, k: int, log_prob_min_clamp: float | None) -> Tensors:
    (student,) = leaves(x, 'student_logits')
    flat = student.reshape(1, -1, student.shape[-1])
    found = x['teacher_logits'].log_softmax(-1).reshape(flat.shape[1:]).topk(k)
    given = [torch.nested.as_nested_tensor([t], layout=torch.jagged) for t in found]
    config = Bare(distillation_loss=Bare(log_prob_min_clamp=log_prob_min_clamp))
    out = verl_distillation.compute_forward_kl_topk(flat, *given, config, 'thd')
    losses = out['distillation_losses'].reshape(student.shape[:2])
    return {
        'losses': losses,
        'gradient_student_logits': torch.autograd.grad(losses.sum(), student)[0],
        'student_mass': out['student_mass'].reshape(student.shape[:2]),
    }
