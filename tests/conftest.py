"""Settings of every test. They are environment variables so that commands started by a test run under them too."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from server import Server

ROOT = Path(__file__).resolve().parent.parent
FAKE_DEVICES = '--xla_force_host_platform_device_count=8'

# All of this has to precede the first import of jax.
if 'jax' in sys.modules:
    raise RuntimeError('jax was imported before tests/conftest.py could configure it')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Small models run in no time and compile for long: the compiler need not try hard.
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0 {FAKE_DEVICES}'.strip()
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
# Most of a cold run's time is compilation, and most programs do not change from one run to the next.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('MPLBACKEND', 'agg')
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope='session')
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope='session')
def one_device() -> dict[str, str]:
    """An environment for commands started by a test, without the eight fake devices of the tests themselves."""
    flags = os.environ['XLA_FLAGS'].replace(FAKE_DEVICES, '').strip()
    return {**os.environ, 'XLA_FLAGS': flags}


@pytest.fixture(scope='session')
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of 400 tokens."""
    from text import small_tokenizer

    path = tmp_path_factory.mktemp('tokenizer')
    small_tokenizer().save(path)
    return str(path)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A chat endpoint on this machine, tried again without much of a pause."""
    from server import Server

    monkeypatch.setattr('data.endpoint.BACKOFF', 0.01)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()
