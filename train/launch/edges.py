"""What the stages of a run need of each other: the edges of its graph, the order they give, and what differs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from data.errors import InputError, did_you_mean
from data.mixture import as_dict, sources_of
from model.config import ModelConfig
from train.checkpoint import read_json, split_address, stage_folder
from train.stages import get_kind, stage_defaults

Config = Mapping[str, Any]

# Fields that no result depends on.
_BESIDE = ('evaluations', 'evaluate_every', 'save_every', 'keep', 'step_deadline', 'compare_every', 'replay_every')
BESIDE = tuple(f'stage.{field}' for field in _BESIDE)
# What a step's program has as arguments: of a stage its variables and data, of the optimizer its learning rate.
_GIVEN = ('seed', 'parent', 'mixture', 'steps', *_BESIDE)
_RATE = ('learning_rate', 'schedule', 'warmup', 'decay', 'final')


def parents(stage: Mapping[str, Any]) -> list[str]:
    """The addresses a stage's variables come from: one, several of a merge; none from scratch or where it has none."""
    return [address for address in stage.get('parents', [stage.get('parent')]) if address]


def edges(stage: Mapping[str, Any]) -> list[str]:
    """The addresses (NAME or NAME@STEP) of checkpoints a stage needs: of stages of the run, and folders (see
    `is_folder`)."""
    return [*parents(stage), *filter(None, stage.get('models', {}).values())]


def is_folder(address: str) -> bool:
    """Whether an address is a path: of an imported model, or of a stage of another run. It has a slash in it."""
    return '/' in address


def records_needed(stage: Mapping[str, Any], sources: Mapping[str, Any]) -> list[str]:
    """Names of the stages of the run whose records a stage draws on, by sources {'type': 'stage', 'name': NAME}."""
    named = sources_of(stage.get('mixture', ())) | {stage.get('source', '')}
    specs = [sources[name] for name in sorted(named) if name in sources]
    return [str(spec.get('name', '')) for spec in specs if spec.get('type') == 'stage']


def data_fingerprints(stage: Mapping[str, Any], sources: Mapping[str, Any]) -> dict[str, str]:
    """Of the folders of records that a stage draws on, what `data.prepare` or `data.curate` says is in them."""
    named = sources_of(stage.get('mixture', ())) | {stage.get('source', '')}
    specs = {name: sources[name] for name in sorted(named) if name in sources}
    paths = {name: Path(x['path']) / 'metadata.json' for name, x in specs.items() if x.get('type') == 'arrayrecord'}
    return {name: read_json(path).get('fingerprint', '') for name, path in paths.items() if path.is_file()}


def stages_needed(stage: Mapping[str, Any], sources: Mapping[str, Any]) -> list[str]:
    """Names of the stages of the run that a stage needs."""
    checkpoints = [split_address(address)[0] for address in edges(stage) if not is_folder(address)]
    return [*checkpoints, *records_needed(stage, sources)]


def order(config: Config) -> list[str]:
    """Names of the stages, each after those it needs (a ConfigDict sorts its keys: position means nothing).

    Raises:
        InputError: an edge to a stage that is not there, or a cycle.
    """
    graph: dict[str, list[str]] = {}
    for name, stage in config['stages'].items():
        graph[name] = stages_needed(stage, config['sources'])
        for needed in graph[name]:
            if needed not in config['stages']:
                raise InputError(f'stages.{name} needs stage {needed!r}{did_you_mean(needed, config["stages"])}')
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise InputError(f'stages: {" needs ".join(error.args[1])}: expected no cycle') from None


def needed_for(config: Config, last: str) -> list[str]:
    """The stages, in order, that have to be there for stage `last`, itself included."""
    stages = config['stages']
    if last not in stages:
        raise InputError(f'--stage: no stage {last!r}{did_you_mean(last, stages)}')
    wanted, front = set(), [last]
    while front:
        name = front.pop()
        wanted.add(name)
        front += stages_needed(stages[name], config['sources'])
    return [name for name in order(config) if name in wanted]


def stage_model(config: Config, name: str) -> ModelConfig:
    """The model as a stage sees it: the run's, with what its ancestors and it itself change; or that of a folder.

    Raises:
        InputError: fields that contradict each other.
    """
    if is_folder(name):
        return ModelConfig.from_dict(read_json(stage_folder(name) / 'config.json')['model'])
    stage = config['stages'][name]
    if parents(stage):
        inherited = stage_model(config, split_address(parents(stage)[0])[0]).to_dict()
    else:
        inherited = {**as_dict(config['model']), 'vocab_size': int(config['tokenizer']['vocab_size'])}
    try:
        return ModelConfig.from_dict({**inherited, **as_dict(stage.get('model', {}))})
    except ValueError as error:
        raise InputError(f'stages.{name}: {error}') from None


def program(config: Config, name: str) -> str:
    """Every setting that the compiled step of a stage depends on: where it is the same, seeds, data and learning rates
    may differ."""
    stage = as_dict(config['stages'][name])
    stage = {field: value for field, value in stage.items() if field not in _GIVEN}
    stage['optimizer'] = {field: x for field, x in as_dict(stage.get('optimizer', {})).items() if field not in _RATE}
    told = {'model': stage_model(config, name).to_dict(), 'stage': stage, 'mesh': as_dict(config['mesh'])}
    return json.dumps(told, sort_keys=True, default=as_dict)


