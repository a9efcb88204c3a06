"""The process that starts confined ones: one thread, the standard library alone, and never a program or a test in it.

Programs run in forks of this process, in which the modules they may import are loaded already: nothing can be read
from disk there. A fork takes a millisecond or so, and begins with a memory that no program has touched. The processes
of a job are killed when it has had its time, or when whoever asked for it closes the pipe that came with it, by dying
for instance.
"""

import contextlib
import gc
import importlib
import json
import math
import os
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from data.tasks.sandbox import confine
from data.tasks.sandbox.roles import MODULES, judge, serve

PATIENCE = 0.05  # seconds until dead processes are looked for again


@dataclass
class Job:
    processes: list[int]
    deadline: float


def main() -> None:
    """Serve the socket that is standard input: `ready`, or why not; then one job per message with two descriptors."""
    control = socket.socket(fileno=0)
    try:
        for name in MODULES:
            with contextlib.suppress(ImportError):  # an interpreter built without some part
                importlib.import_module(name)
        sys.path.clear()
        confine.confine_launcher()
        process = _fork(lambda: os._exit(7), 1.0, [])  # does the filter hold here?
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 7:
            raise OSError('the kernel offers no filter of system calls')
    except OSError as error:
        control.send(str(error).encode())
        return
    gc.disable()
    gc.freeze()
    control.send(b'ready')
    jobs: dict[int, Job] = {}
    dying: list[int] = []
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        deadline = min((job.deadline for job in jobs.values()), default=math.inf)
        wait = min(deadline - time.monotonic(), PATIENCE if dying else math.inf)
        for fd, _ in poll.poll(None if wait == math.inf else max(0, math.ceil(1000 * wait))):
            if fd != control.fileno():
                dying += _kill(jobs.pop(fd))
                poll.unregister(fd)
                os.close(fd)
                continue
            message, fds, _, _ = socket.recv_fds(control, 4096, 2)
            if not message:
                for job in jobs.values():
                    _kill(job)
                return
            request = json.loads(message)
            jobs[fds[1]] = _start(request['role'], fds[0], request['timeout'])
            poll.register(fds[1], 0)  # tells when the other end is closed
        for job in jobs.values():
            if job.deadline <= time.monotonic():
                dying += _kill(job)
        dying = [process for process in dying if os.waitpid(process, os.WNOHANG)[0] == 0]


def _start(role: str, fd: int, timeout: float) -> Job:
    deadline = time.monotonic() + timeout
    if role == 'program':
        processes = [_fork(lambda: serve(fd), timeout, [fd])]
        os.close(fd)
        return Job(processes, deadline)
    here, there = (end.detach() for end in socket.socketpair())
    # The judge comes first and is the first to be killed: it should not see the program die of a timeout.
    processes = [
        _fork(lambda: judge(fd, here), timeout, [fd, here]),
        _fork(lambda: serve(there), timeout, [there]),
    ]
    for end in (fd, here, there):
        os.close(end)
    return Job(processes, deadline)


def _kill(job: Job) -> list[int]:
    """Kill a job's processes, which are not reaped yet, so that no other can have their numbers."""
    killed, job.processes, job.deadline = job.processes, [], math.inf
    for process in killed:
        os.kill(process, signal.SIGKILL)
    return killed


def _fork(work: Callable[[], None], timeout: float, keep: list[int]) -> int:
    """A new process that does `work`, confined, with no descriptors but `keep` and three of /dev/null."""
    process = os.fork()
    if process:
        return process
    try:
        os.dup2(1, 0)
        low = 3
        for fd in sorted(keep):
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, confine.DESCRIPTORS)
        random.seed(0)
        confine.confine_program(math.ceil(timeout) + 1)
        gc.enable()
        work()
    finally:
        os._exit(1)
