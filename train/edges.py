"""What the stages of a run need of each other: the edges of its graph, the order they give, and what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from data.errors import InputError, did_you_mean
from data.mixture import as_dict
from model.config import ModelConfig
from train.checkpoint import read_json, split_address, stage_folder

Stages = Mapping[str, Mapping[str, Any]]


def edges(stage: Mapping[str, Any]) -> list[str]:
    """The addresses (NAME or NAME@STEP) of what a stage needs: stages of the run, and folders (see `is_folder`)."""
    return [address for address in (stage['parent'], *stage['models'].values()) if address]


def is_folder(address: str) -> bool:
    """Whether an address is a path: of an imported model, or of a stage of another run. It has a slash in it."""
    return '/' in address


def stages_needed(stage: Mapping[str, Any]) -> list[str]:
    """Names of the stages of the run that a stage needs."""
    return [split_address(address)[0] for address in edges(stage) if not is_folder(address)]


def order(stages: Stages) -> list[str]:
    """Names of the stages, each after those it needs (a ConfigDict sorts its keys: position means nothing).

    Raises:
        InputError: an edge to a stage that is not there, or a cycle.
    """
    graph: dict[str, list[str]] = {}
    for name, stage in stages.items():
        graph[name] = stages_needed(stage)
        for needed in graph[name]:
            if needed not in stages:
                raise InputError(f'stages.{name} needs stage {needed!r}{did_you_mean(needed, stages)}')
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise InputError(f'stages: {" needs ".join(error.args[1])}: expected no cycle') from None


def needed_for(stages: Stages, last: str) -> list[str]:
    """The stages, in order, that have to be there for stage `last`, itself included."""
    if last not in stages:
        raise InputError(f'--stage: no stage {last!r}{did_you_mean(last, stages)}')
    wanted, front = set(), [last]
    while front:
        name = front.pop()
        wanted.add(name)
        front += stages_needed(stages[name])
    return [name for name in order(stages) if name in wanted]


def stage_model(config: Mapping[str, Any], name: str) -> ModelConfig:
    """The model as a stage sees it: the run's, with what its ancestors and it itself change; or that of a folder.

    Raises:
        InputError: fields that contradict each other.
    """
    if is_folder(name):
        return ModelConfig.from_dict(read_json(stage_folder(name) / 'config.json')['model'])
    stage = config['stages'][name]
    if stage['parent']:
        inherited = stage_model(config, split_address(stage['parent'])[0]).to_dict()
    else:
        inherited = {**as_dict(config['model']), 'vocab_size': int(config['tokenizer']['vocab_size'])}
    try:
        return ModelConfig.from_dict({**inherited, **as_dict(stage['model'])})
    except ValueError as error:
        raise InputError(f'stages.{name}: {error}') from None


def differences(before: Any, now: Any, path: str) -> list[list[Any]]:
    """Leaves that differ between two nested dictionaries, as [path, before, now]."""
    if isinstance(before, dict) and isinstance(now, dict):
        names: Sequence[str] = sorted(before.keys() | now.keys())
        return [d for name in names for d in differences(before.get(name), now.get(name), f'{path}.{name}')]
    return [] if before == now else [[path, before, now]]
