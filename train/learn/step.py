"""One optimizer step as a pure function of the training state and a batch."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from data.errors import InputError
from model.clip import clipped, largest_of
from model.sharding import RULES, named_sharding
from model.transformer import Model, Variables, is_declared, subtree
from train.learn.objectives import Batch, Objective, total_loss

State = dict[str, Any]  # {'params', 'balance', 'optimizer', 'step'}, and 'health' where there is a guard
Guard = Callable[[Any, dict[str, jax.Array], Any], tuple[jax.Array, Any, dict[str, jax.Array]]]


def trained(params: Any, trainable: str) -> Any:
    """Of nested dictionaries of parameters, those in whose path, written with slashes, the expression is found."""
    return subtree(params, re.compile(trainable).search) if trainable else params


def _overlaid(tree: Any, part: Any) -> Any:
    """Nested dictionaries with other leaves where a part of them has some."""
    if not isinstance(tree, dict):
        return part
    return {name: _overlaid(x, part[name]) if name in part else x for name, x in tree.items()}


def initial_state(variables: Variables, optimizer: optax.GradientTransformation, trainable: str = '') -> State:
    """The state before a stage's first step; the optimizer is one for the `trained` parameters alone."""
    mine = trained(variables['params'], trainable)
    shardings = jax.tree.map(lambda x: x.sharding, optimizer_shapes(optimizer, mine))
    return {
        'params': variables['params'],
        'balance': variables['balance'],
        'optimizer': jax.jit(optimizer.init, out_shardings=shardings)(mine),
        'step': jnp.zeros((), jnp.int32),
    }


def optimizer_shapes(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """The optimizer's state as ShapeDtypeStructs, each leaf sharded as the parameter it is kept for.

    Left to itself the compiler would copy fresh moments to every device. A leaf belongs to the parameter whose path its
    own path ends with; what belongs to none (a step counter) is copied.

    Args:
        params: arrays, or ShapeDtypeStructs with shardings.
    """
    owners = dict(jax.tree_util.tree_leaves_with_path(params))
    first = next(iter(owners.values())).sharding
    whole = NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else first

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        owner = next((owners[path[i:]] for i in range(len(path)) if path[i:] in owners), None)
        sharding = owner.sharding if owner is not None and owner.shape == x.shape else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(optimizer.init, params))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the rows of a global batch [rows, length] lie: as [microbatches, rows / microbatches, length], rows and
    length split over the mesh.

    Raises:
        InputError: rows or length do not divide.
    """

    mesh: jax.sharding.Mesh
    rows: int
    length: int
    microbatches: int

    def __post_init__(self) -> None:
        ways = math.prod(self.mesh.shape[axis] for axis in RULES['batch'])
        if self.rows % (self.microbatches * ways):
            raise InputError(
                f'batch_size {self.rows} is no multiple of {self.microbatches} microbatches on {ways} ways of the mesh'
            )
        if self.length % self.mesh.shape['context']:
            raise InputError(
                f'sequence_length {self.length} is no multiple of mesh.context = {self.mesh.shape["context"]}'
            )

    def shapes(self, batch: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """What `place` makes of a global batch, of which shapes and dtypes are enough. Scalars go to every device."""

        def leaf(x: Any) -> jax.ShapeDtypeStruct:
            shape = (self.microbatches, self.rows // self.microbatches, *x.shape[1:]) if x.shape else ()
            axes = (None, 'batch', 'length', *(None for _ in shape[3:]))[: len(shape)]
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=named_sharding(self.mesh, shape, axes))

        return {name: leaf(x) for name, x in batch.items()}

    def rows_here(self) -> list[int]:
        """The rows that this process's devices need some part of."""
        numbers = np.empty((self.rows, self.length), np.bool_)
        (whole,) = self.shapes({'row': numbers}).values()
        here = whole.sharding.addressable_devices_indices_map(whole.shape).values()  # type: ignore[union-attr]
        of_row = np.arange(self.rows).reshape(whole.shape[:2])
        return sorted({int(row) for index in here if index for row in of_row[index[:2]].flat})

    def place(self, batch: Mapping[str, np.ndarray], rows: Sequence[int]) -> dict[str, jax.Array]:
        """A batch on the devices; its arrays hold the global rows `rows`, those that this process needs among them."""
        held = np.full(self.rows, -1)
        held[np.asarray(rows)] = np.arange(len(rows))
        where = held.reshape(self.microbatches, -1)

        def leaf(x: np.ndarray, to: jax.ShapeDtypeStruct) -> jax.Array:
            def share(index: Any) -> np.ndarray:
                return x[where[index[0], index[1]]][(slice(None), slice(None), *index[2:])] if x.ndim else x

            return jax.make_array_from_callback(to.shape, to.sharding, share)

        values = {name: np.asarray(x) for name, x in batch.items()}
        return {name: leaf(values[name], to) for name, to in self.shapes(values).items()}


