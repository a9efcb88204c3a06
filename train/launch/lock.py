"""One run at a time in a workdir."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from data.errors import InputError
from train.launch.host import is_primary


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of `workdir`, which is made where it is missing.

    The lock is the system's, on an open file: it goes with its process, however that dies, so that none can be stale.
    The first process of a run holds it for all.

    Raises:
        InputError: another run is at work there, which is named; the folder cannot be written.
    """
    if not is_primary():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((workdir / '.lock').open('a+'))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or 'it has just begun'
            raise InputError(
                f'{workdir}: another run is at work in it ({holder}); wait for its end, or use another --workdir'
            ) from None
        except OSError as error:
            raise InputError(f'{workdir}: expected a folder that can be written and locked: {error.strerror}') from None
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
