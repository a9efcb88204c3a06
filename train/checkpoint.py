"""Checkpoints: the one module that knows Orbax. Saved asynchronously, whole or not at all, verified when read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> list[jax.Array]:
    """Two wrapping uint32 sums a leaf over its bits, the second weighted by position: no sharding changes them."""

    def one(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        bits = bits.astype(jnp.uint32).reshape(-1)
        place = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
        return jnp.stack([bits.sum(dtype=jnp.uint32), (bits * place).sum(dtype=jnp.uint32)])

    return [one(x) for x in leaves]


def fingerprints(tree: Any) -> dict[str, str]:
    """For each leaf's path: dtype, shape and fingerprint in one string."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
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

        `stream`: the state of this process's stream; that of all is saved.
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
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items |= {'stream': ocp.args.JsonSave(stream), 'metadata': ocp.args.JsonSave(record)}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, wanted: dict[str, Any], step: int | None = None) -> Restored | None:
        """The newest sound checkpoint (or that of `step`), None if there is none.

        Args:
            wanted: for some of 'params', 'balance', 'optimizer', a tree of ShapeDtypeStructs with shardings.

        Raises:
            InputError: arrays of another architecture than `wanted`; a named step that is broken or not there.
        """
        steps = self.steps() if step is None else [step]
        broken: list[int] = []
        for candidate in reversed(steps):
            try:
                restored = self._read(candidate, wanted)
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

    def _read(self, step: int, wanted: dict[str, Any]) -> Restored:
        items = {'stream': ocp.args.JsonRestore(), 'metadata': ocp.args.JsonRestore()}
        read = self._manager.restore(step, args=ocp.args.Composite(**items))
        metadata = dict(read['metadata'])
        claimed = metadata.pop('sha256', None)
        if claimed != _digest(metadata) or metadata['stream_sha256'] != _digest(read['stream']):
            raise ValueError('its metadata or stream state does not match its checksum')
        _check_shapes(self._folder / str(step), wanted, metadata['arrays'])
        present = {name: tree for name, tree in wanted.items() if jax.tree.leaves(tree)}
        arrays = {name: tree for name, tree in wanted.items() if name not in present}
        if present:
            args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in present.items()})
            restored = self._manager.restore(step, args=args)
            for name in present:
                if fingerprints(restored[name]) != metadata['arrays'][name]:
                    raise ValueError(f'its {name} do not match their fingerprints')
                arrays[name] = restored[name]
        return Restored(arrays, read['stream'], metadata)

    def wait(self) -> None:
        """Returns when everything is on disk; an error of the disk surfaces here."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of Orbax's threads."""
        self._manager.close()


def _check_shapes(folder: Path, wanted: dict[str, Any], stored: dict[str, dict[str, str]]) -> None:
    """Raises InputError, naming the first leaf that differs, where a checkpoint is of another architecture."""
    for name, tree in wanted.items():
        expected = {
            jax.tree_util.keystr(path): f'{x.dtype} {list(x.shape)}'
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        found = {path: text.rsplit(' ', 1)[0] for path, text in stored.get(name, {}).items()}
        for path in sorted(expected.keys() | found.keys()):
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


def load(path: str | Path, mesh: jax.sharding.Mesh | None = None) -> Loaded:
    """Loads a stage's checkpoint for use: DIR/STAGE, or DIR/STAGE@STEP for one that is not its last.

    Raises:
        InputError: no such stage, no checkpoint in it, or a broken one; the message names the path.
    """
    name, step = split_address(str(path))
    folder = Path(name)
    if not (folder / 'checkpoints').is_dir():
        raise InputError(f'{folder}: expected a stage folder of a run (DIR/STAGE) with checkpoints in it')
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
    tokenizer = Tokenizer.load(folder.parent / 'tokenizer')
    return Loaded(model, restored.arrays, tokenizer, config, restored.metadata)
