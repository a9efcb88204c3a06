"""What is minimised: pure functions of a batch and a model's output, each term with a denominator of its own.

A loss is the sum over terms of coefficient * sum / denominator. Denominators are taken over the global batch before any
forward pass, so that the result does not depend on packing, on accumulation or on the number of devices. Metrics are
(sum, count) pairs for the same reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model.heads import Output, same_segment

Batch = Mapping[str, jax.Array]
Terms = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Two pure functions and the coefficients that join them.

    Attributes:
        denominators: of a batch whose arrays are [microbatches, rows, T], for each term a float32 scalar.
        terms: of an output and one microbatch [rows, T], for each term its sum, and metrics as (sum, count).
        coefficients: what each term counts in the loss.
        multi_token: whether the multi-token modules take part.
    """

    denominators: Callable[[Batch], Terms]
    terms: Callable[[Output, Batch], tuple[Terms, Metrics]]
    coefficients: Mapping[str, float]
    multi_token: bool = False


def total_loss(objective: Objective, terms: Terms, denominators: Terms) -> jax.Array:
    """Sum of coefficient * sum / denominator; a term with nothing to average over counts 0, not NaN."""
    loss = jnp.zeros((), jnp.float32)
    for name, value in terms.items():
        below = denominators[name]
        loss += objective.coefficients[name] * jnp.where(below > 0, value / jnp.where(below > 0, below, 1.0), 0.0)
    return loss


def multi_token_weight(batch: Batch, depth: int) -> jax.Array:
    """Loss weights of multi-token module `depth`: a token counts where all it is predicted from is its segment."""
    segments = batch['segments'].reshape(-1, batch['segments'].shape[-1])
    same = same_segment(segments, depth + 1).reshape(batch['segments'].shape)
    return batch['loss_weight'] * same


def segment_count(batch: Batch) -> jax.Array:
    """How many segments a batch holds."""
    segments = batch['segments']
    before = jnp.pad(segments, [(0, 0)] * (segments.ndim - 1) + [(1, 0)])[..., :-1]
    return jnp.sum((segments > 0) & (segments != before)).astype(jnp.float32)


def regularizers(config: Mapping[str, Any], depths: int, is_moe: bool) -> Objective:
    """The terms any stage may add to its own: multi-token prediction, z-loss and the two balance losses.

    multi_token: mean over modules of the cross-entropy of module k (DeepSeek-V3, equation 25).
    z_loss: mean of log(Z)^2, which keeps logits from drifting (Chowdhery et al. 2022, section 5).
    sequence_balance: mean over segments, summed over layers (DeepSeek-V3, equations 17 to 20).
    batch_balance: of each microbatch over all devices, summed over layers (Fedus et al. 2022, equation 4); the one term
        that depends on how a batch is cut into microbatches.
    """
    coefficients = {
        name: float(config[name])
        for name in ('multi_token', 'z_loss', 'sequence_balance', 'batch_balance')
        if config[name]
    }
    if not depths:
        coefficients.pop('multi_token', None)
    if not is_moe:
        coefficients.pop('sequence_balance', None)
        coefficients.pop('batch_balance', None)
    multi_token = 'multi_token' in coefficients

    def denominators(batch: Batch) -> Terms:
        below: Terms = {}
        if multi_token:
            below['multi_token'] = sum(
                (multi_token_weight(batch, depth).sum() for depth in range(1, depths + 1)), jnp.zeros(())
            )
        if 'z_loss' in coefficients:
            below['z_loss'] = batch['loss_weight'].sum()
        if 'sequence_balance' in coefficients:
            below['sequence_balance'] = segment_count(batch)
        if 'batch_balance' in coefficients:
            below['batch_balance'] = jnp.sum((batch['segments'] > 0).any((-2, -1))).astype(jnp.float32)
        return below

    def terms(output: Output, batch: Batch) -> tuple[Terms, Metrics]:
        sums: Terms = {}
        metrics: Metrics = {}
        if multi_token:
            losses = [
                -(logprob * multi_token_weight(batch, depth)).sum()
                for depth, logprob in enumerate(output.multi_token_logprob, start=1)
            ]
            sums['multi_token'] = sum(losses, jnp.zeros(()))
            weights = [multi_token_weight(batch, depth).sum() for depth in range(1, depths + 1)]
            metrics['multi_token_loss'] = (sums['multi_token'], sum(weights, jnp.zeros(())))
        if 'z_loss' in coefficients:
            sums['z_loss'] = jnp.sum(jnp.square(output.log_partition) * batch['loss_weight'])
        for name in ('sequence_balance', 'batch_balance'):
            if name in coefficients:
                sums[name] = output.statistics[name].sum()
        return sums, metrics

    return Objective(denominators, terms, coefficients, multi_token)


