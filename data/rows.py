"""The order of a source's records, and one row of the batches: which records it takes, from which source the next.

A row keeps its place in every source as numbers of records and tokens, never as tokens, so its state stays small
however long the documents are.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from grain.experimental import index_shuffle

from data.errors import InputError
from data.packing import RowWriter, encode_record
from data.sources import Source, most_broken
from data.tokenizer import Tokenizer

_SHUFFLE_ROUNDS = 4  # as Grain's own shuffle has it
# The least that Grain's shuffle permutes: among fewer records it takes milliseconds to find one index.
_SHUFFLE_BITS = 16
_MOST_SKIPPED = 1000  # records on end, before a source is said to fit nowhere
PROBLEMS = 2500  # of a task that a tokenizer learns from
CHARACTERS = 3_000_000  # of any other source; with all of them the demo's held-out text took 0.2% fewer tokens


class Order:
    """A source's records in shuffled order, epoch after epoch without end.

    `broken` holds those that could not be read, of which a source may allow some; `events` what is to be told of them.
    """

    def __init__(self, name: str, source: Source, seed: int):
        self._name = name
        self.source = source
        self._size = len(source)
        self._seed = seed
        self.endless = getattr(source, 'endless', False)
        self.broken: set[int] = set()
        self.events: list[tuple[str, str]] = []

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The record at a position of the order; positions run on from epoch to epoch."""
        return self.source[self.index(position)]

    def pass_over(self, index: int, error: InputError) -> None:
        """Notes that a record cannot be read; InputError where these are too many by now."""
        detail, most = f'source {self._name!r}, record {index}: {error}', most_broken(self.source)
        if index not in self.broken and len(self.broken) >= most:
            more = f' (with it {most + 1} records are broken: option broken = {most})' if most else ''
            raise InputError(f'{detail}{more}') from error
        if index not in self.broken:
            self.events.append(('broken record', f'{detail}: passed over'))
        self.broken.add(index)

    def index(self, position: int) -> int:
        """Which record of the source that is."""
        if self.endless:
            # Problems come as they are numbered, from a start of this seed's own: another stage sees others.
            return (_fold(self._seed, self._name) + position) % self._size
        epoch, place = divmod(position, self._size)
        seed = _fold(self._seed, self._name, epoch)
        if self._size <= 2**_SHUFFLE_BITS:
            return int(_permutation(seed, self._size)[place])
        # Grain permutes an even number of bits and walks on until it is in range. Its own walk repeats one index and
        # forgets another where there are 4^k + 1 records (grain 0.2.18), so the walk here is ours.
        bits = (self._size - 1).bit_length()
        largest = 2 ** (bits + bits % 2) - 1
        while True:
            place = index_shuffle(place, max_index=largest, seed=seed, rounds=_SHUFFLE_ROUNDS)
            if place < self._size:
                return place


def untold(orders: Mapping[str, Order]) -> list[tuple[str, str]]:
    """What is to be told of broken records, to be taken from the list; empty when nothing is."""
    return next((order.events for order in orders.values() if order.events), [])


def broken_metrics(orders: Mapping[str, Order]) -> dict[str, float]:
    """How many records could not be read, where there were any."""
    count = sum(len(order.broken) for order in orders.values())
    return {'records/broken': float(count)} if count else {}


@dataclasses.dataclass
class _Progress:
    """How far a row has come in one source."""

    cursor: int = 0  # records done
    offset: int = 0  # tokens done of the next record
    consumed: int = 0  # tokens taken in all
    skipped: int = 0  # records passed over because they were too long to fit in any row
    # Records passed over because they could not be read; a list is never changed, as snapshots hold it.
    broken: list[int] = dataclasses.field(default_factory=list)
    credit: float = 0.0  # tokens this source is owed (if negative: has had too much)


class Taken(NamedTuple):
    """A segment of a batch: source, number of the record in it, and which of the record's tokens, [begin, end)."""

    source: str
    record: int
    begin: int
    end: int


