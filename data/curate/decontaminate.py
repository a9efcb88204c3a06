"""Decontamination: records that hold an item of an evaluation are dropped, whether word for word or lightly edited.

An item is looked for by its runs of words, as many at a time as its length allows; case, spaces and most punctuation
count for nothing. Fewer than LEAST words are too few to look for. Below FUZZY words all have to be there, in order.
Of longer items a share of the runs has to stand close together, and nearly all the numbers: another number makes
another problem. What many items of an evaluation have in common, such as the wording of a task, speaks for none.
"""

import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.curate.grams import grams, hashes, text_of, words
from data.curate.passes import Note, Step
from data.errors import InputError, json_object
from data.files import JsonLines, Record
from data.sources import open_source
from data.tasks import different, get_task, task_names

LEAST = 4
FUZZY = 10
SIZES = (3, 4, 5)  # words in a run: an eighth of an item's, within these
# Below so many words: the shares of an item's runs, and of its numbers, that have to be there.
_SHARES = ((20, 0.6, 1.0), (32, 0.6, 0.6), (2**31, 0.5, 0.6))
_COMMON = 100  # runs in more than one of so many items are common
_WITHIN = 2  # times an item's length: where its runs have to stand
_QUESTIONS = ('question', 'problem', 'context', 'query', 'prompt', 'instruction', 'premises', 'text')
_ANSWERS = ('answer', 'solution', 'chain_of_thought', 'canonical_solution', 'continuation', 'rationale')
_LONG_ANSWER = 40  # words: shorter ones are anybody's
_GOES_ON = re.compile(r'[-+*/^%] [\d(]')
_EXCERPT = 30  # words of a record that a note quotes


class Item(NamedTuple):
    """Something to look for: whose, which, its words' hashes, its runs, those that are its own, and its numbers."""

    evaluation: str
    number: int
    of_words: np.ndarray
    runs: np.ndarray
    own: np.ndarray
    figures: np.ndarray


# Items and, by size, the runs to look for: sorted, and with the numbers of their items.
Index = tuple[list[Item], dict[int, tuple[np.ndarray, dict[int, list[int]]]]]


@dataclass(frozen=True)
class Decontaminate(Step):
    """Drops records that hold an item of an evaluation.

    `against` has names of tasks (their held-out problems, at most `most` of each), files of records, JSON objects that
    are tasks with options ({"name": ...}) or sources ({"type": ...}), and config.json of stages, whose evaluations
    count. Empty: every task that needs no options.
    """

    against: tuple[str, ...] = ()
    most: int = 1000
    name = 'decontaminate'
    version = 1

    def settings(self) -> dict[str, Any]:
        _index.cache_clear()  # the files may be others than they were
        found, _ = _index(self.against, self.most)
        counted = Counter(item.evaluation for item in found)
        digest = hashlib.sha256(b'\n'.join(item.of_words.tobytes() for item in found)).hexdigest()
        return {**asdict(self), 'items': dict(counted), 'of': digest}

    def apply(self, folder: Path, index: int, record: Record) -> tuple[Record | None, Note | None]:
        found = words(text_of(record))
        hit = self.find(found)
        if hit is None:
            return record, None
        item, place, share = hit
        said = ' '.join(found[place : place + min(len(item.of_words), _EXCERPT)])
        return None, {'reason': item.evaluation, 'item': item.number, 'share': round(share, 3), 'words': said}

    def find(self, found: Sequence[str]) -> tuple[Item, int, float] | None:
        """The first item that words hold, at which word, and the share of its runs that is there."""
        text = hashes(found)
        items, runs = _index(self.against, self.most)
        for size, (known, owners) in runs.items():
            here = grams(text, size)
            inside = known[np.minimum(np.searchsorted(known, here), len(known) - 1)] == here
            candidates = Counter(number for run in here[inside].tolist() for number in owners[run])
            for number, count in sorted(candidates.items()):
                item, held = items[number], None
                if len(item.of_words) < FUZZY:
                    held = _verbatim(item, text, found)
                elif count >= _shares(item)[0] * len(item.own):
                    held = _close(item, text, here, size)
                if held:
                    return item, *held
        return None


def _shares(item: Item) -> tuple[float, float]:
    return next((runs, numbers) for below, runs, numbers in _SHARES if len(item.of_words) < below)


