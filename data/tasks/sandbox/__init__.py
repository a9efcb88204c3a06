"""The sandbox: programs written by a model run here, confined, and are judged by tests they never see.

Each program runs in a process of its own that has nothing but memory, time and one socket: no files, network,
environment or other processes, and no way to get any (`confine.py`). Tests run in a second process, as confined, where
the program's functions are stand-ins that pass calls on (`wire.py`): code and arguments go in, values of exact
built-in types come out, and expected values and verdicts are never within the program's reach.

Programs may import the modules in `roles.MODULES`. They cannot start threads. Arguments travel by value: a change that
a program makes to one of them is not seen by the tests.
"""

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import InputError
from data.tasks import Part, Verdict
from data.tasks.sandbox.wire import MESSAGE, Program, describe, receive, send

VERDICTS_KEPT = 4096
VALUE = 2**16  # bytes of a value that `run` takes: no more than can be rebuilt at once, whatever it is
ROOT = Path(__file__).resolve().parents[3]
SYSTEM = ('/usr', '/lib', '/lib64')  # what an interpreter needs of the system, inside bubblewrap
START = f'import sys; sys.path.insert(0, {str(ROOT)!r}); from data.tasks.sandbox.launcher import main; main()'
STARTING = 60.0  # seconds


class Result(NamedTuple):
    """What a call returned, or why it did not, in one line. Objects of other than built-in types are of no use."""

    value: Any
    error: str = ''


class Run(NamedTuple):
    results: tuple[Result, ...]
    output: str
    error: str = ''


def grade(
    code: str, tests: Sequence[str], timeout: float = 5.0, *, setup: str = '', names: Sequence[str] = ()
) -> Verdict:
    """Whether a program passes all tests, pieces of Python such as 'assert add(1, 2) == 3', within `timeout` seconds.

    Names in tests are those that `setup` (trusted code, run on the side of the tests) or earlier tests define, then
    built-in ones, then the program's; `names` are the program's whatever else they may be. The score is 1 or 0, with a
    part for each test. Verdicts are kept: a program is not run twice with the same tests. Safe to call from threads.
    Raises InputError where there is nothing to pass or where this machine cannot confine programs, ChildProcessError
    where the sandbox itself was killed.
    """
    if not tests or isinstance(tests, str) or not all(isinstance(test, str) and test.strip() for test in tests):
        raise InputError(f'sandbox: tests: expected one or more pieces of Python, got {str(tests)[:80]!r}')
    return _grade(code, tuple(tests), _checked(timeout), setup, tuple(names))


@functools.lru_cache(maxsize=VERDICTS_KEPT)
def _grade(code: str, tests: tuple[str, ...], timeout: float, setup: str, names: tuple[str, ...]) -> Verdict:
    answers: list[tuple[bool, str]] = []
    reason = ''
    start = time.monotonic()
    with _process('judge', timeout) as fd:
        try:
            send(fd, [code, setup, names, tests])
            for _ in tests:
                answers.append(receive(fd, MESSAGE))
        except (EOFError, ConnectionError):
            reason = _ending(start, timeout)
    answers += [(False, reason)] * (len(tests) - len(answers))
    parts = tuple(Part(f'test {i}', float(passed), 0, 0) for i, (passed, _) in enumerate(answers, 1))
    failed = [f'test {i}: {why}' for i, (passed, why) in enumerate(answers, 1) if not passed]
    return Verdict(float(not failed), parts, failed[0] if failed else '')


def run(code: str, calls: Sequence[tuple[str, Sequence[Any]]] = (), timeout: float = 5.0) -> Run:
    """Run a program, then call functions of it by name with arguments. Nothing that comes back can be trusted.

    Values of more than VALUE bytes are refused; `output` is the beginning of what was printed. `error` says why the
    program itself failed, in which case every call fails. Raises what `grade` raises.
    """
    results: list[Result] = []
    start = time.monotonic()
    with _process('program', _checked(timeout)) as fd:
        program = Program(fd, VALUE)

        def attempt(*request: Any) -> Result:
            try:
                return Result(program.ask(*request))
            except Exception as error:
                return Result(None, describe(error))

        loaded = attempt('load', code)
        for name, arguments in calls:
            found = loaded if loaded.error else attempt('get', name)
            results.append(found if found.error else attempt('call', found.value, tuple(arguments), {}))
        output = attempt('output')
        program.end()
    failure = loaded.error or output.error and _ending(start, timeout)
    return Run(tuple(results), output.value if isinstance(output.value, str) else '', failure)


