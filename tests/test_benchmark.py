"""The benchmark command: what it measures, and how it accounts for the time."""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import pytest
from absl.testing import flagsaver
from ml_collections import ConfigDict
from small import get_config, model_config
from text import small_tokenizer

from data.errors import InputError
from data.stream import Prefetch
from train import benchmark, stages
from train.benchmark import Measurement, covered, main, measure, stream_report, table
from train.launch import operations
from train.launch.chips import known_peak

STEPS, NAP = 4, 0.2


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    tokenizer = tmp_path_factory.mktemp('tokenizer')
    small_tokenizer().save(tokenizer)
    config = get_config()
    config.tokenizer.path = str(tokenizer)
    config.sources = ConfigDict({'sums': {'type': 'task', 'name': 'arithmetic', 'format': 'text'}})
    config.stages = ConfigDict({'pretrain': config.stages.pretrain})
    config.stages.pretrain.mixture = ((0.0, {'sums': 1.0}),)
    config.stages.pretrain.optimizer.name = 'adamw'
    config.model.update(num_hidden_layers=1, n_routed_experts=0)  # less to compile
    return config


@pytest.fixture(scope='module')
def measured(config: ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, 'MATMUL', 64)
        return measure(config.to_dict(), '', STEPS, tmp_path_factory.mktemp('benchmark'))


def test_rates_begin_after_the_first_step(measured: Measurement, config: ConfigDict) -> None:
    stage = config.stages.pretrain
    full = (STEPS - 1) * stage.batch_size * stage.sequence_length
    assert 0.9 * full < measured.tokens <= full
    spent = measured.spent
    assert 0 < measured.compile_seconds <= spent.first_seconds
    assert measured.late_compile_seconds < 0.1
    assert measured.flops > 0 and spent.total_seconds > 0 and spent.cpu_seconds > 0
    assert measured.peak is not None and measured.peak > 0
    assert 0 < sum(measured.outside.values()) < 1


def test_the_table_says_it_all(measured: Measurement) -> None:
    text = table(measured)
    named = ('small, stage pretrain', 'tokens per second', 'tokens per CPU-second', 'compiling', 'measured here')
    for part in (*named, 'CPU-seconds a step', 'as plain matrix products'):
        assert part in text
    assert measured.steps == STEPS - 1 and measured.plain is not None and measured.plain > 0
    assert f'{measured.tokens / measured.spent.total_seconds:,.0f}' in text
    assert 'not in the step' in text and 'sampling' not in text
    assert '-  no peak is on record' in table(
        dataclasses.replace(measured, peak=None, peak_source='no peak is on record')
    )


def test_a_stream_is_measured_alone(config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.time, 'process_time', iter((10.0, 12.0)).__next__)
    stage = config.stages.pretrain
    said = stream_report(config.to_dict(), '', 3, tmp_path)
    shape = f'{stage.batch_size} x {stage.sequence_length} tokens'
    found = re.fullmatch(f'small, stage pretrain: 3 batches of {shape}: ([0-9,]+) a CPU-second', said)
    full = 3 * stage.batch_size * stage.sequence_length
    assert found is not None and 0.9 * full < 2 * int(found[1].replace(',', '')) <= full
    monkeypatch.setattr(Prefetch, 'work', 'sampling', raising=False)
    with pytest.raises(InputError, match="^--stream: the stream of stage 'pretrain' samples"):
        stream_report(config.to_dict(), '', 3, tmp_path / 'other')


class Napping:
    """A stream that works while it is asked, as one that samples does."""

    work = 'napping'

    def __init__(self, stream: Any) -> None:
        self._stream, self.rows = stream, stream.rows

    def next(self, step: int, variables: Any = None) -> Any:
        time.sleep(NAP)
        return self._stream.next(step, variables)

    def restore(self, state: Any) -> None:
        self._stream.restore(state)


def test_the_work_of_a_stream_is_not_waiting(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, 'MATMUL', 64)
    kind = stages.KINDS['pretrain']
    napping = dataclasses.replace(kind, stream=lambda context: Napping(kind.stream(context)))
    monkeypatch.setitem(stages.KINDS, 'pretrain', napping)
    measured = measure(config.to_dict(), 'pretrain', STEPS, tmp_path)
    assert measured.spent.stream_seconds >= (STEPS - 1) * NAP  # the first step's is left out
    assert measured.spent.stream_seconds < STEPS * NAP + 0.5
    assert measured.outside['data'] < 0.5 < measured.spent.stream_seconds / measured.spent.total_seconds
    assert '\n  napping ' in table(measured)


def test_bad_arguments_are_told_before_any_work(config: ConfigDict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match='2 or more'):
        measure(config.to_dict(), '', 1, tmp_path)
    with pytest.raises(InputError, match="did you mean 'pretrain'"):
        measure(config.to_dict(), 'pretain', 2, tmp_path)
    with pytest.raises(InputError, match='expected the folder of a run'):
        measure(config.to_dict(), '', 2, tmp_path, tmp_path / 'nothing')


def test_operations_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a size that costs nothing: each line of the report is there, and what it compares was called equally often."""
    calls: list[str] = []
    found = operations.seconds({name: lambda name=name: calls.append(name) for name in 'ab'}, 3)
    assert calls == ['a', 'b'] * 4 and set(found) == {'a', 'b'}
    monkeypatch.setattr(operations, 'SHAPES', ((2, 16),))
    monkeypatch.setattr(operations, 'CACHED', (4, 8))
    monkeypatch.setattr(operations, 'STEPS', 2)
    text = operations.report(model_config(num_hidden_layers=1), 1)
    for part in (
        '2 experts x 16 rows, 32 -> 64',
        'microseconds a token by tokens in the cache: 4: ',
        'over 512 tokens',
    ):
        assert part in text
    assert 'latent' not in operations.report(model_config(num_hidden_layers=1, attention='gqa', head_dim=8), 1)


@flagsaver.flagsaver
def test_the_command_reports_a_typo_in_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['benchmark']) == 1
    assert '--config is missing' in capsys.readouterr().err
    assert main(['benchmark', f'--config={root}/tests/small.py', '--steqs=3']) == 1
    err = capsys.readouterr().err
    assert err.startswith('train.benchmark: ') and err.count('\n') == 1 and 'steqs' in err


@pytest.mark.parametrize(
    ('kind', 'peak'),
    [
        ('TPU v5 lite', 197e12),
        ('TPU v5p', 459e12),
        ('TPU v4 lite', None),
        ('NVIDIA H100 80GB HBM3', 989e12),
        ('NVIDIA H200', 989e12),
        ('NVIDIA H200 NVL', 835e12),
        ('NVIDIA A100-SXM4-80GB', 312e12),
        ('NVIDIA L40S', None),
    ],
)
def test_peaks_are_found_by_the_name_of_the_device(kind: str, peak: float | None) -> None:
    found = known_peak(kind)
    assert (found[0] if found else None) == peak


def test_covered_counts_no_moment_twice() -> None:
    assert covered([(1, 5), (2, 3), (4, 6), (8, 20)], 0, 10) == 7
    assert covered([(1, 5)], 2, 3) == 1
    assert covered([(5, 6)], 0, 1) == 0
