"""How every command ends: bad input with one line, an interruption without a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from data.errors import InputError

P = ParamSpec('P')
RESTART = 75  # EX_TEMPFAIL of sysexits.h: a run that is not done, and goes on when the same command is given again


def command(name: str, interrupted: str = '') -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorates a command's main function, which returns its exit status.

    An InputError becomes one line on standard error, after the `name` of the command, and status 1; Ctrl-C a line with
    what `interrupted` says, and the status 130 of shells.
    """

    def decorate(body: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(body)
        def main(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return body(*args, **kwargs)
            except InputError as error:
                print(f'{name}: {error}', file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print(f'{name}: interrupted{interrupted and "; " + interrupted}', file=sys.stderr)
                return 130

        return main

    return decorate