def make_step(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    trainable: str = '',
    guard: Guard | None = None,
    qk_clip: float = 0.0,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """The step function: (state, batch of `Layout.place`, factor on the update) -> (state, metrics as scalars).

    Gradients accumulate in float32 over the microbatches, each divided by the denominators of the whole batch. A
    microbatch without a real token costs nothing: on-policy batches keep a fixed shape and leave the last ones empty.

    The loss is differentiated by the `trained` parameters alone, so that the backward pass of the others, their
    gradients and moments do not exist. Router biases move with the routers: beside one that stands still they would
    change a part of the model that was to stay as it is.

    A `guard` says of a step's metrics whether its update is left out (see `train.learn.health.guard`); what it knows is
    part of the state, `health`. The update stands in a branch of its own: a choice between old and new numbers would be
    fused with what computes them, and round them differently.

    With `qk_clip` heads whose attention logits were above it are scaled down behind the update (see `model.clip`).
    """
    balances = not trainable or any(
        x.role == 'router' for x in jax.tree.leaves(trained(model.declared['params'], trainable), is_leaf=is_declared)
    )

    def loss(mine: Any, state: State, batch: Batch, below: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        output = model.apply(
            {'params': _overlaid(state['params'], mine), 'balance': state['balance']},
            batch['tokens'],
            batch['positions'],
            batch['segments'],
            batch.get('temperature', 1.0),
            multi_token=objective.multi_token,
            expert_ids=batch.get('expert_ids'),
            largest_logits=bool(qk_clip),
        )
        terms, metrics = objective.terms(output, batch)
        value = total_loss(objective, terms, below)
        real = jnp.sum(batch['segments'] > 0).astype(jnp.float32)
        experts = {name: output.statistics[name] for name in ('load', 'entropy') if name in output.statistics}
        largest: dict[str, Any] = {name: x for name, x in metrics.items() if not isinstance(x, tuple)}
        means = {name: x for name, x in metrics.items() if name not in largest}
        largest['attention'] = output.largest_logits or {}
        return value, {'metrics': means, 'largest': largest, 'experts': experts, 'tokens': real, 'loss': value}

    def step(state: State, batch: Batch, rate: jax.Array | float = 1.0) -> tuple[State, dict[str, jax.Array]]:
        below = objective.denominators(batch)
        whole = {name: x for name, x in batch.items() if not x.ndim}
        split = {name: x for name, x in batch.items() if x.ndim}
        gradient, mine = jax.grad(loss, has_aux=True), trained(state['params'], trainable)

        def one(part: Batch) -> Any:
            return gradient(mine, state, {**part, **whole}, below)

        first = jax.tree.map(lambda x: x[0], split)
        if batch['tokens'].shape[0] == 1:
            total = one(first)
        else:
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))

            def accumulate(sums: Any, part: Batch) -> tuple[Any, None]:
                def add(part: Batch) -> Any:
                    new = one(part)
                    gradients, aux = jax.tree.map(jnp.add, sums, new)
                    largest = jax.tree.map(jnp.maximum, sums[1]['largest'], new[1]['largest'])
                    return gradients, {**aux, 'largest': largest}

                return lax.cond((part['segments'] > 0).any(), add, lambda _: sums, part), None

            total, _ = lax.scan(accumulate, zero, split)
        gradients, aux = total

        logits = aux['largest'].pop('attention')
        metrics = {name: above / jnp.maximum(count, 1e-9) for name, (above, count) in aux['metrics'].items()}
        metrics |= {**aux['largest'], 'loss': aux['loss'], 'gradient_norm': optax.global_norm(gradients)}
        metrics['tokens'] = jnp.sum(batch['segments'] > 0)
        if aux['experts']:
            load = aux['experts']['load']
            mean = load.mean(-1)
            excess = jnp.where(mean > 0, load.max(-1) / jnp.maximum(mean, 1e-9) - 1, 0.0)
            # MaxVio: how far the fullest expert is above the mean (Wang et al. 2024, equation 4), worst layer.
            metrics['experts/max_violation'] = jnp.max(excess)
            # Experts with less than a tenth of the mean load, worst layer.
            metrics['experts/starved'] = jnp.max((load < 0.1 * mean[..., None]).mean(-1))
            if biases := jax.tree.leaves(state['balance']):
                metrics['experts/largest_bias'] = jnp.max(jnp.stack([jnp.abs(x).max() for x in biases]))
            metrics['experts/router_entropy'] = jnp.mean(aux['experts']['entropy']) / jnp.maximum(aux['tokens'], 1)

        if qk_clip:
            every = largest_of(logits)
            metrics |= {'attention/largest_logit': every.max(), 'attention/clipped': (every > qk_clip).mean()}

        old = {name: state[name] for name in ('params', 'balance', 'optimizer')}

        def updated() -> State:
            updates, optimizer_state = optimizer.update(gradients, old['optimizer'], mine)
            updates = jax.tree.map(lambda x: x * rate, updates)
            moves = bool(aux['experts']) and balances
            params = _overlaid(old['params'], optax.apply_updates(mine, updates))
            return {
                'params': clipped(params, logits, qk_clip, model.config) if qk_clip else params,
                'balance': model.updated_balance(old['balance'], aux['experts']['load']) if moves else old['balance'],
                'optimizer': optimizer_state,
            }

        if guard is None:
            return {**updated(), 'step': state['step'] + 1}, metrics
        skip, health, said = guard(state['health'], metrics, rate)
        new = lax.cond(skip, lambda: old, updated)
        return {**new, 'step': state['step'] + 1, 'health': health}, {**metrics, **said}

    return step
