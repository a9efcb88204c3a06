"""Stages that do not train: records by planted generators and judges, interrupted; averages of checkpoints."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from server import Server, completion
from small import get_config, one_device
from text import small_tokenizer

from configs.base import add_stage
from data.committee import Vote
from data.errors import InputError
from data.preferences import as_pair
from data.sources import open_source
from data.tasks import get_task
from train.act.make import Maker
from train.act.recipes import best
from train.checkpoint import read_json
from train.launch.edges import check_edges, order, steps_pinned
from train.launch.graph import Run
from train.learn.merge import merge_weights
from train.synthesize import alone

TASK = {'name': 'arithmetic', 'operations': 1, 'digits': 1}
Settings = Callable[[ConfigDict], Any]


@pytest.fixture(autouse=True)
def one_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('train.launch.graph.make_mesh', lambda sizes: one_device())


def configured(settings: Settings, tokenizer_path: str = '') -> dict[str, Any]:
    """A light small run: `pretrain`, of 6 steps with checkpoints at 2, 4 and 6, and what `settings` adds."""
    config = get_config()
    for name in set(config.stages) - {'pretrain'}:
        del config.stages[name]
    config.tokenizer.path = tokenizer_path
    config.model.update(max_position_embeddings=512)
    config.model.n_routed_experts = 0
    config.stages.pretrain.update(mixture=((0.0, {'arithmetic': 1.0}),), sequence_length=32, steps=6, keep=1)
    config.stages.pretrain.optimizer.name = 'adamw'
    settings(config)
    return config.to_dict()


def add_answers(config: ConfigDict, url: str, kind: str = 'attempts', **fields: Any) -> None:
    """A stage whose generator is an endpoint, and whose other members are as well."""
    names = ('generator', *fields.pop('others', ()))
    fields = {'task': TASK, 'prompts': 10, 'block': 4, 'samples': 2, 'max_tokens': 32, **fields}
    if kind == 'attempts':
        fields = {'judges': {'right': {'type': 'verifier'}}, **fields}
    add_stage(config, 'made', kind, endpoints={name: {'url': url, 'model': name} for name in names}, **fields)
    config.sources.made = ConfigDict({'type': 'stage', 'name': 'made'})


def records(folder: Path) -> list[dict[str, Any]]:
    source = open_source({'type': 'arrayrecord', 'path': str(folder / 'records')})
    return [source[i] for i in range(len(source))]


def half_right(handler: Any, prompt: str, number: int) -> bool:
    """Answers the sums of TASK: the first time rightly, then without a result; and judges what it is shown."""
    if 'Verdict' in prompt:
        reply = f'Verdict: {"REJECT" if "<answer>none" in prompt else "ACCEPT"}'
    elif number % 2:
        reply = 'none'
    else:
        task = get_task(**TASK, split='train')
        reply = next(p.reference for p in map(task.prompt, seeds(10)) if p.text == prompt)
    return handler.reply(200, completion(reply))


def seeds(count: int) -> range:
    """The problems that the stage `made` of seed 0 poses."""
    import zlib

    first = zlib.crc32(b'0 made') % 2**31
    return range(first, first + count)


# The graph.


def graph(**mixtures: Any) -> dict[str, Any]:
    train = {'kind': 'sft', 'parent': '', 'models': {}, 'steps': 10, 'save_every': 4, 'keep': 1}
    stages: dict[str, Any] = {name: {**train, 'mixture': ((0.0, {source: 1.0}),)} for name, source in mixtures.items()}
    stages['made'] = {'kind': 'attempts', 'models': {'generator': 'base@8'}, 'source': 'chats'}
    stages['base'] = {**train, 'mixture': ((0.0, {'text': 1.0}),)}
    stages['again'] = {'kind': 'revise', 'models': {'generator': 'base'}, 'source': 'made'}
    sources = {name: {'type': 'stage', 'name': name} for name in ('made', 'again', 'base')}
    return {'stages': stages, 'sources': {**sources, 'text': {'type': 'text'}, 'chats': {'type': 'jsonl'}}}


def test_records_order_the_run() -> None:
    config = graph(a='again', b='text')
    found = order(config)
    assert found.index('base') < found.index('made') < found.index('again') < found.index('a')
    for name in config['stages']:
        check_edges(config, name)
    # The step that `made` names is pinned: the last but one of 4, 8 and 10.
    assert steps_pinned(config, 'base') == [8] and steps_pinned(config, 'a') == []


def test_edges_that_cannot_be_are_refused() -> None:
    config = graph()
    config['stages']['base']['mixture'] = ((0.0, {'again': 1.0}),)
    with pytest.raises(InputError, match='expected no cycle'):
        order(config)
    for change, message in (
        ({'mixture': ((0.0, {'base': 1.0}),)}, "needs the records of 'base': expected a stage that makes some"),
        ({'parent': 'made'}, "needs a checkpoint of 'made', which makes records"),
        ({'models': {'reference': 'base@7'}}, r"needs 'base@7': base saves steps \[4, 8, 10\]"),
    ):
        config = graph(a='text')
        config['stages']['a'] |= change
        with pytest.raises(InputError, match=message):
            check_edges(config, 'a')
    config = graph(a='made')
    config['sources']['made']['name'] = 'maed'
    with pytest.raises(InputError, match="stages.a needs stage 'maed'; did you mean 'made'"):
        order(config)


# Recipes, by an endpoint that is told what to say.


def test_attempts_keep_what_the_committee_accepts(server: Server, tmp_path: Path, tokenizer_path: str) -> None:
    server.script = half_right
    judges = {'right': {'type': 'verifier'}, 'kind': {'type': 'prompt', 'model': 'critic'}}
    settings = functools.partial(add_answers, url=server.url, others=('critic',), judges=judges, rule='unanimous')
    run = Run(configured(settings, tokenizer_path), tmp_path)
    run('made')
    made, task = records(tmp_path / 'made'), get_task(**TASK, split='train')
    problems = {p.text: p for p in map(task.prompt, seeds(10))}
    assert {r['messages'][0]['content'] for r in made} == problems.keys() and len(made) == len(problems)
    for record in made:
        problem, origin = problems[record['messages'][0]['content']], record['provenance']
        assert task.verify(problem, record['messages'][1]['content']).score == 1
        assert origin['key'] == problem.key and problem == task.prompt(seeds(10)[origin['prompt']])
        assert origin['votes'] == {'right': [True, 1.0], 'kind': [True, 1.0]} and origin['generator'] == 'generator'
    finished = read_json(tmp_path / 'made' / 'finished.json')
    report = finished['report']
    assert report == read_json(tmp_path / 'made' / 'report.json')
    assert report['answers'] == 20 and report['records'] == len(made) and report['yield'] == len(made) / 20
    assert report['committee']['accepted'] == report['judges']['right']['accepted'] == 0.5
    assert report['agreement'] == {'pairs': {'kind, right': 1.0}, 'alpha': 1.0}
    assert report['cost']['generator generator']['completion_tokens'] == 60
    assert report['cost']['judge kind']['requests'] == 20
    assert finished['tokens'] == 10 * len(server.asked) and finished['fingerprint']
    asked = len(server.asked)
    Run(configured(settings, tokenizer_path), tmp_path)('made')  # finished before
    assert len(server.asked) == asked


@pytest.mark.parametrize('into', ['text', 'question', 'prompt'])
def test_texts_are_rewritten_and_curated(into: str, server: Server, tmp_path: Path, tokenizer_path: str) -> None:
    """The model turns texts round; of the results a judge takes those that begin with an even number."""

    def script(handler: Any, prompt: str, number: int) -> bool:
        if 'Verdict' in prompt:
            shown = prompt[prompt.index('<answer>') + len('<answer>') :]
            assert ('<answer>text' in prompt) == (into == 'question')
            digit = shown.partition('</answer>')[0].replace('text', '').replace('txet', '')
            reply = f'Verdict: {"REJECT" if int(digit) % 2 else "ACCEPT"}'
        else:
            assert prompt.startswith('About:')
            reply = prompt.removeprefix('About: ')[::-1]
        return handler.reply(200, completion(reply))

    server.script = script
    texts = tmp_path / 'texts.jsonl'
    texts.write_text(''.join(json.dumps({'text': f'text {i}'}) + '\n' for i in range(6)))

    def settings(config: ConfigDict) -> None:
        config.sources.texts = ConfigDict({'type': 'jsonl', 'path': str(texts)})
        judges = {'kind': {'type': 'prompt', 'model': 'critic'}}
        fields = {'task': {'name': ''}, 'source': 'texts', 'prompts': 6, 'samples': 1, 'judges': judges}
        add_answers(config, server.url, 'rewrite', others=('critic',), template='About: {text}', into=into, **fields)

    run = Run(configured(settings, tokenizer_path), tmp_path / 'run')
    run('made')
    made = [
        {name: x for name, x in record.items() if name != 'provenance'} for record in records(tmp_path / 'run/made')
    ]
    user = lambda text: {'role': 'user', 'content': text}  # noqa: E731
    expected: dict[str, Callable[[int], dict[str, Any]]] = {
        'text': lambda i: {'text': f'{i} txet'},
        'question': lambda i: {'messages': [user(f'{i} txet'), {'role': 'assistant', 'content': f'text {i}'}]},
        'prompt': lambda i: {'messages': [user(f'{i} txet')]},
    }
    key = functools.partial(json.dumps, sort_keys=True)
    assert sorted(map(key, made)) == sorted(key(expected[into](i)) for i in (0, 2, 4))
    for field, value, message in (
        ('template', 'reprase', "template is 'reprase': expected one of rephrase, questions, "),
        ('into', 'questoin', "into is 'questoin'; did you mean 'question'"),
    ):
        config = configured(settings, tokenizer_path)
        config['stages']['made'] |= {field: value}
        with pytest.raises(InputError, match=message):
            Run(config, tmp_path / 'other')('made')


def test_the_truth_has_no_vote(server: Server, tmp_path: Path, tokenizer_path: str) -> None:
    server.script = half_right
    judges = {'right': {'type': 'verifier'}, 'kind': {'type': 'prompt', 'model': 'critic'}}
    fields = {'others': ('critic',), 'judges': judges, 'rule': 'weighted', 'weights': {'kind': -1.0}, 'truth': 'right'}
    Run(configured(functools.partial(add_answers, url=server.url, **fields), tokenizer_path), tmp_path)('made')
    made = records(tmp_path / 'made')
    assert made and all(r['provenance']['votes']['right'][0] is False for r in made)  # what the critic refuses is kept
    said = read_json(tmp_path / 'made' / 'report.json')
    assert said['precision']['committee'] == 0.0 and said['precision']['judges']['kind']['share'] == 1.0


def test_the_best_answer_of_each_prompt() -> None:
    def record(prompt: int, score: float, *given: float | None) -> dict[str, Any]:
        votes = {str(i): list(Vote(None) if x is None else Vote(True, x)) for i, x in enumerate(given)}
        return {'provenance': {'prompt': prompt, 'score': score, 'votes': votes}}

    made = [record(0, 0.5, 1.0), record(0, 1.0, 0.2), record(0, 1.0, 0.9), record(0, 1.0, 0.9), record(3, 0.1, None)]
    assert best(made) == [made[2], made[4]] and best(made)[0] is made[2]


@pytest.mark.parametrize('form', ['completion', 'text'])
def test_records_of_other_forms_and_without_doubles(
    form: str, server: Server, tmp_path: Path, tokenizer_path: str
) -> None:
    """A source of chats whose prompts repeat: the answer that follows them is not seen, and one record is made."""
    chats = tmp_path / 'chats.jsonl'
    turns = [{'role': 'user', 'content': 'hello'}, {'role': 'assistant', 'content': 'old'}]
    named = [[{'role': 'user', 'content': f'say {i}'}] for i in range(4)]
    chats.write_text(''.join(json.dumps({'messages': m}) + '\n' for m in [turns, turns, turns, *named]))

    def settings(config: ConfigDict) -> None:
        judges = {'any': {'type': 'prompt', 'model': 'generator'}}
        config.sources.chats = ConfigDict({'type': 'jsonl', 'path': str(chats)})
        add_answers(config, server.url, task={'name': ''}, source='chats', prompts=7, judges=judges, format=form)

    server.script = lambda handler, prompt, _: handler.reply(
        200, completion('Verdict: ACCEPT' if 'Verdict' in prompt else prompt.upper())
    )
    Run(configured(settings, tokenizer_path), tmp_path / 'run')('made')
    made = records(tmp_path / 'run' / 'made')
    said = {'hello', *(f'say {i}' for i in range(4))}
    expected = [
        {'text': f'{x}\n{x.upper()}'} if form == 'text' else {'prompt': f'{x}\n', 'completion': x.upper()} for x in said
    ]
    found = [{name: x for name, x in record.items() if name != 'provenance'} for record in made]
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert read_json(tmp_path / 'run' / 'made' / 'report.json')['duplicates'] == 14 - 5


def test_revisions_are_chats_to_learn_from(server: Server, tmp_path: Path, tokenizer_path: str) -> None:
    def script(handler: Any, prompt: str, number: int) -> bool:
        reply = 'too long' if 'Say precisely' in prompt else 'short' if 'Write the answer anew' in prompt else 'long'
        return handler.reply(200, completion(reply))

    server.script = script
    (tmp_path / 'principles.txt').write_text('Be brief.\n')
    fields = {'principles': str(tmp_path / 'principles.txt'), 'rounds': 1, 'prompts': 3, 'block': 2}

    def settings(config: ConfigDict) -> None:
        endpoints = {'generator': {'url': server.url, 'model': 'm'}}
        add_stage(config, 'made', 'revise', endpoints=endpoints, task=TASK, **fields)

    Run(configured(settings, tokenizer_path), tmp_path / 'run')('made')
    made = records(tmp_path / 'run' / 'made')
    assert len(made) == 3 and all(record['messages'][-1]['content'] == 'short' for record in made)
    origin = made[2]['provenance']
    assert origin['first'] == 'long' and origin['prompt'] == 2
    assert origin['rounds'] == [{'principle': 'Be brief.', 'critique': 'too long', 'revision': 'short'}]
    report = read_json(tmp_path / 'run' / 'made' / 'report.json')
    assert report['yield'] == 1.0 and report['generators'] == {'generator': {'accepted': 1.0, 'abstained': 0.0}}


def test_labels_are_pairs_that_a_stage_learns_from(server: Server, tmp_path: Path, tokenizer_path: str) -> None:
    """A judge who likes long answers; two steps of DPO on what it said."""

    def script(handler: Any, prompt: str, number: int) -> bool:
        if '<answer A>' not in prompt:
            return handler.reply(200, completion(f'answer {"!" * number}'))
        a, b = (len(prompt.split(f'<answer {c}>')[1].split('</')[0]) for c in 'AB')
        p = 0.8 if a > b else 0.2
        top = [{'token': 'A', 'logprob': np.log(p)}, {'token': 'B', 'logprob': np.log(1 - p)}]
        return handler.reply(200, completion('A', logprobs={'content': [{'top_logprobs': top}]}))

    server.script = script

    def settings(config: ConfigDict) -> None:
        judges = {'long': {'type': 'letters', 'model': 'judge'}, 'right': {'type': 'verifier'}}
        add_answers(config, server.url, 'label', others=('judge',), samples=4, judges=judges)
        config.stages.pretrain.steps = 1
        add_stage(
            config,
            'dpo',
            'dpo',
            models={'reference': 'pretrain'},
            parent='pretrain',
            steps=2,
            batch_size=4,
            records=4,
            sequence_length=64,
            mixture=((0.0, {'made': 1.0}),),
            optimizer={'name': 'adamw'},
        )

    run = Run(configured(settings, tokenizer_path), tmp_path)
    assert run.order.index('made') < run.order.index('dpo')
    run()
    made = records(tmp_path / 'made')
    assert len(made) == 10 * 2
    for record in made:
        pair = as_pair(record)
        assert len(pair.chosen) > len(pair.rejected) and pair.probability == pytest.approx(0.8)
        # Both are wrong, of which the verifier says nothing.
        votes = record['provenance']['votes']
        assert max(votes['long'], 1 - votes['long']) == pytest.approx(0.8) and votes['right'] is None
        assert record['provenance']['answers'][0][0] == 'generator'
    report = read_json(tmp_path / 'made' / 'report.json')
    assert report['judges'] == {
        'long': {'accepted': 0.5, 'abstained': 0.0},
        'right': {'accepted': None, 'abstained': 1.0},
    }
    assert report['generators']['generator']['accepted'] == 0.5
    lineage = {stage['name']: stage for stage in read_json(tmp_path / 'lineage.json')['stages']}
    assert lineage['dpo']['records'] == ['made'] and lineage['made']['kind'] == 'label'
    losses = [json.loads(line)['loss'] for line in (tmp_path / 'dpo' / 'metrics.jsonl').read_text().splitlines()]
    assert len(losses) == 2 and losses[0] == pytest.approx(np.log(2), abs=0.3)


# Resuming, and checkpoints.


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with `pretrain` of `configured` in it, checkpoints of steps 2, 4 and 6 included."""
    folder = tmp_path_factory.mktemp('trained')
    small_tokenizer().save(folder / 'tokenizer')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('train.launch.graph.make_mesh', lambda sizes: one_device())
        Run(configured(add_merged), folder)('pretrain')
    return folder