def joined(main: Objective, extra: Objective) -> Objective:
    """One objective with the terms of two."""

    def denominators(batch: Batch) -> Terms:
        return {**main.denominators(batch), **extra.denominators(batch)}

    def terms(output: Output, batch: Batch) -> tuple[Terms, Metrics]:
        first, second = main.terms(output, batch), extra.terms(output, batch)
        return {**first[0], **second[0]}, {**first[1], **second[1]}

    coefficients = {**main.coefficients, **extra.coefficients}
    return Objective(denominators, terms, coefficients, main.multi_token or extra.multi_token)


def next_token() -> Objective:
    """Weighted cross-entropy: sum of -loss_weight * log p(token) over sum of loss_weight."""

    def denominators(batch: Batch) -> Terms:
        return {'next_token': batch['loss_weight'].sum()}

    def terms(output: Output, batch: Batch) -> tuple[Terms, Metrics]:
        weight = batch['loss_weight']
        loss = -jnp.sum(output.logprob * weight)
        return {'next_token': loss}, {'next_token_loss': (loss, weight.sum())}

    return Objective(denominators, terms, {'next_token': 1.0})


def clipped_policy_gradient(config: Mapping[str, Any]) -> Objective:
    """The clipped surrogate over sampled tokens, averaged over all tokens of the batch, with a KL penalty if asked.

    loss = mean_t -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t), r_t = p(token) / p_sampler(token)
    (Schulman et al. 2017, equation 7; one mean over all tokens and two clip widths as in DAPO, Yu et al. 2025,
    equations 8 to 10). The ratio is to the sampler's own log-probabilities, so what sampler and trainer disagree on
    is clipped as well. KL is the estimator k3 = exp(ref - p) - (ref - p) - 1 (Schulman 2020), inside the loss (Shao et
    al. 2024, equation 4), when `kl_coefficient` is not 0.

    The batch carries `advantage`, `behavior_logprob` and, for the penalty, `reference_logprob`, float32 [B, T], and
    `temperature`.
    """
    low, high, kl = float(config['clip_low']), float(config['clip_high']), float(config['kl_coefficient'])

    def denominators(batch: Batch) -> Terms:
        tokens = batch['loss_weight'].sum()
        return {'policy': tokens, 'kl': tokens} if kl else {'policy': tokens}

    def terms(output: Output, batch: Batch) -> tuple[Terms, Metrics]:
        weight, advantage = batch['loss_weight'], batch['advantage']
        count = weight.sum()
        difference = jnp.where(weight > 0, output.logprob - batch['behavior_logprob'], 0.0)
        ratio = jnp.exp(difference)
        clipped = jnp.clip(ratio, 1 - low, 1 + high)
        surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
        sums = {'policy': -jnp.sum(surrogate * weight)}
        metrics = {
            'entropy': (jnp.sum(output.entropy * weight), count),
            'clipped_share': (jnp.sum((ratio * advantage > surrogate) * weight), count),
            'sampler_difference': (jnp.sum(jnp.abs(jax.lax.stop_gradient(difference)) * weight), count),
        }
        if kl:
            gap = jnp.where(weight > 0, batch['reference_logprob'] - output.logprob, 0.0)
            sums['kl'] = jnp.sum((jnp.exp(gap) - gap - 1) * weight)
            metrics['kl'] = (sums['kl'], count)
        return sums, metrics

    return Objective(denominators, terms, {'policy': 1.0, 'kl': kl} if kl else {'policy': 1.0})
