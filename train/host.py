"""The process and its host: settings to be made before JAX does any work, and the CPU time it takes."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from pathlib import Path

import jax
from absl import logging

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def prepare() -> None:
    """Keeps compiled programs on disk, freed memory in the process, and libraries quiet but for errors.

    XLA:CPU allocates each large intermediate anew. By default glibc maps such blocks one by one and gives them back, so
    that every step faults all its pages in again; kept in one arena they are reused.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax warns of every folder it only reads
    cache = Path(os.environ.get('TORSO_CACHE', Path(__file__).parent.parent / '.cache')) / 'jax'
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


def cpu_seconds() -> float:
    """CPU time of this process so far, all its threads and its finished children included."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
