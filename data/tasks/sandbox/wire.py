"""What passes between confined processes: frames of JSON in which every value says its exact built-in type.

The other end may be hostile. Nothing of it is run here: a value is rebuilt from the few types below, so that neither a
subclass nor an overridden `__eq__` survives the trip, and whatever else a program returns is a `Remote`: a number by
which to ask for it again.
"""

import builtins
import collections
import json
import os
from collections.abc import Callable
from typing import Any

MESSAGE = 2**20  # bytes of a frame
ERROR = 200  # characters of an error's message

SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset, collections.deque)}
MAPPINGS = {kind.__name__: kind for kind in (dict, collections.OrderedDict, collections.Counter)}
TYPES = {name: kind for name, kind in vars(builtins).items() if type(kind) is type}
BYTES = {kind.__name__: kind for kind in (bytes, bytearray)}


class ProgramError(Exception):
    """The program raised something that is no built-in exception, or its process is gone."""


def describe(error: BaseException) -> str:
    """An error as a line that can be printed anywhere, whoever wrote its message."""
    line = (f'{type(error).__name__}: {error}'.strip(': ').splitlines() or ['?'])[0][:ERROR]
    return ''.join(letter if letter.isprintable() else '?' for letter in line)


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """`value` as JSON. `refer` gives the number of an object that cannot travel, or raises."""
    if value is None:
        return None
    kind = type(value)
    if kind in (bool, str):
        return value
    if kind is int:  # long ones in hexadecimal: decimal digits take quadratic time
        return value if -(2**63) <= value < 2**63 else ['int', hex(value)]
    if kind is float:
        return ['float', value.hex()]
    if kind is complex:
        return ['complex', [value.real.hex(), value.imag.hex()]]
    if kind is range:
        return ['range', [encode(n, refer) for n in (value.start, value.stop, value.step)]]
    if kind in SEQUENCES.values():
        return [kind.__name__, [encode(item, refer) for item in value]]
    if kind in MAPPINGS.values() or kind is collections.defaultdict:
        name = 'dict' if kind is collections.defaultdict else kind.__name__
        return [name, [[encode(key, refer), encode(item, refer)] for key, item in value.items()]]
    if kind in BYTES.values():
        return [kind.__name__, value.hex()]
    if kind is type and value in TYPES.values():
        return ['type', value.__name__]
    return ['object', refer(value)]


def decode(data: Any, resolve: Callable[[int], Any]) -> Any:
    """The value that `encode` made `data` of; `resolve` gives the object of a number. Anything else raises."""
    if data is None or type(data) in (bool, int, str):
        return data
    name, body = data
    if name == 'int':
        return int(body, 16)
    if name == 'float':
        return float.fromhex(body)
    if name == 'complex':
        return complex(*map(float.fromhex, body))
    if name == 'range':
        return range(*(decode(item, resolve) for item in body))
    if name in SEQUENCES:
        return SEQUENCES[name](decode(item, resolve) for item in body)
    if name in MAPPINGS:
        return MAPPINGS[name]({decode(key, resolve): decode(item, resolve) for key, item in body})
    if name in BYTES:
        return BYTES[name](bytes.fromhex(body))
    if name == 'type':
        return TYPES[body]
    if name == 'object':
        return resolve(body)
    raise ValueError(f'unknown type {name!r}')


def send(fd: int, message: Any) -> None:
    """Write one frame: four bytes of length, then JSON."""
    body = json.dumps(message, separators=(',', ':')).encode()
    left = memoryview(len(body).to_bytes(4, 'big') + body)
    while left:
        left = left[os.write(fd, left) :]


def receive(fd: int, limit: int = 64 * MESSAGE) -> Any:
    """Read one frame of at most `limit` bytes. Raises EOFError where the other end is gone, ValueError for others."""
    size = int.from_bytes(_read(fd, 4), 'big')
    if size > limit:
        raise ValueError(f'a message of {size} bytes; at most {limit} are taken')
    return json.loads(_read(fd, size))


def _read(fd: int, size: int) -> bytes:
    pieces = bytearray()
    while len(pieces) < size:
        try:
            piece = os.read(fd, min(size - len(pieces), 2**16))
        except ConnectionError:
            piece = b''
        if not piece:
            raise EOFError('the process is gone')
        pieces += piece
    return bytes(pieces)


class Program:
    """A program that runs in another process, asked over `fd`. Arguments travel by value, and so do results, of which
    none may take more than `limit` bytes."""

    def __init__(self, fd: int, limit: int = MESSAGE):
        self._fd = fd
        self._limit = limit
        self._broken = False

    def end(self) -> None:
        """Ask no more, as `fd` may soon be another file's."""
        self._broken = True

    def ask(self, operation: str, *arguments: Any) -> Any:
        """What the program's process answers (see `candidate.serve`). Raises what it says was raised there: a built-in
        exception by that name, or ProgramError; whatever follows an answer that was none is ProgramError, too."""
        if self._broken:
            raise ProgramError('the program no longer answers')
        try:
            send(self._fd, [operation, [encode(argument, _number) for argument in arguments]])
            self._broken = True
            kind, *body = receive(self._fd, self._limit)
            self._broken = False
        except (EOFError, ConnectionError) as error:
            raise ProgramError('the program ended') from error
        if kind == 'value':
            return decode(body[0], lambda number: Remote(self, number))
        name, message = (str(text)[:ERROR] for text in body)
        error_type = getattr(builtins, name, None)
        # A StopIteration that a call raises could end a loop over test cases before its time.
        early = error_type is StopIteration and operation != 'next'
        if isinstance(error_type, type) and issubclass(error_type, Exception) and not early:
            raise error_type(message)
        raise ProgramError(f'{name}: {message}')


class Remote:
    """An object of the program: called, iterated and looked into from afar, never compared or shown by its own code."""

    def __init__(self, program: Program, number: int):
        object.__setattr__(self, '_program', program)
        object.__setattr__(self, '_number', number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.ask('call', self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return self._program.ask('getattr', self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask('setattr', self, name, value)

    def __iter__(self) -> Any:
        return self._program.ask('iter', self)

    def __next__(self) -> Any:
        return self._program.ask('next', self)


def _number(value: Any) -> int:
    if type(value) is not Remote:
        raise TypeError(f'a {type(value).__name__} cannot be sent to the program')
    return value._number
