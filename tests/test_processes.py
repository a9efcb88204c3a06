"""Several processes of one run: the same losses as one, each reading its own rows."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small import STAGES

from model.sharding import make_mesh
from train.step import Layout


def start(root: Path, environment: dict[str, str], workdir: Path, log: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, '-m', 'train', '--config=tests/small.py', f'--workdir={workdir}', *flags]
    with log.open('wb') as out:
        return subprocess.Popen(command, cwd=root, env=environment, stdout=out, stderr=out)


def metrics(workdir: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / stage / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_are_as_one(root: Path, one_device: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    cluster = (f'--coordinator_address=localhost:{port}', '--num_processes=2')
    logs = [tmp_path / f'{number}.log' for number in range(2)]
    both = [
        start(root, one_device, tmp_path / 'two', log, *cluster, f'--process_id={number}')
        for number, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=600) for process in both]
    finally:
        for process in both:
            process.kill()  # JAX swallows what is gentler
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
