"""Mixtures: how much of each source a run sees, and how that changes on the way.

A mixture is `((start_fraction, {source: weight}), ...)`: from that fraction of the run on, sources share the tokens in
proportion to those weights. A source that a later entry does not name is off from there on.
"""

import bisect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from data.errors import InputError, did_you_mean

Mixture = Sequence[tuple[float, Mapping[str, float]]]


def weights_at(mixture: Mixture, fraction: float) -> dict[str, float]:
    """Normalised weights of the sources that are on at `fraction` (0 to 1) of the run; they sum to 1."""
    starts = [start for start, _ in mixture]
    weights = as_dict(mixture[max(bisect.bisect_right(starts, fraction) - 1, 0)][1])
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def validate_mixture(mixture: Mixture, sources: Collection[str]) -> None:
    """Raises InputError where a mixture is not of the form above, or names something that is not in `sources`."""
    if not isinstance(mixture, (tuple, list)) or not mixture:
        raise InputError(f'mixture: expected ((start_fraction, {{source: weight}}), ...), got {mixture!r}')
    previous = -1.0
    for position, entry in enumerate(mixture):
        where = f'mixture[{position}]'
        if not isinstance(entry, (tuple, list)) or len(entry) != 2 or not hasattr(entry[1], 'keys'):
            raise InputError(f'{where}: expected (start_fraction, {{source: weight}}), got {entry!r}')
        start = entry[0]
        if not _is_number(start) or not 0 <= start < 1:
            raise InputError(f'{where}: expected a start fraction from 0 to below 1, got {start!r}')
        if position == 0 and start != 0:
            raise InputError(f'{where}: the first entry must start at 0, not {start!r}')
        if start <= previous:
            raise InputError(f'{where}: start fractions must rise, but {start!r} follows {previous!r}')
        previous = start
        weights = as_dict(entry[1])
        for name, weight in weights.items():
            if name not in sources:
                raise InputError(f'{where}: no source {name!r}{did_you_mean(name, sources)}')
            if not _is_number(weight) or weight < 0 or not math.isfinite(weight):
                raise InputError(f'{where}: weight of {name!r}: expected a number of at least 0, got {weight!r}')
        if not any(weights.values()):
            raise InputError(f'{where}: expected a source of positive weight')


def sources_of(mixture: Any) -> set[str]:
    """Names of the sources in a mixture; of one that is not valid, as many as can be told."""
    entries = [entry for entry in mixture if isinstance(entry, (tuple, list)) and len(entry) == 2]
    return {str(name) for _, weights in entries if hasattr(weights, 'keys') for name in weights.keys()}


def as_dict(mapping: Any) -> dict[str, Any]:
    """A plain dict of any mapping; a `ConfigDict`, frozen or not, is one in all but name."""
    return {key: mapping[key] for key in mapping.keys()}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