def add_merged(config: ConfigDict) -> None:
    parents = ('pretrain@2', 'pretrain@4', 'pretrain')
    add_stage(config, 'merged', 'merge', parents=parents, weights=(1.0, 2.0, 3.0))


def add_tried(config: ConfigDict, name: str) -> None:
    """Anything that ends is accepted: the model knows nothing. Both stages draw alike."""
    models = {'generator': 'pretrain', 'generator_early': 'pretrain@4', 'judge': 'pretrain@2'}
    judges = {'any': {'type': 'likelihood', 'model': 'judge', 'threshold': -100.0}}
    fields = {'models': models, 'judges': judges, 'task': TASK, 'prompts': 5, 'block': 2, 'samples': 4}
    add_merged(config)
    add_stage(config, name, 'attempts', max_tokens=64, **fields)


def test_a_killed_stage_makes_the_same_records(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead in its second of three blocks, and again before all records stand together."""
    monkeypatch.setattr('train.stages.Context.stream_seed', 5)
    settings = functools.partial(add_tried, name='whole')
    Run(configured(settings), trained)('whole')
    make, calls = Maker.__call__, []

    def dying(maker: Maker, number: int) -> Any:
        calls.append(number)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return make(maker, number)

    monkeypatch.setattr(Maker, '__call__', dying)
    settings = functools.partial(add_tried, name='killed')
    with pytest.raises(KeyboardInterrupt):
        Run(configured(settings), trained)('killed')
    blocks = trained / 'killed' / 'blocks'
    assert sorted(p.name for p in blocks.iterdir()) == ['000000.json', '000000.jsonl']
    (blocks / '000001.json').write_text('{"duplicates": 7')  # what a kill between the two files of a block leaves
    (blocks / '000001.tmp').write_text('{"mess')
    with monkeypatch.context() as patch:
        patch.setattr('train.act.make.prepare', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Run(configured(settings), trained)('killed')
    Run(configured(settings), trained)('killed')
    assert calls == [0, 1, 1, 2]
    one, other = (read_json(trained / name / 'finished.json') for name in ('whole', 'killed'))
    for field in ('fingerprint', 'report', 'tokens', 'flops', 'models'):
        assert one[field] == other[field], field
    assert records(trained / 'whole') == records(trained / 'killed') and one['flops'] > 0
    generators = {record['provenance']['generator'] for record in records(trained / 'whole')}
    assert generators == {'generator', 'generator_early'} and one['report']['yield'] > 0
    assert max(record['provenance']['prompt'] for record in records(trained / 'whole')) > 1  # numbers of all blocks


def test_a_merge_is_the_mean_and_stages_go_on_from_it(trained: Path) -> None:
    def settings(config: ConfigDict) -> None:
        add_merged(config)
        fields = {'steps': 1, 'batch_size': 2, 'sequence_length': 64, 'optimizer': {'name': 'adamw'}}
        add_stage(config, 'sft', 'sft', parent='merged', mixture=((0.0, {'arithmetic_chat': 1.0}),), **fields)
        add_stage(config, 'more', 'midtrain', parent='merged', mixture=((0.0, {'arithmetic_chat': 1.0}),), **fields)

    run = Run(configured(settings), trained)
    run('sft')
    with pytest.raises(InputError, match="more.keep_optimizer is True: expected False, as 'merged' has no optimizer"):
        run('more')
    with pytest.raises(InputError, match='no state of an optimizer in it: expected keep_optimizer = False'):
        run.begin('more')  # as from a folder, of which nothing is known before
    shapes = run._model('pretrain').shapes(run.mesh)
    parts = [run._restore('pretrain', step, shapes)[0] for step in (2, 4, 6)]
    merged, metadata = run._restore('merged', None, shapes)
    leaves = zip(*(jax.tree.leaves(tree) for tree in (merged, *parts)), strict=True)
    for mean, *some in leaves:
        expected = np.average(np.array(some, np.float64), axis=0, weights=[1, 2, 3])
        np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-7 * np.abs(some).max())
    assert not np.array_equal(np.asarray(some[0]), np.asarray(some[2]))
    assert metadata['tokens'] == run._restore('pretrain', 6, shapes)[1]['tokens']
    state = run.begin('sft')[1]
    for a, b in zip(jax.tree.leaves(state['params']), jax.tree.leaves(merged['params']), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    finished = read_json(trained / 'merged' / 'finished.json')
    assert (finished['parent'], finished['models']) == (
        'pretrain@2',
        {'parent 2': 'pretrain@4', 'parent 3': 'pretrain'},
    )
    assert read_json(trained / 'sft' / 'finished.json')['changed'] == []


def test_shares_of_a_merge() -> None:
    three = {'parents': ('a', 'b', 'c'), 'weights': (), 'decay': 1.0}
    assert merge_weights(three) == pytest.approx([1 / 3] * 3)
    assert merge_weights({**three, 'decay': 0.5}) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert merge_weights({**three, 'weights': (1, 0, 3)}) == [0.25, 0.0, 0.75]
    for change, message in (
        ({'parents': ('a',)}, 'expected the addresses of two checkpoints'),
        ({'weights': (1, 2)}, 'expected 3 numbers'),
        ({'weights': (1, -2, 3)}, 'expected 3 numbers of at least 0'),
        ({'decay': 0.0}, 'decay is 0.0'),
        ({'decay': 0.5, 'weights': (1, 2, 3)}, 'decay is 0.5'),
    ):
        with pytest.raises(InputError, match=message):
            merge_weights({**three, **change})


def test_models_of_two_shapes_are_not_merged(trained: Path) -> None:
    def settings(config: ConfigDict) -> None:
        add_stage(config, 'other', 'pretrain', model={'rope_theta': 7.0}, mixture=((0.0, {'arithmetic': 1.0}),))
        add_merged(config)
        add_stage(config, 'mixed', 'merge', parents=('pretrain', 'other'))

    with pytest.raises(InputError, match="'pretrain' has model.rope_theta = 500.0, 'other' 7.0: expected"):
        Run(configured(settings), trained)('mixed')


@pytest.mark.parametrize(
    ('kind', 'fields', 'message'),
    [
        ('attempts', {'models': {'judg': 'pretrain'}}, 'models.judg: unknown role'),
        ('attempts', {'prompts': 0}, 'prompts is 0: expected 1 or more'),
        ('attempts', {'judges': {}}, 'judges is empty: expected some'),
        ('attempts', {'models': {'generator': ''}}, 'models.generator is empty'),
        ('attempts', {'task': {'name': ''}}, 'task.name and source: expected one of them'),
        ('attempts', {'source': 'chts', 'task': {'name': ''}}, "source: no source 'chts'"),
        ('attempts', {'judges': {'a': {'type': 'verifer'}}}, "judges.a: type 'verifer'; did you mean 'verifier'"),
        ('attempts', {'judges': {'a': {'type': 'prompt'}}}, "judges.a prompt: missing a required argument: 'model'"),
        ('attempts', {'judges': {'a': {'type': 'prompt', 'model': 'jugde'}}}, "judge a: no model or endpoint 'jugde'"),
        ('attempts', {'judges': {'a': {'type': 'reward', 'model': 'generator'}}}, 'without a value head'),
        (
            'attempts',
            {
                'endpoints': {'e': {'url': 'http://localhost:1', 'model': 'm'}},
                'judges': {'a': {'type': 'reward', 'model': 'e'}},
            },
            'an endpoint gives whole answers no likelihood',
        ),
        ('attempts', {'rule': 'majorty'}, "rule is 'majorty'; did you mean 'majority'"),
        ('attempts', {'rule': 'weighted', 'weights': {'b': 1.0}}, "weights: none for judge 'a'"),
        ('attempts', {'select': 'some'}, "select is 'some'"),
        ('attempts', {'truth': 'rihgt'}, "truth is 'rihgt'; expected one of a"),
        ('label', {'judges': {}}, 'judges is empty'),
        ('revise', {}, 'expected a text file of principles'),
    ],
)
def test_settings_that_cannot_work_are_refused(kind: str, fields: dict[str, Any], message: str, trained: Path) -> None:
    common: dict[str, Any] = {'models': {'generator': 'pretrain'}, 'task': TASK}
    if kind != 'revise':
        common['judges'] = {'a': {'type': 'verifier'}}

    def settings(config: ConfigDict) -> None:
        add_merged(config)
        add_stage(config, 'bad', kind, **{**common, **{k: v for k, v in fields.items() if k != 'models'}})
        config.stages.bad.models.update(fields.get('models', {}))
        if fields.get('judges') == {}:
            config.stages.bad.judges = ConfigDict()

    with pytest.raises(InputError, match=message) as error:
        Run(configured(settings), trained)('bad')
    assert '\n' not in str(error.value) and str(error.value).startswith('stages.bad')
    assert not (trained / 'bad' / 'config.json').exists()


# The command.


def test_one_stage_alone_finds_what_it_needs_in_a_run() -> None:
    config = graph(a='made')
    with pytest.raises(InputError, match='--stage is missing: made, again of this config makes records'):
        alone(config, '', 'runs/x')
    with pytest.raises(InputError, match="no stage 'a' that makes records"):
        alone(config, 'a', 'runs/x')
    with pytest.raises(InputError, match="stages.made.models.generator needs stage 'base@8': expected --workdir"):
        alone(config, 'made', '')
    found = alone(config, 'again', 'runs/x')
    assert order(found) == ['again'] and found['stages']['again']['models'] == {'generator': 'runs/x/base'}
    assert found['sources']['made'] == {'type': 'arrayrecord', 'path': 'runs/x/made/records'}
    assert config['stages']['again']['models'] == {'generator': 'base'}


def test_the_command_writes_records(
    server: Server, root: Path, one_device: dict[str, str], tmp_path: Path, tokenizer_path: str
) -> None:
    server.script = half_right
    endpoints = {'generator': {'url': server.url, 'model': 'm'}}
    fields = f"endpoints={endpoints}, task={TASK}, judges={{'right': {{'type': 'verifier'}}}}, prompts=10, samples=2"
    (tmp_path / 'config.py').write_text(
        'from tests.small import get_config as small\nfrom configs.base import add_stage\n'
        f"def get_config():\n    config = small()\n    add_stage(config, 'made', 'attempts', {fields})\n"
        '    return config\n'
    )
    line = [
        sys.executable,
        '-m',
        'train.synthesize',
        f'--config={tmp_path / "config.py"}',
        f'--output={tmp_path / "o"}',
    ]
    line.append(f'--config.tokenizer.path={tokenizer_path}')
    done = subprocess.run(line, cwd=root, env=one_device, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f'records of 20 answers in {tmp_path}/o/made/records' in done.stdout
    assert len(records(tmp_path / 'o' / 'made')) == read_json(tmp_path / 'o' / 'made' / 'report.json')['records'] > 0
