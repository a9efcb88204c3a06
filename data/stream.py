"""Checkpointable batches from sources: which records make step N depends on the config alone.

A global batch has R logical rows. Row r owns records r, r + R, ... of every source's shuffled order and fills itself
without looking at other rows, so a process builds just the rows its devices need, and a state saved by two hundred
processes restores on one. Within a row, sources take turns by what they are owed: after n tokens, each is owed its
weight times n. A long document is cut where the row ends and goes on when its source is next in turn, as a new
segment.
"""

import atexit
import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from data.errors import InputError
from data.files import Record
from data.mixture import Mixture, validate_mixture, weights_at
from data.packing import Batch, RowWriter, empty_batch
from data.rows import Order, Row, Taken, broken_metrics, untold
from data.sources import Source
from data.tokenizer import Tokenizer

State = dict[str, Any]
CONSUMED = 'consumed/'  # before the name of a source, a metric: its share of the tokens taken so far


class Stream(Protocol):
    """What the train loop takes batches from. The state is JSON-able and immutable, and belongs to that batch.

    `rows` are the numbers, in the global batch, of the rows its batches hold: all, or those of this process.

    A stream whose `next` computes with the variables names that work in an attribute `work` ('sampling', say). One that
    has something to tell beside its batches appends (kind, detail) to a list, its attribute `events`, and whoever runs
    it takes it from there.
    """

    @property
    def rows(self) -> Sequence[int]: ...

    def next(self, step: int, variables: Any = None) -> tuple[Batch, State]: ...

    def restore(self, state: State) -> None: ...

    def close(self) -> None: ...


