"""Programs that try to pass without being right, to get out, or to do damage. Standard library alone, so that another
user's interpreter can run it: `python hostile.py ROOT` prints as JSON what went wrong.

The problem is f(x) == x + x. A program passes if its trick works; what follows its name is what the verdict's reason
should say instead, so that none fails by a mere slip. Lines with >>> are tests of its own, for the tricks that need
them.
"""

import json
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TESTS = ['assert f(2) == 4', "assert f('ab') == 'abab'", 'assert f([1, 2]) == [1, 2, 1, 2]']
TIMEOUT = 1.5
PASS = 'def f(x): return x + x'
REASONS = {
    'WRONG': 'AssertionError',
    'ENDED': 'the program ended',
    'REFUSED': 'PermissionError|Operation not permitted',
    'LATE': 'took longer',
}

PROGRAMS = r"""
# Forged success

=== exits at once: SystemExit
import sys; sys.exit(0)
=== exits hard: ENDED
import os; os._exit(0)
=== exits when called: SystemExit
def f(x): raise SystemExit(0)
=== exits hard when called: ENDED
import os
def f(x): os._exit(0)
=== equals all: WRONG
class E:
  def __eq__(self, o): return True
  __hash__ = None
def f(x): return E()
=== number that equals all: WRONG
class E(int):
  def __eq__(self, o): return True
def f(x): return E(9)
=== text that equals all: WRONG
class E(str):
  def __eq__(self, o): return True
def f(x): return E("9")
=== list that equals all: WRONG
class E(list):
  def __eq__(self, o): return True
def f(x): return E()
=== right number of a subclass: WRONG
class E(int): pass
def f(x): return E(4)
>>> assert f(2) == 4
=== lies about its class: WRONG
class E:
  __class__ = int
  def __eq__(self, o): return True
def f(x): return E()
=== metaclass that equals all: WRONG
class M(type):
  def __eq__(self, o): return True
  __hash__ = None
class E(metaclass=M): pass
def f(x): return E
=== not a number: WRONG
def f(x): return float("nan")
=== patches built-ins: WRONG
import builtins
builtins.AssertionError = None
builtins.compile = None
def f(x): return 0
=== patches exec: WRONG
import builtins
builtins.exec = lambda *a: None
def f(x): return 0
=== redefines built-ins: WRONG
abs = lambda x: 0
def f(x): return 0
>>> assert abs(f(2) - 4) < 1e-6
=== redefines len: WRONG
def len(x): return 4
def f(x): return []
>>> assert len(f([1, 2])) == 4
=== brings its own math: WRONG
class math:
  isclose = lambda a, b: True
def f(x): return 0
>>> assert math.isclose(f(2), 4)
=== replaces a module: WRONG
import sys, types
math = sys.modules["math"] = types.ModuleType("math")
math.isclose = lambda *a: True
def f(x): return 0
>>> assert math.isclose(f(2), 4)
=== hooks imports: WRONG
import sys, types
class H:
  def find_spec(self, n, p=None, t=None):
    print(n)
sys.meta_path.insert(0, H())
def f(x): return 0
>>> import string
>>> assert f(2) == 4
=== brings its own check: WRONG
def check(c): pass
def f(x): return 0
>>> def check(c):\n  assert c(2) == 4\ncheck(f)
=== stops the loop over cases: StopIteration
def f(x): raise StopIteration
>>> assert all(map(lambda c: f(c[0]) == c[1], [(1, 2), (2, 4)]))
=== raises what tests raise: WRONG
def f(x): raise AssertionError("")
=== patches the judge: WRONG
from data.tasks.sandbox import roles
roles._failure = lambda *a: ""
def f(x): return 0
=== patches the wire: WRONG
from data.tasks.sandbox import wire
wire.decode = lambda *a: 0
def f(x): return 0
>>> assert f(2) == 4
=== prints success: WRONG
print("[true,\"\"]\nOK passed 1.0")
def f(x): return 0
=== writes verdicts to every descriptor: Error
import os
b = b"[true,\"\"]"
for d in range(64):
  try: os.write(d, len(b).to_bytes(4, "big") + b)
  except OSError: pass
def f(x): return 0
=== answers before it is asked: TypeError
import os
b = b"[\"value\",true]"
for d in range(3, 64):
  try:
    for _ in range(99): os.write(d, len(b).to_bytes(4, "big") + b)
  except OSError: pass
def f(x): return 0
=== reads tests in frames: WRONG
import sys
def f(x):
  n = sys._getframe()
  while n:
    if "".join(["ass", "ert f"]) in str(n.f_locals): return x + x
    n = n.f_back
=== reads tests in the heap: WRONG
import gc
w = "".join(["ass", "ert f(2)"])
def f(x):
  for o in gc.get_objects():
    if type(o) in (list, tuple) and any(type(i) is str and i.startswith(w) for i in o): return x + x
=== looks for a parent to read: REFUSED
import os
def f(x):
  open(f"/proc/{os.getppid()}/mem", "rb")
  return x + x
=== reads its own memory: REFUSED
def f(x):
  open("/proc/self/mem", "rb")
  return x + x
=== acts when deleted: WRONG
import os
class D:
  def __del__(self): os._exit(0)
def f(x): D; return None
=== acts at exit: SystemExit
import atexit, os
atexit.register(os._exit, 0)
raise SystemExit
=== raises above Exception: Sly
class Sly(BaseException): pass
def f(x): raise Sly
=== raises what cannot be shown: ENDED
class Sly(Exception):
  def __str__(self): raise SystemExit(0)
def f(x): raise Sly
=== yields every number: WRONG
import itertools
def f(x): return itertools.count()
=== answers in no known type: ValueError
import os
b = b'["value",["__import__",["os"]]]'
def f(x):
  for d in range(3, 64):
    try: os.write(d, len(b).to_bytes(4, "big") + b)
    except OSError: pass
=== answers what is no message: Error
import os
def f(x):
  for d in range(3, 64):
    try: os.write(d, bytes([0, 0, 0, 2]) + b"{]")
    except OSError: pass
=== passes what it is not asked: NameError
def g(x): return x + x
# Ways out

=== reads a file: REFUSED
def f(x):
  open("/etc/passwd").read()
  return x + x
=== reads its source: REFUSED
import os
def f(x):
  os.open(os.__file__, 0)
  return x + x
=== lists a folder: REFUSED
import os
def f(x):
  os.listdir("/")
  return x + x
=== asks whether files exist: REFUSED
import os
def f(x):
  os.stat("/")
  return x + x
=== reads the environment: KeyError
import os
def f(x):
  os.environ["TORSO_SECRET"]
  return x + x
=== reads the first environment: REFUSED
def f(x):
  open("/proc/self/environ").read()
  return x + x
=== writes a file: REFUSED
def f(x):
  open("/tmp/torso-canary", "w")
  return x + x
=== writes to shared memory: REFUSED
def f(x):
  open("/dev/shm/torso-canary", "w")
  return x + x
=== makes an unnamed file: REFUSED
import os
def f(x):
  os.memfd_create("a")
  return x + x
=== makes a folder: REFUSED
import os
def f(x):
  os.mkdir("/tmp/torso-canary")
  return x + x
=== removes a file: REFUSED
import os
def f(x):
  os.unlink("/tmp/torso-precious")
  return x + x
=== changes rights: REFUSED
import os
def f(x):
  os.chmod("/tmp", 0o777)
  return x + x
=== opens a socket: REFUSED
import socket
def f(x):
  socket.socket()
  return x + x
=== opens a local socket: REFUSED
import socket
def f(x):
  socket.socketpair()
  return x + x
=== asks for a name: Error
import socket
def f(x):
  socket.getaddrinfo("example.org", 80)
  return x + x
=== forks: REFUSED
import os
def f(x):
  os.fork()
  return x + x
=== forks while loading: REFUSED
import os
os.fork()
def f(x): return x + x
=== forks twice: REFUSED
import os
def f(x):
  os.setsid()
  os.fork()
  return x + x
=== forks a terminal: REFUSED
import os
def f(x):
  os.forkpty()
  return x + x
=== starts a command: REFUSED
import subprocess
def f(x):
  subprocess.run(["true"])
  return x + x
=== becomes a command: REFUSED
import os
def f(x):
  os.execv("/bin/true", ["true"])
=== starts a thread: RuntimeError
import threading
def f(x):
  threading.Thread(target=int).start()
  return x + x
=== kills its parent: REFUSED
import os
def f(x):
  os.kill(os.getppid(), 9)
  return x + x
=== kills everybody: REFUSED
import os
def f(x):
  os.kill(-1, 9)
  return x + x
=== stops itself: REFUSED
import os, signal
def f(x):
  os.kill(os.getpid(), signal.SIGSTOP)
  return x + x
=== raises its limits: ValueError|REFUSED
import resource
def f(x):
  resource.setrlimit(0, (9, 9))
  return x + x
=== becomes root: REFUSED
import os
def f(x):
  os.setuid(0)
  return x + x
=== changes its root: REFUSED
import os
def f(x):
  os.chroot("/")
  return x + x
=== makes a pipe: REFUSED
import os
def f(x):
  os.pipe()
  return x + x
=== opens with C: WRONG
import ctypes
def f(x):
  if ctypes.CDLL(None).open(b"/etc/passwd", 0) >= 0: return x + x
=== makes raw system calls: WRONG
import ctypes
c = ctypes.CDLL(None).syscall
# socket, fork, ptrace, unshare, process_vm_readv, memfd_create, bpf, userfaultfd, io_uring, openat2, and more
CALLS = [41, 53, 56, 57, 58, 101, 105, 117, 157, 160, 165, 250, 272, 302, 310, 311, 319, 321, 323, 425, 434, 435, 437]
def f(x):
  if any(c(n, *[0] * 6) >= 0 for n in CALLS): return x + x
=== calls as another architecture: WRONG
import ctypes
def f(x):
  if ctypes.CDLL(None).syscall(0x40000002, b"/", 0) >= 0: return 4
=== traces its parent: WRONG
import ctypes, os
def f(x):
  if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0: return x + x
# Damage

=== never ends: LATE
while True: pass
=== never ends when called: LATE
def f(x):
  while True: pass
=== sleeps: LATE
import time
def f(x): time.sleep(1000)
=== swallows everything for ever: LATE
def f(x):
  while True:
    try:
      while True: pass
    except BaseException: pass
=== ignores signals: LATE
import signal
for s in range(1, 65):
  try: signal.signal(s, signal.SIG_IGN)
  except (OSError, ValueError): pass
def f(x):
  while True: pass
=== computes without a break: LATE
def f(x): return len(str(7 ** 10 ** 9))
=== matches for ever: LATE
import re
def f(x): return re.match("(a*)*b", "a" * 60)
=== takes much memory at once: MemoryError
def f(x):
  bytearray(2 ** 30)
  return x + x
=== takes memory bit by bit: MemoryError|ended|longer
def f(x):
  a = []
  while True: a.append(bytearray(2 ** 24))
=== recurses too deep: ended|RecursionError
import sys
sys.setrecursionlimit(10 ** 9)
def g(n): return [*map(g, [n])]
def f(x): return g(1)
=== returns too much: ValueError
def f(x): return "a" * 2 ** 22
=== returns a huge number: ValueError
def f(x): return 1 << 2 ** 24
=== returns a deep list: RecursionError
def f(x):
  a = []
  for _ in range(10 ** 5): a = [a]
  return a
=== returns a list of itself: RecursionError
def f(x):
  a = []
  a.append(a)
  return a
=== returns half a character: WRONG
def f(x): return "\ud800"
=== returns colliding keys: WRONG|longer
def f(x): return {n * (2 ** 61 - 1): 0 for n in range(3 * 10 ** 4)}
=== prints for ever: LATE
def f(x):
  while True: print("a" * 10 ** 4)
=== floods every descriptor: ValueError|longer
import os
def f(x):
  while True:
    for d in range(3, 64):
      try: os.write(d, b"\xff" * 10 ** 6)
      except OSError: pass
=== announces what never comes: LATE
import os
for d in range(3, 64):
  try: os.write(d, bytes([0, 0, 255, 255]))
  except OSError: pass
while True: pass
=== closes all descriptors: ENDED
import os
os.closerange(0, 4096)
def f(x): return x + x
=== yields without end: MemoryError|longer|ended
import itertools
def f(x): return itertools.count()
>>> assert list(f(2)) == [4]
=== hangs in an exception: LATE
class Sly(Exception):
  def __str__(self):
    while True: pass
def f(x): raise Sly
=== is no program: SyntaxError
def f(x) return x + x
"""


