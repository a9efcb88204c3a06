"""What a compiled program does, read from its optimized HLO text: FLOPs, memory traffic, collectives, loops.

XLA's own `cost_analysis` counts the body of a loop once. Here everything counts as often as it runs: a loop whose trip
count the text tells runs that often; any other as often as `model.backend.trips` noted, or once. Of the branches of a
conditional the one with most FLOPs counts. All numbers are of one device.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from model.backend import TRIPS

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute')
# They move nothing, or what they do is counted inside of them or where it began.
_FREE = (
    'parameter constant tuple get-tuple-element bitcast while conditional call call-start async-start iota '
    'partition-id replica-id after-all opt-barrier add-dependency'
).split()
_SLICES = ('dynamic-slice', 'slice', 'gather')
_SAME = ('bitcast', 'copy', 'convert', 'copy-done', 'copy-start', 'reshape')  # a constant stays one through these

_SHAPE = re.compile(r'(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_HEAD = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = ')
_NAMES = re.compile(r'%([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: its element type, dimensions, and whether it lies in the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    main: bool

    @property
    def size(self) -> int:
        """Bytes."""
        bits = re.search(r'\d+', self.dtype)
        width = 8 if self.dtype == 'pred' else int(bits.group()) if bits else 0
        return math.prod(self.dims) * width // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shapes` are those of the result, flattened where it is a tuple."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    def called(self, *names: str) -> list[str]:
        """Computations named by these attributes."""
        found = [re.search(rf'\b{name}=(\{{[^}}]*\}}|%[\w.\-]+)', self.attributes) for name in names]
        return [name for match in found if match for name in _NAMES.findall(match.group(1))]

    @property
    def scope(self) -> str:
        """Where in the source program it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ''


Computation = dict[str, Instruction]


def _tally() -> dict[str, float]:
    return collections.defaultdict(float)


@dataclasses.dataclass
class Cost:
    """What one call of a program does on one device.

    Attributes:
        flops: of matrix products; kernels: the part of them in Pallas kernels, by name.
        uncounted: Pallas kernels that state no cost, with how often they run.
        memory: bytes to and from main memory, an estimate: operands and results of everything that is not fused away.
        payload: bytes of the larger of operand and result of each collective, by kind; wire: bytes that a device sends,
            if rings are used; calls: how often.
        assumed: loops of unknown trip count, by where they come from, with the count taken.
    """

    flops: float = 0.0
    memory: float = 0.0
    kernels: dict[str, float] = dataclasses.field(default_factory=_tally)
    uncounted: dict[str, float] = dataclasses.field(default_factory=_tally)
    payload: dict[str, float] = dataclasses.field(default_factory=_tally)
    wire: dict[str, float] = dataclasses.field(default_factory=_tally)
    calls: dict[str, float] = dataclasses.field(default_factory=_tally)
    assumed: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, other: Cost, times: float = 1) -> None:
        """Adds another cost, so many times."""
        self.flops += times * other.flops
        self.memory += times * other.memory
        for name in ('kernels', 'uncounted', 'payload', 'wire', 'calls'):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value
        self.assumed |= other.assumed


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = '', None
    for line in text.splitlines():
        if current is None or not line.startswith(' '):
            match = re.match(r'(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$', line)
            if match and not line.startswith('HloModule'):
                current = computations.setdefault(match.group(2), {})
                entry = match.group(2) if match.group(1) else entry
            continue
        head = _HEAD.match(line)
        if head:
            instruction = _instruction(line[head.end() :], head.group(2), bool(head.group(1)))
            current[instruction.name] = instruction
    return computations, entry


def _instruction(rest: str, name: str, root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index('(')
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing - 1]
    shapes = tuple(
        Shape(dtype, tuple(map(int, dims.split(','))) if dims else (), not re.search(r'S\([1-9]', layout))
        for dtype, dims, layout in _SHAPE.findall(kind)
    )
    return Instruction(
        name, rest[:opening].strip(), shapes, tuple(_NAMES.findall(arguments)), arguments, rest[closing:], root
    )


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r'[()]').finditer(text, start):
        depth += 1 if match.group() == '(' else -1
        if not depth:
            return match.end()
    return len(text)


def cost(text: str) -> Cost:
    """The cost of a module, from `jax.stages.Compiled.as_text()`."""
    computations, entry = parse(text)

    @functools.cache
    def of(name: str, fused: bool) -> Cost:
        total = Cost()
        body = computations.get(name, {})
        for one in body.values():
            total.add(_own(one, body, computations, fused))
            if one.opcode == 'while':
                count, told = trip_count(one, body, computations)
                if not told:
                    total.assumed[one.scope] = count
                total.add(of(one.called('body')[0], fused), count)
            elif one.opcode == 'conditional':
                branches = one.called('branch_computations', 'true_computation', 'false_computation')
                total.add(max((of(branch, fused) for branch in branches), key=lambda c: (c.flops, c.memory)))
            elif one.opcode == 'fusion':
                for inner in one.called('calls'):
                    total.add(of(inner, True))
            elif one.opcode in ('call', 'call-start', 'async-start'):
                for inner in one.called('to_apply', 'calls', 'called_computations'):
                    total.add(of(inner, fused))
        return total

    return of(entry, False)


