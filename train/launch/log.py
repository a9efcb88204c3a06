"""Where the metrics of steps go: lines of JSON, TensorBoard events, Weights & Biases where asked, the progress bar."""

from __future__ import annotations

import contextlib
import importlib
import json
import time
import uuid
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from train.launch.events import note
from train.launch.progress import Progress

BUFFER = 2**24  # bytes of metric lines that wait in memory while a disk is full
LAST = 0.1  # share of a stage's steps whose mean is told
FLUSH = 30.0  # seconds between looks that TensorBoard can take


class Log:
    """The metrics of a stage that takes `steps` steps, of which `first` were taken before; a context manager.

    A disk that takes no more ends no run: lines wait until it does again, and TensorBoard's events, which are there for
    the eye, end. With `project` they go to that project of Weights & Biases as well, as one run however often the stage
    is started.
    """

    def __init__(self, folder: Path, name: str, steps: int, first: int, project: str = ''):
        self._folder = folder
        self._lines = (folder / 'metrics.jsonl').open('ab', buffering=BUFFER)
        self._full = False
        # SummaryWriter has a thread: when that dies of a full disk, its queue fills up and blocks.
        self._board: EventsWriter | None = EventsWriter(str(folder / 'events'))
        self._flushed = time.monotonic()
        self._progress = Progress(steps, name, initial=first)
        self._run: Any = None
        if project:
            wandb, known = importlib.import_module('wandb'), folder / 'wandb_id'
            if not known.exists():
                known.write_text(uuid.uuid4().hex)
            told = {'project': project, 'group': folder.resolve().parent.name, 'name': name, 'dir': str(folder)}
            self._run = wandb.init(**told, id=known.read_text(), resume='allow')

    def __enter__(self) -> Log:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        self._lines.close()
        if self._run is not None:
            self._run.finish()
        with contextlib.suppress(OSError):
            if self._board is not None:
                self._board.close()

    def write(self, line: dict[str, Any], tokens: int) -> None:
        """Logs a step: its metrics, 'step' among them, and how many tokens it took."""
        self._lines.write((json.dumps(line) + '\n').encode())
        try:
            self._lines.flush()
            self._full = False
        except OSError as problem:  # what was not written stays in the buffer, for the next time
            if not self._full:
                note(
                    self._folder, line['step'], 'metrics wait', f'{self._folder / "metrics.jsonl"}: {problem.strerror}'
                )
            self._full = True
        if self._board is not None:
            self._draw(line)
        if self._run is not None:
            self._run.log({name: value for name, value in line.items() if name != 'step'}, step=line['step'])
        shown = {name: line[name] for name in ('loss', 'reward/mean') if name in line}
        self._progress.update(line['step'], tokens, **shown)

    def _draw(self, line: dict[str, Any]) -> None:
        """The same for TensorBoard."""
        assert self._board is not None
        values = [Summary.Value(tag=name, simple_value=value) for name, value in line.items() if name != 'step']
        try:
            self._board.write_event(Event(wall_time=time.time(), step=line['step'], summary=Summary(value=values)))
            if time.monotonic() - self._flushed > FLUSH:
                self._board.flush()
                self._flushed = time.monotonic()
        except OSError:
            self._board = None


def at_the_end(folder: Path, metric: str = 'loss') -> float | None:
    """The mean of a metric over the last tenth of a stage's steps; None where its metrics have none."""
    path = folder / 'metrics.jsonl'
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    values = [line[metric] for line in lines if metric in line]
    tail = values[-max(1, round(LAST * len(values))) :]
    return sum(tail) / len(tail) if tail else None


def set_aside(path: Path, step: int) -> None:
    """Moves lines of steps after `step`, which will be taken again, to NAME.replayed.jsonl beside NAME.jsonl."""
    if not path.exists():
        return
    kept: list[str] = []
    moved: list[str] = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            (kept if json.loads(line)['step'] <= step else moved).append(line)
        except ValueError:  # cut off by a kill
            moved.append(line.rstrip('\n') + '\n')
    if moved:
        with path.with_suffix('.replayed.jsonl').open('a') as replayed:
            replayed.writelines(moved)
        temporary = path.with_suffix('.jsonl.tmp')
        temporary.write_text(''.join(kept))
        temporary.replace(path)
