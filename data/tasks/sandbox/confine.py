"""Confinement of a process by itself, with what Linux gives everyone: seccomp, Landlock, resource limits, another user.

The filter is a list of what may be done rather than of what may not: a process that has read its program needs nothing
but memory, the clock and the descriptors it has. It cannot open, make, send, start, signal or trace anything. Landlock
and the change of user come before, in the launcher, and hold where a filter should fail. Numbers are from the kernel's
headers (asm/unistd.h, linux/seccomp.h, linux/filter.h, linux/landlock.h).
"""

import ctypes
import errno
import functools
import os
import platform
import resource
import signal
import struct

NOBODY = 65534
DESCRIPTORS = 4096
# Bytes of address space (an interpreter with its modules takes some 40 million), of core dumps, of any file, ...
LIMITS = {'AS': 2**29, 'CORE': 0, 'FSIZE': 0, 'MEMLOCK': 0, 'MSGQUEUE': 0, 'NOFILE': DESCRIPTORS}

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # classic BPF
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # the same on all architectures
LANDLOCK_BITS = {1: 13, 2: 14, 3: 15, 5: 16}  # since which version how many kinds of file access are known

# Per machine: its audit number, and the numbers of the allowed system calls in the order of the names.
CALLS = (
    'read write close lseek readv writev poll select sched_yield mmap mprotect munmap mremap madvise brk rt_sigaction '
    'rt_sigprocmask rt_sigreturn sigaltstack restart_syscall getpid gettid getrusage times futex nanosleep '
    'clock_nanosleep clock_gettime clock_getres gettimeofday getrandom exit exit_group'
)
MACHINES = {
    'x86_64': (
        0xC000003E,
        '0 1 3 8 19 20 7 23 24 9 10 11 25 28 12 13 14 15 131 219 39 186 98 100 202 35 230 228 229 96 318 60 231',
    ),
    'aarch64': (
        0xC00000B7,
        '63 64 57 62 65 66 73 72 124 222 226 215 216 233 214 134 135 139 132 128 172 178 165 153 98 101 115 113 114 '
        '169 278 93 94',
    ),
}

_libc = ctypes.CDLL(None, use_errno=True)


@functools.cache
def _filter() -> tuple[ctypes.Array[ctypes.c_char], ctypes.Array[ctypes.c_char]]:
    """What the kernel is given: length and address of the instructions, and these. They allow the calls in the list,
    refuse others with EPERM, and kill what calls as another architecture. Raises OSError for an unknown machine."""
    if platform.system() != 'Linux' or platform.machine() not in MACHINES or struct.calcsize('P') != 8:
        raise OSError(f'no filter of system calls for {platform.system()} on {platform.machine()}')
    architecture, numbers = MACHINES[platform.machine()]
    code = [(LOAD, 0, 0, 4), (JUMP_IF_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for number in map(int, numbers.split()):
        code += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    packed = b''.join(struct.pack('HBBI', *words) for words in [*code, (RETURN, 0, 0, REFUSE)])
    instructions = ctypes.create_string_buffer(packed, len(packed))
    header = struct.pack('HxxxxxxP', len(packed) // 8, ctypes.addressof(instructions))
    return ctypes.create_string_buffer(header, len(header)), instructions


def confine_launcher() -> None:
    """No rights, no files and bounded memory, for a process that still starts others. Irrevocable.

    Landlock is left out where the kernel lacks it, and the change of user where this is not root or root may not.
    Raises OSError where this machine has no filter of system calls.
    """
    _filter()
    for name, limit in LIMITS.items():
        _limit(getattr(resource, f'RLIMIT_{name}'), limit)
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except PermissionError:  # a root without the right to be another has lost the others, too
            pass
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_DUMPABLE, 0)  # nobody of the same user may trace it
    _landlock()


def confine_program(seconds: int) -> None:
    """The last steps, after which this process can but compute and use the descriptors it has. Irrevocable.

    It dies with the launcher and after `seconds` of CPU time. Raises OSError where the filter does not hold.
    """
    _limit(resource.RLIMIT_CPU, seconds)
    _limit(resource.RLIMIT_NPROC, 0)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(_filter()[0]))
    try:
        os.open('/', os.O_RDONLY)
    except OSError as error:
        if error.errno == errno.EPERM:
            return
    raise OSError('the filter of system calls does not hold')


def _limit(number: int, limit: int) -> None:
    hard = resource.getrlimit(number)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(number, (limit, limit))


def _prctl(option: int, *arguments: int) -> None:
    words = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *words) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f'prctl {option}: {os.strerror(number)}')


def _landlock() -> None:
    """A rule set that handles every kind of access the kernel knows and allows none."""
    version = _libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return
    files = 2 ** LANDLOCK_BITS[max(since for since in LANDLOCK_BITS if since <= version)] - 1
    words = [files, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0]  # files; TCP; signals, abstract sockets
    rules = struct.pack('QQQ', *words)[: 8 if version < 4 else 16 if version < 6 else 24]
    fd = _libc.syscall(LANDLOCK_CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), ctypes.c_uint(0))
    if fd < 0 or _libc.syscall(LANDLOCK_RESTRICT_SELF, ctypes.c_int(fd), ctypes.c_uint(0)) != 0:
        raise OSError(ctypes.get_errno(), 'Landlock refuses its rules')
    os.close(fd)