def _own(one: Instruction, body: Computation, computations: dict[str, Computation], fused: bool) -> Cost:
    """What an instruction costs by itself, without the computations it calls."""
    own = Cost()
    kind = one.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
        operands = sum(shape.size for name in one.operands if name in body for shape in body[name].shapes)
        result = sum(shape.size for shape in one.shapes)
        if one.opcode != kind and kind != 'all-reduce':  # the result of a -start holds the operands as well
            result -= operands
        size, group = max(operands, result), group_size(one.attributes)
        if group > 1 or kind == 'collective-permute':
            share = 1.0 if kind == 'collective-permute' else (group - 1) / group * (2 if kind == 'all-reduce' else 1)
            own.payload[kind], own.wire[kind], own.calls[kind] = size, size * share, 1
    elif kind in ('dot', 'ragged-dot'):
        own.flops = _dot_flops(one, body)
    elif kind == 'convolution':
        own.flops = _convolution_flops(one, body)
    elif kind == 'custom-call' and 'tpu_custom_call' in one.attributes:
        label = re.sub(r'[.\d]+$', '', one.name)
        flops = _kernel_flops(one, body)
        if flops is None:
            own.uncounted[label] = 1
        else:
            own.flops = own.kernels[label] = flops
    if not fused and one.operands and one.opcode not in _FREE and not one.opcode.endswith('-done'):
        own.memory = _traffic(one, body, computations)
    return own


def trip_count(loop: Instruction, body: Computation, computations: dict[str, Computation]) -> tuple[int, bool]:
    """How often a while loop runs, and whether the text tells: by an annotation or by a counter and constants."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1)), True
    condition = computations.get(loop.called('condition')[0], {})
    root = next((one for one in condition.values() if one.root), None)
    if root is not None and root.opcode == 'fusion':  # of a single comparison
        inner = computations[root.called('calls')[0]]
        outer, root = root, next(one for one in inner.values() if one.root)
        order = [int(inner[name].arguments) for name in root.operands if inner[name].opcode == 'parameter']
        sides = [outer.operands[i] for i in order]
    else:
        sides = list(root.operands) if root is not None else []
    if root is not None and root.opcode == 'compare' and 'direction=LT' in root.attributes and len(sides) == 2:
        first, last = (_start_value(side, condition, loop, body) for side in sides)
        if first is not None and last is not None:
            return max(0, -((first - last) // _stride(condition[sides[0]], loop, computations))), True
    noted = re.search(rf'{TRIPS}(\d+)\)*/while$', loop.scope)
    return (int(noted.group(1)) if noted else 1), False


def _start_value(name: str, condition: Computation, loop: Instruction, body: Computation) -> int | None:
    """The constant that something in a loop's condition is when the loop begins."""
    one = condition[name]
    if one.opcode == 'get-tuple-element':
        state = body[loop.operands[0]]
        return _constant(state.operands[_index(one)], body) if state.opcode == 'tuple' else None
    return _constant(name, condition)


def _stride(counter: Instruction, loop: Instruction, computations: dict[str, Computation]) -> int:
    """What the body of a loop adds to its counter; 1 where that cannot be read."""
    body = computations[loop.called('body')[0]]
    end = next(one for one in body.values() if one.root)
    if counter.opcode != 'get-tuple-element' or end.opcode != 'tuple':
        return 1
    sum_of = body.get(end.operands[_index(counter)])
    while sum_of is not None and sum_of.opcode in _SAME:
        sum_of = body.get(sum_of.operands[0])
    if sum_of is None or sum_of.opcode != 'add':
        return 1
    return next((value for name in sum_of.operands if (value := _constant(name, body))), 1)


def _index(one: Instruction) -> int:
    return int(one.attributes.partition('index=')[2].split(',')[0])


def _constant(name: str, body: Computation) -> int | None:
    one = body[name]
    while one.opcode in _SAME:
        one = body[one.operands[0]]
    return int(one.arguments) if one.opcode == 'constant' and one.arguments.lstrip('-').isdigit() else None


def group_size(attributes: str) -> int:
    """Devices in each group of a collective, from any of the ways `replica_groups` is written; 1 where none is."""
    mesh = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh.group(2)))
    compact = re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes)
    if compact:
        return int(compact.group(2))
    listed = re.search(r'replica_groups=\{\{([\d,]*)\}', attributes)
    return len(listed.group(1).split(',')) if listed else 1


def _dims(attributes: str, name: str) -> list[int]:
    match = re.search(rf'{name}=\{{([\d,]*)\}}', attributes)
    return [int(x) for x in match.group(1).split(',')] if match and match.group(1) else []


