"""Slow streams and slow processes, by clocks made for the test."""

from __future__ import annotations

import json

from train.launch.pace import Pace


def told_of(waited: list[list[float]], seconds: float = 60.0) -> list[tuple[int, str, str]]:
    """The events of process 0, where `waited` has, for each look, the seconds each process waited for data since."""
    events: list[tuple[int, str, str]] = []
    now, total = 0.0, [0.0] * len(waited[0])

    def gather(text: str) -> list[str]:
        mine = json.loads(text)
        assert mine == [seconds, latest[0]]
        return [json.dumps([mine[0], own]) for own in latest]

    pace = Pace(lambda *event: events.append(event), lambda: now, gather)
    pace(0, 0.0)
    for step, latest in enumerate(waited, start=1):
        now, total = now + seconds, [a + b for a, b in zip(total, latest, strict=True)]
        pace(step, total[0])
    return events


def test_a_slow_stream_is_told_of_when_it_begins() -> None:
    said = '20% of the last 60 s went into waiting for data'
    events = told_of([[3], [12], [13], [1], [12]])
    assert events == [(2, 'waits for data', said), (5, 'waits for data', said)]
    assert told_of([[12]], seconds=20) == []  # too short a while


def test_the_slow_one_of_several_processes_is_named() -> None:
    assert told_of([[1, 1, 2, 1], [1, 1, 30, 1]]) == [
        (2, 'straggler', 'in process 2 50% of the last 60 s went into waiting for data, in the others 2%')
    ]
    # All alike: no one of them is slow.
    assert [kind for _, kind, _ in told_of([[12, 13, 12]])] == ['waits for data']
