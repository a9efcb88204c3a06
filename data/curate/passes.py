"""What all steps of curation share: shards, which several processes work on, which outlive a kill, and which are
written as ArrayRecord with the provenance of every record.
"""

import functools
import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from data.curate.grams import text_of
from data.errors import InputError
from data.files import Record
from data.prepare import fingerprint, in_processes, opened, write_shard
from data.sources import Source

Note = dict[str, Any]
NOTES = 'notes.jsonl'  # what a step says of single records
RESULT = 'result'  # what becomes the output, in the folder of work


@dataclass(frozen=True)
class Work:
    """A source in shards, and the folder where what is known of each is kept until all is done."""

    folder: Path
    spec: Mapping[str, Any]
    count: int
    shard_records: int
    workers: int
    progress: bool = False

    @property
    def source(self) -> Source:
        return opened(json.dumps(self.spec))

    def map(self, name: str, make: Callable[[Source, range, Path], None]) -> list[Path]:
        """The files `folder`/NAME-00000..., which `make(source, numbers of records, path)` writes where they are not
        there yet; `make` goes to other processes, and so has to be a function of a module or a `partial` of one."""
        starts = range(0, self.count, self.shard_records)
        paths = [self.folder / f'{name}-{number:05d}' for number in range(len(starts))]
        todo = [(path, start) for path, start in zip(paths, starts, strict=True) if not path.exists()]
        arguments = ([path for path, _ in todo], [range(s, min(s + self.shard_records, self.count)) for _, s in todo])
        with tqdm(total=len(paths), initial=len(paths) - len(todo), desc=name, disable=not self.progress) as bar:
            once = functools.partial(_once, make, json.dumps(self.spec))
            for _ in in_processes(once, arguments, max(min(self.workers, len(todo)), 1)):
                bar.update()
        return paths


@dataclass(frozen=True)
class Step:
    """One thing that curation does to the records of a source. Its options are its fields. It is pickled."""

    name: ClassVar[str]
    version: ClassVar[int]  # of the code: another one makes other data

    def settings(self) -> dict[str, Any]:
        """What else the result depends on, beside the records, JSON-able."""
        return asdict(self)

    def begin(self, work: Work) -> None:
        """Learns in `work.folder` what has to be known of all records before the first is written."""

    def apply(self, folder: Path, index: int, record: Record) -> tuple[Record | None, Note | None]:
        """The record as it is to be, None where it is dropped; and what is to be told of it, its `reason` above all."""
        raise NotImplementedError


