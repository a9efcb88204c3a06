"""The stage graph of a run: in which order stages run, how one hands over to the next, and the record of it all."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import itertools
import json
import re
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import jax

from data.errors import InputError, did_you_mean
from data.mixture import as_dict
from data.rows import sample_texts
from data.sources import open_source
from data.tokenizer import Tokenizer, train_tokenizer
from model.adapters import merge_adapters
from model.config import ModelConfig
from model.sharding import make_mesh
from model.transformer import Model, Variables, subtree
from train.act.make import RECORDS, write_records
from train.checkpoint import Checkpoints, read_json, split_address, stage_folder, tokenizer_folder, write_json
from train.evaluate import checked
from train.launch.edges import (
    check_edges,
    check_gate,
    check_same,
    data_fingerprints,
    differences,
    edges,
    is_folder,
    needed_for,
    order,
    parents,
    pass_gate,
    program,
    records_needed,
    stage_model,
    steps_pinned,
)
from train.launch.evaluated import Evaluated
from train.launch.goodput import Clock
from train.launch.host import is_primary, say, wait_for_all
from train.launch.lock import locked
from train.learn.health import check_clip, check_guard
from train.learn.merge import average
from train.learn.optimizer import learning_rate, make_optimizer
from train.learn.step import Layout, State, initial_state, optimizer_shapes, trained
from train.learn.streams import Context
from train.learn.together import Step, alone
from train.loop import FIELDS, Plan, train
from train.measure.scoring import Other
from train.stages import get_kind, stage_objective, training_kind


class Run:
    """All stages of one config in one workdir.

    Args:
        config: a plain dictionary (see `configs/base.py`).
        workdir: where everything of the run is kept.
        command: how the run was started, for the record.
        compiled: compiles the step of a stage, given what its program depends on (see `train.learn.together`).

    Raises:
        InputError: anything in the config that can be found wrong before compute is spent.
    """

    def __init__(
        self,
        config: dict[str, Any],
        workdir: Path,
        command: str = '',
        compiled: Callable[[Hashable, Step], Step] = alone,
    ):
        self.config, self.workdir, self.command, self.compiled = config, workdir, command, compiled
        self.stages, self.clock = config['stages'], Clock()
        self.order = order(config)
        try:
            self.mesh = make_mesh(config['mesh'])
        except ValueError as error:
            raise InputError(str(error)) from None
        if config.get('wandb') and importlib.util.find_spec('wandb') is None:
            raise InputError(f'wandb is {config["wandb"]!r}, and the package is not installed: pip install wandb')
        for name in self.order:
            self.model_config(name)
            for evaluation in self.stages[name].get('evaluations', ()):
                if evaluation not in config['evaluations']:
                    near = did_you_mean(evaluation, config['evaluations'])
                    raise InputError(f'stages.{name}.evaluations: no evaluation {evaluation!r}{near}')
        # One process trains it, where there is none yet; the others read what it has written.
        if not is_primary():
            wait_for_all('the tokenizer is there')
        self.tokenizer = self._tokenizer()
        if is_primary():
            wait_for_all('the tokenizer is there')

    def __call__(self, last: str = '') -> None:
        """Runs every stage that is not finished, or those that stage `last` needs and itself."""
        with locked(self.workdir), self.clock.kept(self.workdir, is_primary()):
            names = needed_for(self.config, last) if last else self.order
            finished = {name: self._finished(name) for name in names}
            for name in names:
                if not finished[name]:
                    self._check(name)
            for name in names:
                if finished[name]:
                    say(f'{name}: finished before')
                else:
                    self._run(name)
                    self.write_lineage()
            self.write_lineage()

    def _check(self, name: str) -> None:
        """Raises InputError for what is wrong with a stage: before the first stage runs, not when its turn comes."""
        stage, model = self.stages[name], Model(self.model_config(name))
        kind = get_kind(stage['kind'])
        # The variables of others are not there yet; what is built only looks at which of them will be.
        others = {role: Other(self._model(at), {}) for role, at in stage.get('models', {}).items() if at}
        try:
            check_edges(self.config, name)
            check_gate(self.config, name)
            for evaluation in stage.get('evaluations', ()):
                checked(self.config['evaluations'][evaluation], self.stages)
            if kind.make is not None:
                kind.make(self._context(name, model, others))
            elif kind.merge is not None:
                kind.merge(stage)
            if not kind.trains:
                return
            self._optimizer(name, model)
            learning_rate(stage['optimizer'], stage['steps'])
            check_guard(stage['guard'], stage['alarms'])
            if not stage['step_deadline'] >= 0:
                raise InputError(f'step_deadline is {stage["step_deadline"]}: expected seconds, or 0 for none')
            check_clip(stage, model.config)
            before = self._model(stage['parent']) if stage['parent'] and stage['keep_optimizer'] else model
            if (before.paths, before.adapter) != (model.paths, model.adapter):
                raise InputError(
                    f'stages.{name}.keep_optimizer is True: expected False, as the stage has other parameters than '
                    f'its parent {stage["parent"]!r}'
                )
            kind.stream(self._context(name, model, others))
        except ValueError as error:
            text = str(error)
            raise InputError(text if text.startswith('stages.') else f'stages.{name}: {text}') from error

    def _optimizer(self, name: str, model: Model) -> Any:
        stage = self.stages[name]
        try:
            declared = trained(model.declared['params'], stage['trainable'])
        except re.error as error:
            raise InputError(f'stages.{name}.trainable is {stage["trainable"]!r}: {error}') from error
        if not declared:
            wanted = "a part of some parameter's path, such as layers/self_attn/q_proj"
            raise InputError(f'stages.{name}.trainable is {stage["trainable"]!r}: expected {wanted}')
        return make_optimizer(stage['optimizer'], declared)

    def _model(self, address: str) -> Model:
        return Model(self.model_config(split_address(address)[0]))

    def _context(self, name: str, model: Model, models: Mapping[str, Other]) -> Context:
        stage, sources, folder = self.stages[name], self.config['sources'], self.workdir / name
        seed, layout = self._seed(name), self._layout(name) if get_kind(stage['kind']).trains else None
        return Context(name, stage, sources, model, self.tokenizer, seed, models, layout, folder)

    def _layout(self, name: str) -> Layout:
        stage = self.stages[name]
        return Layout(self.mesh, stage['batch_size'], stage['sequence_length'], stage['microbatches'])

    def model_config(self, name: str) -> ModelConfig:
        """The model as a stage sees it."""
        return stage_model(self.config, name)

    def _tokenizer(self) -> Tokenizer:
        """The run's tokenizer: the one kept in the workdir, a given one, that of a folder which a stage starts from, or
        one trained on the training split."""
        folder = self.workdir / 'tokenizer'
        settings, kept = as_dict(self.config['tokenizer']), folder.is_dir()
        names = [split_address(a)[0] for name in self.order for a in edges(self.stages[name]) if is_folder(a)]
        given = settings['path'] or (tokenizer_folder(stage_folder(names[0])) if names else '')
        if kept:
            tokenizer = Tokenizer.load(folder)
        elif given:
            tokenizer = Tokenizer.load(given)
        else:
            if not settings['sources']:
                raise InputError('tokenizer.sources is empty: expected names of sources, or a folder as tokenizer.path')
            for name in settings['sources']:
                if name not in self.config['sources']:
                    near = did_you_mean(name, self.config['sources'])
                    raise InputError(f'tokenizer.sources: no source {name!r}{near}')
            say(f'training a tokenizer of {settings["vocab_size"]} tokens')
            sources = [open_source(self.config['sources'][name]) for name in settings['sources']]
            tokenizer = train_tokenizer(itertools.chain(*map(sample_texts, sources)), settings['vocab_size'])
        for name in names:
            if read_json(Path(name) / 'config.json')['tokenizer'] != tokenizer.fingerprint:
                raise InputError(f'{name} was trained with another tokenizer than {folder if kept else given}')
        from_scratch = any(stage.get('parent') == '' for stage in self.stages.values())
        if from_scratch and tokenizer.vocab_size > settings['vocab_size']:
            raise InputError(
                f'tokenizer.vocab_size is {settings["vocab_size"]}: expected {tokenizer.vocab_size} or more, '
                f'the size of {folder if kept else given}'
            )
        if kept:
            return tokenizer
        self.workdir.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name('tokenizer.tmp')
        tokenizer.save(temporary)
        temporary.rename(folder)
        return tokenizer

    def record(self, name: str) -> dict[str, Any]:
        """What decides a stage's result, as it is kept in its `config.json`."""
        return {
            'name': name,
            'model': self.model_config(name).to_dict(),
            'stage': json.loads(json.dumps(as_dict(self.stages[name]))),
            'seed': self._seed(name),
            'sources': json.loads(json.dumps(as_dict(self.config['sources']))),
            'evaluations': json.loads(json.dumps(as_dict(self.config['evaluations']))),
            'mesh': dict(self.mesh.shape),
            'tokenizer': self.tokenizer.fingerprint,
            'data': data_fingerprints(self.stages[name], self.config['sources']),
        }

    def _seed(self, name: str) -> int:
        own = self.stages[name].get('seed', -1)
        return int(self.config['seed'] if own < 0 else own)

    def _finished(self, name: str) -> bool:
        """Whether a stage has its final checkpoint and its evaluations.

        Raises InputError where the workdir holds the stage with other settings: its results would be mixed up.
        """
        folder = self.workdir / name
        if not (folder / 'config.json').exists():
            return False
        check_same(read_json(folder / 'config.json'), self.record(name), folder)
        finished = folder / 'finished.json'
        if not finished.exists():
            return False
        return set(self.stages[name].get('evaluations', ())) <= set(read_json(finished)['evaluations'])

    def _run(self, name: str) -> None:
        began = time.perf_counter()
        stage, folder = self.stages[name], self.workdir / name
        pass_gate(self.config, name, self.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        changed = self._changes(name)
        for path, old, new in changed:
            say(f'{name}: {path} {old!r} -> {new!r}')
        write_json(folder / 'config.json', self.record(name))

        kind = get_kind(stage['kind'])
        work = self._make if kind.make else self._merge if kind.merge else self._train
        facts = work(name)
        first, *more = parents(stage) or ['']
        models = {role: address for role, address in stage.get('models', {}).items() if address}
        write_json(
            folder / 'finished.json',
            {
                'name': name,
                'kind': stage['kind'],
                'parent': first,
                'models': models | {f'parent {number}': address for number, address in enumerate(more, start=2)},
                'records': records_needed(stage, self.config['sources']),
                'steps': stage.get('steps', 0),
                **facts,
                'seconds': time.perf_counter() - began,
                'devices': jax.device_count(),
                'changed': changed,
            },
        )

    def _train(self, name: str) -> dict[str, Any]:
        """Trains a stage and evaluates it; what `finished.json` says of that."""
        plan, state = self.begin(name)
        state, spent = train(plan, state)
        plan.stream.close()
        variables = {'params': state['params'], 'balance': state['balance']}
        return {
            'tokens': spent.tokens - plan.tokens,
            'flops': spent.flops - plan.flops,
            'parameters': plan.model.parameter_counts,
            'evaluations': self._evaluated(name, plan.model)(variables),
        }

    def _make(self, name: str) -> dict[str, Any]:
        """Makes a stage's records (see `train.act.make`)."""
        make, model = get_kind(self.stages[name]['kind']).make, Model(self.model_config(name))
        assert make is not None
        with jax.set_mesh(self.mesh), self.clock.spend('records'):
            facts = write_records(make(self._context(name, model, self._others(name))), self.workdir / name, name)
        records, answers = (facts['report'][name] for name in ('records', 'answers'))
        say(f'{name}: {records} records of {answers} answers in {self.workdir / name / RECORDS}')
        return {**facts, 'evaluations': {}}

    def _merge(self, name: str) -> dict[str, Any]:
        """Averages a stage's parents, saves that as step 0 and evaluates it. It cost so far what the costliest did."""
        stage, model = self.stages[name], Model(self.model_config(name))
        merge = get_kind(stage['kind']).merge
        assert merge is not None
        shapes, spent = model.shapes(self.mesh), dict.fromkeys(('tokens', 'flops'), 0)

        def read(number: int) -> Variables:
            arrays, metadata = self._restore(*split_address(stage['parents'][number]), shapes)
            spent.update({total: max(spent[total], metadata.get(total, 0)) for total in spent})
            return arrays

        with jax.set_mesh(self.mesh):
            variables = average(merge(stage), read)
        checkpoints = Checkpoints(self.workdir / name / 'checkpoints')
        checkpoints.save(0, {**variables, 'optimizer': {}}, {}, {**self._metadata(name), **spent})
        checkpoints.wait()
        checkpoints.close()
        evaluations = self._evaluated(name, model)(variables)
        return {'tokens': 0, 'flops': 0.0, 'parameters': model.parameter_counts, 'evaluations': evaluations}

    def begin(self, name: str, fresh: bool = False) -> tuple[Plan, State]:
        """What the loop needs to run a stage, and the state it begins with.

        `fresh` puts new weights in the place of other stages' checkpoints, for measurements of speed.
        """
        stage, model = self.stages[name], Model(self.model_config(name))
        kind = training_kind(stage)
        optimizer = self._optimizer(name, model)
        with jax.set_mesh(self.mesh):
            state, start = self._start(name, model, optimizer, fresh)
            models = self._others(name, fresh)
        plan = Plan(
            name=name,
            folder=self.workdir / name,
            model=model,
            objective=stage_objective(stage, model.config),
            optimizer=optimizer,
            stream=kind.stream(self._context(name, model, models)),
            learning_rate=learning_rate(stage['optimizer'], stage['steps']),
            pinned=steps_pinned(self.config, name),
            **{field: stage[field] for field in FIELDS},
            layout=self._layout(name),
            tokens=int(start.get('tokens', 0)),
            flops=float(start.get('flops', 0.0)),
            metadata=self._metadata(name),
            clock=self.clock,
            compiled=functools.partial(self.compiled, program(self.config, name)),
            wandb=self.config.get('wandb', ''),
            measure=self._evaluated(name, model).on_the_way,
        )
        return plan, state

    def _metadata(self, name: str) -> dict[str, Any]:
        """What each checkpoint of a stage says of its origin."""
        parent = ', '.join(parents(self.stages[name]))
        data = data_fingerprints(self.stages[name], self.config['sources'])
        return {'stage': name, 'parent': parent, 'tokenizer': self.tokenizer.fingerprint, 'data': data}

    def _start(self, name: str, model: Model, optimizer: Any, fresh: bool) -> tuple[State, dict[str, Any]]:
        """The state a stage begins with, and the metadata of the checkpoint it comes from.

        Variables that the parent does not have are new, as in a model from scratch; its adapters, where the stage has
        others or none, are merged.
        """
        stage, seed = self.stages[name], self._seed(name)
        shapes = model.shapes(self.mesh)
        if fresh or not stage['parent']:
            return initial_state(model.init(seed, self.mesh), optimizer, stage['trainable']), {}
        parent, step = split_address(stage['parent'])
        before = self._model(parent)
        if before.config.lora_rank and before.adapter != model.adapter:
            arrays, metadata = self._restore(parent, step, before.shapes(self.mesh))
            arrays = subtree(merge_adapters(before, arrays)[1], model.paths.__contains__)
        else:
            wanted = subtree(shapes, before.paths.__contains__)
            if stage['keep_optimizer']:
                wanted['optimizer'] = optimizer_shapes(optimizer, trained(shapes['params'], stage['trainable']))
            arrays, metadata = self._restore(parent, step, wanted, part=before.paths != model.paths)
        state = initial_state(model.init(seed, self.mesh, arrays), optimizer, stage['trainable'])
        if stage['keep_optimizer']:
            state['optimizer'] = arrays['optimizer']
        return state, metadata

    def _others(self, name: str, fresh: bool = False) -> dict[str, Other]:
        """The other models a stage names, by role; one checkpoint is read once."""
        named = {role: address for role, address in self.stages[name].get('models', {}).items() if address}
        found = {address: self._other(address, fresh) for address in sorted(set(named.values()))}
        return {role: found[address] for role, address in named.items()}

    def _other(self, address: str, fresh: bool) -> Other:
        """The model of another stage, with the variables of its checkpoint."""
        model, at = self._model(address), split_address(address)
        return Other(model, model.init(0, self.mesh) if fresh else self._restore(*at, model.shapes(self.mesh))[0])

    def _restore(
        self, name: str, step: int | None, wanted: dict[str, Any], part: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        folder = Path(name) if is_folder(name) else self.workdir / name
        checkpoints = Checkpoints(folder / 'checkpoints', read_only=True)
        restored = checkpoints.restore(wanted, step, part)
        checkpoints.close()
        if restored is None:
            raise InputError(f'{folder}: no checkpoint to start from')
        return restored.arrays, restored.metadata

    def _changes(self, name: str) -> list[list[Any]]:
        """What is different from the parent stage: fields of model and stage, as [field, parent's value, value]."""
        parent = split_address(self.stages[name].get('parent', ''))[0]
        if not parent:
            return []
        now = self.record(name)
        # What made a folder is that one's own affair, and an average has other fields: models can be compared.
        if is_folder(parent) or not get_kind(self.stages[parent]['kind']).trains:
            return differences(self.model_config(parent).to_dict(), now['model'], 'model')
        before = self.record(parent)
        found = [d for field in ('model', 'stage') for d in differences(before[field], now[field], field)]
        return [d for d in found if d[0] != 'stage.parent']

    def _evaluated(self, name: str, model: Model) -> Evaluated:
        return Evaluated(self.config, name, self.workdir, model, self.tokenizer, self.mesh, self.clock)

    def write_lineage(self) -> None:
        """`lineage.json`: every finished stage of the workdir, in the order of the graph."""
        done = [read_json(p) for p in (self.workdir / name / 'finished.json' for name in self.order) if p.exists()]
        path = self.workdir / 'lineage.json'
        known = read_json(path)['run'] if path.exists() else {}
        # What the workdir holds beyond this config (a stage appended once) stays in the record.
        if path.exists():
            done += [s for s in read_json(path)['stages'] if s['name'] not in self.stages]
        run = {
            'command': self.command,
            'config': self.config['name'],
            'created': known.get('created') or datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
            'price': self.config.get('device_hour_price', 0.0),
            'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        }
        write_json(path, {'run': run, 'stages': done})
