"""Optimizers and learning-rate schedules, from optax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from data.errors import InputError
from model.layers import STACKED, Declared
from model.transformer import is_declared


def learning_rate(config: Mapping[str, Any], steps: int) -> optax.Schedule:
    """The learning rate as a function of the step.

    `schedule` is 'wsd' (warmup, stable, then linear to zero over the last `decay` share of the steps; Hu et al. 2024,
    with the linear decay of Hagele et al. 2024), 'cosine' (to `final` times the peak), 'linear' (to zero) or
    'constant'. `warmup` is a share of the steps.
    """
    peak, warmup = float(config['learning_rate']), round(float(config['warmup']) * steps)
    rest = max(1, steps - warmup)
    name = config['schedule']
    if name == 'wsd':
        decay = max(1, round(float(config['decay']) * steps))
        parts = [optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, decay)]
        main = optax.join_schedules(parts, [max(0, rest - decay)])
    elif name == 'cosine':
        main = optax.cosine_decay_schedule(peak, rest, alpha=float(config['final']))
    elif name == 'linear':
        main = optax.linear_schedule(peak, 0.0, rest)
    elif name == 'constant':
        main = optax.constant_schedule(peak)
    else:
        raise InputError(f'optimizer.schedule is {name!r}: expected wsd, cosine, linear or constant')
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup), main], [warmup])


def _dimensions(weight: Declared) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a weight are its matrix's inputs and outputs; None for what Muon leaves to AdamW."""
    if weight.role != 'matrix':
        return None
    own = [i for i, axis in enumerate(weight.axes) if axis not in STACKED]
    return optax.contrib.MuonDimensionNumbers(tuple(own[: weight.inputs]), tuple(own[weight.inputs :]))


def make_optimizer(config: Mapping[str, Any], declared: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Muon, at a learning rate of 1.

    Updates, decay included, are proportional to the rate. It is an argument of the step instead, so that stages of one
    shape share one compiled program.

    Muon (Jordan et al. 2024) orthogonalises the updates of matrices and scales them to the root-mean-square size of
    AdamW's (0.2 sqrt(max(inputs, outputs)); Liu et al. 2025, equation 4), so that one learning rate serves both;
    embeddings, heads, routers and vectors are left to AdamW. Only matrices and embeddings decay.

    With `model.base_width` the update of each weight is multiplied by what its sizes ask for (`model.layers.by_width`),
    with either optimizer, so that a learning rate found on a narrow model holds on a wide one. Decay is not: how much
    of a weight a step takes away is then one number at all widths (Wang and Aitchison 2024). Widen by more
    heads, not by wider ones, as 1 / sqrt(head width) stays in the softmax.

    Args:
        config: fields `name`, `beta1`, `beta2`, `epsilon`, `muon_beta`, `weight_decay`, `clip`.
        declared: the parameters as `Declared` weights.
    """
    decay = float(config['weight_decay'])
    decays = jax.tree.map(lambda x: x.role != 'vector', declared, is_leaf=is_declared)
    update = optax.adamw(1.0, config['beta1'], config['beta2'], config['epsilon'], weight_decay=decay, mask=decays)
    if config['name'] == 'muon':
        muon = optax.contrib.muon(
            1.0,
            beta=config['muon_beta'],
            weight_decay=decay,
            muon_weight_dimension_numbers=jax.tree.map(_dimensions, declared, is_leaf=is_declared),
            consistent_rms=0.2,
        )
        # Not left to optax's Muon: its own AdamW decays every weight, and takes Nesterov's step.
        names = jax.tree.map(lambda x: 'muon' if x.role == 'matrix' else 'adamw', declared, is_leaf=is_declared)
        update = optax.partition({'muon': muon, 'adamw': update}, names)
    elif config['name'] != 'adamw':
        raise InputError(f'optimizer.name is {config["name"]!r}: expected adamw or muon')
    muon_too = config['name'] == 'muon'
    rates = jax.tree.map(lambda x: x.rates[muon_too and x.role == 'matrix'], declared, is_leaf=is_declared)
    if any(rate != 1 for rate in jax.tree.leaves(rates)):

        def scaled(update: jax.Array, weight: jax.Array, rate: float, decays: bool) -> jax.Array:
            return rate * update - (1 - rate) * decay * weight if decays else rate * update

        every = optax.stateless(lambda updates, weights: jax.tree.map(scaled, updates, weights, rates, decays))
        update = optax.chain(update, every)
    clip = float(config['clip'])
    return optax.chain(optax.clip_by_global_norm(clip), update) if clip else update