class RowStream:
    """Rows packed from sources in the proportions of a mixture."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        mixture: Mixture,
        tokenizer: Tokenizer,
        *,
        rows: int,
        sequence_length: int,
        steps: int,
        seed: int,
        split_documents: bool = True,
        rows_here: Sequence[int] | None = None,
        per_example: bool = False,
    ):
        """
        Args:
          mixture: see `data.mixture`; its fractions are of `steps`.
          rows: rows of the global batch (R).
          split_documents: whether a record may be cut at the end of a row. If not, one that does not fit goes to the
            next row and the rest of this one is padding; one longer than a row is skipped and counted.
          rows_here: the rows this process builds; all by default.
          per_example: whether a record's loss weights are divided by their sum, so that short ones count as much as
            long ones.

        Raises InputError for a mixture that does not match the sources, and for an empty source.
        """
        validate_mixture(mixture, sources)
        for name, source in sources.items():
            if len(source) == 0:
                raise InputError(f'source {name!r}: no records in it')
            made_with = getattr(source, 'tokenizer_fingerprint', None)
            if made_with not in (None, tokenizer.fingerprint):
                raise InputError(f'source {name!r}: its tokens come from another tokenizer ({made_with[:12]}...)')
        self._mixture = mixture
        self._tokenizer = tokenizer
        self._rows_total = rows
        self._length = sequence_length
        self._steps = steps
        self.rows: Sequence[int] = range(rows) if rows_here is None else rows_here
        orders = {name: Order(name, source, seed) for name, source in sources.items()}
        self._orders = orders
        self._rows = {row: Row(row, rows, orders, tokenizer, seed, split_documents, per_example) for row in self.rows}
        self._step = 0

    def next(self, step: int, variables: Any = None) -> tuple[Batch, State]:
        """The batch of `step`, arrays [rows here, sequence_length], and the state after it. Steps come in order.

        tokens, positions (from 0 in each segment), segments (1, 2, ... in each row; 0 is padding): int32. loss_weight:
        float32, of predicting that token; 0 at padding and at each segment's first token.
        """
        if step != self._step:
            raise ValueError(f'stream: asked for step {step}, but step {self._step} is next')
        weights = weights_at(self._mixture, step / self._steps)
        batch = empty_batch(len(self._rows), self._length, self._tokenizer.pad_id)
        for i, row in enumerate(self._rows.values()):
            row.fill(RowWriter(batch, i), weights)
        self._step += 1
        return batch, self._state()

    def restore(self, state: State) -> None:
        """Goes on after the batch that `state` came with; it may hold more rows than this process builds."""
        if state['total_rows'] != self._rows_total:
            raise InputError(f'stream state: made with rows={state["total_rows"]}, now rows={self._rows_total}')
        for number, row in self._rows.items():
            if str(number) not in state['rows']:
                raise InputError(f'stream state: no row {number} in it')
            row.restore(state['rows'][str(number)])
        self._step = state['step']

    def close(self) -> None:
        """Nothing is held."""

    @property
    def taken(self) -> dict[int, list[Taken]]:
        """What each row of the last batch is made of, segment by segment."""
        return {number: row.taken for number, row in self._rows.items()}

    def record(self, place: Taken) -> Record:
        """The record that a segment is of."""
        return self._orders[place.source].source[place.record]

    @property
    def events(self) -> list[tuple[str, str]]:
        """Records that were passed over as they could not be read, and of which nobody was told yet."""
        return untold(self._orders)

    def _state(self) -> State:
        rows = {str(number): row.state() for number, row in self._rows.items()}
        metrics = broken_metrics(self._orders) | consumed(rows)
        return {
            'step': self._step,
            'total_rows': self._rows_total,
            'rows': rows,
            **({'metrics': metrics} if metrics else {}),
        }


def consumed(rows: Mapping[str, Any]) -> dict[str, float]:
    """Which share of the tokens taken so far each source has given, by the states of rows; empty of one source."""
    taken: dict[str, int] = {}
    for row in rows.values():
        for name, progress in row['sources'].items():
            taken[CONSUMED + name] = taken.get(CONSUMED + name, 0) + progress['consumed']
    total = max(sum(taken.values()), 1)
    return {name: tokens / total for name, tokens in taken.items()} if len(taken) > 1 else {}


def merged(states: Sequence[State]) -> State:
    """One state of the states that processes have for the rows they build; of any other kind all are alike."""
    rows = {number: row for state in states for number, row in state.get('rows', {}).items()}
    metrics = {**states[0].get('metrics', {}), **consumed(rows)}
    return {**states[0], 'rows': rows, **({'metrics': metrics} if metrics else {})} if rows else states[0]


class Prefetch:
    """Makes the batches of an offline stream ahead of time, in a thread of its own.

    The thread starts at the first `next` and takes steps in order; an error in it surfaces in the `next` it belongs to.
    """

    def __init__(self, stream: Stream, depth: int = 2):
        """`depth` is the number of batches to keep ready."""
        self.rows = stream.rows
        self._stream = stream
        self._depth = depth
        self._thread: threading.Thread | None = None

    def next(self, step: int, variables: Any = None) -> tuple[Batch, State]:
        """As `RowStream.next`."""
        if self._thread is None:
            self._start(step)
        if step != self._expected:
            raise ValueError(f'stream: asked for step {step}, but step {self._expected} is next')
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._stop()
            raise item
        self._expected += 1
        return item

    def restore(self, state: State) -> None:
        """As `RowStream.restore`; batches made ahead are dropped."""
        self._stop()
        self._stream.restore(state)

    def close(self) -> None:
        """Ends the thread; the next call of `next` needs a `restore` before it."""
        self._stop()

    @property
    def events(self) -> list[tuple[str, str]]:
        """Those of the stream, which come with batches made ahead."""
        return getattr(self._stream, 'events', [])

    def _start(self, step: int) -> None:
        self._expected = step
        self._ready: queue.Queue[Any] = queue.Queue(self._depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(step,), name='prefetch', daemon=True)
        self._thread.start()
        # A thread that is inside the tokenizer's Rust code when the interpreter goes down can abort the process.
        atexit.register(self._stop)

    def _stop(self) -> None:
        if self._thread is not None:
            atexit.unregister(self._stop)
            self._stopping.set()
            self._thread.join()
            self._thread = None

    def _work(self, step: int) -> None:
        try:
            while not self._stopping.is_set():
                self._put(self._stream.next(step))
                step += 1
        except BaseException as error:  # handed over to the thread that waits
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stopping.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
