"""Hand-over of mid-trained checkpoints: what changed, and whether reinforcement learning gains more from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from train.checkpoint import write_json
from train.handover import handover, main

ITEMS, SEEDS = 200, (0, 1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in which mid-training costs prose 0.2 bits and lifts the task by 0.1, RL adds 0.1 to the control and 0.3 to
    the mid-trained model, and another task stays where it was but for noise."""
    rng, level = np.random.default_rng(0), {'control': 0.2, 'mid': 0.3, 'probe_control': 0.3, 'probe_mid': 0.6}
    for seed in SEEDS:
        start = rng.normal(0, 0.2, ITEMS)
        for name, mean in level.items():
            probe = name.startswith('probe')
            scores = {'task': start + mean, 'other': rng.normal(0, 0.1, ITEMS)}
            if not probe:
                scores['prose'] = start + (2.2 if name == 'mid' else 2.0) + rng.normal(0, 0.1, ITEMS)
            folder = tmp_path / f'{name}_{seed}'
            folder.mkdir()
            said = {
                key: {'direction': 'lower' if key == 'prose' else 'higher', 'details': {'scores': values.tolist()}}
                for key, values in scores.items()
            }
            write_json(folder / 'evaluations.json', said)
            kind, parent = ('grpo', f'{name.removeprefix("probe_")}_{seed}') if probe else ('midtrain', 'trunk@800')
            write_json(folder / 'finished.json', {'kind': kind, 'parent': parent})
            write_json(folder / 'config.json', {'stage': {'steps': 40, 'parent': parent}})
    return tmp_path


def stages(run: Path, name: str) -> list[str]:
    return [str(run / f'{name}_{seed}') for seed in SEEDS]


def test_changes_and_gains_are_told_apart(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row.what: row for row in handover(stages(run, 'control'), stages(run, 'mid'))}
    assert list(rows) == ['other', 'prose', 'task', 'other: gain of RL', 'task: gain of RL']
    assert {what: row.verdict for what, row in rows.items()} == {
        'other': 'not separated',
        'prose': 'worse',
        'task': 'better',
        'other: gain of RL': 'not separated',
        'task: gain of RL': 'better',
    }
    gain, prose = rows['task: gain of RL'], rows['prose']
    assert (gain.base, gain.tuned, gain.difference) == pytest.approx((0.1, 0.3, 0.2))
    assert prose.difference == pytest.approx(prose.tuned - prose.base) == pytest.approx(0.2, abs=0.02)
    assert prose.low < prose.difference < prose.high
    back = {row.what: row for row in handover(stages(run, 'mid'), stages(run, 'control'))}
    assert back['prose'].verdict == 'better' and back['task: gain of RL'].difference == pytest.approx(-0.2)
    assert main([','.join(stages(run, 'control')), ','.join(stages(run, 'mid'))]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(rows) and printed[-1].startswith('| task: gain of RL | 0.1000 | 0.3000 | +0.2000 [')


def test_probes_have_to_be_there_once_and_alike(run: Path) -> None:
    control, mid = stages(run, 'control'), stages(run, 'mid')
    write_json(run / 'probe_mid_1' / 'config.json', {'stage': {'steps': 80, 'parent': 'mid_1'}})
    with pytest.raises(InputError, match='probe_mid_1 has stage.steps = 80, .*probe_control_1 40: expected the same'):
        handover(control, mid)
    write_json(run / 'probe_mid_1' / 'finished.json', {'kind': 'grpo', 'parent': 'mid_0'})
    for folder, count in (('mid_0', 2), ('mid_1', 0)):
        with pytest.raises(InputError, match=f'{folder}: {count} finished stages of reinforcement .*: expected one'):
            handover([str(run / 'control_0')], [str(run / folder)])
