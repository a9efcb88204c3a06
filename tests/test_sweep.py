"""Sweeps: which arms there are, what they share, and what the table says of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import get_config, one_device

from data.errors import InputError
from model.config import ModelConfig
from train.compare import compare
from train.measure.ranking import reading, table, write_page, write_table
from train.sweep import (
    Arm,
    arms,
    commands,
    compared,
    identity,
    label,
    last_stages,
    link,
    product,
    run_arms,
)


@pytest.fixture
def config() -> dict[str, Any]:
    """`pretrain`, and `midtrain` from it: two steps each of a dense model."""
    made = get_config()
    for name in ('sft', 'grpo'):
        del made.stages[name]
    made.model.n_routed_experts = 0
    for stage in made.stages.values():
        stage.update(steps=2, batch_size=2, sequence_length=32)
        stage.optimizer.name = 'adamw'
    return made.to_dict()


def test_the_product_of_fields(config: dict[str, Any]) -> None:
    field = 'stages.midtrain.mixture'
    sets = ['model.attention=mla,gqa', 'stages.midtrain.steps=1,2', f"{field}=((0.0,{{'stdlib':1.0}}),)"]
    found = product(config, sets)
    assert [(x['model.attention'], x['stages.midtrain.steps']) for x in found] == [
        *(('mla', 1), ('mla', 2), ('gqa', 1), ('gqa', 2))
    ]
    assert found[0][field] == ((0.0, {'stdlib': 1.0}),)
    assert product(config, ['stages.midtrain.optimizer.learning_rate=1'])[0] == {
        'stages.midtrain.optimizer.learning_rate': 1.0
    }
    made = arms(config, found)
    assert made[2].name.startswith('attention=gqa__midtrain.steps=1__midtrain.mixture=')
    assert made[2].config['model']['attention'] == 'gqa' and config['model']['attention'] == 'mla'


def test_stages_are_not_shared_where_others_of_their_run_matter(config: dict[str, Any]) -> None:
    """A checkpoint that one arm wants kept, and an evaluation that looks at another stage."""
    child = {**config['stages']['midtrain'], 'parent': 'midtrain'}
    config['stages'] |= {'child': child, 'rival': {**config['stages']['pretrain'], 'seed': 5}}

    def of(name: str, *sets: str) -> str:
        return identity(arms(config, product(config, sets))[0].config, name)

    assert of('midtrain', 'stages.child.parent=midtrain@1') != of('midtrain', 'stages.child.parent=midtrain')
    assert of('child', 'stages.rival.steps=1') == of('child', 'stages.rival.steps=2')
    config['evaluations']['moved'] = {'type': 'kl', 'task': {'name': 'arithmetic'}, 'reference': 'rival'}
    child['evaluations'] = ('moved',)
    assert of('child', 'stages.rival.steps=1') != of('child', 'stages.rival.steps=2')
    assert of('midtrain', 'stages.rival.steps=1') == of('midtrain', 'stages.rival.steps=2')


@pytest.mark.parametrize(
    ('sets', 'message'),
    [
        ([], 'nothing to sweep over'),
        (['seed'], 'expected FIELD=VALUE'),
        (['seed=0', 'seed=1'], 'given twice'),
        (['seed=0,0'], 'two arms are called seed=0'),
        (['model.atention=mla'], "model.atention: no such field of the config; did you mean 'attention'"),
        (['seed.x=1'], 'seed.x: no such field'),
        (['stages.midtrain.steps=many'], 'expected int, as in 2'),
    ],
)
def test_what_cannot_be_swept_is_named(sets: list[str], message: str, config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=message):
        arms(config, product(config, sets) if sets else [])


def test_stages_are_the_same_where_all_that_leads_to_them_is(config: dict[str, Any]) -> None:
    def of(name: str, *sets: str) -> str:
        return identity(arms(config, product(config, sets))[0].config, name)

    later = 'stages.midtrain.steps=1'
    assert of('pretrain', later) == of('pretrain', 'seed=0') != of('pretrain', 'seed=1')
    assert of('midtrain', later) != of('midtrain', 'seed=0')
    for earlier in ('stages.pretrain.steps=1', 'model.hidden_size=64', 'tokenizer.vocab_size=300', 'mesh.fsdp=2'):
        assert of('pretrain', earlier) != of('pretrain', later)
        assert of('midtrain', earlier) != of('midtrain', 'seed=0')


def test_what_arms_share_is_trained_once(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('train.launch.graph.make_mesh', lambda sizes: one_device())
    made = arms(config, product(config, ['stages.midtrain.optimizer.learning_rate=0.001,0.002']))
    names = {arm.name: ['pretrain', 'midtrain'] for arm in made}
    for _ in range(2):  # the second time nothing is left to do
        for arm in made:
            link(tmp_path, arm, names[arm.name])
            run_arms(tmp_path, [arm], '', commands(tmp_path, [arm], names, []))
    one, two = (tmp_path / arm.name for arm in made)
    assert (one / 'pretrain').resolve() == (two / 'pretrain').resolve()
    assert (one / 'midtrain').resolve() != (two / 'midtrain').resolve()
    assert len(list((tmp_path / 'shared').glob('pretrain-*'))) == 1 == len(list((tmp_path / 'shared').glob('token*')))
    assert len((one / 'pretrain' / 'metrics.jsonl').read_text().splitlines()) == 2
    assert last_stages(config, ['pretrain', 'midtrain']) == ['midtrain']
    rows = table({arm.group: [tmp_path / arm.name] for arm in made}, compared(made, names))
    assert sorted(row.arm for row in rows) == sorted(arm.name for arm in made)
    assert {row.measure for row in rows} == {'loss'} and [row.verdict for row in rows] == ['best', 'not separated']
    other = Arm(made[0].name, {}, {**made[0].config, 'seed': 1}, made[0].group)
    with pytest.raises(InputError, match='trained with other settings'):
        link(tmp_path, other, ['pretrain'])


def test_commands_train_what_is_shared_first(config: dict[str, Any]) -> None:
    made = arms(config, product(config, ['stages.midtrain.steps=1,2']))
    names = {arm.name: ['pretrain', 'midtrain'] for arm in made}
    lines = commands(Path('runs/s'), made, names, ['--config=configs/demo.py'])
    start = 'python -m train --config=configs/demo.py --workdir=runs/s/midtrain.steps='
    assert lines == [
        '# first, one after the other: what arms share',
        f'{start}1 --stage=pretrain --config.stages.midtrain.steps=1',
        '# then, side by side',
        f'{start}1 --stage=midtrain --config.stages.midtrain.steps=1',
        f'{start}2 --stage=midtrain --config.stages.midtrain.steps=2',
    ]


def test_the_table_says_what_is_apart_and_what_is_not(tmp_path: Path) -> None:
    """Three arms of three seeds: one is worse at every item, one differs by noise alone."""
    rng = np.random.default_rng(0)
    items = rng.random(60)
    made = []
    for arm, lift in (('a', 0.0), ('b', 0.0), ('c', -0.3)):
        for seed in range(3):
            changes = {'model.attention': arm, 'seed': seed}
            made.append(Arm(label(changes), changes, {}, f'attention={arm}'))
            scores = items + lift + rng.normal(size=60) * 0.05
            said = {'metric': '', 'value': scores.mean(), 'direction': 'higher', 'details': {'scores': list(scores)}}
            loss = {'value': 2.0 - lift + seed / 10, 'direction': 'lower', 'details': {}}
            place = tmp_path / made[-1].name / 'last'
            place.mkdir(parents=True)
            (place / 'finished.json').write_text(json.dumps({'evaluations': {'right': said, 'bits': loss}}))
            (place / 'evaluations.json').write_text(json.dumps({'right': said, 'bits': loss}))
    groups = {f'attention={arm}': [tmp_path / f'attention={arm}__seed={seed}' for seed in range(3)] for arm in 'abc'}
    rows = {(row.measure, row.arm): row for row in table(groups, ['last'])}
    best, other = 'attention=a', 'attention=b'
    if rows['right', best].verdict != 'best':
        best, other = other, best
    assert rows['right', best].verdict == 'best' and rows['right', best].seeds == 3
    assert rows['right', other].verdict.endswith(': not separated')
    folders = {arm: [str(tmp_path / f'attention={arm}__seed={seed}' / 'last') for seed in range(3)] for arm in 'abc'}
    ahead = compare(folders['c'], folders[best[-1]], 'right')['right']
    worst = rows['right', 'attention=c']
    assert f'{ahead["difference"]:+.4f}' in worst.verdict and not worst.verdict.endswith('separated')
    assert worst.low < worst.value < worst.high
    assert rows['bits', 'attention=c'].verdict.startswith('every seed behind')
    assert (rows['bits', 'attention=a'].low, rows['bits', 'attention=a'].high) == (2.0, 2.2)
    assert reading([row for row in rows.values() if row.measure == 'bits']).count('behind it: attention=c;') == 1
    text = write_table(tmp_path, list(rows.values()))
    assert text.count('\n') == 2 + 6
    with (tmp_path / 'sweep.csv').open() as file:
        assert [line['arm'] for line in csv.DictReader(file)] == [row.arm for row in rows.values()]


def test_documents_do_not_outvote_seeds(tmp_path: Path) -> None:
    """Every document is better by the mean over seeds, and worse with one of the seeds."""
    noise = np.random.default_rng(0).normal(size=40) * 0.01
    sizes = [100] * 20 + [900] * 20
    for arm, lifts in (('a', (0, 0, 0)), ('b', (0.2, 0.2, -0.1)), ('c', (0.2, 0.2, 0.1))):
        for seed, lift in enumerate(lifts):
            scores = 2 + lift + noise * (arm != 'a')
            details = {'scores': scores.tolist(), 'weights': sizes}
            said = {'prose': {'value': np.average(scores, weights=sizes), 'direction': 'lower', 'details': details}}
            place = tmp_path / f'{arm}{seed}' / 'run'
            place.mkdir(parents=True)
            (place / 'finished.json').write_text(json.dumps({'evaluations': said}))
            (place / 'evaluations.json').write_text(json.dumps(said))
    groups = {arm: [tmp_path / f'{arm}{seed}' for seed in range(3)] for arm in 'abc'}
    rows = {row.arm: row for row in table(groups, ['run'])}
    assert rows['a'].verdict == 'best' and rows['b'].low > rows['a'].high
    assert rows['b'].verdict.endswith(': not separated') and not rows['c'].verdict.endswith('separated')


def test_what_arms_are_stands_beside_what_they_came_to(tmp_path: Path) -> None:
    """Cache and parameters where they differ, MaxVio at the end, and a plot of each measure over the cache."""
    for arm, heads, loss in (('mqa', 1, 2.5), ('mha', 4, 2.25)):
        place = tmp_path / arm / 'run'
        place.mkdir(parents=True)
        model = ModelConfig(attention='gqa', num_key_value_heads=heads, head_dim=16, num_hidden_layers=3)
        (place / 'config.json').write_text(json.dumps({'model': model.to_dict()}))
        parameters = {'total': 1000, 'active': 500 + heads}
        (place / 'finished.json').write_text(json.dumps({'evaluations': {}, 'parameters': parameters}))
        lines = [{'loss': 9.0, 'experts/max_violation': 9.0}] * 9 + [{'loss': loss, 'experts/max_violation': 0.5}]
        (place / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    rows = table({arm: [tmp_path / arm] for arm in ('mqa', 'mha')}, ['run'])
    found = {(row.measure, row.arm): row for row in rows}
    assert {row.measure for row in rows} == {'loss', 'MaxVio', 'cache elements a token', 'active parameters'}
    assert (found['loss', 'mha'].value, found['MaxVio', 'mqa'].value) == (2.25, 0.5)
    assert (
        found['cache elements a token', 'mqa'].value == 2 * 1 * 16 * 3 and not found['active parameters', 'mqa'].verdict
    )
    page = write_page(tmp_path, rows, 'cache elements a token').read_text()
    assert page.count('<svg') == 2 and 'mha is first; not separated from it: mqa.' in page
    assert 'id="figure0-' in page and 'id="figure1-' in page
    with pytest.raises(InputError, match="--over is 'cash': expected one of"):
        write_page(tmp_path, rows, 'cash')
