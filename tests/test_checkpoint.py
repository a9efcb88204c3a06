"""Checkpoints: what comes back is what was saved, or the one before it, or one clear line."""

import functools
import gc
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from small import model_config, one_device
from text import small_tokenizer

from data.errors import InputError
from model.sharding import make_mesh
from model.transformer import Model
from train.checkpoint import ARRAYS, Checkpoints, load, read_json, split_address, write_json
from train.learn.fingerprints import fingerprints
from train.learn.optimizer import make_optimizer
from train.learn.step import State, initial_state
from train.stages import COMMON

STREAM = {'step': 3, 'rows': {'0': {'cursor': 17, 'credit': -0.25, 'sources': {}}}}
METADATA = {'stage': 'pretrain', 'parent': '', 'tokens': 1234, 'flops': 5.0e9}
# One number of each JSON item and another to stand in its place, with their names: Orbax writes times into files beside
# them, which may hold any digits.
FLIPS = {'metadata': (b'"tokens": 1234', b'"tokens": 1235'), 'stream': (b'"cursor": 17', b'"cursor": 18')}


@functools.cache
def first_state() -> State:
    """Muon's state, which has leaves of several shapes, over a small model."""
    model = Model(model_config())
    optimizer = make_optimizer({**COMMON['optimizer'], 'name': 'adamw'}, model.declared['params'])
    return initial_state(model.init(0, one_device()), optimizer)


def at(step: int) -> State:
    """A state in which no two numbers of an array are equal: what compresses to nothing has no bits to flip."""

    def leaf(x: jax.Array) -> jax.Array:
        noise = np.random.default_rng(step).normal(size=x.shape) if x.ndim else step
        return x + jax.device_put(np.asarray(noise, x.dtype), x.sharding)

    return {**jax.tree.map(leaf, first_state()), 'step': jnp.asarray(step)}


def wanted(state: State, mesh: Mesh | None = None) -> dict[str, Any]:
    """What to restore: on the state's own devices, or spread over a mesh by the rules of the model."""
    tree = {name: state[name] for name in ARRAYS}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    if mesh is not None:
        spread = Model(model_config()).shapes(mesh)
        return {'params': spread['params'], 'balance': spread['balance']}
    return shapes


def save(folder: Path, *steps: int, keep: int = 5) -> None:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, at(step), {**STREAM, 'step': step}, METADATA)
        checkpoints.wait()
    checkpoints.close()


def restore(folder: Path, step: int | None = None, of: dict[str, Any] | None = None) -> Any:
    checkpoints = Checkpoints(folder, keep=5)
    try:
        return checkpoints.restore(wanted(first_state()) if of is None else of, step)
    finally:
        checkpoints.close()


def assert_same(a: Any, b: Any) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def data_file(folder: Path, step: int, item: str = 'params') -> Path:
    """The file that holds most of the bytes of an item's arrays."""
    return max((folder / str(step) / item).rglob('d/*'), key=lambda p: p.stat().st_size)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(bytes(content))


def test_everything_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 3, 4)
    read = restore(tmp_path)
    assert_same(read.arrays, {name: at(4)[name] for name in ARRAYS})
    assert read.stream == {**STREAM, 'step': 4}
    assert {name: read.metadata[name] for name in METADATA} == METADATA and read.metadata['step'] == 4
    assert_same(restore(tmp_path, step=3).arrays['params'], at(3)['params'])
    assert restore(tmp_path / 'none') is None


def test_old_checkpoints_go_and_the_newest_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=2)
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.steps() == [3, 4]
    checkpoints.close()


def test_what_was_saved_out_of_turn_goes_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, every=2, pinned=(2,))
    left = []
    for step in (2, 4, 6, 7, 8, 9):
        checkpoints.save(step, at(step), STREAM, METADATA)
        checkpoints.wait()
        left.append(checkpoints.steps())
    checkpoints.close()
    assert left == [[2], [2, 4], [2, 4, 6], [2, 4, 6, 7], [2, 6, 8], [2, 6, 8, 9]]


def test_fingerprints_see_every_bit_and_no_sharding() -> None:
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    first = fingerprints({'x': jnp.asarray(values)})
    mesh = make_mesh({'data': 8})
    for spec in (('data', None), (None, 'data')):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert fingerprints({'x': jax.device_put(values, sharding)}) == first
    for bit in (0, 31):
        bits = values.view(np.uint32).copy()
        bits[3, 5] ^= np.uint32(1 << bit)
        assert fingerprints({'x': jnp.asarray(bits.view(np.float32))}) != first
    swapped = values.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert fingerprints({'x': jnp.asarray(swapped)}) != first
    assert fingerprints({'x': jnp.asarray(values.reshape(8, 16))}) != first


@pytest.mark.parametrize('item', ['params', 'optimizer'])
def test_a_flipped_bit_is_found_and_the_one_before_used(
    item: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 3, 4)
    file = data_file(tmp_path, 4, item)
    flip(file, file.stat().st_size // 2)
    with caplog.at_level(logging.WARNING):
        read = restore(tmp_path)
    assert read.metadata['step'] == 3
    assert_same(read.arrays['params'], at(3)['params'])
    warnings = [record.getMessage() for record in caplog.records if 'is broken' in record.getMessage()]
    assert len(warnings) == 1 and str(tmp_path / '4') in warnings[0]


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # of Orbax's reads that were given up
@pytest.mark.parametrize('damage', ['truncated', 'missing', 'metadata', 'stream', 'empty'])
def test_other_damage_is_found_too(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 3, 4)
    if damage in ('truncated', 'missing'):
        file = data_file(tmp_path, 4)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) if damage == 'truncated' else file.unlink()
    elif damage == 'empty':
        for file in (tmp_path / '4' / 'metadata').rglob('*'):
            file.write_bytes(b'')
    else:
        old, new = FLIPS[damage]
        (file,) = (p for p in (tmp_path / '4' / damage).rglob('*') if p.is_file() and old in p.read_bytes())
        file.write_bytes(file.read_bytes().replace(old, new))
    assert restore(tmp_path).metadata['step'] == 3
    with pytest.raises(InputError, match='4: the checkpoint cannot be read'):
        restore(tmp_path, step=4)
    gc.collect()  # Orbax's abandoned reads complain when they are collected, if not here then in some later test


