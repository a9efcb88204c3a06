"""Metrics that go to Weights & Biases, with a stand-in for the package."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from loops import lines
from small import get_config

from data.errors import InputError
from train.launch.graph import Run
from train.launch.log import Log


class Board:
    """What `wandb.init` gives, and what was done to it."""

    def __init__(self, **settings: Any):
        self.settings, self.logged, self.finished = settings, [], False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_metrics_go_to_one_run_however_often_a_stage_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boards: list[Board] = []
    fake = types.ModuleType('wandb')
    fake.init = lambda **settings: boards.append(Board(**settings)) or boards[-1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    folder = tmp_path / 'work' / 'sft'
    folder.mkdir(parents=True)
    for first in (0, 1):
        with Log(folder, 'sft', 2, first, 'torso') as log:
            log.write({'step': first + 1, 'loss': 0.5}, 10)
    assert [board.logged for board in boards] == [[(1, {'loss': 0.5})], [(2, {'loss': 0.5})]]
    assert all(board.finished for board in boards) and boards[0].settings == boards[1].settings
    told = boards[0].settings
    assert (told['project'], told['group'], told['name'], told['resume']) == ('torso', 'work', 'sft', 'allow')
    (tmp_path / 'other').mkdir()
    with Log(tmp_path / 'other', 'other', 2, 0, 'torso'):
        pass
    assert boards[2].settings['id'] != told['id']
    with Log(folder, 'sft', 3, 2) as log:  # not asked for
        log.write({'step': 3, 'loss': 0.5}, 10)
    assert len(boards) == 3 and [line['step'] for line in lines(folder, 'metrics.jsonl')] == [1, 2, 3]


def test_a_package_that_is_not_there_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'wandb', None)
    config = get_config()
    config.wandb = 'torso'
    with pytest.raises(InputError, match="wandb is 'torso', and the package is not installed"):
        Run(config.to_dict(), tmp_path / 'work')
