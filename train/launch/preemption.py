"""The notice that a process must end soon: SIGTERM, which clusters send some time before they take a machine away."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from train.launch.command import RESTART

# Seconds: a signal to a whole process group, and the same one as a supervisor passes it on, are one notice.
TOGETHER = 2.0


class Preempted(SystemExit):
    """The run has saved its state and ends, to be started again: the process ends with the status RESTART."""

    def __init__(self) -> None:
        super().__init__(RESTART)


_told = math.inf  # when this process had its first notice


@contextlib.contextmanager
def notice() -> Iterator[Callable[[int], bool]]:
    """Within it SIGTERM does not end the process: the function it gives says, after each step, whether to leave.

    Processes of one run are told to leave after the same step, whichever of them had the signal: they ask JAX, which
    has taken SIGTERM over. Alone, a later second signal ends the process at once. Python tells the main thread alone:
    runs in other threads leave where that one is within a notice of its own.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: _told < math.inf
        return
    global _told
    _told = math.inf

    def handle(number: int, frame: Any) -> None:
        global _told
        if time.monotonic() - _told >= TOGETHER:
            raise Preempted
        _told = min(_told, time.monotonic())

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield lambda step: _told < math.inf
    finally:
        signal.signal(signal.SIGTERM, before)
