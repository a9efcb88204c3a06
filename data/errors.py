"""The error for bad input: what a user can mend by changing a file, a record or a config field."""

import difflib
import json
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """One clear line naming the file, record or field at fault and what was expected there."""


def json_object(text: str | bytes, where: object) -> dict[str, Any]:
    """The JSON object in a text; else InputError, beginning with `where`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8; thousands of brackets in each other
        raise InputError(f'{where}: expected a JSON object: {error}') from error
    if not isinstance(value, dict):
        raise InputError(f'{where}: expected an object, got {type(value).__name__}')
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest known one, or all of them."""
    choices = sorted(known)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    return f'; did you mean {near[0]!r}?' if near else f'; expected one of {", ".join(choices)}'
