"""Records in files: JSON Lines, ArrayRecord, Parquet, TensorFlow Datasets, and folders of text.

Every source here is random access, safe to read from several threads, and says which file and record is at fault.
"""

import bisect
import functools
import glob
import gzip
import io
import itertools
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, BinaryIO

from data.chat import check_messages
from data.errors import InputError, json_object

Record = dict[str, Any]

TEXT_SUFFIXES = ('.txt', '.md', '.rst', '.py', '.html', '.tex', '.txt.gz')

_CONTENT_FIELDS = ('text', 'messages', 'tokens', 'prompt', 'completion')
_ROW_GROUPS_KEPT = 8
# Records of `data.preferences` have one of these, or those of questions with answers to choose from.
JUDGED = frozenset(('chosen', 'label', 'steps', 'choices', 'good'))


def check_record(value: Any, field: str, where: str) -> Record:
    """`value` as a record, whose text is its `field` if that is given, or what that says with {FIELDS} in braces.

    Raises InputError, beginning with `where`.
    """
    if not isinstance(value, Mapping):
        raise InputError(f'{where}: expected an object, got {type(value).__name__}')
    check_fields(value.keys(), field, where)
    if '{' in field:
        try:
            value = {**value, field: field.format_map(value)}
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f'{where}: cannot be put as {field!r}: {error!r}') from error
    judged = not field and bool(JUDGED & value.keys())  # its own reader checks the rest
    for name in [field] if field else ['text', 'prompt', 'completion']:
        several = name != 'text' and not field and isinstance(value.get(name), list)  # they take turns in a document
        if not judged and not several and not isinstance(value.get(name, ''), str):
            raise InputError(f'{where}: {name}: expected a string, got {type(value[name]).__name__}')
    if field:
        kept = {key: item for key, item in value.items() if key not in (*_CONTENT_FIELDS, field)}
        return {**kept, 'text': value[field]}
    if 'messages' in value and not judged:
        try:
            check_messages(value['messages'])
        except InputError as error:
            raise InputError(f'{where}: {error}') from error
    return dict(value)


def check_fields(names: Collection[str], field: str, where: str) -> None:
    """Raises InputError unless a record with fields of these names can be used."""
    names = set(names)
    for name in fields_named(field):
        if name not in names:
            raise InputError(f'{where}: no field {name!r}; it has {", ".join(sorted(names)) or "none"}')
    if not (field or ({'text', 'messages', 'tokens'} | JUDGED) & names or {'prompt', 'completion'} <= names):
        raise InputError(
            f'{where}: expected text, messages, tokens, prompt and completion, chosen and rejected, or choices; it has '
            f'{", ".join(sorted(names)) or "none"} (option field names the text)'
        )


def fields_named(field: str) -> set[str]:
    """The fields of a record that an option `field` names: one, or those in braces, as '{question}\\n{answer}' does.

    Raises InputError for braces that do not match.
    """
    if '{' not in field:
        return {field} - {''}
    try:
        return {name.split('[')[0].split('.')[0] for _, name, _, _ in Formatter().parse(field) if name is not None}
    except ValueError as error:
        raise InputError(f'field {field!r}: {error}') from error


def find_files(path: str, kind: str) -> list[str]:
    """Sorted files that `path`, a file or a glob, stands for. Raises InputError if there are none."""
    names = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not names:
        raise InputError(f'source {kind}: {path}: no such file')
    return names


def _checked(broken: int) -> int:
    if broken < 0:
        raise InputError(f'broken is {broken}: expected 0, or how many records may be passed over')
    return broken


