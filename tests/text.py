"""A small tokenizer and small sources for the tests of data."""

import functools
import inspect
import json
from collections.abc import Sequence
from typing import Any

from data.tokenizer import Tokenizer, train_tokenizer


@functools.cache
def small_tokenizer(vocab_size: int = 400) -> Tokenizer:
    """Learnt from one module; shared by tests, which leave it as it is."""
    return train_tokenizer(
        [inspect.getsource(json), inspect.getsource(json.decoder), inspect.getsource(json.encoder)], vocab_size
    )


def token_records(lengths: Sequence[int], first: int = 0) -> list[dict[str, Any]]:
    """Records of given lengths whose tokens are all the record's number, counted from `first`."""
    return [{'tokens': [first + i] * length} for i, length in enumerate(lengths)]