class Row:
    """Row `row` of `rows`: it owns records row, row + rows, ... of every source's order."""

    def __init__(
        self,
        row: int,
        rows: int,
        orders: Mapping[str, Order],
        tokenizer: Tokenizer,
        seed: int,
        split_documents: bool,
        per_example: bool = False,
    ):
        self._row = row
        self._stride = rows
        self._orders = orders
        self._tokenizer = tokenizer
        self._seed = seed
        self._split = split_documents
        self._per_example = per_example
        self._segments = 0
        self._progress = {name: _Progress() for name in orders}
        self._open: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # each source's next record, tokenised once
        self.taken: list[Taken] = []  # what the last row that was filled is made of

    def fill(self, writer: RowWriter, weights: Mapping[str, float]) -> None:
        """Writes segments until the row is full, or the next record does not fit and may not be cut."""
        capacity = writer.space
        self.taken = []
        while writer.space:
            name = self._choose(weights)
            tokens, loss_weight = self._next_record(name, capacity)
            progress = self._progress[name]
            begin, end = progress.offset, min(progress.offset + writer.space, len(tokens))
            if end < len(tokens) and not self._split:
                return  # it opens the next row: nothing that the choice depends on has changed
            writer.write(tokens[begin:end], loss_weight[begin:end])
            self.taken.append(Taken(name, self._index(name), begin, end))
            self._account(name, end - begin, weights)
            progress.offset = end
            if end == len(tokens):
                self._advance(name)

    def state(self) -> dict[str, Any]:
        """A JSON-able snapshot, which later batches leave alone."""
        sources = {
            name: {field: x for field, x in vars(progress).items() if field != 'broken' or x}
            for name, progress in self._progress.items()
        }
        return {'segments': self._segments, 'sources': sources}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up a snapshot. Records that were begun are read again when their turn comes."""
        made, now = sorted(state['sources']), sorted(self._orders)
        if made != now:
            raise InputError(f'stream state: made with sources {", ".join(made)}; now they are {", ".join(now)}')
        self._segments = state['segments']
        self._progress = {name: _Progress(**state['sources'][name]) for name in self._orders}
        for name, progress in self._progress.items():
            self._orders[name].broken.update(progress.broken)
        self._open = {}

    def _choose(self, weights: Mapping[str, float]) -> str:
        """The source of the next segment, drawn in proportion to what each will be owed once it is written.

        Taking the largest debt instead would also keep the proportions, but all rows would then move in step: a batch
        of one source, then a batch of another.
        """
        names = [name for name in self._progress if name in weights]
        if len(names) == 1:
            return names[0]
        typical = sum(progress.consumed for progress in self._progress.values()) / max(self._segments, 1)
        owed = [max(self._progress[name].credit + weights[name] * max(typical, 1.0), 0.0) for name in names]
        if not any(owed):  # a source that is now off had far too little: nobody is owed anything
            return max(names, key=lambda name: self._progress[name].credit)
        point = _fold(self._seed, 'row', self._row, self._segments) / 2**32 * sum(owed)
        for name, amount in zip(names, owed, strict=True):
            point -= amount
            if point < 0:
                return name
        return max(names, key=lambda name: self._progress[name].credit)  # rounding left a grain of the sum over

    def _account(self, name: str, tokens: int, weights: Mapping[str, float]) -> None:
        """Books a segment: everyone is owed a share of it, and one source has had it."""
        for other, weight in weights.items():
            self._progress[other].credit += weight * tokens
        self._progress[name].credit -= tokens
        self._progress[name].consumed += tokens
        self._segments += 1

    def _advance(self, name: str) -> None:
        self._progress[name].cursor += 1
        self._progress[name].offset = 0
        self._open.pop(name, None)

    def _next_record(self, name: str, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and loss weights of a source's next record; one that may not be cut and never fits is passed over."""
        for _ in range(_MOST_SKIPPED):
            if name not in self._open and not self._read(name):
                continue
            if self._split or len(self._open[name][0]) <= capacity:
                return self._open[name]
            self._progress[name].skipped += 1
            self._advance(name)
        raise InputError(f'source {name!r}: {_MOST_SKIPPED} records on end are longer than sequence_length={capacity}')

    def _index(self, name: str) -> int:
        """Which record of a source is this row's next."""
        return self._orders[name].index(self._row + self._progress[name].cursor * self._stride)

    def _read(self, name: str) -> bool:
        """Opens a source's next record, or passes over it, which is then false."""
        progress, order = self._progress[name], self._orders[name]
        index = self._index(name)
        try:
            tokens, weight = encode_record(order.source[index], self._tokenizer)
        except InputError as error:
            order.pass_over(index, error)
            progress.broken = sorted({*progress.broken, index})
            self._advance(name)
            return False
        self._open[name] = tokens, weight / max(weight.sum(), 1.0) if self._per_example else weight
        return True


def sample_texts(source: Source) -> Iterator[str]:
    """Words of a source's records in shuffled order, to train a tokenizer on: PROBLEMS records of an endless source;
    of any other, until they hold CHARACTERS.

    Raises InputError for a record without words.
    """
    order = Order('tokenizer', source, seed=0)
    read = 0
    for place in range(PROBLEMS if order.endless else len(source)):
        try:
            record = order[place]
        except InputError as error:
            order.pass_over(order.index(place), error)
            continue
        if 'messages' in record:
            words = '\n'.join(message['content'] for message in record['messages'])
        elif fields := [field for field in ('text', 'prompt', 'completion') if field in record]:
            words = ''.join(''.join(record[field]) for field in fields)  # of lists of strings as well
        else:
            index = order.index(place)
            raise InputError(f'record {index} has {sorted(record)}: expected words to train a tokenizer on')
        yield words
        read += len(words)
        if read >= CHARACTERS:
            return


@functools.lru_cache(maxsize=64)  # rows are not all in the same epoch
def _permutation(seed: int, size: int) -> np.ndarray:
    """A permutation of `size` indices; NumPy keeps the numbers of this old generator the same in all its versions."""
    return np.random.RandomState(seed).permutation(size)


def _fold(*parts: object) -> int:
    """A 32-bit seed from parts, the same in every process."""
    text = '/'.join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), 'big')
