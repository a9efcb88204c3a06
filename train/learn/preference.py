"""Objectives on preferences: pairs of answers to one prompt, single answers judged good or bad, and reward models.

In a batch of pairs segments 1, 3, 5, ... of a row are preferred to segments 2, 4, 6, ...; `loss_weight` is 1 on the
answers' tokens. What belongs to a pair stands on the last learnt token of its first segment: `target`, the probability
that it is the better one, and `margin`. Sequence log-probabilities are sums over the answer's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data.errors import InputError, did_you_mean
from model.heads import Output
from train.learn.objectives import Batch, Metrics, Objective, Terms, per_segment

log_sigmoid = jax.nn.log_sigmoid


class Pairs(NamedTuple):
    """What a pair loss may see, float32 [pairs] each; rows of padding are pairs of weight 0.

    Attributes:
        chosen, rejected: log-probabilities of the two answers.
        chosen_reference, rejected_reference: the reference model's, 0 where there is none.
        chosen_length, rejected_length: tokens of the two answers, at least 1.
        target: probability that the chosen answer is the better one.
        weight: 1 for a pair, 0 for padding.
    """

    chosen: jax.Array
    rejected: jax.Array
    chosen_reference: jax.Array
    rejected_reference: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array
    target: jax.Array
    weight: jax.Array

    @property
    def log_ratio(self) -> jax.Array:
        """How much more than the reference the policy prefers the chosen answer, in nats."""
        return (self.chosen - self.chosen_reference) - (self.rejected - self.rejected_reference)

    @property
    def mean_log_ratio(self) -> jax.Array:
        """The same of log-probabilities per token."""
        chosen = (self.chosen - self.chosen_reference) / self.chosen_length
        return chosen - (self.rejected - self.rejected_reference) / self.rejected_length


PairLoss = Callable[[Pairs, Mapping[str, Any]], jax.Array]


def soft_cross_entropy(logit: jax.Array, target: jax.Array) -> jax.Array:
    """-target log sigmoid(logit) - (1 - target) log sigmoid(-logit)."""
    return -target * log_sigmoid(logit) - (1 - target) * log_sigmoid(-logit)


def sigmoid(pairs: Pairs, c: Mapping[str, Any]) -> jax.Array:
    """DPO (Rafailov et al. 2023, equation 7) with soft labels: `label_smoothing` e takes a sure label to 1 - e
    (Mitchell 2023, "cDPO")."""
    smooth = c['label_smoothing']
    return soft_cross_entropy(c['beta'] * pairs.log_ratio, pairs.target * (1 - 2 * smooth) + smooth)


def normalized(pairs: Pairs, c: Mapping[str, Any]) -> jax.Array:
    """DPO on log-ratios per token (Lambert et al. 2024, "Tulu 3", section 5.1.2)."""
    smooth = c['label_smoothing']
    return soft_cross_entropy(c['beta'] * pairs.mean_log_ratio, pairs.target * (1 - 2 * smooth) + smooth)


def hinge(pairs: Pairs, c: Mapping[str, Any]) -> jax.Array:
    """max(0, 1 - beta log-ratio) (Liu et al. 2023, "RSO", section 3.2)."""
    return jax.nn.relu(1 - c['beta'] * pairs.log_ratio)


def ipo(pairs: Pairs, c: Mapping[str, Any]) -> jax.Array:
    """(log-ratio - 1 / (2 beta))^2 on log-ratios per token (Azar et al. 2023, equation 17; per token as the authors
    advised later)."""
    return jnp.square(pairs.mean_log_ratio - 0.5 / c['beta'])


def robust(pairs: Pairs, c: Mapping[str, Any]) -> jax.Array:
    """DPO unbiased under labels flipped with probability e = `label_smoothing` (Chowdhury et al. 2024, equation 12)."""
    smooth, logit = c['label_smoothing'], c['beta'] * pairs.log_ratio
    return (-(1 - smooth) * log_sigmoid(logit) + smooth * log_sigmoid(-logit)) / (1 - 2 * smooth)


def simpo(pairs: Pairs, c: Mapping[str, Any]) -> jax.Array:
    """-log sigmoid(beta (mean log p chosen - mean log p rejected) - gamma), without a reference (Meng et al. 2024,
    equation 6)."""
    difference = pairs.chosen / pairs.chosen_length - pairs.rejected / pairs.rejected_length
    return -log_sigmoid(c['beta'] * difference - c['gamma'])


def odds_ratio(pairs: Pairs, c: Mapping[str, Any]) -> jax.Array:
    """-beta log sigmoid(log odds chosen - log odds rejected), odds p / (1 - p) of p = exp(mean log p): the second term
    of ORPO (Hong et al. 2024, equations 4 to 7); the first is `nll`."""

    def log_odds(logprob: jax.Array, length: jax.Array) -> jax.Array:
        mean = jnp.minimum(logprob / length, -1e-7)  # an empty pair has 0, whose odds are infinite
        return mean - jnp.log1p(-jnp.exp(mean))

    difference = log_odds(pairs.chosen, pairs.chosen_length) - log_odds(pairs.rejected, pairs.rejected_length)
    return -c['beta'] * log_sigmoid(difference)


PAIR_LOSSES: dict[str, PairLoss] = {
    'sigmoid': sigmoid,
    'normalized': normalized,
    'hinge': hinge,
    'ipo': ipo,
    'robust': robust,
    'simpo': simpo,
    'orpo': odds_ratio,
}
WITHOUT_REFERENCE = ('simpo', 'orpo')


def pair_loss(config: Mapping[str, Any]) -> PairLoss:
    """The loss that `variant` names. Raises InputError for an unknown one."""
    name = config['variant']
    if name not in PAIR_LOSSES:
        raise InputError(f'loss.variant is {name!r}{did_you_mean(name, PAIR_LOSSES)}')
    return PAIR_LOSSES[name]


def in_pairs(x: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sums of x [..., T] over the segments of each pair: chosen [pairs], rejected [pairs]."""
    sums = per_segment(x, batch['segments'])
    return sums[:, 0::2].ravel(), sums[:, 1::2].ravel()


