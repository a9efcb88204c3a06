"""The train loop and the graph of stages: new kinds, appended stages, interrupted runs, and learning by heart."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from small import get_config, one_device
from text import small_tokenizer

from configs.base import add_stage
from data.errors import InputError
from data.mixture import as_dict
from data.packing import Batch, RowWriter, empty_batch, encode_record
from data.prepare import prepare
from data.stream import State as StreamState
from data.tasks import Prompt, Verdict, final_answer
from model.adapters import merge_adapters
from train import stages
from train.act.rollout import RolloutStream
from train.checkpoint import Checkpoints, read_json
from train.launch.edges import order
from train.launch.graph import Run
from train.learn.objectives import next_token
from train.learn.step import initial_state
from train.learn.streams import Context
from train.loop import train
from train.stages import Kind, register

Settings = Callable[[ConfigDict], Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on one of the fake devices (eight of them wait for each other most of the time), with its own kinds."""
    monkeypatch.setattr('train.launch.graph.make_mesh', lambda sizes: one_device())
    monkeypatch.setattr(stages, 'KINDS', dict(stages.KINDS))


@pytest.fixture
def run(tmp_path: Path, tokenizer_path: str) -> Callable[..., Run]:
    """Makes the run of the small config's named stages, with settings of the test, in one workdir.

    Where `light`, its model is dense and its optimizer AdamW: it does not matter there, and compiles faster.
    """

    def make(*names: str, settings: Settings | None = None, light: bool = False) -> Run:
        config = get_config()
        config.tokenizer.path = tokenizer_path
        for name in set(config.stages) - set(names):
            del config.stages[name]
        # Sums in the place of the standard library, which takes a second to read.
        config.stages.pretrain.update(mixture=((0.0, {'arithmetic': 1.0}),), sequence_length=32)
        if settings is not None:
            settings(config)
        if light:
            config.model.n_routed_experts = 0
            for stage in config.stages.values():
                stage.optimizer.name = 'adamw'
        return Run(as_dict(config.to_dict()), tmp_path / 'work', 'python -m train')

    return make


def metrics(folder: Path, name: str = 'metrics.jsonl') -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def saved(folder: Path) -> dict[str, str]:
    """The fingerprints of the last checkpoint's params."""
    steps = [int(p.name) for p in (folder / 'checkpoints').iterdir() if p.name.isdigit()]
    checkpoints = Checkpoints(folder / 'checkpoints', read_only=True)
    restored = checkpoints.restore({}, max(steps))
    checkpoints.close()
    assert restored is not None
    return restored.metadata['arrays']['params']


class Constant:
    """A stream of one batch, over and over."""

    def __init__(self, batch: Batch):
        self.batch, self.rows = batch, range(len(batch.get('tokens', (0, 1))))
        self.asked: list[int] = []

    def next(self, step: int, variables: Any = None) -> tuple[Batch, StreamState]:
        self.asked.append(step)
        return self.batch, {'step': step + 1}

    def restore(self, state: StreamState) -> None:
        self.asked.append(-state['step'])

    def close(self) -> None:
        pass


def rows(records: list[dict[str, Any]], length: int) -> Batch:
    """A batch with a record a row."""
    tokenizer = small_tokenizer()
    batch = empty_batch(len(records), length, tokenizer.pad_id)
    for row, record in enumerate(records):
        RowWriter(batch, row).write(*encode_record(record, tokenizer))
    return batch


