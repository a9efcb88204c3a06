"""What an on-policy stage leaves behind: its answers as records, for other stages to learn from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import InputError, did_you_mean
from data.prepare import prepare
from train.act.make import RECORDS, digest
from train.launch.host import is_primary
from train.launch.log import set_aside

KEPT = ('', 'right', 'all')  # no answers, those that the verifier gives its full score, every one


class Answers:
    """Answers of a stage, kept in `folder`/answers.jsonl step by step, and in the end as records.

    An answer is kept once, however often it is given. What a resumed stage samples again takes the place of what it had
    sampled before, so that a kill changes nothing.
    """

    def __init__(self, folder: Path | None, kept: str):
        """
        Args:
            folder: of the stage; None keeps nothing.
            kept: one of KEPT.

        Raises:
            InputError: another word.
        """
        if kept not in KEPT:
            raise InputError(f'records is {kept!r}{did_you_mean(kept, KEPT)}')
        self._kept = kept
        self._path = folder / 'answers.jsonl' if folder is not None and kept else None
        self._seen: set[bytes] | None = None  # None: not read yet

    def wants(self, score: float) -> bool:
        """Whether an answer of that score is kept."""
        return self._path is not None and (self._kept == 'all' or score >= 1.0)

    def add(self, step: int, answers: Sequence[dict[str, Any]]) -> None:
        """Keeps what was sampled for a step, after all that earlier steps have kept: records with messages."""
        if self._path is None or not is_primary():
            return
        if self._seen is None:
            self._seen = self._begin(step)
        fresh = []
        for answer in answers:
            if (key := digest(answer)) not in self._seen:
                self._seen.add(key)
                fresh.append(json.dumps({**answer, 'step': step + 1}) + '\n')
        with self._path.open('a') as lines:
            lines.writelines(fresh)

    def _begin(self, step: int) -> set[bytes]:
        """Sets aside what later steps had kept; digests of what stays."""
        assert self._path is not None
        set_aside(self._path, step)
        lines = map(json.loads, self._path.read_text().splitlines()) if self._path.exists() else ()
        return {digest({name: x for name, x in line.items() if name != 'step'}) for line in lines}

    def finish(self) -> None:
        """Writes all of them to `folder`/records, as `data.prepare` does.

        Raises:
            InputError: there is none.
        """
        if self._path is None or not is_primary() or (self._path.parent / RECORDS).exists():
            return
        if not self._path.exists() or not self._path.stat().st_size:
            raise InputError(
                f'{self._path.parent}: no answer was kept (records: {self._kept}), so there are no records'
            )
        prepare({'type': 'jsonl', 'path': str(self._path)}, self._path.parent / RECORDS)
