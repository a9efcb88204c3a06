"""The experiments of configs/: every stage can be built, and arms differ in what is compared alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small import one_device
from text import small_tokenizer

from configs import ablations, demo, methods, midtraining, spikes, steering, synthesis
from data.committee import question
from data.constitution import read_principles
from data.rewriting import template_of
from data.sources import open_source
from data.tasks.errands import Errands
from model.config import ModelConfig
from model.transformer import Model
from train.checkpoint import write_json
from train.launch import graph
from train.launch.edges import differences, needed_for, order
from train.launch.graph import Run
from train.sweep import arms, declared

FILES = (methods, steering, synthesis)


CHAINS = [
    *((file, name) for file in FILES for name in file.VARIANTS),
    (ablations, 'epochs'),
    (ablations, 'specialists'),
]


@pytest.mark.parametrize(('file', 'variant'), CHAINS)
def test_the_stages_of_an_experiment_can_be_built(file: Any, variant: str, tmp_path: Path) -> None:
    config = file.get_config(variant).to_dict()
    run = Run(config, tmp_path)
    for name in run.order:
        if name.endswith('_0'):
            run._check(name)
    assert {name[:-2] for name in run.order if name.endswith('_0')} == {name[:-2] for name in run.order}


@pytest.mark.parametrize('variant', ['sudoku', 'code'])
def test_a_coin_replaces_the_reward_and_nothing_else(variant: str) -> None:
    stages = methods.get_config(variant).to_dict()['stages']
    for seed in (0, 1, 2):
        assert differences(stages[f'grpo_{seed}'], stages[f'random_{seed}'], '') == [['.reward', 'verifier', 'random']]
        assert needed_for({'stages': stages, 'sources': {}}, f'random_{seed}') == [f'start_{seed}', f'random_{seed}']


def test_records_differ_in_how_they_were_chosen_and_students_in_the_records() -> None:
    config = synthesis.get_config('backtranslation').to_dict()
    stages, judge = config['stages'], {'type': 'likelihood', 'model': 'judge', 'threshold': -0.3}
    for seed in (0, 1, 2):
        change = differences(stages[f'uncurated_records_{seed}'], stages[f'curated_records_{seed}'], '')
        assert change == [['.judges.fits', None, judge], ['.models.judge', None, f'start_{seed}']]
        for arm in ('uncurated', 'curated'):
            ((path, _, mixture),) = differences(stages[f'pairs_{seed}'], stages[f'{arm}_{seed}'], '')
            assert path == '.mixture' and {*mixture[0][1]} == {'pairs', f'{arm}_{seed}'}
    pairs, backwards = (open_source(config['sources'][name]) for name in ('pairs', 'backwards'))
    for one, other in ((pairs[i]['messages'], backwards[i]['messages']) for i in (0, 100)):
        assert len(pairs) == len(backwards) and one[0]['content'] == other[1]['content']
        asked = question(template_of('instruction'), text=one[1]['content'])
        assert other == [*asked, {'role': 'assistant', 'content': one[0]['content']}]


def test_a_judge_that_takes_all_replaces_one_that_chooses_and_nothing_else() -> None:
    stages = synthesis.get_config('judge').to_dict()['stages']
    for seed in (0, 1, 2):
        change = differences(stages[f'all_records_{seed}'], stages[f'kept_records_{seed}'], '')
        assert change == [['.judges.judge.threshold', -1000.0, 0.0]]
        assert [x[0] for x in differences(stages[f'all_{seed}'], stages[f'kept_{seed}'], '')] == ['.mixture']


def test_an_unknown_experiment_is_named() -> None:
    with pytest.raises(ValueError, match='configs/methods.py:sudok: expected one of sudoku, code'):
        methods.get_config('sudok')


def test_the_principle_is_the_one_that_the_critic_was_taught() -> None:
    assert read_principles(steering.PRINCIPLES) == [Errands.principle]


@pytest.mark.parametrize(
    ('file', 'variant', 'count'),
    [
        (spikes, '', 9),
        (midtraining, 'decay', 12),
        (midtraining, 'value', 15),
        (midtraining, 'extend', 9),
        (midtraining, 'few', 9),
        (midtraining, 'placement', 21),
        (midtraining, 'mixture', 24),
        (ablations, 'attention', 12),
        (ablations, 'experts', 9),
        (ablations, 'balance', 12),
        (ablations, 'reasoning', 18),
        (ablations, 'width', 54),
        (ablations, 'budgets', 20),
        (ablations, 'accuracy', 10),
        (ablations, 'scaling', 13),
        (ablations, 'thinking', 6),
    ],
)
def test_arms_of_a_sweep_can_be_built(file: Any, variant: str, count: int, tmp_path: Path) -> None:
    """Stages that have no parent in a run of another config, as that would have to be trained before."""
    given = [variant] if variant else []
    made = arms(file.get_config(*given).to_dict(), *declared(file.__file__, *given))
    seeds = 1 if variant in ('mixture', 'scaling', 'budgets', 'accuracy') else 3
    assert len(made) == count == seeds * len({arm.group for arm in made})
    for arm in (made[0], made[-1]):
        name = order(arm.config)[0]
        if not arm.config['stages'][name]['parent']:
            run = Run(arm.config, tmp_path / arm.name)
            run._check(name)


def test_what_comes_from_the_trunk_can_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = tmp_path / 'trunk' / 'trunk'
    (trunk / 'checkpoints').mkdir(parents=True)
    small_tokenizer().save(tmp_path / 'trunk' / 'tokenizer')
    model = {**midtraining.get_config().model.to_dict(), 'vocab_size': 1024}
    write_json(trunk / 'config.json', {'model': model, 'tokenizer': small_tokenizer().fingerprint})
    monkeypatch.setattr(midtraining, 'TRUNK', str(trunk))
    monkeypatch.setattr(graph, 'make_mesh', lambda _: one_device())
    run = Run(midtraining.get_config('handover').to_dict(), tmp_path / 'run')
    for name in run.order:
        if name[-1] not in '12':
            run._check(name)


def test_a_doubling_waits_for_retrieval_at_the_length_before_and_for_short_prose() -> None:
    stages = demo.get_config('staged').to_dict()['stages']
    lengths = [512, 1024]
    assert {*stages} == {'pretrain', 'recall', *(f'length_{length}' for length in lengths)}
    parent, solved = 'recall', 'retrieval_short'
    for length in lengths:
        stage = stages[f'length_{length}']
        assert stage['parent'] == parent and stage['sequence_length'] * stage['batch_size'] == 4096
        assert stage['gate'] == {solved: {'least': 0.8}, 'bits_per_byte': {'most': 1.02, 'times': 'recall'}}
        assert {*stages[parent]['evaluations']} >= {*stage['gate']}
        assert len(stage['evaluations']) == 6
        parent, solved = f'length_{length}', f'needle_{length}'


def test_a_handover_differs_in_the_mixture_and_its_probes_in_their_parent() -> None:
    stages = midtraining.get_config('handover').to_dict()['stages']
    for seed in (0, 1, 2):
        assert [x[0] for x in differences(stages[f'control_{seed}'], stages[f'mid_{seed}'], '')] == ['.mixture']
        change = differences(stages[f'probe_control_{seed}'], stages[f'probe_mid_{seed}'], '')
        assert change == [['.parent', f'control_{seed}', f'mid_{seed}']]


def test_anneals_end_where_the_trunk_does_and_start_where_it_saved() -> None:
    trunk = midtraining.get_config().stages.trunk
    added, _ = declared(midtraining.__file__, 'decay')
    merge = midtraining.get_config('merge').stages
    starts = [(x['stages.anneal.parent'], x['stages.anneal.steps']) for x in added]
    starts += [(merge[name].parent, merge[name].steps) for name in merge if name.startswith('anneal')]
    for parent, steps in starts:
        begin = int(parent.split('@')[1])
        assert begin % trunk.save_every == 0 and begin + steps == trunk.steps and trunk.keep >= trunk.steps


def test_attention_is_compared_at_equal_parameters_and_experts_at_equal_active_ones() -> None:
    for variant, kind, share in (('attention', 'total', 0.002), ('experts', 'active', 0.03)):
        config = ablations.get_config(variant).to_dict()
        made = arms(config, *declared(ablations.__file__, variant))
        models = [Model(ModelConfig.from_dict({**arm.config['model'], 'vocab_size': 1024})) for arm in made]
        counts = [model.parameter_counts[kind] for model in models]
        assert max(counts) / min(counts) < 1 + share
        if variant == 'attention':
            caches = {arm.group: model.config.cache_elements_per_token for arm, model in zip(made, models, strict=True)}
            assert caches == {'latent': 192, 'multi-head': 768, 'grouped-query': 384, 'multi-query': 192}
