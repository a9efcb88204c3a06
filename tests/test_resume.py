"""kill -9 in any stage, then the same command again: bit for bit what the run would have been without it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import STAGES
from text import small_tokenizer

from train.checkpoint import load

pytestmark = pytest.mark.slow
STEPS = 40


def start(root: Path, environment: dict[str, str], workdir: Path, stage: str) -> subprocess.Popen[bytes]:
    """The small config in a process of its own, logging beside the workdir."""
    command = [
        *(sys.executable, '-m', 'train', '--config=tests/small.py', f'--workdir={workdir}', f'--stage={stage}'),
        f'--config.tokenizer.path={workdir.parent / "tokenizer"}',
        *(f'--config.stages.{name}.steps={STEPS}' for name in STAGES),
        *(f'--config.stages.{name}.save_every=7' for name in STAGES),
        '--config.stages.grpo.reward=random',  # a model that knows nothing would earn nothing, and learn nothing
        '--config.stages.grpo.records=all',
    ]
    with (workdir.parent / f'{workdir.name}.log').open('ab') as log:
        return subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], workdir: Path) -> None:
    assert process.wait(600) == 0, (workdir.parent / f'{workdir.name}.log').read_text()[-3000:]


def steps_taken(folder: Path) -> int:
    path = folder / 'metrics.jsonl'
    return path.read_text().count('\n') if path.exists() else 0


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, root: Path, one_device: dict[str, str]) -> Path:
    """A workdir in which all four stages ran to their end, in one process."""
    folder = tmp_path_factory.mktemp('resume')
    small_tokenizer().save(folder / 'tokenizer')
    workdir = folder / 'whole'
    finish(start(root, one_device, workdir, STAGES[-1]), workdir)
    return workdir


@pytest.mark.parametrize('stage', STAGES)
def test_a_killed_stage_ends_as_if_it_had_not_been(
    stage: str, uninterrupted: Path, root: Path, one_device: dict[str, str]
) -> None:
    workdir = uninterrupted.with_name(stage)
    shutil.copytree(uninterrupted / 'tokenizer', workdir / 'tokenizer')
    for name in STAGES[: STAGES.index(stage)]:
        shutil.copytree(uninterrupted / name, workdir / name)
    generator = random.Random()
    for _ in range(2):  # in the second life as well
        done = max(steps_taken(workdir / stage), 1)
        last = generator.randint(done, STEPS - 5)
        process = start(root, one_device, workdir, stage)
        began = time.monotonic()
        while steps_taken(workdir / stage) < last:
            assert process.poll() is None and time.monotonic() - began < 300, f'never came to step {last}'
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f'{stage} was over before it could be killed at step {last}'
        assert not (workdir / stage / 'finished.json').exists()
    finish(start(root, one_device, workdir, stage), workdir)

    whole, resumed = load(uninterrupted / stage), load(workdir / stage)
    assert resumed.metadata['arrays'] == whole.metadata['arrays']  # params, balance and optimizer
    for field in ('step', 'tokens', 'flops', 'stream_sha256'):
        assert resumed.metadata[field] == whole.metadata[field]
    values, expected = (json.dumps(as_lists(x.variables)) for x in (resumed, whole))
    assert values == expected
    lines = [json.loads(line) for line in (workdir / stage / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == list(range(1, STEPS + 1))
    before = [json.loads(line) for line in (uninterrupted / stage / 'metrics.jsonl').read_text().splitlines()]
    assert [line['loss'] for line in lines] == [line['loss'] for line in before]
    for kept in (uninterrupted / stage).glob('answers.jsonl'):
        assert (workdir / stage / kept.name).read_bytes() == kept.read_bytes()


KILLS = int(os.environ.get('TORSO_KILLS', '4'))


def supervised(root: Path, environment: dict[str, str], workdir: Path) -> subprocess.Popen[bytes]:
    """The graph of tests/kills.py under the supervisor, which is patient."""
    command = [
        *(sys.executable, '-m', 'train.supervise', '--failures=1000', '--pause=0', '--', sys.executable, '-m', 'train'),
        *(f'--config=tests/kills.py:{workdir.parent}', f'--workdir={workdir}'),
        f'--config.tokenizer.path={workdir.parent / "tokenizer"}',
    ]
    with (workdir.parent / f'{workdir.name}.log').open('ab') as log:
        path = f'{root}{os.pathsep}{root / "tests"}'
        return subprocess.Popen(command, cwd=root, env={**environment, 'PYTHONPATH': path}, stdout=log, stderr=log)


def results(workdir: Path) -> dict[str, Any]:
    """All that a run leaves behind which no interruption may change."""
    found: dict[str, Any] = {}
    for folder in sorted(path.parent for path in workdir.glob('*/finished.json')):
        facts: dict[str, Any] = {}
        if (folder / 'checkpoints').exists():
            metadata = load(folder).metadata
            facts |= {field: metadata[field] for field in ('arrays', 'step', 'tokens', 'flops', 'stream_sha256')}
        if (folder / 'metrics.jsonl').exists():
            lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
            facts['losses'] = [(line['step'], line['loss']) for line in lines]
        for name in ('evaluations.json', 'report.json', 'records/metadata.json'):
            if (folder / name).exists():
                told = json.loads((folder / name).read_text())
                facts[name] = told.get('fingerprint', told)  # records say from which files they are
        found[folder.name] = facts
    return found


def test_kills_at_random_moments_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, root: Path, one_device: dict[str, str]
) -> None:
    """TORSO_KILLS of them, in steps, saves, evaluations, samples and in between, over stages of ten kinds."""
    folder = tmp_path_factory.mktemp('kills')
    small_tokenizer().save(folder / 'tokenizer')
    finish(supervised(root, one_device, folder / 'whole'), folder / 'whole')
    expected = results(folder / 'whole')
    assert len(expected) == 10 and all(expected.values())
    generator, kills, lives = random.Random(), 0, 0
    while kills < KILLS:
        workdir, lives = folder / f'life{lives}', lives + 1
        began, process = time.time(), supervised(root, one_device, workdir)
        while kills < KILLS:
            try:
                process.wait(generator.uniform(2, 45))
                break
            except subprocess.TimeoutExpired:
                children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
                kills += 1
        finish(process, workdir)
        assert results(workdir) == expected
        seconds, passed = json.loads((workdir / 'goodput.json').read_text())['seconds'], time.time() - began
        # But for the way to the beginning of a run (until one is there that was not killed on it), and from its end.
        assert 0.5 * passed < sum(seconds.values()) <= passed
    print(f'{kills} kills, {lives} runs, seconds of the last: {seconds}')


def as_lists(tree: object) -> object:
    """Arrays as lists of their bytes, so that not a bit goes unseen."""
    if isinstance(tree, dict):
        return {name: as_lists(value) for name, value in tree.items()}
    return np.asarray(tree).tobytes().hex()
