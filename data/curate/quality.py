"""Quality: a score for every record, and what of it to see how often.

The classifier is linear over hashed words and pairs of words (as fastText's, Joulin et al. 2016): does a text look like
good ones, or like bad ones? Any other scorer is a callable on text: a judge, say, or the loss of a checkpoint.
"""

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.curate.grams import text_of
from data.curate.passes import RESULT, Note, Step, Work, arrays_of, curate, need, save_arrays
from data.errors import InputError
from data.files import Record
from data.prepare import source_spec
from data.sources import open_source

FEATURES = 2**18
_MODEL = 'classifier.npz'
_GARBLED = 0.15  # share of characters of a garbled text that are any others
_LETTERS = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,'


@dataclass(frozen=True)
class Quality(Step):
    """Writes into `provenance.scores.quality` how likely a record is one of the `good` (0 to 1), and drops those below
    `least`. `good` and `bad` are files or folders of records. Empty: the standard library, and the good ones with their
    words shuffled or their letters garbled. `score`, where given, is asked instead.
    """

    good: str = ''
    bad: str = ''
    least: float = 0.0
    score: Callable[[str], float] | None = None
    name = 'quality'
    version = 1

    def settings(self) -> dict[str, Any]:
        return {**asdict(self), 'score': getattr(self.score, '__qualname__', None)}

    def begin(self, work: Work) -> None:
        path = work.folder / RESULT / _MODEL
        if self.score or path.exists():
            return
        good = [*_texts(self.good)]
        bad = [*_texts(self.bad)] if self.bad else [spoilt(text, random.Random(text)) for text in good]
        save_arrays(path, **fit(good, bad))

    def apply(self, folder: Path, index: int, record: Record) -> tuple[Record | None, Note | None]:
        text = text_of(record)
        value = self.score(text) if self.score else scores([text], arrays_of(folder / RESULT / _MODEL))[0]
        if value < self.least:
            return None, {'reason': 'low', 'quality': round(float(value), 4)}
        origin = record.get('provenance', {})
        known = {**origin.get('scores', {}), 'quality': round(float(value), 4)}
        return {**record, 'provenance': {**origin, 'scores': known}}, None


def fit(good: Sequence[str], bad: Sequence[str]) -> dict[str, np.ndarray]:
    """The weights [FEATURES] and bias [1] of a classifier of texts; both kinds count the same, few or many."""
    need('sklearn')
    from sklearn.linear_model import SGDClassifier

    if not good or not bad:
        raise InputError(f'quality: {len(good)} good texts and {len(bad)} bad ones: expected some of each')
    model = SGDClassifier(loss='log_loss', alpha=1e-6, class_weight='balanced', random_state=0)
    model.fit(_hashing().transform([*good, *bad]), [1] * len(good) + [0] * len(bad))
    return {'weights': model.coef_[0].astype(np.float32), 'bias': model.intercept_.astype(np.float32)}


def scores(texts: Sequence[str], model: Mapping[str, np.ndarray]) -> np.ndarray:
    """How likely each text is a good one: [n], 0 to 1."""
    margins = _hashing().transform(texts) @ model['weights'] + model['bias']
    return 1 / (1 + np.exp(-np.clip(margins, -30, 30)))


def spoilt(text: str, rng: random.Random) -> str:
    """A text with its words in any order, or with wrong letters: each time in two."""
    if rng.random() < 0.5:
        return ' '.join(rng.sample(found := text.split(), len(found)))
    return ''.join(rng.choice(_LETTERS) if rng.random() < _GARBLED else letter for letter in text)


def curve(drop: float, cap: float, count: int) -> np.ndarray:
    """How often records of each of `count` quality classes of one size, worst first, are seen: [count].

    Nothing of the bottom share `drop`; above, a power of the rank that ends at `cap` and leaves as much to see as there
    was, or, where that needs more than `cap` (1 - drop), `cap` for all.
    """
    if not 0 <= drop < 1 or cap < 1 or count < 1:
        raise InputError(f'drop={drop}, cap={cap}, classes={count}: expected 0 <= drop < 1, cap and classes >= 1')
    power = max(cap * (1 - drop) - 1, 0.0)  # the integral of cap r^power over ranks r, times 1 - drop, is 1
    edges = np.clip((np.arange(count + 1) / count - drop) / (1 - drop), 0, 1)
    return np.diff(edges ** (power + 1)) * cap * (1 - drop) / (power + 1) * count


@dataclass(frozen=True)
class Between(Step):
    """Keeps the records whose score `of` is in [low, high)."""

    of: str
    low: float
    high: float
    name = 'between'
    version = 1

    def apply(self, folder: Path, index: int, record: Record) -> tuple[Record | None, Note | None]:
        return (record if self.low <= _score(record, self.of) < self.high else None), None


def upsample(
    spec: Mapping[str, Any],
    output: str | Path,
    drop: float = 0.4,
    cap: float = 4.0,
    classes: int = 5,
    of: str = 'quality',
) -> dict[str, Any]:
    """Cuts scored records into classes of as many characters, `output`/class-0 (the worst) and so on, and compiles
    `curve` to what a config needs: {'sources': {name: spec}, 'mixture': ((0.0, {name: weight}),)}, without the classes
    that are never seen.
    """
    source = open_source(spec)
    found = np.array([_score(source[i], of) for i in range(len(source))])
    sizes = np.array([len(text_of(source[i])) for i in range(len(source))])
    order = np.argsort(found, kind='stable')
    rank = np.cumsum(sizes[order]) / sizes.sum()
    inner = found[order][np.searchsorted(rank, np.arange(1, classes) / classes)]
    edges = [-np.inf, *inner.tolist(), np.inf]
    often = curve(drop, cap, classes)
    weights, sources = {}, {}
    for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        inside = (low <= found) & (found < high)
        if often[i] > 0 and inside.any():
            folder = Path(output) / f'class-{i}'
            curate(Between(of, low, high), spec, folder)
            sources[folder.name] = {'type': 'arrayrecord', 'path': str(folder)}
            weights[folder.name] = round(float(often[i] * sizes[inside].sum() / sizes.sum()), 6)
    return {'sources': sources, 'mixture': ((0.0, weights),)}


def _score(record: Record, of: str) -> float:
    value = record.get('provenance', {}).get('scores', {}).get(of)
    if not isinstance(value, int | float):
        raise InputError(f'provenance.scores.{of}: expected a number, got {value!r}: score the records first')
    return value


@functools.cache
def _hashing() -> Any:
    need('sklearn')
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(
        ngram_range=(1, 2), token_pattern=r'\w+|[^\w\s]', n_features=FEATURES, alternate_sign=False
    )


def _texts(path: str) -> Iterator[str]:
    source = open_source(source_spec(path, 'train', '') if path else {'type': 'stdlib', 'piece': 2000})
    return (text_of(source[index]) for index in range(len(source)))
