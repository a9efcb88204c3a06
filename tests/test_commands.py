"""Commands as a user starts them: bad input ends with one clear line and status 1, and nothing on disk is lost."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(root: Path, one_device: dict[str, str]) -> Command:
    """Runs `python -m MODULE ARGUMENTS` from the repository."""

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, '-m', module, *arguments]
        return subprocess.run(line, cwd=root, env=one_device, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def train(command: Command, tmp_path: Path, tokenizer_path: str) -> Command:
    """Runs the small config in the test's workdir."""

    def run(*arguments: str, config: str = 'tests/small.py') -> subprocess.CompletedProcess[str]:
        return command(
            'train',
            f'--config={config}',
            f'--workdir={tmp_path / "work"}',
            f'--config.tokenizer.path={tokenizer_path}',
            *arguments,
        )

    return run


def complaint(done: subprocess.CompletedProcess[str], name: str = 'train') -> str:
    """The one line on standard error of a command that failed."""
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f'{name}: ')
    return lines[0]


@pytest.mark.parametrize(
    ('flag', 'words'),
    [
        ('--config.stages.sft.stpes=20', ('stpes', 'id you mean', 'steps')),
        ('--config.modle.hidden_size=64', ('modle', 'id you mean', 'model')),
        ('--config.model.hidden_size=wide', ('hidden_size', 'wide')),
        ('--confg=configs/demo.py', ('confg', 'id you mean', 'config')),
        ('--stage', ('stage',)),
        ('word', ("'word'", 'expected --NAME=VALUE')),
    ],
)
def test_a_typo_on_the_command_line(flag: str, words: tuple[str, ...], train: Command, tmp_path: Path) -> None:
    line = complaint(train(flag))
    assert all(word in line for word in words), line
    assert not (tmp_path / 'work').exists()


def test_flags_that_are_missing(command: Command, tmp_path: Path) -> None:
    assert '--workdir is missing' in complaint(command('train', '--config=configs/demo.py'))
    assert '--config is missing' in complaint(command('train', f'--workdir={tmp_path}'))


def test_files_that_are_missing(command: Command, tmp_path: Path) -> None:
    workdir = f'--workdir={tmp_path / "work"}'
    line = complaint(command('train', '--config=nowhere.py', workdir))
    assert '--config=nowhere.py: no such file' in line
    line = complaint(command('train', '--config=configs/demo.py:stuyd', workdir))
    assert 'configs/demo.py:stuyd: expected no variant, study or staged' in line
    assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize('module', ['train', 'train.evaluate', 'train.generate', 'train.synthesize'])
def test_help(module: str, command: Command) -> None:
    done = command(module, '--help')
    assert done.returncode == 0 and not done.stderr
    assert '--checkpoint' in done.stdout or '--config' in done.stdout


def test_a_broken_line_of_a_source_is_named_before_any_step(train: Command, tmp_path: Path) -> None:
    path = tmp_path / 'lines.jsonl'
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "thr\n')
    line = complaint(train('--stage=pretrain', config=f'tests/small.py:{path}'))
    assert f'{path}:3' in line
    assert not (tmp_path / 'work' / 'pretrain' / 'metrics.jsonl').exists()
    path.write_text('{"text": "one"}\n{"txt": "two"}\n')
    line = complaint(train('--stage=pretrain', config=f'tests/small.py:{path}'))
    assert f'{path}:2' in line and 'text' in line
    missing = tmp_path / 'missing.jsonl'
    assert str(missing) in complaint(train('--stage=pretrain', config=f'tests/small.py:{missing}'))


def test_settings_that_contradict_each_other(train: Command) -> None:
    assert 'num_experts_per_tok is 9' in complaint(train('--config.model.num_experts_per_tok=9'))
    assert "no stage 'sfft'; did you mean 'sft'" in complaint(train('--stage=sfft'))
    assert 'tokenizer.vocab_size is 100' in complaint(train('--config.tokenizer.vocab_size=100'))


def test_a_run_and_what_can_go_wrong_with_its_checkpoints(train: Command, command: Command, tmp_path: Path) -> None:
    """One stage is trained and then asked for in every wrong way."""
    done = train('--stage=pretrain')
    assert done.returncode == 0, done.stderr
    assert 'report: ' in done.stdout and (tmp_path / 'work' / 'report.html').exists()
    assert not [line for line in done.stderr.splitlines() if not line.startswith('pretrain: step')], done.stderr
    folder = tmp_path / 'work' / 'pretrain'
    before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}

    # The same stage with another model, and a child of another architecture than its parent.
    line = complaint(train('--stage=pretrain', '--config.model.rope_theta=5.0'))
    assert 'model.rope_theta = 500.0' in line and str(folder) in line
    config = json.loads((folder / 'config.json').read_text())
    other = tmp_path / 'other' / 'pretrain'
    (other / 'checkpoints').parent.mkdir(parents=True)
    (other / 'checkpoints').symlink_to(folder / 'checkpoints')
    (other / 'config.json').write_text(json.dumps({**config, 'model': {**config['model'], 'hidden_size': 48}}))
    line = complaint(command('train.evaluate', f'--checkpoint={other}', '--tasks=arithmetic'), 'train.evaluate')
    assert 'another architecture: params' in line and 'expected float32' in line and str(other) in line

    # A checkpoint that is not there, a task that is not there, a prompt that does not fit.
    nowhere = tmp_path / 'work' / 'pretrian'
    line = complaint(command('train.evaluate', f'--checkpoint={nowhere}', '--tasks=sudoku'), 'train.evaluate')
    assert str(nowhere) in line
    line = complaint(command('train.evaluate', f'--checkpoint={folder}', '--tasks=sudoko'), 'train.evaluate')
    assert "'sudoko'; did you mean 'sudoku'" in line
    long = command('train.generate', f'--checkpoint={folder}', '--prompt=' + '7' * 300, '--max_tokens=4')
    line = complaint(long, 'train.generate')
    assert '301 tokens' in line and 'context of 256' in line
    assert {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()} == before

    # A second start finds everything finished.
    again = train('--stage=pretrain')
    assert again.returncode == 0 and 'pretrain: finished before' in again.stdout
