"""Progress of long work: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

WINDOW = 30.0  # seconds over which rates are taken
QUIET = 10.0  # seconds between plain lines
BAR = '{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]'


def signed(text: str) -> str:
    """A line for people, after the name of the thread it comes from where runs have threads of their own."""
    thread = threading.current_thread()
    return text if thread is threading.main_thread() else f'{thread.name}: {text}'


class Progress:
    """Reports `total` units of work, as a context manager.

    Plain lines come at once for the first update, which tells that compilation is over, then at most every ten seconds,
    and for the last. Rates leave out what came before the first update: compilation is no measure of speed.

    Args:
        total: units of work, those done by an earlier process included.
        description: what is being done, at the head of every line.
        unit: name of one unit.
        initial: units an earlier process has done already.
        stream: where to write; standard error unless given.
    """

    def __init__(
        self, total: int, description: str, unit: str = 'step', initial: int = 0, stream: TextIO | None = None
    ) -> None:
        self.total = total
        self.description = signed(description)
        self.unit = unit
        self._stream = stream if stream is not None else sys.stderr
        self._step = initial
        self._tokens = 0
        self._line = ''
        self._shown: tuple[int, float] | None = None  # step and time of the last plain line
        self._window: deque[tuple[float, int, int]] = deque()  # (time, units, tokens), all cumulative
        self._bar: tqdm | None = None

    def __enter__(self) -> Progress:
        if self._stream.isatty() and threading.current_thread() is threading.main_thread():
            self._bar = tqdm(
                total=self.total,
                desc=self.description,
                initial=self._step,
                file=self._stream,
                bar_format=BAR,
                dynamic_ncols=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._shown is not None and self._shown[0] != self._step:
            self._print(time.monotonic())

    def update(self, step: int, tokens: int = 0, **numbers: float) -> None:
        """Says that `step` units are done, `tokens` tokens more than at the last update, and shows `numbers`."""
        now = time.monotonic()
        self._step = step
        self._tokens += tokens
        self._window.append((now, step, self._tokens))
        while len(self._window) > 2 and now - self._window[1][0] > WINDOW:
            self._window.popleft()
        parts = [f'{name} {_number(value)}' for name, value in numbers.items()]
        rate, left = self._rates()
        if rate:
            parts.append(f'{_number(rate)} tokens/s')
        if left is not None and step < self.total:
            parts.append(f'{_duration(left)} left')
        if self._bar is not None:
            self._bar.set_postfix_str(', '.join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        self._line = ' | '.join([f'{self.description}: {self.unit} {step}/{self.total}', *parts])
        if self._shown is None or now - self._shown[1] >= QUIET or step >= self.total:
            self._print(now)

    def _rates(self) -> tuple[float, float | None]:
        """Tokens per second (0 if unknown) and seconds left (None if unknown), over the recent window."""
        (start, first, before), (end, last, after) = self._window[0], self._window[-1]
        if end <= start or last <= first:
            return 0.0, None
        return (after - before) / (end - start), (self.total - last) * (end - start) / (last - first)

    def _print(self, now: float) -> None:
        print(self._line, file=self._stream, flush=True)
        self._shown = (self._step, now)


def _number(value: float) -> str:
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f'{seconds:.0f} s'
    if seconds < 3600:
        return f'{seconds / 60:.0f} min'
    return f'{seconds / 3600:.1f} h'
