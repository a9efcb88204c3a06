"""Silent corruption: of everything that several devices hold copies of, the copies are compared, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from train.checkpoint import ARRAYS, write_json
from train.fingerprints import sums
from train.health import Rewind
from train.host import fetch
from train.step import State


def agreement(state: State, mesh: jax.sharding.Mesh, folder: Path) -> Callable[[int, State], None]:
    """A function that compares the copies in the state after a step; it does nothing where there are none.

    Each device computes the fingerprint of what it holds (see `train.fingerprints`); a device whose own differs from
    those of most others with the same share is named. It finds copies that have come apart, through a flipped bit in
    the memory or the arithmetic of one device, and not what all have computed alike.

    Raises (the function):
        Rewind: to the newest checkpoint; the fingerprints are in `folder`, in `replicas.STEP.json`.
    """
    kept = {name: state[name] for name in ARRAYS}
    leaves = jax.tree_util.tree_leaves_with_path(kept)
    specs = jax.tree.map(lambda x: x.sharding.spec, kept)
    used = [{a for part in x.sharding.spec for a in (part if isinstance(part, tuple) else (part,))} for _, x in leaves]
    # Of each leaf, the axes of the mesh along which it is copied.
    copied = [tuple(i for i, a in enumerate(mesh.axis_names) if a not in u and mesh.shape[a] > 1) for u in used]
    if not any(copied):
        return lambda step, state: None

    def local(tree: Any) -> jax.Array:
        found = jnp.stack([sums(x) for x in jax.tree.leaves(tree)])
        return found.reshape((1,) * len(mesh.axis_names) + found.shape)

    digests = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(*mesh.axis_names), check_vma=False)
    )
    with jax.set_mesh(mesh):
        compiled = digests.lower(kept).compile()  # before the first step, as everything that is

    def compare(step: int, state: State) -> None:
        found = fetch(compiled({name: state[name] for name in ARRAYS}))  # [of each mesh axis, leaf, 2]
        evidence: dict[str, dict[str, str]] = {}
        wrong: set[str] = set()
        for number, ((path, _), axes) in enumerate(zip(leaves, copied, strict=True)):
            of_leaf = found[..., number, :].astype(np.uint64)
            values = of_leaf[..., 0] << np.uint64(32) | of_leaf[..., 1]
            most = _commonest(values, axes)
            if (values != most).any():
                named = {f'device {d.id}': f'{v:016x}' for d, v in zip(mesh.devices.flat, values.flat, strict=True)}
                evidence[jax.tree_util.keystr(path)] = named
                wrong |= {f'device {device.id}' for device in mesh.devices[values != most]}
        if evidence:
            write_json(folder / f'replicas.{step}.json', evidence)
            first, more = next(iter(evidence)), f' and {len(evidence) - 1} more' if len(evidence) > 1 else ''
            raise Rewind(step, f'copies of {first}{more} differ after step {step} on {", ".join(sorted(wrong))}')

    return compare


def _commonest(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Of an array the commonest value along some axes, in the array's shape; of two alike the first."""
    if not axes:
        return values
    moved = np.moveaxis(values, axes, range(-len(axes), 0))
    rows = moved.reshape(-1, int(np.prod(moved.shape[-len(axes) :])))
    best = [row[np.argmax([(row == x).sum() for x in row])] for row in rows]
    whole = np.broadcast_to(np.reshape(best, moved.shape[: -len(axes)] + (1,) * len(axes)), moved.shape)
    return np.moveaxis(whole, range(-len(axes), 0), axes)