class JsonLines:
    """JSON Lines: one object a line. All lines are parsed on opening, to index and to check them; then read by offset.

    Lines end at \\n alone (JSON strings may hold other line ends), and blank ones are passed over. Files ending in .gz
    are kept in memory, unpacked: compressed bytes have no offsets.

    Of `broken` lines all is known only when they are read: they keep their numbers, and so does what follows them.
    """

    def __init__(self, path: str, broken: int = 0):
        self.most_broken = _checked(broken)
        self._left = broken  # lines that may still be broken
        self._records: list[tuple[int, int, int, int]] = []  # file, line, offset and size in bytes
        self._names = find_files(path, 'jsonl')
        self._contents: list[bytes | int] = []  # unpacked bytes or a file descriptor
        for number, name in enumerate(self._names):
            try:
                if name.endswith('.gz'):
                    content = gzip.decompress(Path(name).read_bytes())
                    self._contents.append(content)
                    self._index(io.BytesIO(content), number)
                else:
                    self._contents.append(os.open(name, os.O_RDONLY))
                    with open(name, 'rb') as file:
                        self._index(file, number)
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f'{name}: cannot be read: {error}') from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        number, line, offset, size = self._records[index]
        content = self._contents[number]
        # os.pread leaves the file position alone: seek and read would mix up threads.
        data = os.pread(content, size, offset) if isinstance(content, int) else content[offset : offset + size]
        return self._parse(data, number, line)

    def where(self, index: int) -> str:
        """The file and line of a record."""
        number, line, _, _ = self._records[index]
        return f'{self._names[number]}:{line}'

    def __del__(self) -> None:
        for content in getattr(self, '_contents', ()):
            if isinstance(content, int):
                os.close(content)

    def _index(self, file: BinaryIO, number: int) -> None:
        offset = 0
        for line, data in enumerate(file, 1):
            if data.strip():
                try:
                    self._parse(data, number, line)
                except InputError:
                    if not self._left:
                        raise
                    self._left -= 1
                self._records.append((number, line, offset, len(data)))
            offset += len(data)

    def _parse(self, data: bytes, number: int, line: int) -> Record:
        where = f'{self._names[number]}:{line}'
        return self._check(json_object(data, where), where)

    def _check(self, value: Record, where: str) -> Record:
        return value


class JsonLinesSource(JsonLines):
    """JSON Lines of records to train on."""

    def __init__(self, path: str, field: str = '', broken: int = 0):
        self._field = field
        super().__init__(path, broken)

    def _check(self, value: Record, where: str) -> Record:
        return check_record(value, self._field, where)


class ArrayRecordSource:
    """ArrayRecord files of JSON objects: a file, a glob, or a folder that `python -m data.prepare` wrote.

    `tokenizer_fingerprint` says which tokenizer made the tokens of such a folder; None where it holds text. `metadata`
    is what its metadata.json says.
    """

    def __init__(self, path: str, field: str = '', broken: int = 0):
        from grain.sources import ArrayRecordDataSource

        self.most_broken = _checked(broken)
        self._field = field
        self._path = path
        names = find_files(os.path.join(path, '*.arrayrecord') if os.path.isdir(path) else path, 'arrayrecord')
        metadata = Path(names[0]).parent / 'metadata.json'
        self.metadata = json_object(metadata.read_bytes(), metadata) if metadata.is_file() else {}
        self.tokenizer_fingerprint = self.metadata.get('tokenizer')
        if not isinstance(self.tokenizer_fingerprint, str | None):
            raise InputError(f'{metadata}: tokenizer: expected a fingerprint, got {self.tokenizer_fingerprint!r:.60}')
        try:
            self._source = ArrayRecordDataSource(names)
        except RuntimeError as error:
            raise InputError(f'{path}: not an ArrayRecord file: {error}') from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        where = f'{self._path}: record {index}'
        try:
            data = self._source[index]
        except (ValueError, RuntimeError) as error:
            raise InputError(f'{where}: cannot be read: {error}') from error
        return check_record(json_object(data, where), self._field, where)


