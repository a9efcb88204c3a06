"""Sources made worse on purpose: for control arms, and to plant what guards and filters are to find."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

from data.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from data.files import Record
    from data.sources import Source

KINDS = ('shuffled', 'random', 'repeated', 'digits')


class Noisy:
    """The texts of another source with so large a share of their words spoilt: 'shuffled' has them trade places, so
    that words keep their frequencies and lose their order; 'random' puts random letters for them, as many; 'repeated'
    puts the first of them for all; 'digits' puts a random digit for each in them, so that what was a sum keeps only its
    form. Which words, and how, depends on the record's number alone."""

    def __init__(self, source: Source, kind: str = 'shuffled', share: float = 1.0):
        """Raises InputError for an unknown kind, a share outside 0 to 1, or records without a text."""
        if kind not in KINDS:
            raise InputError(f'source noisy: kind {kind!r}{did_you_mean(kind, KINDS)}')
        if not 0 <= share <= 1:
            raise InputError(f'source noisy: share {share!r}: expected 0 to 1')
        if 'text' not in source[0]:
            raise InputError('source noisy: expected records with a text')
        self._source, self._kind, self._share = source, kind, share
        self.endless = getattr(source, 'endless', False)
        self.most_broken = getattr(source, 'most_broken', 0)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record: dict[str, Any] = {**self._source[index]}
        rng = random.Random(f'noise {self._kind} {self._share} {index}')
        parts = re.split(r'(\s+)', record['text'])  # words at even places, what is between them at odd ones
        words = [place for place in range(0, len(parts), 2) if parts[place]]
        spoilt = sorted(rng.sample(words, round(self._share * len(words))))
        if self._kind == 'shuffled':
            now = [parts[place] for place in spoilt]
            rng.shuffle(now)
        elif self._kind == 'random':
            now = [''.join(rng.choices('abcdefghijklmnopqrstuvwxyz', k=len(parts[place]))) for place in spoilt]
        elif self._kind == 'digits':
            now = [re.sub(r'\d', lambda _: rng.choice('0123456789'), parts[place]) for place in spoilt]
        else:
            now = [parts[spoilt[0]]] * len(spoilt) if spoilt else []
        for place, word in zip(spoilt, now, strict=True):
            parts[place] = word
        return {**record, 'text': ''.join(parts)}
