"""The mesh and the one table that says which mesh axes carry which logical axis of an array."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# The first one crosses the network between slices of a pod, the last ones are next neighbours.
MESH_AXES = ('slice', 'data', 'fsdp', 'expert', 'tensor', 'context')

# Stored weights shard over (fsdp, expert) along `embed`; in use only the axes in KEPT stay (see `gathered`).
RULES: dict[str, tuple[str, ...]] = {
    'batch': ('slice', 'data', 'fsdp', 'expert'),
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

    With `slice` above 1 on devices that know their slice (TPU pods joined by the data-centre network), the other axes
    stay within one.

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
    types = (AxisType.Auto,) * len(MESH_AXES)
    if shape[0] > 1 and getattr(devices[0], 'slice_index', None) is not None:
        across = [shape[0]] + [1] * (len(shape) - 1)
        grid = mesh_utils.create_hybrid_device_mesh([1, *shape[1:]], across, devices)
        return jax.sharding.Mesh(grid, MESH_AXES, axis_types=types)
    try:
        return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis that is no product of the slice's own axes, such as 8 of 4 x 4 chips
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(grid, MESH_AXES, axis_types=types)


def partition_spec(shape: Sequence[int], axes: Axes, mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """The spec of an array with the given logical axes; a mesh axis that does not divide its dimension is left out."""
    return PartitionSpec(*(_splitting(size, axis, mesh_shape) or None for size, axis in zip(shape, axes, strict=True)))


def _splitting(size: int, axis: str | None, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    kept: list[str] = []
    for mesh_axis in RULES.get(axis or '', ()):
        if size % (math.prod(mesh_shape[a] for a in kept) * mesh_shape[mesh_axis]) == 0:
            kept.append(mesh_axis)
    return tuple(kept)


def named_sharding(mesh: jax.sharding.Mesh, shape: Sequence[int], axes: Axes) -> NamedSharding:
    """Sharding of an array at rest."""
    return NamedSharding(mesh, partition_spec(shape, axes, dict(mesh.shape)))


def mesh_in_use() -> dict[str, int]:
    """Sizes of the mesh axes; empty outside a mesh, on a single device, and where code is one device's already."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual else dict(mesh.shape)


def splits(axis: str, size: int) -> tuple[str, ...]:
    """The mesh axes in use (those larger than 1) that split a dimension of `size` with that logical axis."""
    sizes = mesh_in_use()
    return tuple(mesh_axis for mesh_axis in _splitting(size, axis, sizes) if sizes[mesh_axis] > 1) if sizes else ()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to keep an activation sharded by its logical axes; outside a mesh it does nothing."""
    sizes = mesh_in_use()
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, sizes)) if sizes else x


def gathered(weight: jax.Array, axes: Axes) -> jax.Array:
    """A weight as it is used: gathered over the axes that only store it, still split over the tensor axis.

    Its gradient is split again at once: left to itself XLA sums whole gradients on every device.
    """
    if not mesh_in_use():
        return weight
    used = [axis if set(RULES.get(axis or '', ())) <= set(KEPT) else None for axis in axes]
    gather = jax.custom_vjp(lambda stored: constrain(stored, *used))
    gather.defvjp(lambda stored: (constrain(stored, *used), None), lambda _, gradient: (constrain(gradient, *axes),))
    return gather(weight)


def per_device(function: Callable[..., Any], arguments: Sequence[Axes], results: Any) -> Callable[..., Any]:
    """`function` as each device runs it on its own shares, collectives and all; outside a mesh the function itself.

    Args:
        arguments: logical axes of each argument.
        results: for each result (a tree of them where the function returns one) the number of the argument whose
            dimensions are split alike, None where the result is the same on every device, or its spec.
    """
    sizes = mesh_in_use()
    if not sizes:
        return function

    def call(*values: jax.Array) -> Any:
        specs = tuple(partition_spec(x.shape, axes, sizes) for x, axes in zip(values, arguments, strict=True))

        def spec(n: int | PartitionSpec | None) -> PartitionSpec:
            return specs[n] if isinstance(n, int) else n or PartitionSpec()

        given = jax.tree.map(spec, results, is_leaf=lambda n: n is None or isinstance(n, PartitionSpec))
        return jax.shard_map(function, in_specs=specs, out_specs=given, check_vma=False)(*values)

    return call


def batch_ways() -> int:
    """How many parts a batch's rows are split into by the mesh in use; 1 outside a mesh."""
    sizes = mesh_in_use()
    return math.prod(sizes.get(axis, 1) for axis in RULES['batch'])
