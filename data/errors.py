"""The error for bad input: what a user can mend by changing a file, a record or a config field."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """One clear line naming the file, record or field at fault and what was expected there."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest known one, or all of them."""
    choices = sorted(known)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    return f'; did you mean {near[0]!r}?' if near else f'; expected one of {", ".join(choices)}'
