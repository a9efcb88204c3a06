"""Sources: where records come from. `open_source({'type': ..., ...})` gives something with a length and `source[i]`.

A record is a dict with `text`, `messages`, `tokens`, or `prompt` and `completion`; other keys say where it is from.
Access is random, so that any process can read just the rows it needs, and what can be checked is checked on opening:
before compute.
"""

import inspect
import random
from collections.abc import Callable
from typing import Any, Protocol

from data import corpus
from data.committee import fill
from data.constitution import CRITIQUE_TEMPLATE, REVISION_TEMPLATE
from data.errors import InputError, did_you_mean
from data.files import ArrayRecordSource, JsonLinesSource, ParquetSource, Record, TextSource, TfdsSource
from data.mixture import as_dict
from data.noise import Noisy
from data.recast import Composed, FillInTheMiddle
from data.rewriting import TEMPLATES
from data.tasks import Comparable, Criticizable, Prompt, Proposable, Task, get_task
from data.words import WORDS

# A procedural task never runs out: any index below this is a problem.
ENDLESS = 2**31


class Source(Protocol):
    """Random access to records. One with a true attribute `endless` is read in order and never shuffled."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def most_broken(source: Source) -> int:
    """How many of a source's records may turn out to be broken, and are passed over."""
    return getattr(source, 'most_broken', 0)


