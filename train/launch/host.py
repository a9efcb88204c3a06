"""The process, its host and its peers: settings to be made before JAX does any work, and what many processes share."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from data.errors import InputError
from train.launch.peers import end_restartably
from train.launch.progress import signed

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def prepare() -> None:
    """Keeps compiled programs on disk, freed memory in the process, and libraries quiet but for errors.

    XLA:CPU allocates each large intermediate anew. By default glibc maps such blocks one by one and gives them back, so
    that every step faults all its pages in again; kept in one arena they are reused.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax warns of every folder it only reads
    cache = Path(os.environ.get('TORSO_CACHE', Path(__file__).parents[2] / '.cache')) / 'jax'
    jax.config.update('jax_compilation_cache_dir', str(cache))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    if platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        for parameter, value in (
            (_M_MMAP_MAX, 0),
            (_M_TRIM_THRESHOLD, 2**31 - 1),
            (_M_TOP_PAD, 1 << 28),
            (_M_ARENA_MAX, 1),
        ):
            libc.mallopt(parameter, value)


def join(coordinator_address: str, num_processes: int, process_id: int) -> None:
    """Makes this process one of many (`jax.distributed`), which together see the devices of all.

    On Cloud TPU, GKE and Slurm JAX finds out by itself what is to be known (`coordinator_address='auto'`); elsewhere
    each process names the address HOST:PORT of process 0, how many there are, and its own number. Nothing happens where
    the address is empty.

    Raises:
        InputError: JAX cannot tell who the others are, or cannot reach them.
    """
    if not coordinator_address:
        return
    known = coordinator_address != 'auto'
    try:
        jax.distributed.initialize(
            coordinator_address if known else None,
            num_processes if known else None,
            process_id if known else None,
            # A peer that was lost is noticed in this time, and does not hold up the others' exit for longer.
            heartbeat_timeout_seconds=60,
            shutdown_timeout_seconds=60,
        )
        end_restartably()
    except (ValueError, RuntimeError) as error:
        line = str(error).strip().split('\n')[0]
        raise InputError(
            f'--coordinator_address={coordinator_address}: {line}; expected auto on Cloud TPU, GKE or Slurm, '
            'elsewhere HOST:PORT of process 0 with --num_processes and --process_id'
        ) from None


def is_primary() -> bool:
    """Whether this process is the one that prints and writes files (checkpoints, all write together)."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_primary():
        print(signed(text), flush=True)


def wait_for_all(reason: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(reason)


def fetch(tree: Any) -> Any:
    """Arrays as NumPy arrays, whole on every process, wherever their parts are."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def gather_text(text: str) -> list[str]:
    """The texts of all processes, on each of them."""
    if jax.process_count() == 1:
        return [text]
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([raw.size]))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: raw.size] = raw
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes.reshape(-1), strict=True)]


def cpu_seconds() -> float:
    """CPU time of this process so far, all its threads and its finished children included."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
