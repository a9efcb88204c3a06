"""A bit flipped in the memory or the arithmetic of one device: found, named, and the run ends as if it had not been."""

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loops import Counting, kinds, lines, plan, saved

from data.errors import InputError
from model.sharding import make_mesh
from train import loop
from train.learn.health import Rewind
from train.learn.replicas import Prints, Step, agreement, twice
from train.learn.step import State
from train.loop import train


def flip(array: jax.Array, device: int, place: int = 1, bit: int = 3) -> None:
    """In place, where only that device's copy lies."""
    (shard,) = [x for x in array.addressable_shards if x.device.id == device]
    pointer = shard.data.unsafe_buffer_pointer()
    word = ctypes.cast(pointer + 4 * place, ctypes.POINTER(ctypes.c_uint32))
    word[0] ^= 1 << bit


class Flipping(Counting):
    """Flips a bit of the parameters before the batch of each step named, so many times."""

    def __init__(self, rows: int, step: int, times: int = 1):
        super().__init__(rows)
        self.step, self.times = step, times

    def next(self, step: int, variables: Any = None) -> Any:
        if step == self.step and self.times:
            self.times -= 1
            jax.block_until_ready(variables)
            flip(jax.tree.leaves(variables['params'])[0], 2)
        return super().next(step)


@pytest.fixture(scope='module')
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('clean') / 'stage'
    train(*plan(folder, devices=8, steps=9, save_every=4))
    return folder


@pytest.mark.parametrize('step', [5, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 7))])
def test_a_flipped_bit_is_found_and_mended(step: int, tmp_path: Path, clean: Path) -> None:
    """Within the interval of 3 steps, or before the next save, whichever comes first; one was made at step 4."""
    folder = tmp_path / 'stage'
    train(*plan(folder, devices=8, stream=Flipping(16, step), steps=9, save_every=4))
    found = {4: 6, 5: 6, 7: 8}[step]
    assert kinds(folder) == [(4, 'went back')]
    (event,) = lines(folder, 'events.jsonl')
    assert f'differ after step {found} on device 2;' in event['detail']
    evidence = json.loads((folder / f'replicas.{found}.json').read_text())
    assert all(len(set(values.values())) == 2 for values in evidence.values())
    assert saved(folder, 9) == saved(clean, 9)
    losses, expected = ([x['loss'] for x in lines(f, 'metrics.jsonl')] for f in (folder, clean))
    assert losses == expected and kinds(clean) == []


@pytest.mark.slow
def test_a_device_that_goes_on_like_that_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='differ after step 6 on .*and again'):
        train(*plan(tmp_path / 'stage', devices=8, stream=Flipping(16, 5, times=9), steps=9, save_every=4))
    with pytest.raises(InputError, match='differ after step 2 .*no checkpoint to go back to'):
        train(*plan(tmp_path / 'other', devices=8, stream=Flipping(16, 1), steps=9, save_every=2))


def placed(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Leaves that are whole everywhere, split along some axes, and without a copy."""
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    values = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    params = {'whole': put(values), 'split': put(values, 'fsdp'), 'alone': put(values, ('data', 'fsdp'), 'tensor')}
    return {'params': params, 'balance': {'bias': put(values[0])}, 'optimizer': {'count': put(np.int32(3))}}


@pytest.mark.parametrize('device', range(8))
@pytest.mark.parametrize('leaf', ['whole', 'split'])
def test_the_device_is_named_where_most_others_agree(leaf: str, device: int, tmp_path: Path) -> None:
    mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}, jax.devices())
    state = placed(mesh)
    compare = agreement(Prints(state, mesh, tmp_path), mesh)
    for step in range(3):
        compare(step, state)
    flip(state['params'][leaf], device)
    with pytest.raises(Rewind) as error:
        compare(5, state)
    assert f"['{leaf}'] differ" in error.value.reason and error.value.reason.endswith(f' on device {device}')


def test_nothing_is_compared_where_there_are_no_copies(tmp_path: Path) -> None:
    mesh = make_mesh({'fsdp': 8}, jax.devices())
    values = np.arange(16, dtype=np.float32)
    leaf = jax.device_put(values, NamedSharding(mesh, PartitionSpec('fsdp')))
    state: dict[str, Any] = {'params': {'a': leaf}, 'balance': {}, 'optimizer': {}}
    compare = agreement(Prints(state, mesh, tmp_path), mesh)
    flip(leaf, 3, place=0)
    compare(1, state)


@pytest.mark.parametrize(('axis', 'again'), [('fsdp', 0), pytest.param('fsdp', 1, marks=pytest.mark.slow)])
def test_a_step_that_went_wrong_once_is_found_by_taking_it_twice(
    axis: str, again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has a copy under fsdp alone; the bit is flipped in the first or in the second time step 6 is taken."""
    train(*plan(tmp_path / 'clean', devices=8, axis=axis, steps=9, save_every=4))
    calls: list[int] = []

    def faulty(one_step: Step) -> Step:
        def step(state: State, batch: Any, rate: Any) -> Any:
            state, metrics = one_step(state, batch, rate)
            calls.append(int(state['step']))
            if len(calls) == 3 + again:  # steps 3 and 6 are taken twice
                jax.block_until_ready(state)
                split = [x for x in jax.tree.leaves(state['params']) if axis in str(x.sharding.spec)]
                flip(split[0], 5)
            return state, metrics

        return step

    monkeypatch.setattr(loop, 'twice', lambda one_step, prints: twice(faulty(one_step), prints))
    folder = tmp_path / 'stage'
    train(*plan(folder, devices=8, axis=axis, steps=9, save_every=4, replay_every=3))
    assert calls == [3, 3, 6, 6, 6, 6, 9, 9]
    (event,) = lines(folder, 'events.jsonl')
    assert event['kind'] == 'went back' and 'differ after step 6 on device 5;' in event['detail']
    assert (folder / 'replay.6.json').exists()
    assert saved(folder, 9) == saved(tmp_path / 'clean', 9)
    losses, expected = ([x['loss'] for x in lines(f, 'metrics.jsonl')] for f in (folder, tmp_path / 'clean'))
    assert losses == expected


@pytest.mark.slow
@pytest.mark.parametrize('axis', ['data', 'fsdp'])
def test_no_false_alarm_in_clean_steps(axis: str, tmp_path: Path) -> None:
    """TORSO_CLEAN_STEPS says how many; copies are compared and steps taken twice as often as can be."""
    steps = int(os.environ.get('TORSO_CLEAN_STEPS', '50'))
    folder = tmp_path / 'stage'
    changes = {'save_every': steps, 'compare_every': 1, 'replay_every': 2}
    train(*plan(folder, devices=8, axis=axis, steps=steps, **changes))
    assert kinds(folder) == [] and len(lines(folder, 'metrics.jsonl')) == steps
