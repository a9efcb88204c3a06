"""Texts as hashes of words and of runs of words, the same in every process: what curation compares."""

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data.errors import InputError

# Signs of arithmetic are words: 3+4 is another problem than 3-4. Other punctuation may change without notice.
WORD = re.compile(r'\w+|[-+*/=<>^%~&|()]')
_MOST_REMEMBERED = 2_000_000  # words whose hash is kept
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: no product loses bits


class _Hashes(dict[str, int]):
    """64 bits of a hash for each word that was met; far quicker than to hash it again."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MOST_REMEMBERED:
            self.clear()
        digest = hashlib.blake2b(word.encode(errors='surrogatepass'), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, 'little')
        return value


_HASHES = _Hashes()


def text_of(record: Mapping[str, Any]) -> str:
    """All words of a record in their order. Raises InputError where it has none."""
    if 'text' in record:
        return str(record['text'])
    if 'messages' in record:
        return '\n'.join(message['content'] for message in record['messages'])
    if 'prompt' in record and 'completion' in record:
        prompt, completion = record['prompt'], record['completion']
        if isinstance(prompt, list):
            return ''.join(text for both in zip(prompt, completion, strict=True) for text in both)
        return f'{prompt}{completion}'
    found = [record[name] for name in ('prompt', 'chosen', 'rejected') if isinstance(record.get(name), str)]
    if not found:
        raise InputError(f'record has {sorted(record)}: expected words; curate before tokens are made')
    return '\n'.join(found)


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return WORD.findall(text.lower())


def hashes(found: Sequence[str]) -> np.ndarray:
    """A hash of each word: uint64 [n]."""
    return np.fromiter(map(_HASHES.__getitem__, found), np.uint64, len(found))


def mixed(columns: Iterable[np.ndarray]) -> np.ndarray:
    """One hash for each row of columns of hashes, uint64 [n] each; their order counts."""
    total = functools.reduce(lambda sum_, column: sum_ * _FACTOR + column, columns)
    # The low bits of a product know nothing of the high ones.
    total = (total ^ (total >> np.uint64(32))) * _FACTOR
    return total ^ (total >> np.uint64(29))


def grams(of_words: np.ndarray, size: int) -> np.ndarray:
    """A hash of each run of `size` words, uint64 [n - size + 1]; of fewer words, one of all of them."""
    size = min(size, len(of_words))
    count = len(of_words) - size + 1
    return mixed(of_words[place : place + count] for place in range(size)) if size else of_words


def whole(of_words: np.ndarray) -> int:
    """A hash of words in their order, of 64 bits."""
    return int.from_bytes(hashlib.blake2b(of_words.tobytes(), digest_size=8).digest(), 'little')


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """What two sets, sorted arrays without repetition, have in common, of all that is in either."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    either = len(one) + len(other) - both
    return both / either if either else 1.0
