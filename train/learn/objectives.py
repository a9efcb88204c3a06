"""What is minimised: pure functions of a batch and a model's output, each term with a denominator of its own.

A loss is the sum over terms of coefficient * sum / denominator. Denominators are taken over the global batch before any
forward pass, so that the result does not depend on packing, on accumulation or on the number of devices. Metrics are
(sum, count) pairs for the same reason, or the largest of something that is not negative.
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
Metrics = dict[str, tuple[jax.Array, jax.Array] | jax.Array]


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


def per_segment(x: jax.Array, segments: jax.Array) -> jax.Array:
    """Sums over the segments of each row: x [..., T] -> [rows, S]; column k is segment k + 1, S is even.

    Args:
        x, segments: of one shape; leading dimensions become rows.
    """
    length = segments.shape[-1]
    sums = jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, num_segments=length // 2 * 2 + 1))
    return sums(x.reshape(-1, length), segments.reshape(-1, length))[:, 1:]


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
