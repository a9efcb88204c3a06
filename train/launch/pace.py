"""Hosts that hold the devices up: too slow a stream of data, or one process slower than the others."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from train.launch.host import gather_text

STALL = 0.1  # the share of time in waiting for data that is told of
LEAST = 30.0  # seconds: no shorter while is judged


class Pace:
    """Looks, each time it is called, at the time since it was last: the seconds a process waited for its data.

    In a run of several processes all wait for the slowest, so that its own seconds show which one that is.

    Args:
        tell: is told the step, kind and detail of an event.
        clock: in seconds.
        gather: texts of all processes.
    """

    def __init__(
        self,
        tell: Callable[[int, str, str], None],
        clock: Callable[[], float] = time.monotonic,
        gather: Callable[[str], list[str]] = gather_text,
    ):
        self._tell, self._clock, self._gather = tell, clock, gather
        self._since: tuple[float, float] | None = None
        self._told = ''

    def __call__(self, step: int, waited: float) -> None:
        """`waited`: seconds in waiting for data, from a moment that stays the same. All processes have to call."""
        now = self._clock()
        if self._since is None:
            self._since = now, waited
            return
        mine = now - self._since[0], waited - self._since[1]
        told: list[list[Any]] = [json.loads(text) for text in self._gather(json.dumps(mine))]
        if min(seconds for seconds, _ in told) < LEAST:
            return
        self._since = now, waited
        shares = [own / seconds for seconds, own in told]
        worst = max(range(len(shares)), key=shares.__getitem__)
        said = f'{shares[worst]:.0%} of the last {told[worst][0]:.0f} s went into waiting for data'
        kind = '' if shares[worst] < STALL else 'waits for data'
        if kind and len(shares) > 1 and shares[worst] > 2 * (others := statistics.median(shares)):
            kind, said = 'straggler', f'in process {worst} {said}, in the others {others:.0%}'
        if kind and kind != self._told:
            self._tell(step, kind, said)
        self._told = kind