def test_a_new_kind_is_one_registration_and_an_appended_stage_runs_alone(run: Any, capsys: Any) -> None:
    """A kind that unlearns: the same terms with the opposite sign, on a stream and with a field of its own."""
    run('pretrain', light=True)()
    workdir = run('pretrain', light=True).workdir
    before = contents(workdir / 'pretrain')

    def stream(context: Context) -> Constant:
        assert context.config['word'] == 'spam' and context.sources
        return Constant(rows([{'text': context.config['word']}] * context.config['batch_size'], 32))

    def objective(settings: Any) -> Any:
        return dataclasses.replace(next_token(), coefficients={'next_token': -1.0})

    register('unlearn', Kind({'word': 'ham', 'optimizer': {'schedule': 'constant'}}, objective, stream))

    def append(config: ConfigDict) -> None:
        add_stage(config, 'forget', 'unlearn', parent='pretrain', word='spam', steps=3, batch_size=2)

    capsys.readouterr()
    run('pretrain', settings=append, light=True)()
    assert 'pretrain: finished before' in capsys.readouterr().out
    assert contents(workdir / 'pretrain') == before
    lines = metrics(workdir / 'forget')
    assert [line['step'] for line in lines] == [1, 2, 3]
    assert lines[-1]['next_token_loss'] > lines[0]['next_token_loss'] > 0 > lines[0]['loss']
    assert lines[0]['tokens'] > metrics(workdir / 'pretrain')[-1]['tokens']  # totals go on over the lineage
    record = read_json(workdir / 'lineage.json')['stages']
    assert [(s['name'], s['kind'], s['parent'], s['steps']) for s in record] == [
        ('pretrain', 'pretrain', '', 5),
        ('forget', 'unlearn', 'pretrain', 3),
    ]
    # And a config that has never heard of it leaves it in the record.
    run('pretrain', light=True)()
    assert {s['name'] for s in read_json(workdir / 'lineage.json')['stages']} == {'pretrain', 'forget'}


def test_no_stage_outlives_a_fix_of_its_data(run: Any, tmp_path: Path) -> None:
    """The fingerprint of the records is in every checkpoint, and with other records in their place nothing goes on."""

    def prepared(words: str) -> str:
        shutil.rmtree(tmp_path / 'records', ignore_errors=True)
        (tmp_path / 'in.jsonl').write_text(json.dumps({'text': words * 40}) + '\n')
        made = prepare({'type': 'jsonl', 'path': str(tmp_path / 'in.jsonl')}, tmp_path / 'records')
        return str(made['fingerprint'])

    def settings(config: ConfigDict) -> None:
        config.sources.records = ConfigDict({'type': 'arrayrecord', 'path': str(tmp_path / 'records')})
        config.stages.pretrain.update(mixture=((0.0, {'records': 1.0}),), steps=2)

    made = prepared('some words ')
    run('pretrain', settings=settings, light=True)()
    metadata = next((tmp_path / 'work' / 'pretrain' / 'checkpoints').glob('*/metadata/metadata'))
    assert read_json(metadata)['data'] == {'records': made}
    run('pretrain', settings=settings, light=True)()
    prepared('other words ')
    with pytest.raises(InputError, match=f"data.records = '{made}', the config now says"):
        run('pretrain', settings=settings, light=True)()


def test_a_finished_stage_with_other_settings_is_refused_and_nothing_lost(run: Any) -> None:
    run('pretrain', light=True)()
    folder = run('pretrain', light=True).workdir
    before = contents(folder)

    def changed(field: str, value: Any) -> Settings:
        return lambda config: config.update_from_flattened_dict({field: value})

    for field, value, shown in (
        ('stages.pretrain.steps', 6, 'stage.steps = 5, the config now says 6'),
        ('stages.pretrain.optimizer.beta2', 0.5, 'stage.optimizer.beta2'),
        ('model.rope_theta', 77.0, 'model.rope_theta'),
        ('seed', 3, 'seed = 0, the config now says 3'),
    ):
        with pytest.raises(InputError, match=shown) as error:
            run('pretrain', settings=changed(field, value), light=True)()
        assert str(folder / 'pretrain') in str(error.value) and '\n' not in str(error.value)
    # What does not change the result may change.
    run('pretrain', settings=changed('stages.pretrain.save_every', 3), light=True)()
    beside = {'lineage.json', 'goodput.json'}
    after = contents(folder)
    assert all(after[name] == before[name] for name in (after.keys() | before.keys()) - beside)