def pair_weight(batch: Batch) -> jax.Array:
    """float32 [pairs]: 1 where both answers are there."""
    chosen, rejected = in_pairs(batch['loss_weight'], batch)
    return ((chosen > 0) & (rejected > 0)).astype(jnp.float32)


def preference(config: Mapping[str, Any]) -> Objective:
    """A loss on pairs, averaged over pairs, and `nll` times the token mean of -log p over chosen answers.

    The batch carries `target` and, unless the variant needs none, `reference_logprob`, float32 [B, T].
    Log-probabilities of both answers are reported, since training may lower both.
    """
    loss = pair_loss(config)
    coefficients = {'preference': 1.0, **({'nll': float(config['nll'])} if config['nll'] else {})}

    def chosen_tokens(batch: Batch) -> jax.Array:
        return batch['loss_weight'] * (batch['segments'] % 2 == 1)

    def denominators(batch: Batch) -> Terms:
        below = {'preference': pair_weight(batch).sum(), 'nll': chosen_tokens(batch).sum()}
        return {name: below[name] for name in coefficients}

    def terms(output: Output, batch: Batch) -> tuple[Terms, Metrics]:
        learnt = batch['loss_weight']
        reference = batch.get('reference_logprob', jnp.zeros_like(learnt))
        chosen_length, rejected_length = in_pairs(learnt, batch)
        pairs = Pairs(
            *in_pairs(output.logprob * learnt, batch),
            *in_pairs(reference * learnt, batch),
            jnp.maximum(chosen_length, 1.0),
            jnp.maximum(rejected_length, 1.0),
            in_pairs(batch['target'], batch)[0],
            pair_weight(batch),
        )
        sums = {'preference': jnp.sum(loss(pairs, config) * pairs.weight)}
        if 'nll' in coefficients:
            sums['nll'] = -jnp.sum(output.logprob * chosen_tokens(batch))
        count = pairs.weight.sum()
        shown = {
            'accuracy': (pairs.log_ratio > 0).astype(jnp.float32),
            'margin': pairs.log_ratio,
            'chosen_logprob': pairs.chosen,
            'rejected_logprob': pairs.rejected,
        }
        metrics: Metrics = {f'preference/{name}': (jnp.sum(x * pairs.weight), count) for name, x in shown.items()}
        return sums, metrics

    return Objective(denominators, terms, coefficients)


