"""Deduplication: of texts that say the same, or nearly so, the first stays.

MinHash (Broder 1997) over the set of a text's runs of words, in bands: texts with a band in common are candidates, and
their exact Jaccard similarity decides. With 26 bands of 11 rows, as 'datatrove' has it, two texts of similarity s
become candidates with probability 1 - (1 - s^11)^26: 0.90 at 0.8, 0.991 at 0.85. A text is compared with those that
stay, so that a chain of small changes is not taken for one text.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.curate.grams import grams, hashes, jaccard, mixed, text_of, whole, words
from data.curate.passes import Note, Step, Work, arrays_of, need, save_arrays
from data.errors import InputError
from data.files import Record
from data.sources import Source

LEVELS = ('document', 'paragraph')
_SEED = 1
_SHORTEST_PARAGRAPH = 10  # words: shorter ones (headings, `return None`) are everybody's
_SETS_KEPT = 4096  # texts whose runs of words are remembered while they are compared
_GAP = re.compile(r'(\n\s*\n)')
TWINS = 'twins.npz'


@dataclass(frozen=True)
class Dedup(Step):
    """Drops records, or paragraphs of records with `text`, that repeat earlier ones.

    `similarity` is the least Jaccard similarity of duplicates, 1: none but exact ones, which have the same words in
    the same order. `size` is the words in a run.
    """

    level: str = 'document'
    similarity: float = 0.8
    size: int = 5
    bands: int = 26
    rows: int = 11
    name = 'dedup'
    version = 1

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise InputError(f'dedup: level {self.level!r}: expected one of {", ".join(LEVELS)}')
        if not 0 < self.similarity <= 1 or min(self.size, self.bands, self.rows) < 1:
            raise InputError('dedup: expected similarity in (0, 1], and size, bands and rows of at least 1')

    def begin(self, work: Work) -> None:
        need('rensa')
        if (work.folder / TWINS).exists():
            return
        parts = [arrays_of(path) for path in work.map('signatures', functools.partial(_sign, self))]
        signs, exact, places = (np.concatenate([part[name] for part in parts]) for name in ('signs', 'exact', 'places'))
        twin, similarity = self._twins(work, signs, exact, places)
        save_arrays(work.folder / TWINS, places=places, twin=twin, similarity=similarity)

    def apply(self, folder: Path, index: int, record: Record) -> tuple[Record | None, Note | None]:
        held = arrays_of(folder / TWINS)
        places, twin, similarity = held['places'], held['twin'], held['similarity']
        own = range(*np.searchsorted(places[:, 0], (index, index + 1)))
        repeated = [unit for unit in own if twin[unit] >= 0]
        if not repeated:
            return record, None
        last = repeated[-1]
        note = {
            'reason': 'exact' if all(similarity[unit] == 2 for unit in repeated) else 'near',
            'twin': int(places[twin[last], 0]),
            'similarity': round(min(float(similarity[last]), 1.0), 4),
        }
        if self.level == 'document' or 'text' not in record:
            return None, note
        pieces = _pieces(record['text'])
        for unit in repeated:
            place = int(places[unit, 1])
            pieces[place : place + 2] = [''] * len(pieces[place : place + 2])  # with the gap behind it
        left = ''.join(pieces)
        note |= {'paragraphs': len(repeated)}
        return ({**record, 'text': left}, note) if left.strip() else (None, note)

    def units(self, record: Record) -> Iterator[tuple[int, list[str]]]:
        """The words of what is compared of a record, and which piece of it each is."""
        parts = self.level == 'paragraph' and 'text' in record
        for place, piece in enumerate(_pieces(record['text']) if parts else [text_of(record)]):
            found = words(piece)
            if len(found) >= (_SHORTEST_PARAGRAPH if parts else 1):  # texts without words are left alone
                yield place, found

    def _twins(
        self, work: Work, signs: np.ndarray, exact: np.ndarray, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of each text the earlier one that it repeats (-1: none), and how similar they are (2: the same words)."""
        _, first, group = np.unique(exact, return_index=True, return_inverse=True)
        twin = np.where(first[group] < np.arange(len(exact)), first[group], -1)
        similarity = np.where(twin >= 0, 2.0, 0.0)
        if self.similarity == 1:
            return twin, similarity
        alone = np.flatnonzero(twin < 0)
        shared = np.zeros((len(alone), self.bands), bool)  # bands that another text has too
        for band in range(self.bands):
            _, group, count = np.unique(signs[alone, band], return_inverse=True, return_counts=True)
            shared[:, band] = count[group] > 1

        source = work.source

        @functools.lru_cache(_SETS_KEPT)
        def runs(unit: int) -> np.ndarray:
            index, place = places[unit].tolist()
            return np.unique(grams(hashes(dict(self.units(source[index]))[place]), self.size))

        stayed: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row in np.flatnonzero(shared.any(1)):
            unit = int(alone[row])
            keys = [(int(band), int(signs[unit, band])) for band in np.flatnonzero(shared[row])]
            for other in sorted({other for key in keys for other in stayed.get(key, ())}):
                similar = jaccard(runs(unit), runs(other))
                if similar >= self.similarity:
                    twin[unit], similarity[unit] = other, similar
                    break
            else:
                for key in keys:
                    stayed[key].append(unit)
        return twin, similarity


def _pieces(text: str) -> list[str]:
    """Paragraphs and the gaps between them, in turn: at blank lines or, where there are none, at line ends."""
    pieces = _GAP.split(text)
    return pieces if len(pieces) > 1 else re.split('(\n)', text)


def _sign(step: Dedup, source: Source, numbers: range, path: Path) -> None:
    """Writes for every text of a shard the hashes of its bands, that of all its words, and where it stands."""
    from rensa import RMinHash

    places, exact, runs = [], [], []
    for index in numbers:
        for place, found in step.units(source[index]):
            of_words = hashes(found)
            places.append((index, place))
            exact.append(whole(of_words))
            runs.append(grams(of_words, step.size))
    ends = np.cumsum([0, *map(len, runs)])
    flat = np.concatenate([*runs, np.zeros(0, np.uint64)])
    digests = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, step.bands * step.rows, _SEED).to_rows()
    table = np.array(digests, np.uint64).reshape(-1, step.bands, step.rows)
    signs = mixed(table[:, :, row] for row in range(step.rows))
    save_arrays(path, signs=signs, exact=np.array(exact, np.uint64), places=np.array(places, np.int64).reshape(-1, 2))