def _chat(asked: str, said: str) -> Record:
    return {'messages': [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': said}]}


def _revision(task: Criticizable, prompt: Prompt, index: int) -> Record:
    """One of the two questions of `data.constitution.revise`, with its answer."""
    answer, critique, revision = task.criticism(prompt)
    fields = {'principle': task.principle, 'prompt': prompt.text, 'answer': answer}
    if index % 2:
        return _chat(fill(CRITIQUE_TEMPLATE, **fields), critique)
    return _chat(fill(REVISION_TEMPLATE, **fields, critique=critique), revision)


def _instruction(_: Task, p: Prompt, __: int) -> Record:
    """What template 'instruction' asks of a model that is shown the answer, and the problem as its reply."""
    return _chat(TEMPLATES['instruction'].format(text=p.reference), p.text)


def _pair(task: Comparable, prompt: Prompt, _: int) -> Record:
    return dict(zip(('prompt', 'chosen', 'rejected'), (prompt.text, *task.pair(prompt)), strict=True))


# What becomes of a problem: what a task must be able to for it, as a protocol and in words, and how it is done, of
# (task, problem, its number).
FORMATS: dict[str, tuple[type, str, Callable[[Any, Prompt, int], Record]]] = {
    'text': (object, '', lambda _, p, i: {'text': f'{p.text}\n{p.reference}'}),
    'completion': (object, '', lambda _, p, i: {'prompt': f'{p.text}\n', 'completion': p.reference}),
    'chat': (object, '', lambda _, p, i: _chat(p.text, p.reference)),
    'proposal': (Proposable, 'takes proposals', lambda task, p, i: _chat(task.invitation, task.proposal(p))),
    'pair': (Comparable, 'has pairs of answers', _pair),
    'revision': (Criticizable, 'has criticism', _revision),
    'instruction': (object, '', _instruction),
}


class TaskSource:
    """The problems of a procedural task with their reference answers: as text, as text whose answer alone is learnt
    ('completion'), or as chats; as answers themselves, to whoever asks for a problem ('proposal'); with a better and a
    worse answer ('pair'); an answer's critique and, every second time, its revision ('revision'); or the problem, to
    whoever is shown its answer ('instruction')."""

    def __init__(self, name: str, split: str = 'train', format: str = 'text', records: int = 0, **options: Any):
        """`records`: the first so many problems, again and again; 0: new ones without end. `options` go to the task.
        Raises InputError for an unknown task, split, option or format, and for a number that is none."""
        if type(records) is not int or records < 0:
            raise InputError(f'source task: records {records!r}: expected 0 (without end) or more')
        if format not in FORMATS:
            raise InputError(f'source task: format {format!r}{did_you_mean(format, FORMATS)}')
        self.task = get_task(name, split=split, **options)
        able, what, self._record = FORMATS[format]
        if not isinstance(self.task, able):
            raise InputError(f'source task: format {format!r}: expected a task that {what}, not {name!r}')
        self.endless = not records
        self._records = records or ENDLESS

    def __len__(self) -> int:
        return self._records

    def __getitem__(self, index: int) -> Record:
        prompt = self.task.prompt(index)
        return {**self._record(self.task, prompt, index), 'key': prompt.key}


class Repeats:
    """Documents of short strings of random words, each said twice in a row, of which the second saying is learnt.

    Only what stands in the context helps, so a model learns to look there: to find the last time a token occurred and
    to copy what came next (induction heads; Olsson et al. 2022). Long strings alone teach that hardly at all; begin
    with the shortest. Strings follow one another without a mark: where a string begins or ends would tell how far back
    to look, and a model that counts has no need to find.
    """

    endless = True

    def __init__(self, words: tuple[int, int] = (2, 5), strings: int = 16):
        """Each string has `words` (least, most) words, a document `strings` strings. Raises InputError."""
        low, high = words if isinstance(words, tuple | list) and len(words) == 2 else (words, words)
        if type(low) is not int or type(high) is not int or not 2 <= low <= high:
            raise InputError(f'source repeats: words {words!r}: expected (least, most) of at least 2')
        if type(strings) is not int or strings < 1:
            raise InputError(f'source repeats: strings {strings!r}: expected 1 or more')
        self._words, self._strings = (low, high), strings

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Record:
        rng = random.Random(f'repeats {self._words} {index}')
        strings = [rng.choices(WORDS, k=rng.randint(*self._words)) for _ in range(self._strings)]
        # The first word of a copy might be any: it is shown, and the others are learnt.
        prompts = [''.join(f' {word}' for word in [*string, string[0]]) for string in strings]
        return {'prompt': prompts, 'completion': [''.join(f' {word}' for word in string[1:]) for string in strings]}


class Awaited:
    """The records that a stage of the run has still to write: a place for them, while settings are checked."""

    def __init__(self, stage: str):
        self._stage = stage

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Record:
        raise InputError(f'stage {self._stage!r} has not written its records yet')


def open_source(spec: Any) -> Source:
    """The source that a mapping `{'type': TYPE, option: value, ...}` describes.

      stdlib                        split, piece (characters a record; 0: whole files)
      stdlib_instructions           split
      task                          name, split, format (of FORMATS), records (how many
                                    problems; 0: without end), and the task's own options
      repeats                       words, strings
      noisy                         source (another such mapping), kind (shuffled, random or repeated), share
      fim                           source, rate: of its texts with the middle moved to the end, to be filled in
      composed                      source, parts (least, most), ask (one or all): several of its records in one
      jsonl, arrayrecord, parquet   path (a file or a glob), field, broken (how many records that cannot be read a run
                                    passes over; 0: none)
      text                          path (a file, a folder or a glob): one document a file
      tfds                          name or path, split, field

    `field` names what is to be read as the text. Raises InputError for an unknown type or option, and where the first
    records (for JSON Lines: any) are not what a source should hold.
    """
    options = as_dict(spec)
    kind = options.pop('type', None)
    if kind not in _TYPES:
        raise InputError(f'source: type {kind!r}{did_you_mean(str(kind), _TYPES)}')
    opener = _TYPES[kind]
    parameters = inspect.signature(opener).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in options:
            if name not in parameters:
                raise InputError(f'source {kind}: no option {name!r}{did_you_mean(name, parameters)}')
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if required and options.get(name) in (None, ''):
            raise InputError(f'source {kind}: option {name!r} is missing')
    source = opener(**options)
    if len(source) == 0:
        raise InputError(f'source {kind}: no records in it')
    for index in range(min(len(source), most_broken(source) + 1)):
        try:
            source[index]
            break
        except InputError:
            if index == min(len(source) - 1, most_broken(source)):
                raise
    return source


_TYPES: dict[str, Callable[..., Source]] = {
    'stdlib': lambda split='train', piece=0: corpus.standard_library(split, piece),
    'stdlib_instructions': lambda split='train': corpus.instructions(split),
    'task': TaskSource,
    'repeats': Repeats,
    'fim': lambda source, rate=0.5: FillInTheMiddle(open_source(source), rate),
    'composed': lambda source, parts=(4, 8), ask='one': Composed(open_source(source), parts, ask),
    'noisy': lambda source, kind='shuffled', share=1.0: Noisy(open_source(source), kind, share),
    'jsonl': JsonLinesSource,
    'arrayrecord': ArrayRecordSource,
    'parquet': ParquetSource,
    'text': TextSource,
    'tfds': TfdsSource,
}