class Hostile(NamedTuple):
    name: str
    reason: str  # a pattern
    program: str
    tests: list[str] = TESTS


def hostile() -> list[Hostile]:
    """The programs above and some that are too long to write down. Numbers of system calls are those of x86-64."""
    nested = 'SyntaxError|MemoryError|RecursionError|ended'
    found = [
        Hostile('nests too deep to parse', nested, '(' * 10**5),
        Hostile('nests too deep to compile', nested, f'x = {"-" * 10**5}1\n{PASS}'),
        Hostile('holds half a character', 'Error', f'{PASS}\n"\ud800"'),
        Hostile('holds a null', 'Error', f'{PASS}\n\0'),
    ]
    for section in re.split('^=== ', PROGRAMS, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition('\n')
        name, _, reason = title.partition(': ')
        for short, pattern in REASONS.items():
            reason = reason.replace(short, pattern)
        lines = body.split('\n')
        tests = [line[4:].replace('\\n', '\n') for line in lines if line.startswith('>>> ')]
        program = '\n'.join(line for line in lines if not line.startswith('>>> '))
        if platform.machine() == 'x86_64' or 'syscall' not in program:
            found.append(Hostile(name, reason, program, tests or TESTS))
    return found


# No program can pass these, whatever it does: if one does, it has found a hole.
IMPOSSIBLE = [
    'value = f(2)\nassert value == 4 and value == 5',
    'import secrets\nassert f(2) == secrets.token_hex()',
    'assert f is None',
    'assert f(2) == 4 and False',
]


def main() -> list[str]:
    """What went wrong, a line each."""
    from data.tasks.sandbox import grade

    def attack(case: Hostile) -> list[str]:
        name, expected, program, tests = case
        start = time.monotonic()
        verdict = grade(program, tests, TIMEOUT)
        taken = time.monotonic() - start
        found = []
        if verdict.score != 0 or not re.search(expected, verdict.reason):
            found.append(f'{name}: {verdict.score} {verdict.reason!r}, expected {expected}')
        if taken > TIMEOUT + 10:  # generous, for a machine with much else to do
            found.append(f'{name}: took {taken:.1f} s')
        if expected != REASONS['LATE']:
            passed = [part.name for part in grade(program, IMPOSSIBLE, TIMEOUT).parts if part.score]
            found += [f'{name}: passes impossible {test}' for test in passed]
        return found

    os.environ['TORSO_SECRET'] = 'secret'
    with ThreadPoolExecutor(4) as pool:
        wrong = [line for lines in pool.map(attack, hostile()) for line in lines]
    if grade(PASS, TESTS).score != 1:
        wrong.append('after all that the right program fails')
    if any(Path(folder, 'torso-canary').exists() for folder in ('/tmp', '/dev/shm')):
        wrong.append('something was written')
    return wrong


if __name__ == '__main__':
    sys.path.insert(0, sys.argv[1])
    print(json.dumps({'user': os.geteuid(), 'programs': len(hostile()), 'wrong': main()}))
