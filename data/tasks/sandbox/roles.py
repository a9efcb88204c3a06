"""What confined processes do: one runs the program, and another, if there are tests, judges what it returns."""

import builtins
import importlib
import io
import re
import sys
import types
from collections.abc import Callable
from typing import Any

from data.tasks.sandbox.wire import Program, decode, describe, encode, receive, send

OUTPUT = 2**16  # characters that are kept of what a program prints

# Loaded before a process is confined; what is not here cannot be imported. With them come the modules they need.
MODULES = (
    'abc array ast base64 binascii bisect builtins calendar cmath collections collections.abc contextlib copy '
    'dataclasses datetime decimal difflib enum fractions functools gc graphlib hashlib heapq html inspect io '
    'itertools json keyword math numbers operator pprint queue random re secrets statistics string struct sys '
    'textwrap threading time traceback types typing unicodedata uuid warnings weakref zlib _strptime '
    'encodings.ascii encodings.latin_1 encodings.idna encodings.utf_16 encodings.utf_32 '
).split()
DOTTED = re.compile(r'(?<![\w.])(\w+)\.\w')


class Output(io.StringIO):
    """Standard output of a program: its beginning is kept."""

    def write(self, text: str) -> int:
        super().write(text[: max(0, OUTPUT - self.tell())])
        return len(text)


def serve(fd: int) -> None:
    """Run a program and do what is asked of it, until the other end is gone.

    `load` executes source code, `get` finds one of its names, `call`, `getattr`, `setattr`, `iter` and `next` do what
    they say with objects, and `output` is what has been printed. Once the program is loaded this process is its own:
    it may answer as it likes, and all that can be is another value.
    """
    module = types.ModuleType('program')
    sys.modules['program'] = module
    objects: list[Any] = []
    printed = sys.stdout = sys.stderr = Output()
    sys.stdin = io.StringIO()

    def load(code: str) -> None:
        _execute(code, module.__dict__)

    def get(name: str) -> Any:
        if name not in module.__dict__:
            raise NameError(f'the program defines no {name}')
        return module.__dict__[name]

    operations: dict[str, Callable[..., Any]] = {
        'load': load,
        'get': get,
        'call': lambda function, arguments, named: function(*arguments, **named),
        'getattr': getattr,
        'setattr': setattr,
        'iter': iter,
        'next': next,
        'output': printed.getvalue,
    }

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    while True:
        operation, arguments = receive(fd)
        try:
            result = operations[operation](*(decode(argument, objects.__getitem__) for argument in arguments))
            answer = ['value', encode(result, refer)]
        except BaseException as error:
            answer = ['error', type(error).__name__, str(error)]
        send(fd, answer)


class Names(dict[str, Any]):
    """The global names of tests: their own, then built-in ones, then the program's."""

    def __init__(self, program: Program):
        super().__init__(__name__='tests', __builtins__=builtins)
        self._program = program

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        return self._program.ask('get', name)


def judge(fd: int, program_fd: int) -> None:
    """Take [code, setup, names, tests] from `fd` and answer with [passed, reason] for each test in turn.

    Neither tests nor verdict are ever in the process of the program.
    """
    code, setup, names, tests = receive(fd)
    program = Program(program_fd)
    known = Names(program)
    failure = _failure(program.ask, 'load', code) or _failure(_prepare, known, program, setup, names, tests)
    for test in tests:
        reason = failure or _failure(_execute, test, known)
        send(fd, [not reason, reason])


def _prepare(known: Names, program: Program, setup: str, names: list[str], tests: list[str]) -> None:
    _execute(setup, known)
    for name in {name for test in tests for name in DOTTED.findall(test)}:
        # A module is the tests' own, even where they rely on the program to have imported it.
        if name in MODULES:
            known.setdefault(name, importlib.import_module(name))
    for name in names:
        known[name] = program.ask('get', name)


def _execute(source: str, names: dict[str, Any]) -> None:
    exec(compile(source, '<source>', 'exec', dont_inherit=True), names)


def _failure(action: Callable[..., Any], *arguments: Any) -> str:
    """Why an action failed, in one line; empty where it did not."""
    try:
        action(*arguments)
    except BaseException as error:
        return describe(error)
    return ''
