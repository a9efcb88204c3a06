"""How the streams of a stage are built from its config: what `train.stages` names in its entries."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from data.errors import InputError, did_you_mean
from data.inspect import describe
from data.mixture import as_dict, sources_of
from data.sources import Awaited, Source, open_source
from data.stream import Prefetch, RowStream, Stream
from data.tasks import get_task
from data.tokenizer import Tokenizer
from model.transformer import Model
from train.act.make import RECORDS, Maker
from train.act.members import Members
from train.act.proposer import ProposerStream
from train.act.recipes import Recipe
from train.act.rollout import RolloutStream
from train.act.self_play import SelfPlayStream
from train.launch.host import is_primary
from train.learn.pairs import RecordStream
from train.learn.step import Layout
from train.measure.scoring import Other, TeacherStream


@dataclasses.dataclass(frozen=True)
class Context:
    """What a kind may build its stream from.

    Attributes:
        name: of the stage; config: its fields; sources: all sources of the run by name; seed: of the stage.
        models: the other models the stage names (`models.reference`, ...), by role.
        layout: of a batch on the devices; all rows are built here by default.
        folder: of the stage, where a stream may keep what it found out.
    """

    name: str
    config: Mapping[str, Any]
    sources: Mapping[str, Any]
    model: Model
    tokenizer: Tokenizer
    seed: int
    models: Mapping[str, Other]
    layout: Layout | None = None
    folder: Path | None = None

    @property
    def stream_seed(self) -> int:
        """A seed of this stage's own, so that stages do not see the same problems."""
        return zlib.crc32(f'{self.seed} {self.name}'.encode())


def _spec(context: Context, name: str, field: str) -> dict[str, Any]:
    """What a source of the run is; `field` names it. Of {'type': 'stage', 'name': NAME} it is what that stage wrote."""
    if name not in context.sources:
        raise InputError(f'stages.{context.name}.{field}: no source {name!r}{did_you_mean(name, context.sources)}')
    spec = as_dict(context.sources[name])
    if spec.get('type') != 'stage':
        return spec
    assert context.folder is not None
    return {'type': 'arrayrecord', 'path': str(context.folder.parent / spec['name'] / RECORDS)}


def _source(context: Context, name: str, field: str) -> Source:
    """A source of the run, opened; that of a stage which has not run yet has no records so far."""
    spec, given = _spec(context, name, field), context.sources[name]
    waits = given.get('type') == 'stage' and not Path(spec['path']).is_dir()
    return Awaited(given['name']) if waits else open_source(spec)


def _sources(context: Context) -> dict[str, Source]:
    """The sources that a stage's mixture names, opened."""
    return {name: _source(context, name, 'mixture') for name in sorted(sources_of(context.config['mixture']))}


def rows(context: Context, split_documents: bool) -> Stream:
    c = context.config
    settings = {
        'rows': c['batch_size'],
        'sequence_length': c['sequence_length'],
        'steps': c['steps'],
        'seed': context.stream_seed,
        'split_documents': split_documents,
        'per_example': c.get('weighting') == 'example',
    }
    rows_here = context.layout.rows_here() if context.layout else None
    stream = RowStream(_sources(context), c['mixture'], context.tokenizer, rows_here=rows_here, **settings)
    if context.folder is not None and context.folder.is_dir() and is_primary():
        specs = {name: _spec(context, name, 'mixture') for name in sorted(sources_of(c['mixture']))}
        describe(context.folder, specs, c['mixture'], **settings)
    return Prefetch(stream)


def _needs(context: Context, role: str, reason: str) -> Other:
    """The other model of that role, or InputError."""
    if role not in context.models:
        raise InputError(f'stages.{context.name}.models.{role} is empty: expected a stage, for {reason}')
    return context.models[role]


def records(context: Context, form: str, reference: bool) -> Stream:
    return RecordStream(
        form,
        _sources(context),
        context.config['mixture'],
        context.tokenizer,
        context.config,
        context.stream_seed,
        Other(context.model, {}),
        _needs(context, 'reference', 'its log-probabilities') if reference else None,
        context.folder / 'reference.jsonl' if context.folder else None,
    )


def distilled(context: Context) -> Stream:
    teacher = _needs(context, 'teacher', 'what it says of each token')
    return TeacherStream(rows(context, split_documents=False), teacher, context.config, context.layout)


def rollouts(context: Context, stream: Callable[..., Stream] = RolloutStream) -> Stream:
    c = context.config
    if c['loss']['kl_coefficient'] or c['kl_reward']:
        _needs(context, 'reference', 'a penalty on the KL')
    if c['algorithm'] == 'reverse_kl':
        _needs(context, 'teacher', 'algorithm reverse_kl')
    options = as_dict(c['task'])
    name = options.pop('name')
    levels: Sequence[Mapping[str, Any]] = c['levels'] or ({},)
    tasks = [get_task(name, split='train', **{**options, **as_dict(level)}) for level in levels]
    harder = as_dict(c['strict'])
    strict = [get_task(name, split='train', **{**options, **as_dict(x), **harder}) for x in levels] if harder else []
    given = (context.model, context.tokenizer, tasks, c, context.stream_seed, context.models, rollout_stamps(c), strict)
    return stream(*given, context.folder)


def games(context: Context) -> Stream:
    return rollouts(context, SelfPlayStream)


def proposals(context: Context) -> Stream:
    return rollouts(context, ProposerStream)


def rollout_stamps(c: Mapping[str, Any]) -> tuple[str, ...]:
    """What the batches of an on-policy stage say of each token beyond its advantage and the sampler's probability."""
    loss, names = c['loss'], []
    if loss['importance'] != 'none' and c['epochs'] * c['minibatches'] > 1:
        names.append('old_logprob')
    if loss['kl_coefficient']:
        names.append('reference_logprob')
    if loss['value_coefficient']:
        names += ['old_value', 'value_target']
    return tuple(names)


def making(recipe: Recipe) -> Callable[[Context], Maker]:
    def make(context: Context) -> Maker:
        if jax.process_count() > 1:
            raise InputError(f'stages.{context.name} makes records: expected one process')
        assert context.folder is not None
        c, name = context.config, context.config['source']
        members = Members(c, context.models, context.tokenizer, context.folder)
        source = _source(context, name, 'source') if name else None
        return Maker(c, recipe, members, source, context.stream_seed)

    return make
