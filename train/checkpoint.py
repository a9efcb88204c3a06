"""Checkpoints: the one module that knows Orbax. Saved asynchronously, whole or not at all, verified when read."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from data.errors import InputError
from data.stream import merged
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.sharding import make_mesh
from model.transformer import Model, Variables
from train.launch.host import gather_text, is_primary, wait_for_all
from train.learn.fingerprints import Lazy, fingerprints
from train.learn.step import State

ARRAYS = ('params', 'balance', 'optimizer')
Metadata = dict[str, Any]
# Runs in threads save one after the other: Orbax counts a process's saves, and takes two at a time for one.
_SAVES = threading.Lock()


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


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes arrays one after the other, so that one of them is in memory at a time."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[Lazy], infos: Any, args: Any = None) -> list[Any]:
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value.read()], [info], [arg]):
                written.result()
        return []


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Retention:
    """Orbax's question which checkpoints, oldest first, stay when a new one is there (see `Checkpoints`)."""

    keep: int
    every: int
    pinned: frozenset[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        stay = {steps[-1], *[step for step in steps if step % self.every == 0][-self.keep :]} | self.pinned
        return [step in stay for step in steps]


class Checkpoints:
    """The checkpoints of one stage, in `folder`."""

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        every: int = 1,
        pinned: Sequence[int] = (),
        read_only: bool = False,
        note: Callable[[int, str, str], None] | None = None,
    ):
        """
        Args:
            keep: how many of the newest stay, of those at multiples of `every` steps. A later one stays as well, until
                the next is there: one saved out of turn costs none of the others.
            pinned: steps that stay whatever comes.
            note: is told the step, kind and detail of saves that failed and checkpoints that are broken; they are
                logged as warnings by default.
        """
        self._folder = folder.absolute()
        self._retention = _Retention(keep, every, frozenset(pinned))
        self._read_only = read_only
        self._note = note or (lambda step, kind, detail: logging.warning('%s: %s', kind, detail))
        self._saving = 0  # the step saved last
        self._failure = ''  # why that save failed
        self._open()

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if self._read_only else self._retention,
            create=not self._read_only,
            read_only=self._read_only,
            # Without these a kill while an old step is being deleted leaves half of it behind.
            cleanup_tmp_directories=not self._read_only,
            todelete_subdir=None if self._read_only else 'deleted',
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
        self._manager = ocp.CheckpointManager(self._folder, options=options, handler_registry=registry)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State, stream: Any, metadata: Metadata) -> None:
        """Starts to save; the arrays are copied before it returns, the disk is written behind the run's back.

        A save that fails shows here, in the next one or in `wait`. It is noted and what it has written removed, so that
        a full disk is not kept full; of many processes none can know what the others wrote, and the error is raised.

        `stream`: the state of this process's stream; that of all is saved. Trees of `Lazy` arrays are written before it
        returns, each array made twice and one in memory at a time.
        """
        self._settle()
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
        self._saving, self._failure = step, ''
        try:
            with _SAVES:
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
                if threading.current_thread() is not threading.main_thread():
                    self._manager.wait_until_finished()
        except Exception as error:  # whatever a full or failing disk makes Orbax raise
            self._give_up(error)

    def _settle(self) -> None:
        """Returns when the save under way is over."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if jax.process_count() > 1:
            raise error
        self._failure = ' '.join(str(error).split())[:300] or type(error).__name__
        self._note(self._saving, 'save failed', f'{self._folder / str(self._saving)}: {self._failure}')
        with contextlib.suppress(Exception):
            self._manager.close()
        for left in self._folder.glob(f'{self._saving}.orbax-checkpoint-tmp*'):
            shutil.rmtree(left, ignore_errors=True)
        self._open()

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
                detail = f'{self._folder / str(candidate)} is broken ({line}): taking the one before it'
                self._note(candidate, 'broken checkpoint', detail)
                broken.append(candidate)
        return None

    def go_back(self, step: int) -> int | None:
        """Puts all checkpoints aside but those up to `step`, or the oldest. Gives the newest left, if there is one."""
        steps = self.steps()
        left = [x for x in steps if x <= step] or steps[:1]
        self._set_aside([x for x in steps if x not in left], 'abandoned')
        return left[-1] if left else None

    def _set_aside(self, broken: list[int], kind: str = 'broken') -> None:
        """Moves checkpoints out of the way of those that will be saved at the same steps."""
        if not broken or self._read_only:
            return
        aside = self._folder.with_name(f'{self._folder.name}.{kind}')
        if is_primary():
            aside.mkdir(exist_ok=True)
            for step in broken:
                (self._folder / str(step)).rename(aside / f'{step}.{len(list(aside.iterdir()))}')
        wait_for_all('checkpoints are set aside')
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
        """Returns when everything is on disk. Raises InputError where the last save failed."""
        self._settle()
        if self._failure:
            raise InputError(f'{self._folder / str(self._saving)}: the checkpoint could not be saved: {self._failure}')

    def close(self) -> None:
        """Waits, and lets go of Orbax's threads."""
        self._settle()
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
        if name == 'optimizer' and expected and not found:
            raise InputError(f'{folder}: no state of an optimizer in it: expected keep_optimizer = False')
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
    except (ValueError, RecursionError) as error:
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