def kahneman_tversky(config: Mapping[str, Any]) -> Objective:
    """KTO (Ethayarajh et al. 2024, equations 7 and 8): mean over answers of w (1 - sigmoid(s beta (r - z))).

    r is the answer's log-ratio to the reference; s and w are 1 and `desirable` for a good answer, -1 and `undesirable`
    for a bad one; z, the batch's scalar `baseline`, estimates the KL to the reference from mismatched prompts and
    answers. The batch carries `target` (1 good, -1 bad) on each answer's last token and `reference_logprob`.
    """
    beta, weights = float(config['beta']), (float(config['undesirable']), float(config['desirable']))

    def label(batch: Batch) -> jax.Array:
        return per_segment(batch['target'], batch['segments'])

    def denominators(batch: Batch) -> Terms:
        return {'preference': jnp.sum(label(batch) != 0).astype(jnp.float32)}

    def terms(output: Output, batch: Batch) -> tuple[Terms, Metrics]:
        ratio = (output.logprob - batch['reference_logprob']) * batch['loss_weight']
        reward, sign = per_segment(ratio, batch['segments']), label(batch)
        weight = jnp.where(sign > 0, weights[1], weights[0]) * jnp.abs(sign)
        loss = weight * (1 - jax.nn.sigmoid(sign * beta * (reward - batch['baseline'])))
        metrics: Metrics = {
            f'preference/{name}': (jnp.sum(reward * here), jnp.sum(here).astype(jnp.float32))
            for name, here in (('desirable_log_ratio', sign > 0), ('undesirable_log_ratio', sign < 0))
        }
        return {'preference': loss.sum()}, metrics

    return Objective(denominators, terms, {'preference': 1.0})


def last_learnt(batch: Batch) -> jax.Array:
    """float32 [..., T]: 1 on the last learnt token of each segment, which is the stop token of an answer that ends."""
    weight, segments = batch['loss_weight'], batch['segments']
    rank = weight.ndim - 1
    ahead = lambda x: jnp.pad(x, [(0, 0)] * rank + [(0, 1)])[..., 1:]  # noqa: E731
    goes_on = (ahead(weight) > 0) & (ahead(segments) == segments)
    return ((weight > 0) & ~goes_on).astype(jnp.float32)


def bradley_terry(config: Mapping[str, Any]) -> Objective:
    """A reward model: mean over pairs of -log sigmoid(r chosen - r rejected - margin), with soft labels (Ouyang et al.
    2022, equation 1; margins as in Touvron et al. 2023, "Llama 2", equation 2).

    r is the value head's output at the stop token. `center` times the mean of (r chosen + r rejected)^2 keeps rewards
    around zero (Eisenstein et al. 2023, equation 8). The batch carries `target` and `margin`.
    """
    coefficients = {'preference': 1.0, **({'center': float(config['center'])} if config['center'] else {})}

    def denominators(batch: Batch) -> Terms:
        return dict.fromkeys(coefficients, pair_weight(batch).sum())

    def terms(output: Output, batch: Batch) -> tuple[Terms, Metrics]:
        weight = pair_weight(batch)
        chosen, rejected = in_pairs(output.value * last_learnt(batch), batch)
        target, margin = (in_pairs(batch[name], batch)[0] for name in ('target', 'margin'))
        loss = soft_cross_entropy(chosen - rejected - margin, target)
        sums = {'preference': jnp.sum(loss * weight), 'center': jnp.sum(jnp.square(chosen + rejected) * weight)}
        shown = {'accuracy': (chosen > rejected).astype(jnp.float32), 'margin': chosen - rejected}
        metrics: Metrics = {f'reward/{name}': (jnp.sum(x * weight), weight.sum()) for name, x in shown.items()}
        return {name: sums[name] for name in coefficients}, metrics

    return Objective(denominators, terms, coefficients)


def process_reward(config: Mapping[str, Any]) -> Objective:
    """A process reward model: mean over judged steps of the cross-entropy between sigmoid(value) at the step's last
    token and its score (Lightman et al. 2023, section 2.5; Uesato et al. 2022).

    The batch carries `target`, the score in [0, 1], where `loss_weight` is positive: on the last tokens of steps.
    """

    def denominators(batch: Batch) -> Terms:
        return {'process': batch['loss_weight'].sum()}

    def terms(output: Output, batch: Batch) -> tuple[Terms, Metrics]:
        weight = batch['loss_weight']
        loss = jnp.sum(soft_cross_entropy(output.value, batch['target']) * weight)
        right = ((output.value > 0) == (batch['target'] > 0.5)) * weight
        return {'process': loss}, {'process/accuracy': (right.sum(), weight.sum())}

    return Objective(denominators, terms, {'process': 1.0})
