"""Several processes of one run: the same losses as one, each reading its own rows."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from loops import lines, saved
from small import STAGES

from model.sharding import make_mesh
from train.launch.command import RESTART
from train.launch.peers import lost
from train.learn.step import Layout


def start(root: Path, environment: dict[str, str], workdir: Path, log: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, '-m', 'train', '--config=tests/small.py', f'--workdir={workdir}', *flags]
    with log.open('wb') as out:
        return subprocess.Popen(command, cwd=root, env=environment, stdout=out, stderr=out)


def metrics(workdir: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / stage / 'metrics.jsonl').read_text().splitlines()]


@contextlib.contextmanager
def two(root: Path, environment: dict[str, str], folder: Path, *flags: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes of one run in `folder`/two, which log to 0.log and 1.log beside it."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    cluster = (f'--coordinator_address=localhost:{port}', '--num_processes=2')
    both = [
        start(root, environment, folder / 'two', folder / f'{i}.log', *cluster, f'--process_id={i}', *flags)
        for i in range(2)
    ]
    try:
        yield both
    finally:
        for process in both:
            process.kill()  # JAX swallows what is gentler
            process.wait()


@pytest.mark.slow
def test_two_processes_are_as_one(root: Path, one_device: dict[str, str], tmp_path: Path) -> None:
    with two(root, one_device, tmp_path) as both:
        codes = [process.wait(timeout=600) for process in both]
    logs = [tmp_path / f'{number}.log' for number in range(2)]
    assert codes == [0, 0], [log.read_text()[-3000:] for log in logs]
    assert 'step 1/5' not in logs[1].read_text()  # one of them reports
    alone = start(root, one_device, tmp_path / 'one', tmp_path / 'one.log')
    assert alone.wait(timeout=600) == 0
    for stage in STAGES:
        found, expected = metrics(tmp_path / 'two', stage), metrics(tmp_path / 'one', stage)
        assert [line['step'] for line in found] == [line['step'] for line in expected] == list(range(1, 6))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours['tokens'] == theirs['tokens']
            for name in {'loss', 'reward/mean'} & theirs.keys():
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=f'{stage} {name}')


LONG = ('--stage=pretrain', '--config.stages.pretrain.save_every=10', '--config.stages.pretrain.steps=40')


@pytest.fixture(scope='module')
def undisturbed(root: Path, one_device: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir in which two processes came to their end."""
    folder = tmp_path_factory.mktemp('undisturbed')
    with two(root, one_device, folder, *LONG) as both:
        assert [process.wait(timeout=600) for process in both] == [0, 0], (folder / '0.log').read_text()[-3000:]
    return folder / 'two'


@pytest.mark.slow
@pytest.mark.parametrize(
    'victim, number, codes, seconds',
    [
        (0, signal.SIGKILL, [-signal.SIGKILL, RESTART], 10),
        (1, signal.SIGKILL, [RESTART, -signal.SIGKILL], 10),
        (1, signal.SIGSTOP, [RESTART, None], 30),  # it is there and does nothing: only time tells
        (1, signal.SIGTERM, [RESTART, RESTART], 30),
    ],
)
def test_what_happens_to_one_ends_both_to_go_on_bit_for_bit(
    victim: int,
    number: signal.Signals,
    codes: list[int | None],
    seconds: float,
    undisturbed: Path,
    root: Path,
    one_device: dict[str, str],
    tmp_path: Path,
) -> None:
    path = tmp_path / 'two' / 'pretrain' / 'metrics.jsonl'
    with two(root, one_device, tmp_path, *LONG, '--config.stages.pretrain.step_deadline=8') as both:
        while not path.exists() or path.read_text().count('\n') < 15:
            assert all(process.poll() is None for process in both), (tmp_path / '0.log').read_text()[-3000:]
            time.sleep(0.01)
        both[victim].send_signal(number)
        began = time.monotonic()
        while [process.poll() for process in both] != codes:
            assert time.monotonic() - began < seconds, [process.poll() for process in both]
            time.sleep(0.01)
    steps = sorted(int(x.name) for x in (path.parent / 'checkpoints').iterdir() if x.name.isdigit())
    if number == signal.SIGTERM:
        (event,) = lines(path.parent, 'events.jsonl')
        assert event['kind'] == 'preempted' and event['step'] == steps[-1] == len(lines(path.parent, 'metrics.jsonl'))
    with two(root, one_device, tmp_path, *LONG) as both:
        assert [process.wait(timeout=600) for process in both] == [0, 0], (tmp_path / '0.log').read_text()[-3000:]
    assert saved(path.parent, 40) == saved(undisturbed / 'pretrain', 40)
    found, expected = metrics(tmp_path / 'two', 'pretrain'), metrics(undisturbed, 'pretrain')
    assert [(x['step'], x['loss']) for x in found] == [(x['step'], x['loss']) for x in expected]


OVERDUE = """
import time
from train.launch.peers import deadline
with deadline(0.5, lambda *event: print(*event, flush=True)) as began:
    time.sleep(1)
    for step in (2, 3, 4):
        began(step)
        time.sleep(0.1)
with deadline(0.2, lambda *event: print(*event, flush=True)) as began:
    began(5)
    time.sleep(60)
"""


def test_a_step_that_never_ends_ends_its_process(root: Path) -> None:
    """With the stack of every thread, and not before there was a step."""
    done = subprocess.run([sys.executable, '-c', OVERDUE], cwd=root, capture_output=True, text=True)
    assert done.returncode == RESTART
    assert done.stdout.startswith('5 step overdue not done after 0.2 s') and done.stdout.count('\n') == 1
    assert 'most recent call first' in done.stderr


def test_errors_of_one_process_stay_what_they_are() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError), lost(lambda: 1, lambda *event: pytest.fail(str(event))):
        raise jax.errors.JaxRuntimeError('INTERNAL: no')


def test_a_process_places_the_rows_of_its_devices() -> None:
    """Of all rows, in every microbatch; one process has all devices here, and so needs all rows."""
    mesh = make_mesh({'data': 2, 'context': 2}, jax.devices()[:4])
    layout = Layout(mesh, 8, 6, 2)
    assert layout.rows_here() == list(range(8))
    batch = {'x': np.arange(48).reshape(8, 6), 'scale': np.float32(3)}
    order = [3, 1, 0, 2, 7, 6, 5, 4]  # as a process may hold them
    placed = layout.place({'x': batch['x'][order], 'scale': batch['scale']}, order)
    np.testing.assert_array_equal(placed['x'], batch['x'].reshape(2, 4, 6))
    assert placed['x'].addressable_shards[0].data.shape == (2, 2, 3)
    assert float(placed['scale']) == 3
