"""Objectives on sampled answers: the policy gradient with its ratios, clips and penalties, values, distillation.

`loss_weight` says what each sampled token counts: 1 where all tokens of the batch are averaged, 1 / length where each
answer counts the same. The batch's scalar `answers`, where there is one, is what the sum is divided by instead of the
sum of weights: answers that were sampled but have no gradient then count in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from data.errors import InputError, did_you_mean
from model.heads import Output
from train.learn.objectives import Batch, Metrics, Objective, Terms, per_segment

stop_gradient = jax.lax.stop_gradient


def k1(gap: jax.Array) -> jax.Array:
    """log p - log ref. Unbiased as a value, so it belongs in the reward; its gradient in a loss has mean zero."""
    return -gap


def k2(gap: jax.Array) -> jax.Array:
    """(log p - log ref)^2 / 2. Biased as a value; on-policy its gradient is that of the KL, so it belongs in the
    loss."""
    return jnp.square(gap) / 2


def k3(gap: jax.Array) -> jax.Array:
    """ref / p - 1 - log(ref / p). Unbiased and never negative, so it is the one to report; GRPO has it in the loss."""
    return jnp.exp(gap) - gap - 1


# Of gap = log ref - log p, at a token sampled from p (Schulman 2020, "Approximating KL divergence").
KL_ESTIMATORS: dict[str, Callable[[jax.Array], jax.Array]] = {'k1': k1, 'k2': k2, 'k3': k3}


def token_ratio(difference: jax.Array, batch: Batch) -> jax.Array:
    """exp(log p - log p_old) of each token (Schulman et al. 2017, section 3)."""
    return jnp.exp(difference)


def sequence_ratio(difference: jax.Array, batch: Batch) -> jax.Array:
    """exp of the mean over the answer, at each of its tokens (Zheng et al. 2025, "GSPO", equation 7).

    Its gradient at a token is that of the token's own log-probability times the ratio (equation 17, "GSPO-token"),
    which for advantages that are alike over an answer, averaged over its tokens, is that of equation 5.
    """
    sampled = (batch['loss_weight'] > 0).astype(jnp.float32)
    length = jnp.maximum(per_segment(sampled, batch['segments']), 1.0)
    mean = per_segment(stop_gradient(difference) * sampled, batch['segments']) / length
    mean = jnp.pad(mean, ((0, 0), (1, 0)))
    here = jnp.take_along_axis(mean, batch['segments'], axis=1)
    return jnp.exp(here + difference - stop_gradient(difference))


RATIOS = {'token': token_ratio, 'sequence': sequence_ratio}
SURROGATES = ('clip', 'cispo')
IMPORTANCE = ('none', 'truncate', 'mask')


def check_policy(c: Mapping[str, Any]) -> None:
    """Raises InputError for a choice of `policy_gradient` that there is not."""
    known: dict[str, Any] = {
        'ratio': RATIOS,
        'surrogate': SURROGATES,
        'importance': IMPORTANCE,
        'kl_estimator': KL_ESTIMATORS,
    }
    for field, choices in known.items():
        if c[field] not in choices:
            raise InputError(f'loss.{field} is {c[field]!r}{did_you_mean(c[field], choices)}')


def policy_gradient(c: Mapping[str, Any]) -> Objective:
    """The policy gradient on sampled tokens, in the form that the fields of a stage's `loss` choose.

    surrogate 'clip': min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (Schulman et al. 2017, equation 7; two widths:
        Yu et al. 2025, "DAPO", equation 10); where A < 0 and `dual_clip` is not 0, at least dual_clip A (Ye et al.
        2020, equation 5). 'cispo': the ratio, clipped and without gradient, times A log p (MiniMax 2025, equation 4).
    ratio: r of one token, or of the answer (`sequence_ratio`).
    importance 'none': r is to the sampler's log-probabilities, so that what sampler and trainer disagree on is clipped
        as well. Otherwise r is to the trainer's own before the first update on these answers, and a factor
        w = p_old / p_sampler corrects for the sampler: min(w, importance_cap) if 'truncate' (Yao et al. 2025, "TIS"),
        w where 1 / importance_cap <= w <= importance_cap and else 0 if 'mask' (Ling team 2025, "IcePop").
    kl_coefficient: of a penalty against the reference, estimated by `kl_estimator`, inside the loss.
    value_coefficient: of max((V - R)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - R)^2) / 2 of a critic on
        the policy's trunk, whose value of a state stands at the token before (Schulman et al. 2017, section 5; the
        clip is that of its published code, none where value_clip is 0).

    The batch carries `advantage` and `behavior_logprob`; where the fields above ask for them `old_logprob` (without it
    the policy of this very step is the old one), `reference_logprob`, `old_value` and `value_target`: float32 [B, T].

    Raises:
        InputError: a field has no such choice.
    """
    check_policy(c)
    low, high, dual, cap = (float(c[name]) for name in ('clip_low', 'clip_high', 'dual_clip', 'importance_cap'))
    coefficients = {
        name: float(c[field]) for name, field in (('kl', 'kl_coefficient'), ('value', 'value_coefficient')) if c[field]
    }
    coefficients['policy'] = 1.0

    def denominators(batch: Batch) -> Terms:
        return dict.fromkeys(coefficients, batch.get('answers', batch['loss_weight'].sum()))

    def terms(output: Output, batch: Batch) -> tuple[Terms, Metrics]:
        weight, advantage = batch['loss_weight'], batch['advantage']
        sampled = (weight > 0).astype(jnp.float32)
        count = sampled.sum()
        old = batch.get('old_logprob', stop_gradient(output.logprob))
        if c['importance'] == 'none':
            old = batch['behavior_logprob']
        ratio = RATIOS[c['ratio']](jnp.where(weight > 0, output.logprob - old, 0.0), batch)
        clipped = jnp.clip(ratio, 1 - low, 1 + high)
        if c['surrogate'] == 'cispo':
            surrogate = stop_gradient(clipped) * advantage * output.logprob
            outside = clipped != ratio
        else:
            surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
            outside = ratio * advantage > surrogate
            if dual:
                surrogate = jnp.where(advantage < 0, jnp.maximum(surrogate, dual * advantage), surrogate)
        correction = jnp.where(weight > 0, jnp.exp(stop_gradient(old) - batch['behavior_logprob']), 1.0)
        if c['importance'] == 'truncate':
            surrogate *= jnp.minimum(correction, cap)
        elif c['importance'] == 'mask':
            surrogate *= jnp.where((correction <= cap) & (correction >= 1 / cap), correction, 0.0)
        sums = {'policy': -jnp.sum(surrogate * weight)}
        apart = jnp.abs(stop_gradient(output.logprob) - batch['behavior_logprob']) * sampled
        metrics: Metrics = {
            'entropy': (jnp.sum(output.entropy * sampled), count),
            'clipped_share': (jnp.sum(outside * sampled), count),
            'sampler_difference': (jnp.sum(apart), count),
            'sampler_difference_max': jnp.max(apart),
        }
        if 'kl' in coefficients:
            gap = jnp.where(weight > 0, batch['reference_logprob'] - output.logprob, 0.0)
            sums['kl'] = jnp.sum(KL_ESTIMATORS[c['kl_estimator']](gap) * weight)
            metrics['kl'] = (jnp.sum(k3(gap) * sampled), count)
        if 'value' in coefficients:
            value = jnp.pad(output.value, ((0, 0), (1, 0)))[:, :-1]
            squared = jnp.square(value - batch['value_target'])
            if c['value_clip']:
                near = batch['old_value'] + jnp.clip(value - batch['old_value'], -c['value_clip'], c['value_clip'])
                squared = jnp.maximum(squared, jnp.square(near - batch['value_target']))
            sums['value'] = jnp.sum(squared * weight) / 2
            metrics['value_error'] = (jnp.sum(jnp.square(value - batch['value_target']) * sampled), count)
        return sums, metrics

    return Objective(denominators, terms, coefficients)


def distillation(c: Mapping[str, Any]) -> Objective:
    """Generalised Jensen-Shannon divergence of student and teacher at each learnt token (Agarwal et al. 2023, "GKD",
    equation 3): b KL(t || m) + (1 - b) KL(s || m), m = b t + (1 - b) s; b = 0 stands for KL(t || s), 1 for KL(s || t).

    Over the tokens that the teacher names, `teacher_ids` int32 [B, T, K] with `teacher_logprob` float32 [B, T, K]; what
    is left of either distribution is not counted, so that with few of them only b = 0 makes sense.
    """
    beta = float(c['beta'])

    def kl(p: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    def denominators(batch: Batch) -> Terms:
        return {'distillation': batch['loss_weight'].sum()}

    def terms(output: Output, batch: Batch) -> tuple[Terms, Metrics]:
        weight, teacher = batch['loss_weight'], batch['teacher_logprob']
        student = output.logprob_of(batch['teacher_ids'])
        if beta in (0.0, 1.0):
            loss = kl(student, teacher) if beta else kl(teacher, student)
        else:
            mixed = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
            loss = beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)
        loss = jnp.sum(jnp.where(weight > 0, loss, 0.0) * weight)
        agree = (jnp.argmax(student, -1) == jnp.argmax(teacher, -1)) * weight
        return {'distillation': loss}, {
            'distillation_loss': (loss, weight.sum()),
            'teacher_agreement': (agree.sum(), weight.sum()),
        }

    return Objective(denominators, terms, {'distillation': 1.0})
