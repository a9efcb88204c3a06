"""The supervisor: what ends is started again, with patience and with an end to it."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.errors import InputError
from train.launch.command import RESTART
from train.supervise import Supervisor, main

# Does what its next life in a file says: leaves a checkpoint and ends with a status, or waits for a signal.
CHILD = """
import os, pathlib, signal, sys, time
work = pathlib.Path(sys.argv[1].removeprefix('--workdir='))
lives = (work / 'lives').read_text().split()
(work / 'lives').write_text(' '.join(lives[1:] or lives))
with (work / 'times').open('a') as out:
    out.write(f'{time.monotonic()}\\n')
what, _, status = lives[0].partition(':')
if what == 'saves':
    (work / 'stage' / 'checkpoints' / str(len(list((work / 'stage' / 'checkpoints').iterdir())))).mkdir()
elif what == 'tries':
    (work / 'stage' / 'checkpoints' / f'{time.monotonic()}.orbax-checkpoint-tmp').mkdir()
elif what == 'waits':
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    (work / 'ready').touch()
    while not told:
        time.sleep(0.01)
elif what == 'dies':
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(status))
"""


@pytest.fixture
def child(tmp_path: Path) -> Callable[..., list[str]]:
    """The command of a child whose lives are given; the last one is lived again and again."""

    def make(*lives: str) -> list[str]:
        (tmp_path / 'stage' / 'checkpoints').mkdir(parents=True)
        (tmp_path / 'lives').write_text(' '.join(lives))
        (tmp_path / 'child.py').write_text(CHILD)
        return [sys.executable, '-S', str(tmp_path / 'child.py'), f'--workdir={tmp_path}']

    return make


def starts(folder: Path) -> list[float]:
    return [float(line) for line in (folder / 'times').read_text().splitlines()]


def test_it_starts_again_until_the_command_is_done(
    child: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = child(f'saves:{RESTART}', 'fails:1', 'dies:0', 'saves:3', 'ends:0')
    before = signal.getsignal(signal.SIGTERM)
    assert main(['', '--failures=4', '--pause=0.2', '--', *words]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    said = re.sub(r'after \d+ s', 'after N s', capfd.readouterr().err).splitlines()
    assert said == [
        'supervise: ended with status 75 after N s: starting again at once (0 in a row)',
        'supervise: ended with status 1 after N s: starting again in 0.2 s (1 in a row)',
        'supervise: ended with status 137 (SIGKILL) after N s: starting again in 0.4 s (2 in a row)',
        'supervise: ended with status 3 after N s: starting again in 0.2 s (1 in a row)',
    ]
    a, b, c, d, e = starts(tmp_path)
    assert c - b > 0.2 and d - c > 0.4 and e - d > 0.2


@pytest.mark.parametrize('life', ['fails:5', 'tries:5', f'fails:{RESTART}'])
def test_it_gives_up_where_nothing_comes_of_it(
    life: str, child: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also of a command that asks to be started again, and where saves begin and are never whole."""
    words = child('saves:1', life)
    status = int(life.partition(':')[2])
    assert Supervisor(words, failures=3, pause=0.01)() == status
    assert len(starts(tmp_path)) == 3
    assert capfd.readouterr().err.endswith('3 times without a new checkpoint: giving up\n')


def test_it_passes_signals_on_and_ends_with_its_child(child: Callable[..., list[str]], tmp_path: Path) -> None:
    """And then starts nothing, nor does it where the signal comes in a pause."""
    command = [sys.executable, '-m', 'train.supervise', '--pause=60', '--', *child(f'waits:{RESTART}', 'fails:1')]
    root = Path(__file__).parent.parent
    for expected, awaited in ((RESTART, 'ready'), (1, 'stage')):
        with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE) as process:
            while not (tmp_path / awaited).exists():
                time.sleep(0.01)
            if expected == 1:
                assert process.stderr is not None and b'in 60 s' in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == expected
    assert len(starts(tmp_path)) == 2


@pytest.mark.parametrize(
    'words, message',
    [
        ([], 'expected a command after --'),
        (['python', '-m', 'train'], 'no --workdir=DIR'),
        (['no-such-program', '--workdir', 'x'], 'no-such-program: No such file'),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Supervisor(words, failures=1, pause=0)()
    with pytest.raises(InputError, match='expected at least 1'):
        Supervisor(['a', '--workdir=x'], failures=0, pause=0)
