"""One record to tokens and loss weights, and tokens into the rows of a batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.chat import render_chat
from data.errors import InputError
from data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


def encode_record(record: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (int32 [n]) and loss weights (float32 [n]) of a record. Weight t is that of predicting token t.

    A record is one of
      {'text'}                     begin, text, end: all learnt
      {'messages'}                 a chat: the assistant's words and its stop tokens are learnt
      {'prompt', 'completion'}     begin, prompt, completion, end: the completion and end are learnt; two lists of equal
                                   length alternate in one document
      {'tokens'[, 'loss_weight']}  as they are
    The first token has nothing before it and weighs 0. Raises InputError for any other record.
    """
    if 'tokens' in record:
        tokens = _token_array(record['tokens'], tokenizer.vocab_size)
        weight = _array(record.get('loss_weight', np.ones(len(tokens))), 'loss_weight', np.float32).copy()
        if weight.shape != tokens.shape:
            raise InputError(f'loss_weight: expected one per token ({len(tokens)}), got shape {weight.shape}')
        if not np.isfinite(weight).all():
            raise InputError('loss_weight: expected finite numbers')
    elif 'text' in record:
        ids = tokenizer.encode(_text(record, 'text'))
        tokens = np.array([tokenizer.begin_id, *ids, tokenizer.end_id], np.int32)
        weight = np.ones(len(tokens), np.float32)
    elif 'messages' in record:
        chat, mask = render_chat(record['messages'], tokenizer)
        tokens, weight = np.array(chat, np.int32), np.array(mask, np.float32)
    elif 'prompt' in record and 'completion' in record:
        pieces = [tokenizer.encode(text) for both in _pairs(record) for text in both]
        pieces = [[tokenizer.begin_id, *pieces[0]], *pieces[1:-1], [*pieces[-1], tokenizer.end_id]]
        tokens = np.concatenate(pieces).astype(np.int32)
        weight = np.repeat(np.arange(len(pieces)) % 2, [len(piece) for piece in pieces]).astype(np.float32)
    else:
        raise InputError(f'record has {sorted(record)}: expected text, messages, tokens, or prompt and completion')
    if not len(tokens):
        raise InputError('messages: the chat template makes nothing of them')
    weight[0] = 0
    return tokens, weight


def empty_batch(rows: int, length: int, pad_id: int) -> Batch:
    """A batch of nothing but padding: arrays [rows, length]."""
    return {
        'tokens': np.full((rows, length), pad_id, np.int32),
        'positions': np.zeros((rows, length), np.int32),
        'segments': np.zeros((rows, length), np.int32),
        'loss_weight': np.zeros((rows, length), np.float32),
    }


class RowWriter:
    """Fills one row of a batch, segment after segment."""

    def __init__(self, batch: Batch, row: int):
        self._row = {name: array[row] for name, array in batch.items()}
        self._filled = 0
        self._segments = 0

    @property
    def space(self) -> int:
        """Tokens that still fit."""
        return len(self._row['tokens']) - self._filled

    def write(self, tokens: np.ndarray, loss_weight: np.ndarray) -> None:
        """Appends a segment that fits; its positions restart at 0, and its first token, unpredictable, weighs 0."""
        begin, end = self._filled, self._filled + len(tokens)
        self._segments += 1
        self._row['tokens'][begin:end] = tokens
        self._row['positions'][begin:end] = np.arange(len(tokens), dtype=np.int32)
        self._row['segments'][begin:end] = self._segments
        self._row['loss_weight'][begin:end] = loss_weight
        self._row['loss_weight'][begin] = 0
        self._filled = end


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens that stand together: int [n], their loss weights float [n], and further numbers of theirs, [n, ...] each,
    by the names of the arrays of a batch."""

    tokens: Sequence[int]
    loss_weight: np.ndarray
    stamps: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def last(self) -> int:
        """The place of the last learnt token."""
        return int(np.flatnonzero(self.loss_weight)[-1])

    def stamped(self, **values: float) -> 'Segment':
        """The segment with further numbers, each on the last learnt token and 0 elsewhere."""
        place = np.arange(len(self.tokens)) == self.last
        stamps = {name: np.where(place, value, 0).astype(np.float32) for name, value in values.items()}
        return dataclasses.replace(self, stamps={**self.stamps, **stamps})


def pack(units: Sequence[Sequence[Segment]], batch: Batch) -> None:
    """Writes units of segments, none of them torn apart, into the rows of an empty batch: longest first, each into the
    first row with room, in the order given within a row of equals. The last rows may stay empty.

    Raises InputError for a unit longer than a row, or more units than fit.
    """
    rows, length = batch['tokens'].shape
    used: list[int] = []
    writers: list[RowWriter] = []
    size = lambda unit: sum(len(segment.tokens) for segment in unit)  # noqa: E731
    for unit in sorted(units, key=size, reverse=True):
        needed = size(unit)
        if needed > length:
            raise InputError(f'{needed} tokens that belong together: expected sequence_length of that or more')
        row = next((i for i, n in enumerate(used) if n + needed <= length), len(used))
        if row == rows:
            raise InputError(f'{len(units)} answers or pairs do not fit into batch_size = {rows} rows of {length}')
        if row == len(used):
            used.append(0)
            writers.append(RowWriter(batch, row))
        for segment in unit:
            place = slice(used[row], used[row] + len(segment.tokens))
            writers[row].write(np.asarray(segment.tokens, np.int32), segment.loss_weight)
            for name, values in segment.stamps.items():
                batch[name][row, place] = values
            used[row] = place.stop


def _pairs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The prompts and completions of a record that holds one of each, or a list of each."""
    prompt, completion = record['prompt'], record['completion']
    parts = [record]
    if isinstance(prompt, list) and isinstance(completion, list) and len(prompt) == len(completion) > 0:
        parts = [{'prompt': p, 'completion': c} for p, c in zip(prompt, completion, strict=True)]
    return [(_text(part, 'prompt'), _text(part, 'completion')) for part in parts]


def _array(value: Any, field: str, dtype: Any = None) -> np.ndarray:
    try:
        with np.errstate(over='ignore'):
            return np.asarray(value, dtype)
    except (ValueError, TypeError, OverflowError):  # lists in lists, words, numbers beyond all bounds
        raise InputError(f'{field}: expected a list of numbers, got {str(value)[:60]}') from None


def _token_array(ids: Any, vocab_size: int) -> np.ndarray:
    tokens = _array(ids, 'tokens')
    if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f'tokens: expected a non-empty list of token ids, got {str(ids)[:60]}')
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise InputError(f'tokens: expected ids from 0 to {vocab_size - 1}, got {tokens.min()} to {tokens.max()}')
    return tokens.astype(np.int32)


def _text(record: Mapping[str, Any], field: str) -> str:
    if not isinstance(record[field], str):
        raise InputError(f'{field}: expected a string, got {type(record[field]).__name__}')
    return record[field]
