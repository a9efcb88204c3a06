"""Repetition inside a text: words said over and over are dropped, or shown and not learnt.

A text repeats itself where a run of 1 to 13 words stands there 32 times or more on end (OLMo 2, arXiv:2501.00656,
section 3.2, which counts tokens): logs, tables of noughts. They are learnt in no time and cause
spikes in the loss.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.curate.grams import hashes, text_of
from data.curate.passes import Note, Step
from data.errors import InputError
from data.files import Record

_PIECE = re.compile(r'\w+|[^\w\s]+')  # a rule of dashes is one


@dataclass(frozen=True)
class Repetition(Step):
    """Drops records with a run of up to `longest` words that stands `times` times on end or, with `mask`, makes of one
    with `text` a record {prompt, completion} of lists, of which the first saying is learnt and the others are not.
    """

    mask: bool = False
    times: int = 32
    longest: int = 13
    name = 'repetition'
    version = 1

    def __post_init__(self) -> None:
        if self.times < 2 or self.longest < 1:
            raise InputError('repetition: expected times of at least 2, and longest of at least 1')

    def apply(self, folder: Path, index: int, record: Record) -> tuple[Record | None, Note | None]:
        if not any(self._runs(hashes(_PIECE.findall(text_of(record))))):
            return record, None
        if not self.mask or 'text' not in record:
            return None, {'reason': 'dropped'}
        parts = self.pieces(record['text'])
        kept = {name: value for name, value in record.items() if name != 'text'}
        note = {'reason': 'masked', 'characters': sum(map(len, parts[::2]))}
        return {**kept, 'prompt': parts[::2], 'completion': parts[1::2]}, note

    def pieces(self, text: str) -> list[str]:
        """The text cut where it is not to be learnt and, in turn, where it is; the first and the last may be empty."""
        found = list(_PIECE.finditer(text))
        repeated = np.zeros(len(found) + 1, np.int64)
        for begin, end in self._runs(hashes([match[0] for match in found])):
            repeated[begin] += 1
            repeated[end] -= 1
        inside = np.flatnonzero(np.diff(np.cumsum(repeated) > 0, prepend=False))  # where it begins and ends, in turn
        cuts = [found[word].start() if i % 2 == 0 else found[word - 1].end() for i, word in enumerate(inside.tolist())]
        places = [0, 0, *cuts, len(text)]
        return [text[begin:end] for begin, end in zip(places, places[1:], strict=False)]

    def _runs(self, of_words: np.ndarray) -> Iterator[tuple[int, int]]:
        """Words [begin, end) that only say again what stood before them."""
        for size in range(1, self.longest + 1):
            same = np.concatenate([[False], of_words[size:] == of_words[:-size], [False]])
            edges = np.flatnonzero(np.diff(same))
            for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                if end - begin >= size * (self.times - 1):
                    yield begin + size, end + size
