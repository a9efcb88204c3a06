"""What happens to a stage beside its steps: failed saves, alarms, restarts. A line of `events.jsonl` each."""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path

from train.launch.host import is_primary, say


def note(folder: Path, step: int, kind: str, detail: str) -> None:
    """Prints an event of the stage in `folder` and appends it to its events: step, kind, detail and time (UTC).

    It never fails: a disk that takes no more is itself an event.
    """
    if not is_primary():
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    with contextlib.suppress(OSError):
        say(f'{folder.name}: step {step}: {kind}: {detail}')
        with (folder / 'events.jsonl').open('a') as lines:
            lines.write(json.dumps({'step': step, 'kind': kind, 'detail': detail, 'time': now}) + '\n')