def _dot_flops(one: Instruction, body: Computation) -> float:
    """Two for each output element and contracted index; a ragged product as if all rows were in use."""
    left = body[one.operands[0]].shapes[0].dims
    contracted = math.prod(left[i] for i in _dims(one.attributes, 'lhs_contracting_dims'))
    return 2.0 * math.prod(one.shapes[0].dims) * contracted


def _convolution_flops(one: Instruction, body: Computation) -> float:
    """Two for each product that does not meet padding. XLA:TPU writes every matrix product as a convolution, with batch
    dimensions as spatial ones whose window meets one element each."""
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', one.attributes)
    assert labels is not None, one.attributes
    left, right = (body[name].shapes[0].dims for name in one.operands[:2])
    out = one.shapes[0].dims
    window = re.search(r'window=\{([^}]*)\}', one.attributes)
    fields = dict(pair.split('=') for pair in window.group(1).split()) if window else {}
    products = float(out[labels.group(3).index('b')] * out[labels.group(3).index('f')])
    products *= right[labels.group(2).index('i')]
    groups = re.search(r'batch_group_count=(\d+)', one.attributes)
    products /= int(groups.group(1)) if groups else 1

    def numbers(name: str, axis: int, default: str) -> list[int]:
        return [int(x) for x in fields[name].split('x')[axis].split('_')] if name in fields else [int(default)]

    for axis in range(len(labels.group(1)) - 2):
        size, stride = left[labels.group(1).index(str(axis))], numbers('stride', axis, '1')[0]
        dilated, spread = numbers('lhs_dilate', axis, '1')[0], numbers('rhs_dilate', axis, '1')[0]
        low = numbers('pad', axis, '0')[0]
        place = np.arange(out[labels.group(3).index(str(axis))])[:, None] * stride - low
        place = place + np.arange(numbers('size', axis, '1')[0])[None] * spread
        products *= int(np.sum((place >= 0) & (place <= (size - 1) * dilated) & (place % dilated == 0)))
    return 2.0 * products


def _kernel_flops(one: Instruction, body: Computation) -> float | None:
    """FLOPs of a Pallas kernel: those it states, or what splash attention computes under a causal mask.

    Splash attention takes queries and keys [..., T, D] and values [..., S, V] and a small table of the blocks of the
    mask, of which those on or below the diagonal are computed.
    """
    stated = re.search(r'"cost_estimate":\{"flops":"(\d+)"', one.attributes)
    if stated:
        return float(stated.group(1))
    if not one.name.startswith('splash_m'):
        return None
    shapes = [body[name].shapes[0] for name in one.operands if name in body and body[name].shapes]
    query, key, value = [s.dims for s in shapes if s.dtype in ('bf16', 'f32') and len(s.dims) >= 3][:3]
    table = next((s.dims for s in shapes if s.dtype == 's8' and len(s.dims) >= 3), (1, 1, 1))
    share = (1 + 1 / table[-1]) / 2
    d, v = query[-1], value[-1]
    width = d + v if '_fwd' in one.name else 2 * d + v if '_dq' in one.name else 2 * (d + v)
    return 2.0 * math.prod(query[:-1]) * key[-2] * width * share


def _traffic(one: Instruction, body: Computation, computations: dict[str, Computation]) -> float:
    """Bytes an instruction reads from and writes to main memory.

    Of what is sliced only the slice is read, and what is updated in place is not written whole.
    """
    written = float(sum(shape.size for shape in one.shapes if shape.main))
    operands = [[s for s in body[name].shapes if s.main] if name in body else [] for name in one.operands]
    read = [float(sum(shape.size for shape in shapes)) for shapes in operands]
    if one.opcode in _SLICES:
        return 2.0 * written if read and read[0] else written
    if one.opcode.endswith('-start'):  # of most, the result holds the operands too
        return max(written, sum(read)) if one.opcode != 'all-reduce-start' else written + sum(read)
    if one.opcode == 'dynamic-update-slice':
        return 2.0 * read[1]
    if one.opcode == 'fusion':
        inner = computations[one.called('calls')[0]]
        for part in inner.values():
            place = int(part.arguments) if part.opcode == 'parameter' else len(read)
            if place < len(read):
                users = list(_users(part.name, inner))
                if users and all(user.opcode in _SLICES and name == user.operands[0] for name, user in users):
                    read[place] = min(read[place], sum(shape.size for _, user in users for shape in user.shapes))
                elif users and all(
                    user.opcode == 'dynamic-update-slice' and name == user.operands[0] for name, user in users
                ):
                    written += sum(inner[user.operands[1]].shapes[0].size for _, user in users) - read[place]
                    read[place] = 0.0
    return max(0.0, written) + sum(read)


def _users(name: str, body: Computation) -> Iterator[tuple[str, Instruction]]:
    """What reads a value, with the name it reads it by: that of a view may be another."""
    for one in body.values():
        if name in one.operands:
            if one.opcode == 'bitcast':
                yield from _users(one.name, body)
            else:
                yield name, one
