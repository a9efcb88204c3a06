"""Processes of a run that are lost, and steps that never end: the others end soon, to be started again together."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from train.launch.command import RESTART

Tell = Callable[[int, str, str], None]
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _ended(number: int) -> None:
    line = f'process {jax.process_index()}: JAX lost another one of the run: status {RESTART}, to be started again\n'
    os.write(2, line.encode())
    os._exit(RESTART)


_on_abort = _HANDLER(_ended)  # kept: the system calls it


def end_restartably() -> None:
    """From now on, a process that JAX aborts ends with the status RESTART.

    That is what JAX does, from a thread of its own, where the process that coordinates the others is gone. No handler
    of Python's would be called, as abort() does not return to the interpreter.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, _HANDLER)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), _on_abort)


@contextlib.contextmanager
def lost(where: Callable[[], int], tell: Tell) -> Iterator[None]:
    """Within it, errors of JAX in a run of several processes end this one with the status RESTART.

    At once: whoever waits for a save, or for the others to shut down, waits in vain. `where` gives the step of the
    event, which `tell` is told with its kind and detail. Memory that does not suffice is nobody's loss.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        line = str(error).strip().split('\n')[0]
        if jax.process_count() == 1 or line.startswith('RESOURCE_EXHAUSTED'):
            raise
        _end(tell, where(), 'process lost', line[:300])


@contextlib.contextmanager
def deadline(seconds: float, tell: Tell) -> Iterator[Callable[[int], None]]:
    """Gives a function to be called with the number of each step that begins, but for the first, which compiles.

    Where it was called, and for so many seconds is not called again nor the context left, the process ends with the
    status RESTART: the others of the run may wait for this one, or this one for them, for ever. 0 seconds: never.
    """
    if not seconds:
        yield lambda step: None
        return
    begun: queue.SimpleQueue[int] = queue.SimpleQueue()  # 0: no more

    def watch() -> None:
        step = begun.get()
        while step:
            try:
                step = begun.get(timeout=seconds)
            except queue.Empty:
                faulthandler.dump_traceback()
                _end(tell, step, 'step overdue', f'not done after {seconds:g} s')

    thread = threading.Thread(target=watch, name='deadline', daemon=True)
    thread.start()
    try:
        yield begun.put
    finally:
        begun.put(0)
        thread.join()


def _end(tell: Tell, step: int, kind: str, detail: str) -> Any:
    tell(step, kind, f'{detail}; ends with status {RESTART}, to be started again')
    print(f'process {jax.process_index()}: {kind}: {detail}: status {RESTART}', file=sys.stderr, flush=True)
    os._exit(RESTART)
