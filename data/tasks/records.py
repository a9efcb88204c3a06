"""The base of tasks whose problems are the records of a file."""

from collections import Counter
from dataclasses import dataclass

from data.errors import InputError
from data.files import JsonLines, Record
from data.tasks import Prompt, SplitTask, Verdict, key_hash


@dataclass(kw_only=True)
class RecordTask(SplitTask):
    """A task that reads its problems from JSON Lines (plain or .gz). Subclasses say how a record is posed and judged.

    `path` is a file or a glob. Records are split by the hash of their keys like drawn problems; with `evaluation`, for
    files that nothing is ever trained on, all of them are held out. Problems come in the order of that hash, so that
    the first few are a fair sample of a sorted file, and begin anew after the last one (`len(task)` of them). Of
    records with one key the first counts. `skipped` counts, by reason, the records of both splits that are left out.

    Raises InputError, naming file and line, for a record that cannot be read: all of them are posed on opening.
    """

    path: str = ''
    evaluation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._boolean('evaluation')
        if not isinstance(self.path, str) or not self.path:
            raise InputError(f'task {self.name!r}: path must name a JSON Lines file, got {self.path!r}')
        if self.evaluation and self.split == 'train':
            raise InputError(f'task {self.name!r}: all records of {self.path} are held out (option evaluation)')
        self.skipped: Counter[str] = Counter()
        self._records = JsonLines(self.path)
        keys: dict[str, int] = {}
        for index in range(len(self._records)):
            posed = self._posed(index)
            if isinstance(posed, str):
                self.skipped[posed] += 1
            elif self.evaluation or self.in_split(posed.key):
                keys.setdefault(posed.key, index)
        if not keys:
            raise InputError(f'task {self.name!r}: {self.path}: no {self.split} record among {len(self._records)}')
        self._order = [keys[key] for key in sorted(keys, key=lambda key: (key_hash(key), key))]

    def pose(self, record: Record) -> Prompt | str:
        """The prompt of a record, or why it is left out. Raises InputError naming the field that is not as expected."""
        raise NotImplementedError

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        """Judge a completion."""
        raise NotImplementedError

    def prompt(self, index: int) -> Prompt:
        """Problem number `index` of the split."""
        posed = self._posed(self._order[index % len(self)])
        assert isinstance(posed, Prompt)
        return posed

    def __len__(self) -> int:
        return len(self._order)

    def _posed(self, index: int) -> Prompt | str:
        try:
            return self.pose(self._records[index])
        except InputError as error:
            raise InputError(f'{self._records.where(index)}: {error}') from error


def string(record: Record, field: str) -> str:
    """A field that must hold text."""
    if not isinstance(value := record.get(field), str):
        raise InputError(
            f'{field}: expected a string, got {type(value).__name__ if field in record else "no such field"}'
        )
    return value


def canonical(text: str) -> str:
    """A text as a key: white space and case make no new problem of it."""
    return ' '.join(text.split()).casefold()