def test_no_sound_checkpoint_is_one_line(tmp_path: Path) -> None:
    save(tmp_path, 3)
    flip(data_file(tmp_path, 3), 1000)
    with pytest.raises(InputError, match='3: the checkpoint cannot be read') as error:
        restore(tmp_path)
    assert '\n' not in str(error.value)


def test_a_broken_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    folder = tmp_path / 'checkpoints'
    save(folder, 3, 4)
    flip(data_file(folder, 4), 1000)
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.restore(wanted(first_state())).metadata['step'] == 3  # type: ignore[union-attr]
    checkpoints.save(4, at(4), STREAM, METADATA)
    checkpoints.close()
    assert_same(restore(folder).arrays['params'], at(4)['params'])
    assert (tmp_path / 'checkpoints.broken').is_dir()  # nothing that was on disk is lost


def test_another_architecture_is_one_clear_line(tmp_path: Path) -> None:
    save(tmp_path, 3, 4)
    for changes in ({'hidden_size': 48}, {'num_hidden_layers': 3}, {'n_routed_experts': 0}):
        other = Model(model_config(**changes)).shapes(one_device())
        with pytest.raises(InputError, match=r"another architecture: (params|balance)\['.* is .*, expected ") as error:
            restore(tmp_path, of=other)
        assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize('sizes', [{'data': 8}, {'data': 2, 'fsdp': 4}, {'fsdp': 2, 'expert': 2, 'tensor': 2}])
def test_restores_onto_other_device_counts(sizes: dict[str, int], tmp_path: Path) -> None:
    save(tmp_path, 3)
    mesh = make_mesh(sizes)
    arrays = restore(tmp_path, of=wanted(first_state(), mesh)).arrays
    assert_same(arrays['params'], at(3)['params'])
    leaves = jax.tree.leaves(arrays['params'])
    assert all(len(x.sharding.device_set) == 8 for x in leaves)
    if 'fsdp' in sizes:
        assert not all(x.is_fully_replicated for x in leaves)
    # And back: what eight devices saved, one reads.
    checkpoints = Checkpoints(tmp_path / 'spread', keep=1)
    checkpoints.save(5, {**arrays, 'optimizer': {}, 'step': jnp.asarray(5)}, STREAM, METADATA)
    checkpoints.close()
    shapes = wanted(first_state())
    back = restore(tmp_path / 'spread', of={name: shapes[name] for name in ('params', 'balance')})
    assert_same(back.arrays['params'], at(3)['params'])
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(back.arrays))


@pytest.fixture
def stage_folder(tmp_path: Path) -> Path:
    """A stage as a run leaves it."""
    folder = tmp_path / 'pretrain'
    save(folder / 'checkpoints', 2, 4)
    write_json(folder / 'config.json', {'model': model_config().to_dict(), 'evaluations': {}})
    small_tokenizer().save(tmp_path / 'tokenizer')
    return folder


def test_load_gives_a_model_ready_for_use(stage_folder: Path) -> None:
    loaded = load(stage_folder)
    assert loaded.metadata['step'] == 4 and loaded.config['model']['hidden_size'] == 32
    assert loaded.tokenizer.fingerprint == small_tokenizer().fingerprint
    assert_same(loaded.variables['params'], at(4)['params'])
    out = loaded.model.apply(loaded.variables, jnp.zeros((2, 5), jnp.int32))
    assert out.logits.shape == (2, 5, 400) and out.logits.dtype == jnp.float32
    earlier = load(f'{stage_folder}@2')
    assert earlier.metadata['step'] == 2
    assert_same(earlier.variables['params'], at(2)['params'])


def test_what_cannot_be_loaded_is_named(stage_folder: Path) -> None:
    with pytest.raises(InputError, match='nowhere: expected a stage folder'):
        load(stage_folder.parent / 'nowhere')
    with pytest.raises(InputError, match=r'pretrain@x: expected NAME or NAME@STEP'):
        load(f'{stage_folder}@x')
    with pytest.raises(InputError, match=r'3: .*cannot be read'):
        load(f'{stage_folder}@3')
    write_json(stage_folder / 'config.json', {'model': model_config(hidden_size=48).to_dict()})
    with pytest.raises(InputError, match='another architecture: params'):
        load(stage_folder)
    (stage_folder / 'config.json').write_text('{"model": ')
    with pytest.raises(InputError, match='config.json: not JSON'):
        load(stage_folder)


def test_reading_does_not_write(stage_folder: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in stage_folder.rglob('*'))
    load(stage_folder)
    assert sorted((p, p.stat().st_mtime_ns) for p in stage_folder.rglob('*')) == before


def test_addresses_and_files(tmp_path: Path) -> None:
    assert split_address('sft') == ('sft', None) and split_address('sft@12') == ('sft', 12)
    write_json(tmp_path / 'a.json', {'b': [1]})
    assert read_json(tmp_path / 'a.json') == {'b': [1]}
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']
    with pytest.raises(InputError, match='no such file'):
        read_json(tmp_path / 'c.json')
