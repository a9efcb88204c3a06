"""The programs of a stage, compiled from shapes alone for devices that need not be here."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.transformer import Model
from train.act.decoding import admit, decode, empty_pool, prefill
from train.launch.edges import stage_model
from train.launch.host import cpu_seconds
from train.learn.health import first_health, guard
from train.learn.optimizer import make_optimizer
from train.learn.step import Layout, make_step, optimizer_shapes, trained
from train.sampler import pool_size, prompt_width
from train.stages import batch_shapes, stage_objective, training_kind


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        name, work: what it is, and what one call of it does, for people.
        model_flops: of one call, over all devices (see `Model.flops_per_token`).
        text: optimized HLO; memory: bytes of one device (`jax.stages.Compiled.memory_analysis`).
        wall_seconds, cpu_seconds: what tracing, lowering and compiling took.
    """

    name: str
    work: str
    model_flops: float
    text: str
    memory: Any
    wall_seconds: float
    cpu_seconds: float


def compiled_programs(config: Mapping[str, Any], name: str, mesh: jax.sharding.Mesh) -> Iterator[Program]:
    """The train step of a stage, as `train.loop` runs it; for an on-policy stage then the sampler's two programs.

    No array is made and no data is read.

    Raises:
        InputError: a batch that does not divide among the devices, or fields that contradict each other.
        jax.errors.JaxRuntimeError: the compiler refuses.
    """
    stage, model = config['stages'][name], Model(stage_model(config, name))
    kind, variables = training_kind(stage), model.shapes(mesh)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(stage['optimizer'], trained(model.declared['params'], stage['trainable']))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        state = {
            **variables,
            'optimizer': optimizer_shapes(optimizer, trained(variables['params'], stage['trainable'])),
            'step': jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        }
        if stage['guard']['sigma']:
            health = first_health(stage['guard'])
            state['health'] = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for n, x in health.items()}
        rows, length, parts = stage['batch_size'], stage['sequence_length'], stage['microbatches']
        batch = Layout(mesh, rows, length, parts).shapes(batch_shapes(stage))
        objective = stage_objective(stage, model.config)
        step = make_step(model, objective, optimizer, stage['trainable'], guard(stage['guard']), stage['qk_clip'])
        step = jax.jit(step, donate_argnums=0)
        work = f'{rows} x {length:,} tokens' + (f' in {parts} microbatches' if parts > 1 else '')
        flops = rows * length * model.flops_per_token(length)
        yield _program('train step', work, flops, lambda: step.lower(state, batch, np.float32(1)))[0]
        if kind.on_policy:
            yield from _sampler(model, stage, variables)


def _sampler(model: Model, stage: Mapping[str, Any], variables: Any) -> Iterator[Program]:
    """Prefill and decode of as many prompts as are answered at a time, as long as fit in a row with their answers."""
    samples, answer, total = stage['samples'], stage['max_tokens'], stage['sequence_length']
    width = prompt_width(total - answer)
    group, rows = pool_size(stage['prompts'], samples)
    one, greedy = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.bool_)

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    per_token = model.flops_per_token(total, backward=False)
    read = (model, variables, integers(group, width), integers(group), one)
    lower = functools.partial(prefill.lower, *read, samples=samples)
    program, (entries, logits, _) = _program(
        'prefill', f'{group} prompts of {width:,} tokens', group * width * per_token, lower
    )
    yield program
    _, pool = _program('', '', 0, functools.partial(empty_pool.lower, model, entries, rows=rows, max_tokens=answer))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), group * samples))
    new = (integers(group * samples), entries, logits, integers(group * samples), keys)
    _, pool = _program('', '', 0, functools.partial(admit.lower, pool, *new))
    lower = functools.partial(decode.lower, model, variables, pool, one, greedy, integers(), stop=0)
    yield _program('decode', f'{rows} answers of {answer:,} tokens', rows * answer * per_token, lower)[0]


def _program(name: str, work: str, flops: float, lower: Callable[[], jax.stages.Lowered]) -> tuple[Program, Any]:
    """A program, and what it returns as ShapeDtypeStructs, sharded as the compiler chose."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    lowered = lower()
    compiled = lowered.compile()
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    results = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )
    return Program(name, work, flops, compiled.as_text() or '', compiled.memory_analysis(), wall, cpu), results