def test_graphs_that_cannot_run_are_refused(run: Any) -> None:
    def parent(name: str) -> Settings:
        return lambda config: config.stages.pretrain.update(parent=name)

    with pytest.raises(InputError, match="stages.pretrain needs stage 'midtrian'; did you mean 'midtrain'"):
        run('pretrain', 'midtrain', settings=parent('midtrian'))
    with pytest.raises(InputError, match='expected no cycle'):
        run('pretrain', 'midtrain', settings=parent('midtrain'))
    with pytest.raises(InputError, match="no stage 'pretran'; did you mean 'pretrain'"):
        run('pretrain')('pretran')
    for expression, shown in (('q_projj', "expected a part of some parameter's path"), ('(', 'missing')):
        with pytest.raises(InputError, match='stages.pretrain.trainable is .*' + shown):
            run('pretrain', settings=lambda c, e=expression: c.stages.pretrain.update(trainable=e), light=True)()
    everything = as_dict(get_config().stages.to_dict())
    assert order({'stages': dict(sorted(everything.items())), 'sources': {}}) == ['pretrain', 'midtrain', 'sft', 'grpo']


@pytest.mark.parametrize(
    ('sources', 'shown'),
    [((), 'tokenizer.sources is empty'), (('stlib',), "no source 'stlib'; did you mean 'stdlib'")],
)
def test_a_tokenizer_needs_something_to_learn_from(run: Callable[..., Run], sources: Any, shown: str) -> None:
    with pytest.raises(InputError, match=shown):
        run('pretrain', settings=lambda config: config.tokenizer.update(path='', sources=sources))


class Failing(Constant):
    """A stream that gives a batch of its own for every step, and dies before one of them the first time."""

    died = False

    def next(self, step: int, variables: Any = None) -> tuple[Batch, StreamState]:
        if step == 5 and not type(self).died:
            type(self).died = True
            raise KeyboardInterrupt
        self.asked.append(step)
        text = [{'text': f'{step} and {step + row}'} for row in range(2)]
        return rows(text, 32), {'step': step + 1, 'metrics': {'marker': float(step)}}


