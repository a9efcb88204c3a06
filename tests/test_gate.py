"""Gates between stages: what a config may ask for, and what happens where it is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from train.checkpoint import write_json
from train.launch.edges import check_gate, pass_gate
from train.stages import stage_defaults


def asked(gate: dict[str, Any]) -> dict[str, Any]:
    """A run whose stage `longer` has a gate; it comes from `long`, and that from `first`."""

    def stage(parent: str, evaluations: tuple[str, ...], **fields: Any) -> dict[str, Any]:
        return {**stage_defaults('midtrain'), 'parent': parent, 'evaluations': evaluations, **fields}

    stages = {
        'first': stage('', ('prose',)),
        'long': stage('first', ('prose', 'needle')),
        'longer': stage('long', (), gate=gate),
        'beside': stage('first', ('prose',)),
    }
    return {'stages': stages, 'sources': {}}


SOLVED_AND_RECOVERED = {'needle': {'least': 0.9}, 'prose': {'most': 1.02, 'times': 'first'}}


@pytest.mark.parametrize(
    ('values', 'said'),
    [
        ({'needle': 0.9, 'prose': 2.04}, ''),
        ({'needle': 0.85, 'prose': 2.04}, 'needle of long is 0.85: expected at least 0.9'),
        ({'needle': 1.0, 'prose': 2.1}, 'prose of long is 2.1: expected at most 2.04'),
    ],
)
def test_a_stage_waits_for_what_it_asks(values: dict[str, float], said: str, tmp_path: Path) -> None:
    for name, found in (('first', {'prose': 2.0}), ('long', values)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / 'evaluations.json', {key: {'value': x} for key, x in found.items()})
    config = asked(SOLVED_AND_RECOVERED)
    check_gate(config, 'longer')
    if said:
        with pytest.raises(InputError, match=f'^stages.longer.gate: {said}$'):
            pass_gate(config, 'longer', tmp_path)
    else:
        pass_gate(config, 'longer', tmp_path)


@pytest.mark.parametrize(
    ('gate', 'said'),
    [
        ({'needle': {'above': 0.9}}, "needle has above: expected 'least' or 'most'"),
        ({'needle': {'times': 'long'}}, "needle has times: expected 'least' or 'most'"),
        ({'needles': {'least': 0.9}}, "needles: expected an evaluation of 'long'"),
        ({'needle': {'least': 0.9, 'times': 'first'}}, "needle: expected an evaluation of 'first'"),
        (
            {'prose': {'most': 1.0, 'times': 'beside'}},
            "prose: 'beside' is no stage of the run that stage 'longer'",
        ),
    ],
)
def test_a_gate_that_means_nothing_is_named(gate: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f'^stages.longer.gate.{said}'):
        check_gate(asked(gate), 'longer')
