"""python -m train.supervise [--failures=5] [--pause=1] -- python -m train --workdir=DIR ...

Runs a command and starts it again until it is done: at once where it asks for that (status 75), else after a pause that
doubles with each failure in a row. So many failures without a new checkpoint between them, and it gives up.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data.errors import InputError
from train.launch.command import RESTART, command

LONGEST = 300.0  # seconds of a pause
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What a run leaves behind in its workdir as it goes on: checkpoints, results, finished stages, blocks of records.
SIGNS = ('*/checkpoints/*', '*/evaluations.json', '*/finished.json', '*/blocks/*')


class Supervisor:
    """One command, and what was told to end it.

    Args:
        words: the command, with the `--workdir` where its progress shows.
        failures: how many in a row without progress are enough.
        pause: seconds before the first new start after a failure.

    Raises:
        InputError: no command, or one without a workdir.
    """

    def __init__(self, words: list[str], failures: int, pause: float):
        if not words:
            raise InputError('expected a command after --, such as: -- python -m train --workdir=DIR ...')
        following = dict(zip(words, words[1:], strict=False))  # of each word
        equals = [word.partition('=')[2] for word in words if word.startswith('--workdir=')]
        folder = equals[-1] if equals else following.get('--workdir', '')
        if not folder:
            raise InputError(f'{" ".join(words)}: no --workdir=DIR in it, where progress would show')
        if failures < 1 or pause < 0:
            raise InputError(f'--failures={failures} --pause={pause}: expected at least 1 and 0')
        self._words, self._workdir, self._failures, self._pause = words, Path(folder), failures, pause
        self._child: subprocess.Popen[bytes] | None = None
        self._told = 0  # the last signal that was passed on

    def __call__(self) -> int:
        """Runs the command to its end and returns its status; that of a child that a signal ended is 128 and more."""
        before = {number: signal.signal(number, self._pass_on) for number in PASSED_ON}
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        in_a_row, seen = 0, self._signs()
        while True:
            began = time.monotonic()
            status = self._once()
            if status == 0 or self._told:
                return status
            now = self._signs()
            came_on, seen = bool(now - seen), seen | now
            in_a_row = (0 if came_on else in_a_row) + (status != RESTART or not came_on)
            said = f'ended with {_named(status)} after {time.monotonic() - began:.0f} s'
            if in_a_row >= self._failures:
                _say(f'{said}, {in_a_row} times without a new checkpoint: giving up')
                return status
            # Status 75 is no failure, but one that comes again and again without progress must not spin.
            doubled = in_a_row - 1 - (status == RESTART)
            pause = min(self._pause * 2**doubled, LONGEST) if doubled >= 0 else 0.0
            _say(f'{said}: starting again {f"in {pause:g} s" if pause else "at once"} ({in_a_row} in a row)')
            until = time.monotonic() + pause
            while time.monotonic() < until and not self._told:
                time.sleep(min(0.1, pause))
            if self._told:
                return status

    def _once(self) -> int:
        try:
            # In a session of its own: Ctrl-C reaches it once, from here, and not from the terminal as well.
            self._child = subprocess.Popen(self._words, start_new_session=True)
        except OSError as error:
            raise InputError(f'{self._words[0]}: {error.strerror}') from None
        if self._told:  # it came while the child was being made
            self._child.send_signal(self._told)
        status = self._child.wait()
        return status if status >= 0 else 128 - status

    def _pass_on(self, number: int, frame: Any) -> None:
        self._told = number
        if self._child is not None:
            self._child.send_signal(number)

    def _signs(self) -> set[tuple[str, int]]:
        """What shows how far the run has come; checkpoints under way have no number for a name."""
        found = [path for pattern in SIGNS for path in self._workdir.glob(pattern)]
        kept = [path for path in found if path.parent.name != 'checkpoints' or path.name.isdigit()]
        return {(str(path), path.stat().st_mtime_ns if path.suffix == '.json' else 0) for path in kept if path.exists()}


def _named(status: int) -> str:
    try:
        return f'status {status} ({signal.Signals(status - 128).name})'
    except ValueError:
        return f'status {status}'


def _say(line: str) -> None:
    print(f'supervise: {line}', file=sys.stderr, flush=True)


@command('supervise')
def main(arguments: list[str]) -> int:
    """The command; returns the status of the command it ran."""
    parser = argparse.ArgumentParser('train.supervise', description=__doc__)
    parser.add_argument('--failures', type=int, default=5, help='in a row, without a new checkpoint: the end')
    parser.add_argument('--pause', type=float, default=1.0, help='seconds after the first failure')
    at = arguments.index('--') if '--' in arguments else len(arguments)
    settings = parser.parse_args(arguments[1:at])
    return Supervisor(arguments[at + 1 :], settings.failures, settings.pause)()


if __name__ == '__main__':
    sys.exit(main(sys.argv))
