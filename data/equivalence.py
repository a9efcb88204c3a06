"""Whether two short mathematical expressions say the same, decided by the library math-verify in a process of its own.

The library computes what it reads, so that an expression as short as 9^9^9^9 keeps it busy for good, and its own limits
of time only work on a main thread. So a child process does all of it, one request at a time. The child asks the kernel
to end it (whatever it is doing) when a request has used up its processor time; the next request starts another child.
"""

import functools
import json
import logging
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

MEMORY = 2 << 30  # bytes of address space
_READY = b'ready\n'


class Checker:
    """Asks the child process, which starts with the first request. Safe to call from several threads."""

    def __init__(self, seconds: float = 2.0):
        """`seconds` of processor time are a request's; most take milliseconds."""
        self._seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def equivalent(self, reference: str, answer: str) -> bool | None:
        """Whether `answer` equals `reference`, both LaTeX or plain; None if that took too long or too much memory.

        Raises RuntimeError if there is no way to tell because the child does not start.
        """
        with self._lock:
            child = self._child = self._child or self._start()
            assert child.stdin and child.stdout
            try:
                child.stdin.write(json.dumps([reference, answer, self._seconds]).encode() + b'\n')
                child.stdin.flush()
                reply = child.stdout.readline()
            except BrokenPipeError:  # killed by others since the last request
                reply = b''
            except BaseException:  # a reply that nobody read would be taken for that to the next request
                self._stop(child)
                raise
            if not reply:
                self._stop(child)
                return None
            return bool(json.loads(reply))

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the folder of this file is no place to import from. A new session: Ctrl-C is the parent's to handle.
        child = subprocess.Popen(
            [sys.executable, '-P', __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert child.stdout
        if child.stdout.readline() != _READY:
            self._stop(child)
            raise RuntimeError(f'math-verify does not start: {sys.executable} -P {__file__} shows why')
        return child

    def _stop(self, child: subprocess.Popen[bytes]) -> None:
        self._child = None
        child.kill()
        child.communicate()


def _serve() -> None:
    """The child: a line of JSON in, a line out, until the parent is gone."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    config = [LatexExtractionConfig()]

    @functools.lru_cache(1 << 12)
    def expression(text: str) -> list[Any]:
        # One pair of dollars around all of it: what is read is the whole answer, never the best part of it.
        return parse(f'${text}$', config, fallback_mode='no_fallback', parsing_timeout=None)  # type: ignore[arg-type]

    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    replies.write(_READY)
    replies.flush()
    for line in requests:
        reference, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            same = verify(expression(reference), expression(answer), timeout_seconds=None)
        except Exception:
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(b'%d\n' % same)
        replies.flush()


if __name__ == '__main__':
    _serve()
