"""Checkpoints: the one module that knows Orbax. Saved asynchronously, whole or not at all, verified when read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from data.errors import InputError
from data.stream import merged
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.sharding import make_mesh
from model.transformer import Model, Variables
from train.host import fetch, gather_text, is_primary, wait_for_all
from train.step import State

ARRAYS = ('params', 'balance', 'optimizer')
Metadata = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held: arrays as asked for, the stream's state, and the metadata."""

    arrays: dict[str, Any]
    stream: Any
    metadata: Metadata


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready for use: `model.apply(variables, tokens)`.

    Attributes:
        model: pure functions; variables: {'params', 'balance'}; tokenizer: of the run; config: the stage's config as a
        plain dictionary; metadata: stage, step, tokens and FLOPs so far, parent.
    """

    model: Model
    variables: Variables
    tokenizer: Tokenizer
    config: dict[str, Any]
    metadata: Metadata


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A float32 array of a tree to save that is made by `read` whenever it is needed, and not kept."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype = np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes arrays one after the other, so that one of them is in memory at a time."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[Lazy], infos: Any, args: Any = None) -> list[Any]:
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value.read()], [info], [arg]):
                written.result()
        return []


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> list[jax.Array]:
    """Two wrapping uint32 sums a leaf over its bits, the second weighted by position: no sharding changes them."""

    def one(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        bits = bits.astype(jnp.uint32).reshape(-1)
        place = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
        return jnp.stack([bits.sum(dtype=jnp.uint32), (bits * place).sum(dtype=jnp.uint32)])

    return [one(x) for x in leaves]


def _host_fingerprint(x: np.ndarray) -> tuple[int, int]:
    """The same two sums of an array on the host, piece by piece: they need next to no memory beside it."""
    bits = np.ascontiguousarray(x).reshape(-1).view(f'u{x.dtype.itemsize}')
    plain, placed = np.uint32(0), np.uint32(0)
    with np.errstate(over='ignore'):
        for start in range(0, bits.size, 2**24):
            piece = bits[start : start + 2**24].astype(np.uint32)
            place = np.arange(start, start + piece.size, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(1)
            plain += piece.sum(dtype=np.uint32)
            placed += (piece * place.astype(np.uint32)).sum(dtype=np.uint32)
    return int(plain), int(placed)


def fingerprints(tree: Any) -> dict[str, str]:
    """For each leaf's path: dtype, shape and fingerprint in one string."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if leaves and isinstance(leaves[0][1], (Lazy, np.ndarray)):
        sums = [_host_fingerprint(x.read() if isinstance(x, Lazy) else x) for _, x in leaves]
    else:
        sums = fetch(_fingerprints([jnp.asarray(x) for _, x in leaves]))
    named = zip(leaves, sums, strict=True)
    return {jax.tree_util.keystr(p): f'{x.dtype} {list(x.shape)} {s[0]:08x}{s[1]:08x}' for (p, x), s in named}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of one stage, in `folder`."""

    def __init__(self, folder: Path, keep: int = 2, read_only: bool = False):
        """`keep` is how many of the newest stay."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            read_only=read_only,
            # Without these a kill while an old step is being deleted leaves half of it behind.
            cleanup_tmp_directories=not read_only,
            todelete_subdir=None if read_only else 'deleted',
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in ('stream', 'metadata')}
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name in ARRAYS:
            registry.add(name, ocp.args.StandardSave, handlers[name])
            registry.add(name, ocp.args.StandardRestore, handlers[name])
        handler = ocp.type_handlers
        types = handler.create_type_handler_registry(
            (Lazy, _LazyHandler()), (np.ndarray, handler.NumpyHandler()), (jax.Array, handler.ArrayHandler())
        )
        one_by_one = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
        for name in ('params', 'balance'):
            registry.add(name, ocp.args.PyTreeSave, one_by_one)
            registry.add(name, ocp.args.PyTreeRestore, one_by_one)
        for name in ('stream', 'metadata'):
            registry.add(name, ocp.args.JsonSave, handlers[name])
            registry.add(name, ocp.args.JsonRestore, handlers[name])
        self._folder = folder.absolute()
        self._read_only = read_only
        self._manager = ocp.CheckpointManager(self._folder, options=options, handler_registry=registry)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State, stream: Any, metadata: Metadata) -> None:
        """Starts to save; the arrays are copied before it returns, the disk is written behind the run's back.

        `stream`: the state of this process's stream; that of all is saved. Trees of `Lazy` arrays are written before it
        returns, each array made twice and one in memory at a time.
        """
        stream = merged([json.loads(text) for text in gather_text(json.dumps(stream))])
        arrays = {name: state[name] for name in ARRAYS if jax.tree.leaves(state[name])}
        record = {
            **metadata,
            'step': step,
            'arrays': {name: fingerprints(tree) for name, tree in arrays.items()},
            'stream_sha256': _digest(stream),
        }
        record['sha256'] = _digest(record)
        items: dict[str, Any] = {name: _saving(tree) for name, tree in arrays.items()}
        items |= {'stream': ocp.args.JsonSave(stream), 'metadata': ocp.args.JsonSave(record)}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, wanted: dict[str, Any], step: int | None = None, part: bool = False) -> Restored | None:
        """The newest sound checkpoint (or that of `step`), None if there is none.

        Args:
            wanted: for some of 'params', 'balance', 'optimizer', a tree of ShapeDtypeStructs with shardings.
            part: whether it may hold more 'params' and 'balance' than that; what is not wanted is not read.

        Raises:
            InputError: arrays of another architecture than `wanted`; a named step that is broken or not there.
        """
        steps = self.steps() if step is None else [step]
        broken: list[int] = []
        for candidate in reversed(steps):
            try:
                restored = self._read(candidate, wanted, part)
                self._set_aside(broken)
                return restored
            except InputError:
                raise
            except Exception as error:  # whatever a broken file makes Orbax raise
                line = str(error).strip().split('\n')[0]
                if step is not None or candidate == steps[0]:
                    raise InputError(
                        f'{self._folder / str(candidate)}: the checkpoint cannot be read: {line}'
                    ) from error
                logging.warning('%s is broken (%s): taking the one before it', self._folder / str(candidate), line)
                broken.append(candidate)
        return None

    def _set_aside(self, broken: list[int]) -> None:
        """Moves broken checkpoints out of the way of those that will be saved at the same steps."""
        if not broken or self._read_only:
            return
        aside = self._folder.with_name(self._folder.name + '.broken')
        if is_primary():
            aside.mkdir(exist_ok=True)
            for step in broken:
                (self._folder / str(step)).rename(aside / f'{step}.{len(list(aside.iterdir()))}')
        wait_for_all('broken checkpoints are set aside')
        self._manager.reload()

    def _read(self, step: int, wanted: dict[str, Any], part: bool) -> Restored:
        stream, metadata = self._records(step)
        _check_shapes(self._folder / str(step), wanted, metadata['arrays'], part)
        present = {name: tree for name, tree in wanted.items() if jax.tree.leaves(tree)}
        arrays = {name: tree for name, tree in wanted.items() if name not in present}
        if present:
            args = ocp.args.Composite(**{name: _restoring(tree, part) for name, tree in present.items()})
            restored = self._manager.restore(step, args=args)
            for name in present:
                if not fingerprints(restored[name]).items() <= metadata['arrays'][name].items():
                    raise ValueError(f'its {name} do not match their fingerprints')
                arrays[name] = restored[name]
        return Restored(arrays, stream, metadata)

    def _records(self, step: int) -> tuple[Any, Metadata]:
        """The stream's state and the metadata of a checkpoint; ValueError where they are not what was saved."""
        items = {'stream': ocp.args.JsonRestore(), 'metadata': ocp.args.JsonRestore()}
        read = self._manager.restore(step, args=ocp.args.Composite(**items))
        metadata = dict(read['metadata'])
        claimed = metadata.pop('sha256', None)
        if claimed != _digest(metadata) or metadata['stream_sha256'] != _digest(read['stream']):
            raise ValueError('its metadata or stream state does not match its checksum')
        return read['stream'], metadata

    def reader(self, wanted: dict[str, Any], step: int | None = None) -> Callable[[Sequence[str]], np.ndarray]:
        """A function from the path of a leaf, such as ('params', 'norm'), to its array: one in memory at a time.

        Args:
            wanted: the trees of shapes of 'params' and 'balance' that should be there.
            step: the last one when absent.

        Raises:
            InputError: no such checkpoint, another architecture, or (the function) an array that is broken.
        """
        steps = self.steps()
        step = step if step is not None or not steps else steps[-1]
        if step not in steps:
            raise InputError(f'{self._folder}: no checkpoint{"" if step is None else f" of step {step}"} in it')
        folder = self._folder / str(step)
        try:
            stored = self._records(step)[1]['arrays']
        except Exception as error:  # whatever a broken file makes Orbax raise
            raise InputError(f'{folder}: the checkpoint cannot be read: {str(error).splitlines()[0]}') from error
        _check_shapes(folder, wanted, stored)

        def read(path: Sequence[str]) -> np.ndarray:
            tree: Any = ocp.RestoreArgs(restore_type=np.ndarray)
            for key in reversed(path[1:]):
                tree = {key: tree}
            args = ocp.args.PyTreeRestore(tree, restore_args=tree, partial_restore=True)
            try:
                leaf = self._manager.restore(step, args=ocp.args.Composite(**{path[0]: args}))[path[0]]
                ((key, found),) = fingerprints(leaf).items()
            except Exception as error:
                line = str(error).strip().split('\n')[0]
                raise InputError(f'{folder}: {"/".join(path)} cannot be read: {line}') from error
            if found != stored[path[0]][key]:
                raise InputError(f'{folder}: {"/".join(path)} does not match its fingerprint')
            return jax.tree.leaves(leaf)[0]

        return read

    def wait(self) -> None:
        """Returns when everything is on disk; an error of the disk surfaces here."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of Orbax's threads."""
        self._manager.close()