def curate(
    step: Step,
    spec: Mapping[str, Any],
    output: str | Path,
    *,
    licence: str = '',
    shard_records: int = 10_000,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Takes the source `spec` through a step into the folder `output`, and returns what its metadata.json says.

    That is as `data.prepare.prepare` has it, with `curated`, the steps behind the records, oldest first: settings,
    how many records and characters came, how many records stayed, and how many got notes, by reason. The fingerprint
    covers them, so another version of a step makes other data. `provenance` of each record has `source` (where the
    first step found it), `licence` if known, and `transforms`. Shards are kept in `output`.unfinished until all are
    done: the same command goes on from there. The number of `workers` (processes) changes nothing in the result. An
    `output` that is finished with the same settings is left as it is.

    Raises:
        InputError: a source that cannot be curated, an output of other settings, or nothing left.
    """
    output = Path(output)
    opened.cache_clear()  # the files may be others than they were
    source = opened(json.dumps(spec))
    if getattr(source, 'endless', False):
        raise InputError(f'source {spec["type"]}: it has no end: expected records of files')
    told = getattr(source, 'metadata', {})
    settings = {'step': step.name, 'version': step.version, **step.settings(), 'licence': licence}
    begun = {'settings': settings, 'source': spec, 'of': told.get('fingerprint'), 'records': len(source)}
    begun = json.loads(json.dumps(begun | {'shard_records': shard_records}))
    if output.exists():
        return _same(output / 'metadata.json', begun, output)
    folder = output.with_name(f'{output.name}.unfinished')
    (folder / RESULT).mkdir(parents=True, exist_ok=True)
    if (folder / 'begun.json').exists():
        _same(folder / 'begun.json', begun, folder)
    _write_json(folder / 'begun.json', {'begun': begun})
    work = Work(folder, spec, len(source), shard_records, workers, progress)
    step.begin(work)
    place = str(spec.get('path') or spec.get('name') or spec['type'])
    done = [json.loads(p.read_text()) for p in work.map('written', functools.partial(_write, step, licence, place))]
    notes = [note for shard in done for note in shard['notes']]
    shards = [shard['shard'] for shard in done if shard['shard']['records']]
    kept = sum(shard['records'] for shard in shards)
    if not kept:
        raise InputError(f'{output}: none of {len(source)} records is left')
    counts = dict(sorted(Counter(note['reason'] for note in notes).items()))
    counted = {'records': len(source), 'characters': sum(shard['characters'] for shard in done), 'kept': kept}
    history = [*told.get('curated', []), {**settings, **counted, 'notes': counts}]
    metadata = {'records': kept, 'tokens': 0, 'tokenizer': None, 'source': spec, 'shards': shards, 'begun': begun}
    metadata |= {'fingerprint': fingerprint(shards, history), 'curated': history}
    result = folder / RESULT
    for shard in done:
        if not shard['shard']['records']:
            (result / shard['shard']['name']).unlink(missing_ok=True)
    (result / NOTES).write_text(''.join(json.dumps(note) + '\n' for note in notes))
    _write_json(result / 'metadata.json', metadata)
    result.rename(output)
    shutil.rmtree(folder)
    return metadata


def need(package: str) -> None:
    """Raises InputError where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f'{package} is not installed: pip install -r requirements-curate.txt')


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes arrays for `arrays_of`; the file is whole or absent."""
    temporary = path.with_name(f'{path.name}.part')
    with open(temporary, 'wb') as file:  # to a path of another ending NumPy gives one of its own
        np.savez(file, allow_pickle=False, **arrays)
    temporary.replace(path)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays in a file, read once."""
    return _arrays(path, path.stat().st_mtime_ns)


@functools.lru_cache(4)
def _arrays(path: Path, _: int) -> dict[str, np.ndarray]:
    with np.load(path) as held:
        return dict(held)


def _same(path: Path, begun: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a file of an earlier run says, if that was run with the same settings."""
    told = json.loads(path.read_text()) if path.exists() else {}
    if told.get('begun') != begun:
        raise InputError(f'{folder}: exists already, of other settings or records; expected the name of a new folder')
    return told


def _once(make: Callable[[Source, range, Path], None], spec: str, path: Path, numbers: range) -> None:
    temporary = path.with_name(f'{path.name}.tmp')
    make(opened(spec), numbers, temporary)
    temporary.rename(path)


def _write(step: Step, licence: str, place: str, source: Source, numbers: range, path: Path) -> None:
    """Writes what a step leaves of a shard, and to `path` what is to be told of it."""
    notes: list[Note] = []
    characters = 0
    where = getattr(source, 'where', lambda index: f'{place}: record {index}')

    def stepped() -> Iterator[tuple[int, Record]]:
        nonlocal characters
        for index in numbers:
            record = source[index]
            try:
                characters += len(text_of(record))
                made, note = step.apply(path.parent, index, record)
            except InputError as error:
                raise InputError(f'{where(index)}: {error}') from error
            if note:
                notes.append({'record': index, **note})
            if made is not None:
                origin = {'source': where(index), **made.get('provenance', {})}
                if known := record.get('licence') or licence:
                    origin.setdefault('licence', known)
                origin['transforms'] = [*origin.get('transforms', []), f'{step.name} {step.version}']
                yield index, {**made, 'provenance': origin}

    shard = write_shard(str(path.parent / RESULT / f'records-{numbers.start:010d}.arrayrecord'), stepped())
    _write_json(path, {'shard': shard, 'notes': notes, 'characters': characters})


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f'{path.name}.part')
    temporary.write_text(json.dumps(value, indent=2) + '\n')
    temporary.replace(path)