def test_an_interrupted_stage_goes_on_and_its_metrics_have_every_step_once(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 5, of which step 4 was saved; beside it the same stage without a kill."""
    made: list[Failing] = []

    def stream(context: Context) -> Failing:
        made.append(Failing({}))
        return made[-1]

    register('counting', Kind({}, lambda _: next_token(), stream))

    def settings(config: ConfigDict) -> None:
        for name in ('killed', 'whole'):
            add_stage(config, name, 'counting', steps=7, batch_size=2, sequence_length=32, save_every=2)
        del config.stages['pretrain']

    monkeypatch.setattr(Failing, 'died', False)
    with pytest.raises(KeyboardInterrupt):
        run('pretrain', settings=settings, light=True)('killed')
    folder = run('pretrain', settings=settings, light=True).workdir / 'killed'
    assert [line['step'] for line in metrics(folder)] == [1, 2, 3, 4]
    with (folder / 'metrics.jsonl').open('a') as lines:  # what a later death would leave: step 5, and half a line
        lines.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    assert not (folder / 'finished.json').exists()
    run('pretrain', settings=settings, light=True)()
    # Streams are also made, and not used, to check every stage before the first one runs.
    asked = [stream.asked for stream in made if stream.asked]
    assert asked == [[0, 1, 2, 3, 4], [-4, 4, 5, 6], list(range(7))]
    assert [(line['step'], line['marker']) for line in metrics(folder)] == [(n, n - 1) for n in range(1, 8)]
    replayed = (folder / 'metrics.replayed.jsonl').read_text()
    assert replayed == '{"step": 5, "loss": 1.0}\n{"step": 6, "lo\n'
    whole = folder.with_name('whole')
    assert saved(folder) == saved(whole)
    for a, b in zip(metrics(folder), metrics(whole), strict=True):
        assert all(a[name] == b[name] for name in (a.keys() | b.keys()) - {'tokens_per_second', 'goodput'})
    # Once more: everything is finished, nothing runs.
    run('pretrain', settings=settings, light=True)()
    assert len(made) == 6


@pytest.mark.parametrize('kind', ['pretrain', pytest.param('midtrain', marks=pytest.mark.slow), 'sft'])
def test_one_batch_is_learnt_by_heart(kind: str, run: Any) -> None:
    """With the stage's own stream, objective and optimizer."""

    def settings(config: ConfigDict) -> None:
        for stage in config.stages.values():
            stage.update(steps=130, save_every=1000, batch_size=2, mixture=((0.0, {'arithmetic': 1.0}),))
            stage.optimizer.learning_rate = 0.02
        config.stages.sft.mixture = ((0.0, {'arithmetic_chat': 1.0}),)
        # In longer rows, documents that begin alike and go on differently leave something that cannot be learnt.
        config.stages.midtrain.sequence_length = 32

    made = run('pretrain', 'midtrain', 'sft', settings=settings)
    plan, state = made.begin(kind, fresh=True)
    batch, _ = plan.stream.next(0)
    plan.stream.close()
    (made.workdir / kind).mkdir()
    train(dataclasses.replace(plan, stream=Constant(batch)), state)
    lines = metrics(made.workdir / kind)
    assert lines[0]['loss'] > 4.0
    assert lines[-1]['next_token_loss'] < 0.05
    assert lines[-1]['loss'] < 0.06  # with the regularizers


class OneProblem:
    """The same question always; one of the four answers that a model was taught is right."""

    name = 'one'

    def prompt(self, index: int) -> Prompt:
        return Prompt('Which of the four?', 'Answer: 3', 'one', {})

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        return Verdict(float(final_answer(completion) == '3'))


def test_grpo_takes_the_reward_on_one_prompt_to_one(run: Any) -> None:
    def settings(config: ConfigDict) -> None:
        config.stages.sft.update(steps=40, save_every=1000, batch_size=4)
        config.stages.sft.optimizer.learning_rate = 0.02
        config.stages.grpo.update(steps=50, save_every=1000, prompts=1, samples=16, batch_size=16, microbatches=1)
        config.stages.grpo.temperature = 1.0  # warmer samples go on being wrong now and then
        config.stages.grpo.optimizer.learning_rate = 0.003

    made = run('pretrain', 'midtrain', 'sft', 'grpo', settings=settings)
    problem = OneProblem().prompt(0)
    chats = [
        {'messages': [{'role': 'user', 'content': problem.text}, {'role': 'assistant', 'content': f'Answer: {n}'}]}
        for n in range(1, 5)
    ]
    plan, state = made.begin('sft', fresh=True)
    for name in ('sft', 'grpo'):
        (made.workdir / name).mkdir()
    state, _ = train(dataclasses.replace(plan, stream=Constant(rows(chats, 96))), state)

    plan, _ = made.begin('grpo', fresh=True)
    stage = made.stages['grpo']
    stream = RolloutStream(plan.model, small_tokenizer(), [OneProblem()], stage, seed=0)  # type: ignore[arg-type]
    with jax.set_mesh(plan.layout.mesh):
        state = initial_state({name: state[name] for name in ('params', 'balance')}, plan.optimizer)
    train(dataclasses.replace(plan, stream=stream), state)
    rewards = [line['reward/mean'] for line in metrics(made.workdir / 'grpo')]
    assert 0.0 < np.mean(rewards[:2]) < 0.7
    assert np.mean(rewards[-5:]) > 0.97


def test_a_stage_hands_over_what_it_should(run: Any) -> None:
    """Params and balance go on, the step starts again; with `keep_optimizer` its state goes on as well."""
    run('pretrain')()
    for keep in (False, True):

        def settings(config: ConfigDict, keep: bool = keep) -> None:
            config.stages.midtrain.update(keep_optimizer=keep, model=ConfigDict({}))

        made = run('pretrain', 'midtrain', settings=settings)
        plan, state = made.begin('midtrain')
        assert int(state['step']) == 0 and plan.tokens == metrics(made.workdir / 'pretrain')[-1]['tokens']
        parent = made.begin('pretrain')[1]
        arrays, _ = made._restore('pretrain', None, {n: parent[n] for n in ('params', 'balance', 'optimizer')})
        for name in ('params', 'balance', 'optimizer') if keep else ('params', 'balance'):
            for a, b in zip(jax.tree.leaves(state[name]), jax.tree.leaves(arrays[name]), strict=True):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)
        leaves = jax.tree_util.tree_leaves_with_path(state['optimizer'])
        momentum = [float(abs(x).max()) for path, x in leaves if '.mu[' in jax.tree_util.keystr(path)]
        assert momentum and (max(momentum) > 0) == keep


