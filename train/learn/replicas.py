"""Silent corruption, bit for bit: the copies that several devices hold are compared, and a step is taken twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from train.checkpoint import ARRAYS, write_json
from train.launch.host import fetch
from train.learn.fingerprints import sums
from train.learn.health import Rewind
from train.learn.step import State


class Prints:
    """Fingerprints of what each device holds of a state.

    Attributes:
        leaves: paths of the arrays, and what is known of each without its values.
    """

    def __init__(self, state: State, mesh: jax.sharding.Mesh, folder: Path):
        known = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
        self._kept = jax.tree.map(known, {name: state[name] for name in ARRAYS})
        self.leaves = jax.tree_util.tree_leaves_with_path(self._kept)
        self._mesh, self._folder = mesh, folder
        self._compiled: Callable[..., jax.Array] | None = None

    def compile(self) -> None:
        """To be asked for before the first step, as everything is compiled then; there may be nothing to compare."""
        if self._compiled:
            return
        mesh = self._mesh
        specs = jax.tree.map(lambda x: x.sharding.spec, self._kept)

        def local(tree: Any) -> jax.Array:
            found = jnp.stack([sums(x) for x in jax.tree.leaves(tree)])
            return found.reshape((1,) * len(mesh.axis_names) + found.shape)

        every = PartitionSpec(*mesh.axis_names)
        digests = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=every, check_vma=False)
        with jax.set_mesh(mesh):
            self._compiled = jax.jit(digests).lower(self._kept).compile()

    def __call__(self, state: State) -> np.ndarray:
        """[size of each axis of the mesh, leaf], uint64."""
        assert self._compiled
        found = fetch(self._compiled({name: state[name] for name in ARRAYS})).astype(np.uint64)
        return found[..., 0] << np.uint64(32) | found[..., 1]

    def same(self, step: int, found: np.ndarray, expected: np.ndarray, name: str, what: str) -> None:
        """Where fingerprints are not as expected, these are kept in the file `name`.STEP.json.

        Raises:
            Rewind: to the newest checkpoint; `what`, with the leaf in the place of {}, and the devices.
        """
        wrong = found != expected
        if not wrong.any():
            return
        of = [jax.tree_util.keystr(path) for path, _ in self.leaves]
        devices = self._mesh.devices
        evidence = {
            of[i]: {f'device {d.id}': f'{v:016x}' for d, v in zip(devices.flat, found[..., i].flat, strict=True)}
            for i in np.flatnonzero(wrong.reshape(-1, len(of)).any(axis=0))
        }
        write_json(self._folder / f'{name}.{step}.json', evidence)
        first, more = next(iter(evidence)), f' and {len(evidence) - 1} more' if len(evidence) > 1 else ''
        named = ', '.join(sorted(f'device {d.id}' for d in devices[wrong.any(axis=-1)]))
        raise Rewind(step, f'{what.format(first + more)} after step {step} on {named}')


def agreement(prints: Prints, mesh: jax.sharding.Mesh) -> Callable[[int, State], None]:
    """A function that compares the copies in the state after a step; it does nothing where there are none.

    Each device computes the fingerprint of what it holds (see `train.learn.fingerprints`); a device whose own differs
    from those of most others with the same share is named. It finds copies that have come apart, through a flipped
    bit in the memory or the arithmetic of one device, and not what all have computed alike.

    Raises (the function):
        Rewind: to the newest checkpoint; the fingerprints are in the stage's folder, in `replicas.STEP.json`.
    """
    specs = [x.sharding.spec for _, x in prints.leaves]
    used = [{a for part in spec for a in (part if isinstance(part, tuple) else (part,))} for spec in specs]
    # Of each leaf, the axes of the mesh along which it is copied.
    copied = [tuple(i for i, a in enumerate(mesh.axis_names) if a not in u and mesh.shape[a] > 1) for u in used]
    if not any(copied):
        return lambda step, state: None
    prints.compile()

    def compare(step: int, state: State) -> None:
        found = prints(state)
        most = np.stack([_commonest(found[..., i], axes) for i, axes in enumerate(copied)], axis=-1)
        prints.same(step, found, most, 'replicas', 'copies of {} differ')

    return compare


Step = Callable[[State, Any, Any], tuple[State, Any]]


def twice(one_step: Step, prints: Prints) -> Callable[[int, State, Any, Any], tuple[State, Any]]:
    """A function that takes a step, and once more from the same state, and compares what comes of both.

    It finds arithmetic and memory that failed in one of the two, on any mesh; not a device that fails in the same way
    each time, and not what was already wrong before the step. The state waits in the hosts' memory meanwhile, each
    share once, so that devices hold no more than in any other step. Gradients on GPUs are not the same from run to run
    (atomic additions): there the step is taken once.

    Raises (the function):
        Rewind: to the newest checkpoint; the fingerprints are in the stage's folder, in `replay.STEP.json`.
    """
    prints.compile()

    def take(step: int, state: State, batch: Any, rate: Any) -> tuple[State, Any]:
        if jax.default_backend() == 'gpu':
            return one_step(state, batch, rate)
        leaves, tree = jax.tree.flatten(state)
        kept = [_shares(x) for x in leaves]
        first, _ = one_step(state, batch, rate)
        expected = prints(first)
        jax.tree.map(lambda x: x.delete(), first)
        again = [_placed(x, shares) for x, shares in zip(leaves, kept, strict=True)]
        state, metrics = one_step(jax.tree.unflatten(tree, again), batch, rate)
        prints.same(step, prints(state), expected, 'replay', 'a step taken twice gave two results: {} differ')
        return state, metrics

    return take


def _shares(x: jax.Array) -> dict[str, np.ndarray]:
    """What this process's devices hold of an array, by place, copied to the host."""
    found: dict[str, np.ndarray] = {}
    for shard in x.addressable_shards:
        if str(shard.index) not in found:
            found[str(shard.index)] = np.array(shard.data)
    return found


def _placed(x: jax.Array, shares: dict[str, np.ndarray]) -> jax.Array:
    """An array like that one (whose own memory may be gone) of those shares."""
    places = x.sharding.addressable_devices_indices_map(x.shape)
    each = [jax.device_put(shares[str(index)], device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, each)


def _commonest(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Of an array the commonest value along some axes, in the array's shape; of two alike the first."""
    if not axes:
        return values
    moved = np.moveaxis(values, axes, range(-len(axes), 0))
    rows = moved.reshape(-1, int(np.prod(moved.shape[-len(axes) :])))
    best = [row[np.argmax([(row == x).sum() for x in row])] for row in rows]
    whole = np.broadcast_to(np.reshape(best, moved.shape[: -len(axes)] + (1,) * len(axes)), moved.shape)
    return np.moveaxis(whole, range(-len(axes), 0), axes)