def _checked(timeout: float) -> float:
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout <= 3600:
        raise InputError(f'sandbox: timeout: expected seconds in (0, 3600], got {timeout!r}')
    return float(timeout)


def _ending(start: float, timeout: float) -> str:
    return f'took longer than {timeout:g} s' if time.monotonic() - start >= timeout else 'the process ended'


class _Launcher:
    """The process of `launcher.py`, inside bubblewrap if that works. Raises InputError if it cannot confine."""

    def __init__(self) -> None:
        answer = f'{sys.platform} is not Linux'
        bubblewrap = shutil.which('bwrap')
        for wrapper in ([_bubblewrap(bubblewrap)] if bubblewrap else []) + ([[]] if sys.platform == 'linux' else []):
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self.process = _interpreter(wrapper, theirs)
            self.control.settimeout(STARTING)
            try:
                answer = self.control.recv(4096).decode()
            except OSError as error:
                answer = str(error)
            if answer == 'ready':
                self.control.settimeout(None)
                return
            self.control.close()
            self.process.kill()
            self.process.wait()
        raise InputError(
            f'sandbox: programs cannot be confined here ({answer or "the launcher did not start"}): use Linux on '
            'x86_64 or aarch64 with seccomp, such as a container with the default profile of Docker'
        )


def _interpreter(wrapper: list[str], control: socket.socket) -> subprocess.Popen[bytes]:
    """This interpreter without the user's environment, packages and folders: only this project's `data`.

    Hashes are not random, so that a program which depends on the order of a set is judged alike every time.
    """
    kept = {name: os.environ[name] for name in ('LD_LIBRARY_PATH',) if name in os.environ}
    return subprocess.Popen(
        [*wrapper, os.path.realpath(sys.executable), '-P', '-s', '-S', '-B', '-c', START],
        stdin=control.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd='/',
        env={'PYTHONHASHSEED': '0', **kept},
        start_new_session=True,
    )


def _bubblewrap(command: str) -> list[str]:
    folders = dict.fromkeys(
        [*SYSTEM, sys.base_prefix, str(Path(sys.executable).resolve().parents[1]), str(ROOT / 'data')]
    )
    binds = [word for folder in folders for word in ('--ro-bind-try', folder, folder)]
    identity = ['--unshare-all', '--unshare-user', '--uid', '65534', '--gid', '65534', '--cap-drop', 'ALL']
    return [command, *identity, '--new-session', *binds, '--chdir', '/', '--']


_launchers: dict[int, _Launcher] = {}  # by process, as a fork must not use the one of its parent
_starting = threading.Lock()


def _launcher() -> _Launcher:
    with _starting:
        launcher = _launchers.get(os.getpid())
        if launcher is None or launcher.process.poll() is not None:
            _launchers.clear()
            launcher = _launchers[os.getpid()] = _Launcher()
        return launcher


@contextlib.contextmanager
def _process(role: str, timeout: float) -> Iterator[int]:
    """A socket to a new confined process, which is killed after `timeout` seconds or on leaving."""
    mine, theirs = socket.socketpair()
    alive, leash = os.pipe()
    try:
        with theirs:
            try:
                launcher = _launcher()
                message = json.dumps({'role': role, 'timeout': timeout}).encode()
                socket.send_fds(launcher.control, [message], [theirs.fileno(), alive])
            finally:
                os.close(alive)
        yield mine.fileno()
        if launcher.process.poll() is not None:
            raise ChildProcessError('sandbox: the process that starts others was killed')
    finally:
        mine.close()
        os.close(leash)