def test_a_stage_may_have_other_parameters_than_its_parent(run: Any) -> None:
    """What both have is handed over; what is new is as in a model from scratch; what is gone is not read."""
    run('pretrain', light=True)()

    def settings(config: ConfigDict, keep: bool = False) -> None:
        model = ConfigDict({'value_head': True, 'num_nextn_predict_layers': 1})
        config.stages.midtrain.update(model=model, seed=7, keep_optimizer=keep)
        config.stages.sft.update(model=ConfigDict({'num_nextn_predict_layers': 0}))

    made = run('pretrain', 'midtrain', 'sft', settings=settings, light=True)
    before = made.begin('pretrain', fresh=True)[1]['params']
    trained, _ = made._restore('pretrain', None, {'params': before})
    plan, state = made.begin('midtrain')
    fresh = plan.model.init(7, made.mesh)['params']
    assert fresh.keys() - before.keys() == {'value_head', 'multi_token_1'}
    for path, x in jax.tree_util.tree_leaves_with_path(state['params']):
        source = trained['params'] if path[0].key in before else fresh
        expected = dict(jax.tree_util.tree_leaves_with_path(source))[path]
        np.testing.assert_array_equal(np.asarray(x), np.asarray(expected), err_msg=jax.tree_util.keystr(path))
    made('midtrain')
    state = made.begin('sft')[1]
    assert state['params'].keys() == before.keys() | {'value_head'}
    # The optimizer of one cannot go on with the other.
    other = run('pretrain', 'midtrain', 'sft', settings=functools.partial(settings, keep=True), light=True)
    other.workdir = other.workdir.with_name('other')
    with pytest.raises(InputError, match='stages.midtrain.keep_optimizer is True: expected False, as the stage has'):
        other('midtrain')


def test_adapters_train_alone_and_are_merged_where_a_stage_has_none(run: Any) -> None:
    run('pretrain', light=True)()

    def settings(config: ConfigDict, keep: bool = False) -> None:
        config.stages.midtrain.update(model=ConfigDict({'lora_rank': 2}), trainable='_lora_', sequence_length=32)
        config.stages.midtrain.mixture = ((0.0, {'arithmetic': 1.0}),)
        config.stages.sft.update(model=ConfigDict({'lora_rank': 0}), keep_optimizer=keep)

    made = run('pretrain', 'midtrain', 'sft', settings=settings, light=True)
    start = made.begin('midtrain')[1]
    made('midtrain')
    with jax.set_mesh(made.mesh):
        model, trained = made._other('midtrain', fresh=False)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(trained),
        jax.tree.leaves({name: start[name] for name in trained}),
        strict=True,
    ):
        assert ('_lora_' in jax.tree_util.keystr(path)) == bool((x != y).any()), path
    merged = merge_adapters(model, trained)[1]
    after = made.begin('sft')[1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after['params']), jax.device_get(merged['params']))
    other = run('pretrain', 'midtrain', 'sft', settings=functools.partial(settings, keep=True), light=True)
    with pytest.raises(InputError, match='stages.sft.keep_optimizer is True: expected False'):
        other._check('sft')