def _saving(tree: Any) -> Any:
    if not any(isinstance(x, Lazy) for x in jax.tree.leaves(tree)):
        return ocp.args.StandardSave(tree)
    # In pieces: a compressed copy of a whole array would take as much memory as the array.
    return ocp.args.PyTreeSave(tree, save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=2**28), tree))


def _restoring(tree: Any, part: bool) -> Any:
    if not part:
        return ocp.args.StandardRestore(tree)
    how = ocp.checkpoint_utils.construct_restore_args(tree)
    return ocp.args.PyTreeRestore(tree, restore_args=how, partial_restore=True)


def _check_shapes(folder: Path, wanted: dict[str, Any], stored: dict[str, dict[str, str]], part: bool = False) -> None:
    """Raises InputError, naming the first leaf that differs, where a checkpoint is of another architecture."""
    for name, tree in wanted.items():
        expected = {
            jax.tree_util.keystr(path): f'{x.dtype} {list(x.shape)}'
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        found = {path: text.rsplit(' ', 1)[0] for path, text in stored.get(name, {}).items()}
        for path in sorted(expected if part else expected.keys() | found.keys()):
            if expected.get(path) != found.get(path):
                have, want = found.get(path, 'nothing'), expected.get(path, 'nothing')
                raise InputError(f'{folder}: another architecture: {name}{path} is {have}, expected {want}')


def read_json(path: Path) -> Any:
    """A JSON file, or InputError in one line."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f'{path}: no such file') from None
    except ValueError as error:
        raise InputError(f'{path}: not JSON ({error})') from None


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all; of many processes one does."""
    if not is_primary():
        return
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(json.dumps(value, indent=1) + '\n')
    temporary.replace(path)


def split_address(address: str) -> tuple[str, int | None]:
    """'NAME@STEP' as (name, step); without '@' the step is None: the last one.

    Raises InputError for a step that is no number.
    """
    name, at, step = address.partition('@')
    if at and not step.isdigit():
        raise InputError(f'{address}: expected NAME or NAME@STEP with a whole number')
    return name, int(step) if at else None


def stage_folder(name: str | Path) -> Path:
    """The folder of a stage, DIR/STAGE, or of an imported model; InputError if it has no checkpoints."""
    folder = Path(name)
    if not (folder / 'checkpoints').is_dir():
        raise InputError(f'{folder}: expected a stage folder of a run (DIR/STAGE) with checkpoints in it')
    return folder


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a stage is: an imported model has its own, the stages of a run share theirs."""
    own = folder / 'tokenizer'
    return own if own.is_dir() else folder.parent / 'tokenizer'


def load(path: str | Path, mesh: jax.sharding.Mesh | None = None) -> Loaded:
    """Loads a stage's checkpoint for use: DIR/STAGE, or DIR/STAGE@STEP for one that is not its last.

    Raises:
        InputError: no such stage, no checkpoint in it, or a broken one; the message names the path.
    """
    name, step = split_address(str(path))
    folder = stage_folder(name)
    config = read_json(folder / 'config.json')
    model = Model(ModelConfig.from_dict(config['model']))
    shapes = model.shapes(mesh if mesh is not None else make_mesh({'data': 1}, jax.devices()[:1]))
    checkpoints = Checkpoints(folder / 'checkpoints', read_only=True)
    try:
        restored = checkpoints.restore({name: shapes[name] for name in ('params', 'balance')}, step)
    finally:
        checkpoints.close()
    if restored is None:
        raise InputError(f'{folder}: no checkpoint in it yet')
    tokenizer = Tokenizer.load(tokenizer_folder(folder))
    return Loaded(model, restored.arrays, tokenizer, config, restored.metadata)