def check_edges(config: Config, name: str) -> None:
    """Looks at what a stage needs of others.

    Raises:
        InputError: checkpoints of a stage that has none, records of one that writes none, a step that is not saved,
            the optimizer of one that does not train, or parents of other models than one another.
    """
    stage, stages = config['stages'][name], config['stages']
    for needed in records_needed(stage, config['sources']):
        if get_kind(stages[needed]['kind']).make is None and not stages[needed].get('records'):
            raise InputError(f'stages.{name} needs the records of {needed!r}: expected a stage that makes some')
    for address in edges(stage):
        needed, step = split_address(address)
        if is_folder(address):
            continue
        if get_kind(stages[needed]['kind']).make is not None:
            raise InputError(f'stages.{name} needs a checkpoint of {needed!r}, which makes records instead')
        if step is not None and step not in saved_steps(stages[needed]):
            raise InputError(f'stages.{name} needs {address!r}: {needed} saves steps {saved_steps(stages[needed])}')
    parent = split_address(stage.get('parent', ''))[0]
    if stage.get('keep_optimizer') and parent in stages and not get_kind(stages[parent]['kind']).trains:
        raise InputError(f'stages.{name}.keep_optimizer is True: expected False, as {parent!r} has no optimizer')
    several = stage.get('parents', ())
    models = [stage_model(config, split_address(address)[0]).to_dict() for address in several]
    for address, model in zip(several, models, strict=True):
        for path, one, other in differences(models[0], model, 'model'):
            both = f'{several[0]!r} has {path} = {one!r}, {address!r} {other!r}'
            raise InputError(f'stages.{name}.parents: {both}: expected models of one shape')
        if model['lora_rank']:
            raise InputError(f'stages.{name}.parents: {address!r} has adapters, whose averages mean nothing')


def check_gate(config: Config, name: str) -> None:
    """Looks at what a stage asks of evaluations (see `pass_gate`).

    Raises:
        InputError: fields that mean nothing, an evaluation that a stage has not, or a stage that is no ancestor.
    """
    stage = config['stages'][name]
    for evaluation, asked in as_dict(stage.get('gate', {})).items():
        where = f'stages.{name}.gate.{evaluation}'
        if not asked.keys() <= {'least', 'most', 'times'} or not asked.keys() & {'least', 'most'}:
            raise InputError(f"{where} has {', '.join(asked)}: expected 'least' or 'most', a number, and maybe 'times'")
        before = split_address(stage['parent'])[0]
        for other in (before, asked.get('times', before)):
            if other not in needed_for(config, name)[:-1]:
                raise InputError(f'{where}: {other!r} is no stage of the run that stage {name!r} comes from')
            if evaluation not in config['stages'][other]['evaluations']:
                raise InputError(f'{where}: expected an evaluation of {other!r}')


def pass_gate(config: Config, name: str, workdir: Path) -> None:
    """Compares the evaluations of a stage's parent with what the stage asks of them before it begins: of each a value
    of `least` so much, or `most`: times that of the stage `times`, if one is named.

    Raises:
        InputError: one of them is not as it should be.
    """
    stage = config['stages'][name]
    before = split_address(stage.get('parent', ''))[0]
    for evaluation, asked in as_dict(stage.get('gate', {})).items():
        value, factor = (
            read_json(workdir / other / 'evaluations.json')[evaluation]['value'] if other else 1.0
            for other in (before, asked.get('times'))
        )
        least, most = (asked.get(bound, other) * factor for bound, other in (('least', -math.inf), ('most', math.inf)))
        if not least <= value <= most:
            bound = f'at least {least:.4g}' if value < least else f'at most {most:.4g}'
            raise InputError(f'stages.{name}.gate: {evaluation} of {before} is {value:.4g}: expected {bound}')


def check_same(kept: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raises InputError where the record of a stage that was run says something else than that of the one to be run."""
    kept['model'] = ModelConfig.from_dict(kept['model']).to_dict()  # fields that came later had their defaults
    kept['stage'] = {**json.loads(json.dumps(stage_defaults(now['stage']['kind']))), **kept['stage']}
    for field in ('model', 'stage', 'seed', 'tokenizer', 'data'):
        for path, old, new in differences(kept.get(field, now[field]), now[field], field):
            raise InputError(
                f'{folder} was run with {path} = {old!r}, the config now says {new!r}: '
                'use another --workdir, or remove that folder to run the stage again'
            )


def saved_steps(stage: Mapping[str, Any]) -> list[int]:
    """The steps after which a stage saves a checkpoint; 0 is that of one that does not train."""
    if not get_kind(stage['kind']).trains:
        return [0]
    return [*range(stage['save_every'], stage['steps'], stage['save_every']), stage['steps']]


def steps_pinned(config: Config, name: str) -> list[int]:
    """The steps of a stage that others name: their checkpoints stay."""
    addresses = [split_address(address) for other in config['stages'].values() for address in edges(other)]
    return sorted({step for needed, step in addresses if needed == name and step is not None})


def differences(before: Any, now: Any, path: str) -> list[list[Any]]:
    """Leaves that differ between two nested dictionaries, as [path, before, now], but for those in BESIDE."""
    if isinstance(before, dict) and isinstance(now, dict):
        names: Sequence[str] = sorted(before.keys() | now.keys())
        return [d for name in names for d in differences(before.get(name), now.get(name), f'{path}.{name}')]
    return [] if before == now or path in BESIDE else [[path, before, now]]
