"""The mesh and the one table that says which mesh axes carry which logical axis of an array."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_AXES = ('data', 'fsdp', 'expert', 'tensor', 'context')

# Stored weights shard over (fsdp, expert) along `embed`; in use only the axes in KEPT stay (see `gathered`).
RULES: dict[str, tuple[str, ...]] = {
    'batch': ('data', 'fsdp', 'expert'),
    'length': ('context',),
    'embed': ('fsdp', 'expert'),
    'expert_embed': ('fsdp',),
    'experts': ('expert',),
    'heads': ('tensor',),
    'mlp': ('tensor',),
    'vocab': ('tensor',),
}
KEPT = ('tensor',)

Axes = Sequence[str | None]


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Builds the mesh. `sizes` maps axis names to sizes (absent axes are 1); one of them may be -1: all that is left.

    Raises:
        ValueError: an unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    unknown = set(sizes) - set(MESH_AXES)
    if unknown:
        raise ValueError(f'mesh.{min(unknown)} is no mesh axis: expected some of ' + ', '.join(MESH_AXES))
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    if -1 in shape:
        rest = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = max(1, len(devices) // rest)
    if math.prod(shape) != len(devices):
        given = ' x '.join(f'{axis} {size}' for axis, size in zip(MESH_AXES, shape, strict=True))
        raise ValueError(f'mesh is {given} = {math.prod(shape)}: expected the {len(devices)} devices that there are')
    return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def partition_spec(shape: Sequence[int], axes: Axes, mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """The spec of an array with the given logical axes; a mesh axis that does not divide its dimension is left out."""
    entries: list[tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        kept: list[str] = []
        for mesh_axis in RULES.get(axis or '', ()):
            if size % (math.prod(mesh_shape[a] for a in kept) * mesh_shape[mesh_axis]) == 0:
                kept.append(mesh_axis)
        entries.append(tuple(kept) or None)
    return PartitionSpec(*entries)


def named_sharding(mesh: jax.sharding.Mesh, shape: Sequence[int], axes: Axes) -> NamedSharding:
    """Sharding of an array at rest."""
    return NamedSharding(mesh, partition_spec(shape, axes, dict(mesh.shape)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to keep an activation sharded by its logical axes; outside a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, dict(mesh.shape)))


def gathered(weight: jax.Array, axes: Axes) -> jax.Array:
    """A weight as it is used: gathered over the axes that only store it, still split over the tensor axis."""
    used = [axis if set(RULES.get(axis or '', ())) <= set(KEPT) else None for axis in axes]
    return constrain(weight, *used)


def batch_ways() -> int:
    """How many parts a batch's rows are split into by the mesh in use; 1 outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in batch_axes())


def batch_axes() -> tuple[str, ...]:
    """Mesh axes over which a batch is split, for `shard_map`; empty outside a mesh or on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return ()
    return RULES['batch']