def _verbatim(item: Item, text: np.ndarray, found: Sequence[str]) -> tuple[int, float] | None:
    """Where all words of an item stand, and no sum goes on behind it: 2*3 is not in 2*3+4."""
    length = len(item.of_words)
    for place in np.flatnonzero(text[: max(len(text) - length + 1, 0)] == item.of_words[0]).tolist():
        if (text[place : place + length] == item.of_words).all():
            last, *more = found[place + length - 1 : place + length + 2]
            if not (last == ')' or last.isdigit()) or not _GOES_ON.match(' '.join(more)):
                return place, 1.0
    return None


def _close(item: Item, text: np.ndarray, here: np.ndarray, size: int) -> tuple[int, float] | None:
    """Where enough of an item's runs, of its own runs and of its numbers stand close together."""
    (share, numbers), reach = _shares(item), _WITHIN * len(item.of_words)
    places = np.flatnonzero(np.isin(here, item.runs))
    needed = int(np.ceil(share * len(item.runs)))
    if len(places) < needed:
        return None
    ends = places[needed - 1 :]
    for place in places[: len(ends)][ends - places[: len(ends)] <= reach].tolist():
        near = np.unique(here[place : place + reach])
        shares = [np.isin(of, near, assume_unique=True).mean() for of in (item.runs, item.own)]
        figures = np.isin(item.figures, text[place : place + reach + size])
        if min(shares) >= share and (not len(figures) or figures.mean() >= numbers):
            return place, float(shares[0])
    return None


@functools.lru_cache(2)
def _index(against: tuple[str, ...], most: int) -> Index:
    """Reads the items; of those that are alike in one evaluation the first."""
    items: list[Item] = []
    owners: dict[int, dict[int, list[int]]] = {size: {} for size in SIZES}
    for name, texts in _evaluations(against, most):
        unlike: dict[tuple[str, ...], int] = {}
        for number, text in enumerate(texts):
            unlike.setdefault(tuple(words(text)), number)
        made = [(found, number, hashes(found)) for found, number in unlike.items() if len(found) >= LEAST]
        runs = [np.unique(grams(of_words, _size(len(of_words)))) for _, _, of_words in made]
        common = Counter(run for some in runs for run in some.tolist())
        for (found, number, of_words), some in zip(made, runs, strict=True):
            own = np.array([run for run in some.tolist() if common[run] <= 1 + len(made) // _COMMON], np.uint64)
            if len(found) < FUZZY:
                own = grams(of_words, LEAST)[:1]  # of those that must be there anyway
            for run in own.tolist():
                owners[_size(len(found))].setdefault(run, []).append(len(items))
            figures = np.unique(hashes([word for word in found if word.isdigit()]))
            items += [Item(name, number, of_words, some, own, figures)] if len(own) else []
    if not items:
        raise InputError('decontaminate: no items to look for')
    return items, {size: (np.array(sorted(known), np.uint64), known) for size, known in owners.items() if known}


def _size(length: int) -> int:
    return LEAST if length < FUZZY else max(min(length // 8, SIZES[-1]), SIZES[0])


def _evaluations(against: tuple[str, ...], most: int) -> Iterator[tuple[str, list[str]]]:
    """Names of evaluations and the texts of their items."""
    for name in against:
        if name in task_names():
            yield name, _problems({'name': name}, most)
        elif name.startswith('{'):
            yield name, _texts(json_object(name, '--against'), most)
        elif name.endswith('config.json') and os.path.isfile(name):
            for key, told in json_object(Path(name).read_bytes(), name).get('evaluations', {}).items():
                if spec := told.get('task') or told.get('source'):
                    yield key, _texts(spec, most)
        else:
            records = JsonLines(name)
            yield os.path.basename(name), [text for i in range(len(records)) for text in _said(records[i])]
    if not against:
        for name in task_names():
            try:
                texts = _problems({'name': name}, most)
            except InputError:  # it needs a file, say, or a package
                continue
            yield name, texts


def _texts(spec: dict[str, Any], most: int) -> list[str]:
    if 'type' not in spec:
        return _problems(spec, most)
    source = open_source(spec)
    return [text_of(source[index]) for index in range(min(len(source), most))]


def _problems(spec: dict[str, Any], most: int) -> list[str]:
    task = get_task(**{**spec, 'split': 'heldout'})
    return [prompt.text for prompt in different(task, most)]


def _said(record: Record) -> Iterator[str]:
    """The question of a published record, and its answer where that is long enough to tell it from others."""
    for names, least in ((_QUESTIONS, 1), (_ANSWERS, _LONG_ANSWER)):
        for name in names:
            said = record.get(name)
            text = '\n'.join(map(str, said)) if isinstance(said, list) else said
            if isinstance(text, str) and len(words(text)) >= least:
                yield text
                break
