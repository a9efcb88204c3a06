"""A stage small enough to be run many times: the smallest dense model, on a stream made for the test."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from small import model_config, one_device

from data.packing import Batch
from data.stream import State as StreamState
from model.sharding import make_mesh
from model.transformer import Model
from train.checkpoint import Checkpoints
from train.learn.objectives import next_token
from train.learn.optimizer import make_optimizer
from train.learn.step import Layout, State, initial_state
from train.loop import Plan
from train.stages import COMMON

LENGTH = 16


class Counting:
    """A batch of its own for every step; `before` is called with a step's number before its batch is made."""

    def __init__(self, rows: int, before: Callable[[int], None] = lambda step: None):
        self.rows, self.before = range(rows), before
        self.asked: list[int] = []

    def next(self, step: int, variables: Any = None) -> tuple[Batch, StreamState]:
        self.before(step)
        self.asked.append(step)
        shape = (len(self.rows), LENGTH)
        tokens = np.random.default_rng(step).integers(40, size=shape).astype(np.int32)
        return {
            'tokens': tokens,
            'positions': np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
            'segments': np.ones(shape, np.int32),
            'loss_weight': np.broadcast_to((np.arange(LENGTH) > 0).astype(np.float32), shape),
        }, {'step': step + 1}

    def restore(self, state: StreamState) -> None:
        pass

    def close(self) -> None:
        pass


@functools.cache
def parts(devices: int, axis: str = 'data') -> tuple[Model, Any, Any]:
    """The model, its optimizer, and the mesh."""
    model = Model(model_config(n_routed_experts=0, num_hidden_layers=1))
    optimizer = make_optimizer({**COMMON['optimizer'], 'name': 'adamw'}, model.declared['params'])
    return model, optimizer, one_device() if devices == 1 else make_mesh({axis: devices})


def plan(folder: Path, devices: int = 1, stream: Any = None, axis: str = 'data', **changes: Any) -> tuple[Plan, State]:
    """A stage in `folder`, and a new state for it."""
    model, optimizer, mesh = parts(devices, axis)
    folder.mkdir(parents=True, exist_ok=True)
    rows = 2 * devices
    settings: dict[str, Any] = {
        'name': folder.name,
        'folder': folder,
        'model': model,
        'objective': next_token(),
        'optimizer': optimizer,
        'stream': stream if stream is not None else Counting(rows),
        'trainable': '',
        'learning_rate': lambda step: 0.01,
        'steps': 7,
        'save_every': 2,
        'keep': 2,
        'pinned': (),
        'guard': COMMON['guard'],
        'alarms': COMMON['alarms'],
        'step_deadline': 0.0,
        'compare_every': 3,
        'replay_every': 0,
        'qk_clip': 0.0,
        'layout': Layout(mesh, rows, LENGTH, 1),
        'tokens': 0,
        'flops': 0.0,
        'metadata': {'stage': folder.name},
    }
    with jax.set_mesh(mesh):
        state = initial_state(model.init(0, mesh), optimizer)
    return Plan(**{**settings, **changes}), state


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; none where there is no file."""
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kinds(folder: Path) -> list[tuple[int, str]]:
    """The events of a stage: step and kind."""
    return [(line['step'], line['kind']) for line in lines(folder, 'events.jsonl')]


def saved(folder: Path, step: int) -> dict[str, Any]:
    """The fingerprints of what was saved at a step."""
    checkpoints = Checkpoints(folder / 'checkpoints', read_only=True)
    try:
        restored = checkpoints.restore({}, step)
    finally:
        checkpoints.close()
    assert restored is not None
    return restored.metadata['arrays']
