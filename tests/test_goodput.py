"""Goodput: every second has one cause, through kills and clocks that jump."""

import json
import random
import time
from pathlib import Path

import pytest
from loops import lines, plan

from train.launch.goodput import CAUSES, FILE, Clock, summary
from train.loop import train


class Time:
    """A time that goes by when told to."""

    def __init__(self) -> None:
        self.now, self.set = 1000.0, 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.set

    def clock(self) -> Clock:
        return Clock(self.monotonic, self.wall)


def life(time: Time, folder: Path, first: int, last: int, save_every: int, costs: dict[str, float]) -> int:
    """One process, killed after the step `last`; the step of its last save."""
    clock, saved = time.clock(), first
    kept = clock.kept(folder, True)
    kept.__enter__()
    time.now += costs['start']
    with clock.spend('restore'):
        time.now += costs['restore']
    clock.resumed('stage', first)
    with clock.spend('compile'):
        time.now += costs['compile']
        for step in range(first + 1, last + 1):
            clock.now('step')
            with clock.spend('data'):
                time.now += costs['data']
            time.now += costs['step']
            if step % save_every == 0:
                with clock.spend('save'):
                    time.now += costs['save']
                clock.saved(step)
                saved = step
        clock._path = None  # killed: from here on nothing is written
    time.now += costs['down']
    return saved


# Seconds, as in the small configuration of the tests on two cores, with programs that were compiled before.
COSTS = {'start': 6.0, 'restore': 1.5, 'compile': 6.0, 'save': 0.1, 'data': 0.002, 'step': 2.0, 'down': 5.0}


def test_one_kill_in_twenty_minutes(tmp_path: Path) -> None:
    """Half a simulated day: the parts add up to the wall time, what was saved was useful, and goodput is above 95%."""
    time, draw, saved, deaths = Time(), random.Random(5), 0, 0
    began = time.now
    while time.now < began + 43200:
        steps = int(draw.expovariate(1 / 1200) / COSTS['step'])
        saved, deaths = life(time, tmp_path, saved, saved + steps, 15, COSTS), deaths + 1
    clock = time.clock()
    with clock.kept(tmp_path, True):
        clock.resumed('stage', saved)
        seconds = clock.seconds()
    assert deaths > 20
    assert sum(seconds.values()) == pytest.approx(time.now - began, abs=1e-3)
    assert seconds['step'] == pytest.approx(saved * COSTS['step'], rel=1e-6)
    # After its last write, seconds before a kill, time counts as between runs.
    assert deaths * COSTS['down'] <= seconds['down'] < deaths * (COSTS['down'] + 8)
    assert seconds['start'] == pytest.approx(deaths * COSTS['start'], abs=1e-3)
    assert seconds['replayed'] > 0 and clock.goodput() > 0.95
    assert sum(share for _, _, share in summary(tmp_path)) == pytest.approx(1)


def test_clocks_that_jump_and_files_that_are_broken(tmp_path: Path) -> None:
    time = Time()
    life(time, tmp_path, 0, 10, 2, COSTS)
    before = json.loads((tmp_path / FILE).read_text())['seconds']
    time.set = -1e6
    clock = time.clock()
    with clock.kept(tmp_path, True):
        assert clock.seconds() == pytest.approx(before)
    for broken in ('', '[]', '{"seconds": {}}', '{"seconds": 3}', '\0'):
        (tmp_path / FILE).write_text(broken)
        assert summary(tmp_path) == []
        clock = time.clock()
        with clock.kept(tmp_path, True):
            time.now += 3
        assert clock.seconds() == {**dict.fromkeys(CAUSES, 0.0), 'start': 3.0}


def test_a_stage_books_all_of_its_time(tmp_path: Path) -> None:
    began = time.monotonic()
    clock = Clock()
    folder = tmp_path / 'stage'
    with clock.kept(tmp_path, True):
        train(*plan(folder, clock=clock))
        first = clock.seconds()
        assert sum(first.values()) == pytest.approx(time.monotonic() - began, abs=0.1)
        (folder / 'checkpoints' / '7').rename(tmp_path / 'gone')
        train(*plan(folder, clock=clock))  # the last step again
    second = clock.seconds()
    assert all(first[cause] > 0 for cause in ('step', 'compile', 'restore', 'save', 'data', 'start'))
    assert first['replayed'] == 0 < second['replayed'] < first['step']
    assert sum(second.values()) == pytest.approx(time.monotonic() - began, abs=0.1)
    assert all(0 <= line['goodput'] < 1 for line in lines(folder, 'metrics.jsonl'))
    assert json.loads((tmp_path / FILE).read_text())['seconds'] == pytest.approx(second, abs=0.05)