class ParquetSource:
    """Parquet files, one record a row. Whole row groups are read and a few are kept.

    Shuffled reading of files with large row groups is slow: put such data through `python -m data.prepare` first.
    """

    def __init__(self, path: str, field: str = '', broken: int = 0):
        import pyarrow
        from pyarrow import parquet

        self.most_broken = _checked(broken)
        self._field = field
        self._names = find_files(path, 'parquet')
        self._groups: list[tuple[int, int]] = []  # file and row group
        sizes = []
        columns = fields_named(field) or {*_CONTENT_FIELDS, 'loss_weight'}
        self._columns = []
        for number, name in enumerate(self._names):
            try:
                metadata = parquet.read_metadata(name)
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise InputError(f'{name}: not a Parquet file: {error}') from error
            present = metadata.schema.to_arrow_schema().names
            check_fields(present, field, name)
            self._columns.append([column for column in present if column in columns])
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                sizes.append(metadata.row_group(group).num_rows)
        self._ends = list(itertools.accumulate(sizes))
        self._read_group = functools.lru_cache(maxsize=_ROW_GROUPS_KEPT)(self._read_group_uncached)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        position = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[position - 1] if position else 0)
        where = f'{self._names[self._groups[position][0]]}: record {index}'
        try:
            value = self._read_group(position).slice(row, 1).to_pylist()[0]
        except (OSError, ValueError) as error:  # pyarrow's errors are among these
            raise InputError(f'{where}: cannot be read: {error}') from error
        return check_record(value, self._field, where)

    def _read_group_uncached(self, position: int) -> Any:
        from pyarrow import parquet

        number, group = self._groups[position]
        # A file is opened anew each time: its handle is not safe to share between threads.
        with parquet.ParquetFile(self._names[number]) as file:
            return file.read_row_group(group, columns=self._columns[number], use_threads=False)


class TextSource:
    """Text files, one document each: a file, a glob, or a folder with all files below it that end like text."""

    def __init__(self, path: str):
        if os.path.isdir(path):
            self._names = sorted(
                str(p) for p in Path(path).rglob('*') if p.name.endswith(TEXT_SUFFIXES) and p.is_file()
            )
            if not self._names:
                raise InputError(f'source text: {path}: no file that ends in {", ".join(TEXT_SUFFIXES)}')
        else:
            self._names = find_files(path, 'text')
        for index in range(len(self._names)):  # one broken file should fail now rather than in the middle of a run
            self[index]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        name = self._names[index]
        try:
            data = Path(name).read_bytes()
            text = (gzip.decompress(data) if name.endswith('.gz') else data).decode()
        except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
            raise InputError(f'{name}: expected UTF-8 text: {error}') from error
        return {'text': text, 'path': name}


class TfdsSource:
    """A prepared TensorFlow dataset in ArrayRecord form, read without TensorFlow.

    Give `path`, the folder with `dataset_info.json`, or `name` (and `data_dir` unless it is the default one).
    """

    def __init__(self, name: str = '', path: str = '', split: str = 'train', data_dir: str = '', field: str = ''):
        import tensorflow_datasets as tfds

        if bool(name) == bool(path):
            raise InputError('source tfds: expected either name or path')
        if path and not (Path(path) / 'dataset_info.json').is_file():
            raise InputError(f'source tfds: {path}: no dataset_info.json there')
        self._where = f'{path or name}/{split}'
        self._field = field
        try:
            builder = tfds.builder_from_directory(path) if path else tfds.builder(name, data_dir=data_dir or None)
            self._source: Sequence[Any] = builder.as_data_source(split=split)
        except Exception as error:  # whatever the dataset's builder raises
            raise InputError(f'source tfds: {self._where}: {str(error).strip().splitlines()[0]}') from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return check_record(_plain(self._source[index]), self._field, f'{self._where}: record {index}')


def _plain(value: Any) -> Any:
    """TFDS values in the terms of JSON: text for bytes, lists for arrays, a list of dicts for a sequence of them."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        fields = {key: _plain(item) for key, item in value.items()}
        messages = fields.get('messages')
        if isinstance(messages, dict):
            fields['messages'] = [
                dict(zip(messages, items, strict=True)) for items in zip(*messages.values(), strict=True)
            ]
        return fields
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if hasattr(value, 'tolist') else value
