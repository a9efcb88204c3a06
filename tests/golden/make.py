"""Golden values of post-training objectives and advantages, from the published libraries TRL and verl.

Writes golden.json: input sets, and cases that were computed from them. README.md beside this file explains the cases
and the conventions they show; calls.py holds the calls.

    pip install -r requirements-golden.txt && python tests/golden/make.py
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import calls
import numpy as np
import torch

SEQUENCES, LENGTH, GROUP = 8, 7, 4
OUT = Path(__file__).with_name('golden.json')
CASES: dict[str, tuple[calls.Call, str, dict[str, Any]]] = {}


def make_inputs() -> dict[str, dict[str, np.ndarray]]:
    """The shared input sets, float64 and int64. Masked places hold numbers too: they must not matter."""
    random = np.random.default_rng(20260101)
    shape, places = (SEQUENCES, LENGTH), np.arange(LENGTH)
    normal = random.normal

    lengths = np.array([7, 5, 6, 3, 7, 4, 2, 6])
    valid = (places < lengths[:, None]).astype(np.int64)
    mask = valid.copy()
    mask[[0, 0, 4, 7], [2, 3, 1, 4]] = 0  # observations: tokens that an environment wrote
    old = -random.gamma(3.0, 0.5, shape) - 0.05
    logprob = np.minimum(old + normal(0, 0.3, shape), -0.01)
    logprob[[1, 2, 3, 4], [1, 2, 0, 3]] = old[[1, 2, 3, 4], [1, 2, 0, 3]] = -3.0
    logprob[[1, 2, 3, 4], [1, 2, 0, 3]] += [1.7, 1.6, -1.4, -1.3]  # ratios beyond every clip, for both signs
    reward = np.array([1.0, 0.0, 0.25, 1.0, 0.3, -0.5, 0.8, 0.1])
    outcome = np.zeros(shape)
    outcome[np.arange(SEQUENCES), lengths - 1] = reward
    rollout = {
        'logprob': logprob,
        'old_logprob': old,
        'sampler_logprob': old + normal(0, 0.35, shape),
        'reference_logprob': logprob + normal(0, 0.4, shape),
        'entropy': random.uniform(0.1, 2.0, shape),
        'valid': valid,
        'mask': mask,
        'advantage': np.array([1.2, -0.7, 0.4, -1.5, 0.9, -0.3, -1.1, 0.6]),
        'token_advantage': normal(0, 1, shape),
        'group': np.repeat([0, 1], GROUP),
        'group_single': np.array([0, 0, 0, 1, 2, 2, 2, 2]),
        'reward': reward,
        'reward_equal': np.array([1.0, 0.0, 0.25, 1.0, 0.7, 0.7, 0.7, 0.7]),
        'reward_parts': normal(0, 1, (SEQUENCES, 2)),
        'reward_baseline': normal(0, 0.5, SEQUENCES),
        'outcome_reward': outcome,
        'token_reward': outcome + 0.1 * normal(0, 1, shape) * mask,
        'value': normal(0, 0.5, shape),
        'value_prediction': normal(0, 0.6, shape),
        'return': normal(0, 0.6, shape),
    }
    empty = mask.copy()
    empty[6] = 0

    pairs, prompt = SEQUENCES // 2, 2
    chosen, rejected = np.array([[7, 5, 6, 4], [6, 7, 3, 5]])[:, :, None]
    preference = {
        'chosen_logprob': -random.gamma(3.0, 0.4, (pairs, LENGTH)) - 0.05,
        'rejected_logprob': -random.gamma(3.0, 0.5, (pairs, LENGTH)) - 0.05,
        'chosen_valid': (places < chosen).astype(np.int64),
        'rejected_valid': (places < rejected).astype(np.int64),
        'chosen_mask': ((places >= prompt) & (places < chosen)).astype(np.int64),
        'rejected_mask': ((places >= prompt) & (places < rejected)).astype(np.int64),
    }
    for side in ('chosen', 'rejected'):
        total = (preference[f'{side}_logprob'] * preference[f'{side}_mask']).sum(1)
        preference[f'{side}_reference'] = total + normal(0, 2.0, pairs)
        preference[f'{side}_reward'] = normal(0, 1, pairs)
    preference['margin'] = random.uniform(0, 1, pairs)

    total = (logprob * valid).sum(1)
    single = {
        'logprob': logprob,
        'valid': valid,
        'reference': total + normal(-0.2, 1.0, SEQUENCES),
        'desirable': np.array([1, 0, 1, 1, 0, 0, 1, 0]),
        'mismatched': old.sum(1),
        'mismatched_reference': old.sum(1) - random.uniform(0.1, 0.6, SEQUENCES),
    }
    labels = np.array([[3, 0, -100], [5, 1, 2]])
    return {
        'rollout': rollout,
        'rollout_empty': {**rollout, 'mask': empty},
        'preference': preference,
        'single': single,
        'distillation': {
            'student_logits': normal(0, 1.5, (2, 3, 6)),
            'teacher_logits': normal(0, 1.5, (2, 3, 6)),
            'labels': labels,
            'mask': (labels != -100).astype(np.int64),
        },
        'length': {'length': np.array([1, 8, 12, 13, 16, 19, 20, 22])},
        'divergence': {'observed': np.array([0.02, 0.3, 0.09, 0.11, 0.005, 1.0])},
    }


def add(name: str, call: calls.Call, inputs: str = '', **arguments: Any) -> None:
    assert name not in CASES, name
    CASES[name] = (call, inputs or calls.CALLS[call][1], arguments)


# Preferences and rewards.

PREFERENCE = {'beta': 0.3}
for kind in 'sigmoid hinge ipo sigmoid_norm sft nca_pair bco_pair sppo_hard discopop apo_zero apo_down'.split():
    add(f'dpo_{kind}', calls.dpo, loss_type=[kind], **PREFERENCE)
for kind in ('robust', 'exo_pair', 'aot', 'aot_unpaired'):
    add(f'dpo_{kind}', calls.dpo, loss_type=[kind], label_smoothing=0.1, **PREFERENCE)
add('dpo_sigmoid_sft', calls.dpo, loss_type=['sigmoid', 'sft'], loss_weights=[1.0, 0.5], **PREFERENCE)
add('dpo_length_desensitized', calls.dpo, loss_type=['sigmoid'], ld_alpha=0.4, **PREFERENCE)
for kind in ('forward_kl', 'js_divergence'):
    add(f'dpo_{kind}', calls.dpo, loss_type=['sigmoid'], f_divergence_type=kind, **PREFERENCE)
add('cdpo', calls.cdpo, loss_type='sigmoid', label_smoothing=0.1, **PREFERENCE)

SIMPO = {'loss_type': 'simpo', 'beta': 2.0, 'simpo_gamma': 0.5, 'cpo_alpha': 0.0}
add('simpo', calls.cpo, **SIMPO)
add('simpo_smoothed', calls.cpo, label_smoothing=0.1, **SIMPO)
add('alphapo', calls.cpo, alpha=0.25, **SIMPO)
for kind in ('sigmoid', 'hinge', 'ipo'):
    add(f'cpo_{kind}', calls.cpo, loss_type=kind, cpo_alpha=1.0, **PREFERENCE)
add('orpo', calls.orpo, **PREFERENCE)

KTO = {'beta': 0.1, 'desirable_weight': 1.0, 'undesirable_weight': 1.33}
add('kto', calls.kto, loss_type='kto', **KTO)
add('kto_clamped', calls.kto, loss_type='kto', swap_mismatched=True, **KTO)
add('kto_apo_zero', calls.kto, loss_type='apo_zero_unpaired', **KTO)
add('reward_bradley_terry', calls.reward_model)
add('reward_margin', calls.reward_model, margin=True)
add('reward_centered', calls.reward_model, margin=True, center_rewards_coefficient=0.01)

# Advantages.

add('verl_gae', calls.verl_advantage, estimator='gae', reward='token_reward', gamma=0.97, lam=0.9)
add('verl_gae_undiscounted', calls.verl_advantage, estimator='gae', reward='token_reward', gamma=1.0, lam=1.0)
add('verl_grpo', calls.verl_advantage, estimator='grpo')
add('verl_grpo_equal', calls.verl_advantage, estimator='grpo', reward='reward_equal')
add('verl_grpo_single', calls.verl_advantage, estimator='grpo', index='group_single')
add('verl_dr_grpo', calls.verl_advantage, estimator='grpo', norm_adv_by_std_in_grpo=False)
add('verl_rloo_single', calls.verl_advantage, estimator='rloo', index='group_single')
for kind in ('rloo', 'remax', 'opo', 'gpg', 'reinforce_plus_plus_baseline'):
    add(f'verl_{kind}', calls.verl_advantage, estimator=kind)
REINFORCE = {'estimator': 'reinforce_plus_plus', 'config': {'gamma': 0.97}}
add('verl_reinforce_plus_plus', calls.verl_advantage, reward='token_reward', **REINFORCE)
add('trl_grpo', calls.trl_group_advantage, scale_rewards='group')
add('trl_grpo_equal', calls.trl_group_advantage, reward='reward_equal', scale_rewards='group')
add('trl_grpo_batch', calls.trl_group_advantage, scale_rewards='batch')
add('trl_dr_grpo', calls.trl_group_advantage, scale_rewards='none')
for name, kind in {'trl_grpo_sum': 'sum_then_normalize', 'trl_gdpo': 'normalize_then_sum'}.items():
    add(name, calls.trl_group_advantage, reward='reward_parts', multi_objective_aggregation=kind)
add('trl_rloo', calls.trl_rloo_advantage, beta=0.0, normalize_advantages=False)
add('trl_rloo_penalty', calls.trl_rloo_advantage, beta=0.1, normalize_advantages=False)
add('trl_rloo_normalized', calls.trl_rloo_advantage, beta=0.1, normalize_advantages=True)
add('verl_whiten', calls.verl_whiten, shift_mean=True)
add('verl_whiten_scale_only', calls.verl_whiten, shift_mean=False)

# Policy losses.

CLIP = {'clip_ratio_low': 0.2, 'clip_ratio_high': 0.28}
TOKEN_MEAN = {'aggregation': 'token-mean', **CLIP}
SEQUENCE_MEAN = {'aggregation': 'seq-mean-token-mean', **CLIP}
NARROW = {'clip_ratio_low': 0.1, 'clip_ratio_high': 0.15}
TRUNCATED = {'rollout_is': 'token', 'rollout_is_threshold': 2.0}
for kind in 'token-mean token-sum seq-mean-token-sum seq-mean-token-sum-norm seq-mean-token-mean'.split():
    add(f'verl_ppo_{kind.replace("-", "_")}', calls.verl_policy, loss_mode='vanilla', aggregation=kind, **CLIP)
add('verl_ppo_dual_clip', calls.verl_policy, loss_mode='vanilla', clip_ratio_c=1.5, **TOKEN_MEAN)
add('verl_ppo_token_advantage', calls.verl_policy, loss_mode='vanilla', advantage='token_advantage', **TOKEN_MEAN)
add('verl_ppo_truncated', calls.verl_policy, loss_mode='vanilla', weight=TRUNCATED, **TOKEN_MEAN)
add('verl_ppo_empty_sequence', calls.verl_policy, 'rollout_empty', loss_mode='vanilla', **SEQUENCE_MEAN)
add('verl_gspo', calls.verl_policy, loss_mode='gspo', **{**SEQUENCE_MEAN, **NARROW})
add('verl_gspo_token', calls.verl_policy, loss_mode='gspo', advantage='token_advantage', **{**SEQUENCE_MEAN, **NARROW})
add('verl_cispo', calls.verl_policy, loss_mode='cispo', **{**TOKEN_MEAN, 'clip_ratio_low': 10.0})
add('verl_cispo_two_sided', calls.verl_policy, loss_mode='cispo', **TOKEN_MEAN)
add('verl_sapo', calls.verl_policy, loss_mode='sapo', **SEQUENCE_MEAN)
add('verl_gmpo', calls.verl_policy, loss_mode='geo_mean', **SEQUENCE_MEAN)
add('verl_gpg_policy', calls.verl_policy, loss_mode='gpg', **TOKEN_MEAN)
for kind in ('reinforce', 'ppo_clip'):
    policy = {'rollout_correction': {'loss_type': kind, **TRUNCATED}}
    add(f'verl_bypass_{kind}', calls.verl_policy, loss_mode='bypass_mode', policy_loss=policy, **TOKEN_MEAN)

GRPO = {'epsilon': 0.2, 'epsilon_high': 0.28, 'max_completion_length': 10}
GSPO = {'importance_sampling_level': 'sequence', 'epsilon': 0.1, 'epsilon_high': 0.15}
MODES = {'token_truncate': 1.5, 'token_mask': 1.5, 'sequence_truncate': 2.0, 'sequence_mask': 2.0}
for kind in 'grpo bnpo dr_grpo dapo sapo vespo'.split():
    add(f'trl_{kind}_policy', calls.trl_policy, loss_type=kind, **GRPO)
add('trl_cispo_policy', calls.trl_policy, loss_type='cispo', epsilon_high=1.28)
for kind in ('grpo', 'dapo', 'luspo'):
    add(f'trl_gspo_{kind}_policy', calls.trl_policy, loss_type=kind, **GSPO)
add('trl_two_sided_policy', calls.trl_policy, loss_type='dapo', delta=1.5, **GRPO)
for name, corrected in {'trl_penalty_policy': False, 'trl_corrected_penalty_policy': True}.items():
    add(name, calls.trl_policy, loss_type='grpo', beta=0.1, use_bias_correction_kl=corrected, **GRPO)
add('trl_off_policy_mask_policy', calls.trl_policy, loss_type='grpo', off_policy_mask_threshold=0.05, **GRPO)
add('trl_high_entropy_policy', calls.trl_policy, loss_type='dapo', top_entropy_quantile=0.4, **GRPO)
add('trl_entropy_bonus_policy', calls.trl_policy, loss_type='grpo', entropy_coef=0.01, gradient=['entropy'], **GRPO)
add('trl_empty_sequence_policy', calls.trl_policy, 'rollout_empty', loss_type='grpo', **GRPO)
for name, kind in {'trl_truncated_policy': 'token_truncate', 'trl_masked_policy': 'sequence_mask'}.items():
    add(name, calls.trl_policy, loss_type='dapo', sampler={'mode': kind, 'clip_max': MODES[kind]}, **GRPO)
add('trl_rloo_policy', calls.trl_rloo_policy, epsilon=0.2)

# Between the sampler and the trainer.

for kind, maximum in MODES.items():
    add(f'trl_sampler_{kind}', calls.trl_sampler_weight, mode=kind, clip_max=maximum)
add('trl_sampler_token_mask_both', calls.trl_sampler_weight, mode='token_mask', clip_min=0.7, clip_max=1.5)
for kind in ('token', 'sequence'):
    add(f'verl_sampler_{kind}', calls.verl_sampler_weight, rollout_is=kind, rollout_is_threshold=1.5)
add('verl_sampler_token_mask', calls.verl_sampler_weight, rollout_is='token', rollout_is_threshold='0.7_1.5')
NORMALIZED = {'rollout_is_threshold': 1.5, 'rollout_is_batch_normalize': True}
add('verl_sampler_token_normalized', calls.verl_sampler_weight, rollout_is='token', **NORMALIZED)
REJECTIONS = {'token_k1': '0.7_1.5', 'token_k3': '0.1', 'seq_sum_k1': '0.4_2.5', 'seq_mean_k1': '0.9_1.1'}
for kind, threshold in {**REJECTIONS, 'seq_mean_k3': '0.08', 'seq_max_k2': '0.2'}.items():
    add(f'verl_reject_{kind}', calls.verl_sampler_mask, rollout_rs=kind, rollout_rs_threshold=threshold)

# Values, entropy, divergence, length.

for kind in ('token-mean', 'seq-mean-token-mean'):
    add(f'verl_value_{kind.replace("-", "_")}', calls.verl_value, cliprange_value=0.3, loss_agg_mode=kind)
add('verl_entropy', calls.verl_entropy, loss_agg_mode='token-mean')
for kind in ('k1', 'abs', 'k2', 'k3', 'k1+', 'k3+'):
    add(f'verl_kl_{kind.replace("+", "_straight_through")}', calls.verl_divergence, kl_penalty=kind)
CONTROL = {'kl_coefficient': 0.1, 'target': 0.1, 'horizon': 1000}
add('verl_kl_controller', calls.verl_controller, steps=64, **CONTROL)
add('verl_reward_penalty', calls.verl_reward_penalty, kl_penalty='k3', **CONTROL)
add('trl_overlong', calls.trl_overlong, max_completion_len=20, soft_punish_cache=8)
add('verl_overlong', calls.verl_overlong, max_resp_len=20, buffer=8, penalty_factor=1.0)

# Distillation.

for beta in (0.0, 0.1, 0.5, 1.0):
    add(f'gkd_beta_{beta}', calls.gkd, beta=beta)
    add(f'top_k_beta_{beta}', calls.top_k, beta=beta, top_k=2)
add('gkd_temperature', calls.gkd, beta=0.5, temperature=2.0)
add('gkd_mean', calls.gkd, beta=0.5, reduction='mean')
for beta in (0.0, 1.0):
    add(f'top_k_renormalized_beta_{beta}', calls.top_k, beta=beta, top_k=2, add_tail=False)
TOP_TWO = {'distillation_topk': 2, 'distillation_add_tail': True}
for alpha in (0.0, 0.5):
    add(f'student_top_k_alpha_{alpha}', calls.student_top_k, distillation_alpha=alpha, **TOP_TWO)
add('verl_teacher_top_k', calls.verl_teacher_top_k, k=2, log_prob_min_clamp=-10.0)


def computed(name: str, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    call, used, arguments = CASES[name]
    function, _, precision = calls.CALLS[call]
    tensors = {key: torch.tensor(value) for key, value in inputs.items()}
    outputs = call(tensors, **json.loads(json.dumps(arguments)))  # a copy, as calls may change what they are given
    return {
        'function': function,
        'inputs': used,
        'arguments': arguments,
        'precision': precision,
        'outputs': {key: value.tolist() for key, value in outputs.items()},
    }


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    inputs = make_inputs()
    parts = {
        'versions': {name: importlib.metadata.version(name) for name in ('torch', 'trl', 'verl')},
        'inputs': {name: {key: value.tolist() for key, value in arrays.items()} for name, arrays in inputs.items()},
        'cases': {name: computed(name, inputs[used]) for name, (_, used, _) in CASES.items()},
    }
    lines = {part: [f'{json.dumps(key)}: {json.dumps(value)}' for key, value in parts[part].items()] for part in parts}
    text = ',\n'.join(f'"{part}": {{\n' + ',\n'.join(rows) + '\n}' for part, rows in lines.items())
    OUT.write_text('{\n' + text + '\n}\n', encoding='utf-8')
    print(f'{len(CASES)} cases, {OUT.stat().st_size} bytes')


if __name__ == '__main__':
    main()
