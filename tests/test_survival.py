"""Runs that are told to end, disks that fail, two runs in one workdir: nothing is lost, and one line says what was."""

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loops import Counting, kinds, lines, plan, saved

from data.errors import InputError
from train.launch.command import RESTART
from train.launch.lock import locked
from train.launch.log import Log
from train.launch.preemption import Preempted, notice
from train.loop import train


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage as it is when nothing happens to it."""
    folder = tmp_path_factory.mktemp('whole') / 'stage'
    train(*plan(folder))
    return folder


def steps(folder: Path) -> list[int]:
    return [line['step'] for line in lines(folder, 'metrics.jsonl')]


def assert_as_if_nothing_had_happened(folder: Path, whole: Path) -> None:
    """The same parameters, and the same losses, each step once."""
    assert saved(folder, 7) == saved(whole, 7)
    found, expected = (lines(x, 'metrics.jsonl') for x in (folder, whole))
    assert [(x['step'], x['loss']) for x in found] == [(x['step'], x['loss']) for x in expected]


def at(step: int, action: Callable[[], Any]) -> Counting:
    return Counting(2, lambda now: action() if now == step else None)


def test_sigterm_saves_and_leaves_to_go_on(tmp_path: Path, whole: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as left:
        train(*plan(tmp_path / 'stage', stream=at(4, lambda: os.kill(os.getpid(), signal.SIGTERM))))
    assert left.value.code == RESTART == 75 and signal.getsignal(signal.SIGTERM) is before
    assert steps(tmp_path / 'stage') == [1, 2, 3, 4, 5] and kinds(tmp_path / 'stage') == [(5, 'preempted')]
    train(*plan(tmp_path / 'stage'))
    assert_as_if_nothing_had_happened(tmp_path / 'stage', whole)


def test_a_second_sigterm_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes with the first, as a supervisor passes it on as well, is not a second."""
    with pytest.raises(Preempted), notice() as leave:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert leave(1)
        monkeypatch.setattr('train.launch.preemption.TOGETHER', 0.0)
        os.kill(os.getpid(), signal.SIGTERM)


def small_files(limit: int) -> None:
    """From now on, files of this process cannot grow beyond so many bytes: as on a full disk, writes fail."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def full_disk() -> Any:
    yield small_files
    small_files(resource.RLIM_INFINITY)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # of Orbax's writes that were given up
def test_a_save_that_fails_is_cleared_away_and_tried_again(tmp_path: Path, whole: Path, full_disk: Any) -> None:
    folder = tmp_path / 'stage'
    after: list[list[str]] = []

    def before(step: int) -> None:
        if step == 3:
            while not (folder / 'checkpoints' / '2').exists():
                time.sleep(0.01)
            full_disk(20_000)
        elif step == 5:
            time.sleep(2)  # the save of step 4 is written behind the run's back
            full_disk(resource.RLIM_INFINITY)
        elif step == 6:
            after.append(sorted(x.name for x in (folder / 'checkpoints').iterdir() if x.name.startswith('4')))

    train(*plan(folder, stream=Counting(2, before)))
    assert kinds(folder) == [(4, 'save failed')] and after == [[]]
    (line,) = lines(folder, 'events.jsonl')
    assert 'checkpoints/4: ' in line['detail'] and '\n' not in line['detail']
    assert_as_if_nothing_had_happened(folder, whole)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_last_save_that_fails_is_one_line_and_the_run_goes_on_from_the_one_before(
    tmp_path: Path, whole: Path, full_disk: Any
) -> None:
    with pytest.raises(InputError, match='checkpoints/7: the checkpoint could not be saved: ') as error:
        train(*plan(tmp_path / 'stage', stream=at(6, lambda: full_disk(20_000))))
    assert '\n' not in str(error.value)
    full_disk(resource.RLIM_INFINITY)
    train(*plan(tmp_path / 'stage'))
    assert_as_if_nothing_had_happened(tmp_path / 'stage', whole)


def test_metrics_wait_for_a_full_disk(tmp_path: Path, full_disk: Any) -> None:
    with Log(tmp_path, 'stage', 9, 0) as log:
        for step in range(1, 10):
            full_disk(3000 if 3 <= step < 7 else resource.RLIM_INFINITY)
            log.write({'step': step, **WIDE}, 1)
        full_disk(resource.RLIM_INFINITY)
    assert [line['step'] for line in lines(tmp_path, 'metrics.jsonl')] == list(range(1, 10))
    assert kinds(tmp_path) == [(3, 'metrics wait')]


WIDE = {f'number/{i}': float(i) for i in range(60)}


def hold(workdir: Path, ready: Any, done: Any) -> None:
    with locked(workdir):
        ready.set()
        done.wait()


def test_one_run_in_a_workdir(tmp_path: Path) -> None:
    """Also after a run was killed: the lock of a dead process holds nobody up."""
    context = multiprocessing.get_context('spawn')
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / 'work', ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match=f'at work in it .process {other.pid} on'), locked(tmp_path / 'work'):
        pass
    other.kill()
    other.join()
    with locked(tmp_path / 'work'):
        assert str(os.getpid()) in (tmp_path / 'work' / '.lock').read_text()
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='file: expected a folder that can be written'), locked(tmp_path / 'file'):
        pass


def test_events_are_lines(tmp_path: Path, whole: Path) -> None:
    assert kinds(whole) == []  # nothing happened
    text = (whole / 'metrics.jsonl').read_text()
    assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
