"""Every file of a checkpoint damaged in every way: found, named and put aside, or harmless; nothing differs unseen."""

import functools
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.checkpoint import ARRAYS, Checkpoints

STREAM = {'step': 3, 'rows': {'0': {'cursor': 17, 'credit': -0.25, 'sources': {}}}}
METADATA = {'stage': 'pretrain', 'parent': '', 'tokens': 1234, 'flops': 5.0e9}


@functools.cache
def at(step: int) -> dict[str, Any]:
    """Arrays of several types and shapes."""
    draw = np.random.default_rng(step).normal
    params = {'layers': {'q_proj': draw(size=(24, 40)), 'norm': draw(size=7)}, 'embedding': draw(size=(50, 8))}
    return {
        'params': jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params),
        'balance': {'bias': jnp.asarray(draw(size=(2, 4)), jnp.bfloat16)},
        'optimizer': {'count': jnp.asarray(step), 'moment': jnp.asarray(draw(size=(24, 40)), jnp.float32)},
    }


@pytest.fixture(scope='module')
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('sound') / 'checkpoints'
    checkpoints = Checkpoints(folder)
    for step in (3, 4):
        checkpoints.save(step, at(step), {**STREAM, 'step': step}, METADATA)
    checkpoints.close()
    return folder


def files(folder: Path) -> list[str]:
    """The files of the newest checkpoint."""
    return sorted(str(p.relative_to(folder)) for p in (folder / '4').rglob('*') if p.is_file())


def damages(size: int) -> list[tuple[str, int]]:
    flips = sorted({size * i // 8 for i in range(8)}) if size else []
    return [('delete', 0), ('zero', 0), ('truncate', size // 2), ('truncate', size - 1)] + [
        ('flip', at) for at in flips
    ]


def damage(path: Path, how: str, place: int) -> None:
    content = bytearray(path.read_bytes())
    if how == 'delete':
        path.unlink()
    elif how == 'zero':
        path.write_bytes(bytes(len(content)))
    elif how == 'truncate':
        path.write_bytes(content[:place])
    else:
        content[place] ^= 1 << place % 8
        path.write_bytes(content)


def check(sound: Path, folder: Path, name: str, how: str, place: int) -> str:
    """Damages a copy and restores from it; says what came of it."""
    shutil.copytree(sound, folder)
    damage(folder / name, how, place)
    told: list[tuple[int, str, str]] = []
    checkpoints = Checkpoints(folder, note=lambda *event: told.append(event))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), at(4))
    restored = checkpoints.restore(wanted)
    checkpoints.close()
    assert restored is not None
    step = restored.metadata['step']
    assert restored.stream == {**STREAM, 'step': step}
    assert {field: restored.metadata[field] for field in METADATA} == METADATA
    for item in ARRAYS:
        for ours, theirs in zip(jax.tree.leaves(restored.arrays[item]), jax.tree.leaves(at(step)[item]), strict=True):
            assert ours.dtype == theirs.dtype and np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    if step == 4:
        assert not told
        return 'harmless'
    (event,) = told
    assert step == 3 and event[:2] == (4, 'broken checkpoint') and f'{folder / "4"} is broken' in event[2]
    aside = folder.with_name(f'{folder.name}.broken')
    assert not (folder / '4').exists() and len(list(aside.rglob('*'))) > 5  # moved, not deleted
    return 'found'


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Orbax's abandoned reads complain when they are collected, if not here then in some later test."""
    yield
    gc.collect()


quiet = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@quiet
def test_a_damage_of_each_kind(sound: Path, tmp_path: Path) -> None:
    names = files(sound)
    for number, how in enumerate(('delete', 'zero', 'truncate', 'flip')):
        name = max(names, key=lambda name: (sound / name).stat().st_size) if how == 'flip' else names[number]
        check(sound, tmp_path / str(number), name, how, 100)


@quiet
@pytest.mark.slow
def test_every_damage_to_every_file(sound: Path, tmp_path: Path) -> None:
    outcomes: list[str] = []
    wrong: list[str] = []
    for name in files(sound):
        for how, place in damages((sound / name).stat().st_size):
            folder = tmp_path / str(len(outcomes)) / 'checkpoints'
            try:
                outcomes.append(check(sound, folder, name, how, place))
            except Exception as error:
                outcomes.append('wrong')
                wrong.append(f'{name} {how} {place}: {type(error).__name__} {str(error)[:200]}')
            shutil.rmtree(folder.parent)
    assert not wrong, '\n'.join([f'{len(wrong)} of {len(outcomes)}', *wrong])
    assert len(outcomes) >= 200 and outcomes.count('found') > 100
