"""Records recast: the middle of a text moved to its end, or several short problems put as one long one."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from data.errors import InputError

if TYPE_CHECKING:
    from data.files import Record
    from data.sources import Source

# Written as text, so that any tokenizer will do; those that models of code know by these names read them as theirs.
PREFIX, SUFFIX, MIDDLE = '<fim_prefix>', '<fim_suffix>', '<fim_middle>'


class FillInTheMiddle:
    """Texts cut in three at random, of which the middle comes last, so that a model learns to fill it in (Bavarian et
    al. 2022, section 3): prefix, suffix, middle, or suffix, prefix, middle, each in half of the cases (their PSM, and
    the second variant of SPM in their appendix D). The share `rate` of records is cut, the others stay as they are.

    Which, and where, depends on the record's number alone. Places are characters: a cut may fall inside a token.
    """

    def __init__(self, source: Source, rate: float = 0.5):
        """Raises InputError for a rate outside 0 to 1, or records without a text."""
        if not 0 <= rate <= 1:
            raise InputError(f'source fim: rate {rate!r}: expected 0 to 1')
        if 'text' not in source[0]:
            raise InputError('source fim: expected records with a text')
        self._source, self._rate = source, rate
        self.endless = getattr(source, 'endless', False)
        self.most_broken = getattr(source, 'most_broken', 0)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record, rng = self._source[index], random.Random(f'fim {index}')
        if rng.random() >= self._rate:
            return record
        text = record['text']
        first, last = sorted(rng.randint(0, len(text)) for _ in range(2))
        prefix, middle, suffix = text[:first], text[first:last], text[last:]
        if rng.random() < 0.5:
            return {**record, 'text': f'{PREFIX}{prefix}{SUFFIX}{suffix}{MIDDLE}{middle}'}
        return {**record, 'text': f'{PREFIX}{SUFFIX}{suffix}{MIDDLE}{prefix}{middle}'}


class Composed:
    """Long problems made of short ones: several records stand in a row, each with a number, and one of them is asked
    for (`ask` 'one') or all in order ('all'). What was asked is learnt: of records with a completion that, the prompts
    being shown, and of texts the text itself.

    A record is made of others than its neighbours are, as far as the source goes; which, how many between the least and
    the most of `parts`, and what is asked depends on its number alone.
    """

    def __init__(self, source: Source, parts: tuple[int, int] = (4, 8), ask: str = 'one'):
        """Raises InputError for parts or `ask` that mean nothing, or records with neither text nor completion."""
        low, high = parts if isinstance(parts, tuple | list) and len(parts) == 2 else (parts, parts)
        if type(low) is not int or type(high) is not int or not 2 <= low <= high:
            raise InputError(f'source composed: parts {parts!r}: expected (least, most) of at least 2')
        if ask not in ('one', 'all'):
            raise InputError(f"source composed: ask {ask!r}: expected 'one' or 'all'")
        if not source[0].keys() & {'text', 'completion'}:
            raise InputError('source composed: expected records with a text, or with a prompt and a completion')
        self.endless = getattr(source, 'endless', False)
        if len(source) < high:
            raise InputError(f'source composed: {len(source)} records: expected at least parts = {high} of them')
        self._source, self._parts, self._ask = source, (low, high), ask

    def __len__(self) -> int:
        return len(self._source) // self._parts[1]

    def __getitem__(self, index: int) -> Record:
        rng, most = random.Random(f'composed {index}'), self._parts[1]
        count = rng.randint(*self._parts)
        records = [self._source[index * most + place] for place in range(count)]
        shown = [str(record.get('prompt', record.get('text'))).strip() for record in records]
        said = [str(record.get('completion', record.get('text'))).strip() for record in records]
        given = '\n\n'.join(f'Number {place}:\n{text}' for place, text in enumerate(shown, 1))
        verb = 'Solve' if 'completion' in records[0] else 'Repeat'
        if self._ask == 'all':
            asked, answer = f'{verb} all.', '\n'.join(f'{i}: {text}' for i, text in enumerate(said, 1))
        else:
            place = rng.randrange(count)
            asked, answer = f'{verb} number {place + 1}.', said[place]
        return {'prompt': f'{given}\n\n{asked}\n', 'completion': answer}
