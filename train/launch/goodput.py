"""Goodput: the share of a run's time that went into steps that counted; and what the rest was lost to.

Every moment belongs to one cause, so that the parts add up to the wall time. This module needs no JAX.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = 'goodput.json'  # in a workdir
EVERY = 5.0  # seconds between writes: what a kill may book as time between runs
MARKS = 50  # saves of a stage of which it is known what had been spent
CAUSES = {
    'step': 'steps that counted, with their sampling and scoring',
    'records': 'making records',
    'start': 'setting up and handing over',
    'compile': 'first steps after a start, which compile',
    'restore': 'restoring checkpoints',
    'save': 'saving, while training waited',
    'evaluation': 'evaluation',
    'data': 'waiting for data',
    'replayed': 'steps that were taken again, as they had not been saved',
    'down': 'between runs, until the next had come up',
}
USEFUL = ('step', 'records')


class Clock:
    """What time goes by for. Set-up, until told otherwise; what is not `kept` is forgotten.

    Args:
        monotonic, wall: clocks, in seconds. The second one only tells how long no process was there: when it is set,
            no more than that is wrong.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time):
        self._monotonic, self._wall = monotonic, wall
        self._path: Path | None = None
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        # Of each stage, the seconds of its steps that counted: up to 'now', and up to the steps that were saved.
        self._stages: dict[str, dict[str, float]] = {}
        self._cause, self._stage = 'start', ''
        self._since = self._written = monotonic()
        self._began = wall()

    @contextlib.contextmanager
    def kept(self, workdir: Path, here: bool) -> Iterator[None]:
        """Goes on from the file of an earlier process, where there is a sound one; writes it, if `here`, within."""
        path = workdir / FILE
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            told = json.loads(path.read_text())
            for cause in CAUSES:
                self._seconds[cause] += float(told['seconds'][cause])
            self._seconds['down'] += max(self._began - float(told['seen']), 0.0)
            self._stages = {name: dict(marks) for name, marks in told['stages'].items()}
        self._path = path if here else None
        try:
            yield
        finally:
            self.write()

    @contextlib.contextmanager
    def spend(self, cause: str) -> Iterator[None]:
        """Within it time goes by for that cause; '' changes nothing."""
        before = self._cause
        self.now(cause or before)
        try:
            yield
        finally:
            self.now(before)

    def now(self, cause: str) -> None:
        """From now on, and until the `spend` around it ends, time goes by for that cause."""
        at = self._book()
        self._cause = cause
        if at - self._written > EVERY:
            self.write()

    def _book(self) -> float:
        at = self._monotonic()
        self._seconds[self._cause] += at - self._since
        if self._cause == 'step':
            self._stages[self._stage]['now'] += at - self._since
        self._since = at
        return at

    def resumed(self, stage: str, step: int) -> None:
        """The stage goes on from that step: what time later ones took is lost."""
        marks = self._stages.setdefault(stage, {'now': 0.0, '0': 0.0})
        lost = marks['now'] - marks.get(str(step), marks['now'])
        self._stages[stage] = {at: s for at, s in marks.items() if at == 'now' or int(at) <= step}
        self._stages[stage]['now'] -= lost
        self._seconds['step'] -= lost
        self._seconds['replayed'] += lost
        self._stage = stage
        self.write()

    def saved(self, step: int) -> None:
        """The stage's steps up to this one are saved."""
        self._book()
        marks = self._stages[self._stage]
        marks[str(step)] = marks['now']
        for old in sorted(set(marks) - {'now', '0'}, key=int)[:-MARKS]:
            del marks[old]
        self.write()

    def goodput(self) -> float:
        """The share of all time so far that was of use."""
        return sum(self._seconds[cause] for cause in USEFUL) / max(sum(self._seconds.values()), 1e-9)

    def seconds(self) -> dict[str, float]:
        """So far, by cause."""
        self._book()
        return dict(self._seconds)

    def write(self) -> None:
        """Writes what is known, whole or not at all. A disk that takes no more ends no run."""
        self._written = self._book()
        if self._path is None:
            return
        told: dict[str, Any] = {'goodput': self.goodput(), 'seconds': self._seconds, 'stages': self._stages}
        temporary = self._path.with_name(f'{FILE}.tmp')
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps({**told, 'seen': self._wall()}, indent=1) + '\n')
            temporary.replace(self._path)


def summary(workdir: Path) -> list[tuple[str, float, float]]:
    """Of a run the causes with their seconds and share of its time, goodput first; [] where nothing was kept."""
    try:
        seconds = {cause: float(json.loads((workdir / FILE).read_text())['seconds'][cause]) for cause in CAUSES}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    whole = max(sum(seconds.values()), 1e-9)
    return [(words, seconds[cause], seconds[cause] / whole) for cause, words in CAUSES.items() if seconds[cause] > 0]
