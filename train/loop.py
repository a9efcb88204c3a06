"""The train loop. There is one, and it does not know which stage it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from data.stream import Stream
from model.transformer import Model
from train.checkpoint import Checkpoints
from train.events import note
from train.host import cpu_seconds, is_primary
from train.log import Log, set_aside
from train.objectives import Objective
from train.preemption import Preempted, notice
from train.step import Layout, State, make_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything the loop needs to know.

    Attributes:
        name: shown beside the progress bar.
        folder: where metrics, events and checkpoints go.
        model, objective, optimizer, stream: what is trained, on what, and how.
        trainable: an expression that selects the parameters which learn (see `train.step.trained`).
        learning_rate: of the step; a factor on the optimizer's updates.
        steps, save_every, keep: counts; pinned: steps whose checkpoints stay, whatever `keep` says.
        layout: of a batch on the devices.
        tokens, flops: what the checkpoint the stage starts from has already cost.
        metadata: goes into every checkpoint.
    """

    name: str
    folder: Path
    model: Model
    objective: Objective
    optimizer: optax.GradientTransformation
    stream: Stream
    trainable: str
    learning_rate: Callable[[int], Any]
    steps: int
    save_every: int
    keep: int
    pinned: Sequence[int]
    layout: Layout
    tokens: int
    flops: float
    metadata: dict[str, Any]


@dataclasses.dataclass
class Spent:
    """Running totals over the lineage, and where this process's time went (seconds).

    Attributes:
        first_seconds: the first step, which compiles. `warm` is when it was over (on time.perf_counter's clock); what
            follows is counted from there to the metrics of the last step.
        total_seconds, cpu_seconds: by the clock on the wall, and on all CPU cores.
        stream_seconds, place_seconds, log_seconds: in `stream.next`, moving batches to devices, writing metrics.
    """

    tokens: int
    flops: float
    first_seconds: float = 0.0
    warm: float = 0.0
    total_seconds: float = 0.0
    cpu_seconds: float = 0.0
    stream_seconds: float = 0.0
    place_seconds: float = 0.0
    log_seconds: float = 0.0


def train(plan: Plan, state: State) -> tuple[State, Spent]:
    """Takes the state to `plan.steps`, from the newest checkpoint in the folder if there is one.

    Batches come in order from `plan.stream.next(step, variables)`. Metrics of a step are read while the next one runs.
    The last state is always saved, and is on disk when this returns. Told to end (see `train.preemption`), it saves
    after the step under way.

    Raises:
        Preempted: it was told to end before the last step.
        InputError: the last state could not be saved. Of other saves that fail, the next is waited for.
    """
    tell = functools.partial(note, plan.folder)
    checkpoints = Checkpoints(plan.folder / 'checkpoints', plan.keep, plan.save_every, plan.pinned, note=tell)
    spent = Spent(plan.tokens, plan.flops)
    state = _resume(plan, checkpoints, state, spent)
    first = int(state['step'])
    step_function = jax.jit(make_step(plan.model, plan.objective, plan.optimizer, plan.trainable), donate_argnums=0)
    # All at once, as asking for one would wait for the devices.
    rates = np.asarray(jax.jit(jax.vmap(plan.learning_rate))(np.arange(plan.steps)), np.float32)
    stream_works = bool(getattr(plan.stream, 'work', ''))
    cpu_before = 0.0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(checkpoints))  # an interrupted run still finishes the save it has begun
        stack.enter_context(jax.set_mesh(plan.layout.mesh))
        log = stack.enter_context(Log(plan.folder, plan.name, plan.steps, first)) if is_primary() else None
        leave = stack.enter_context(notice())
        reported = time.perf_counter()

        def report(step: int, device: dict[str, jax.Array], stream_state: dict[str, Any], length: int) -> None:
            nonlocal reported
            now = time.perf_counter()
            values = {name: float(value) for name, value in jax.device_get(device).items()}
            ready = time.perf_counter()
            waited = ready - now
            tokens = int(values.pop('tokens'))  # of all processes
            spent.tokens += tokens
            spent.flops += tokens * plan.model.flops_per_token(length) + stream_state.get('flops', 0.0)
            line = {
                'step': step + 1,
                'tokens': spent.tokens,
                'flops': spent.flops,
                'learning_rate': float(rates[step]),
                **stream_state.get('metrics', {}),
                **values,
                # Since the last report: steps overlap, so that from its start to its end would be the time of two.
                'tokens_per_second': tokens / max(ready - reported, 1e-9),
            }
            reported = ready
            if log is not None:
                log.write(line, tokens)
            spent.log_seconds += time.perf_counter() - now - waited
            spent.total_seconds = time.perf_counter() - spent.warm
            spent.cpu_seconds = cpu_seconds() - cpu_before

        pending: tuple[Any, ...] | None = None
        for step in range(first, plan.steps):
            started = time.perf_counter()
            variables = {'params': state['params'], 'balance': state['balance']}
            if stream_works:  # it needs them at once, and the rest of the last step is not its time
                jax.block_until_ready(variables)
            asked = time.perf_counter()
            batch, stream_state = plan.stream.next(step, variables)
            made = time.perf_counter()
            placed = plan.layout.place(batch, plan.stream.rows)
            while told := getattr(plan.stream, 'events', None):
                tell(step + 1, *told.pop(0))
            spent.stream_seconds += made - asked
            spent.place_seconds += time.perf_counter() - made
            state, metrics = step_function(state, placed, rates[step])
            if step == first:
                jax.block_until_ready(state)
                spent.warm, cpu_before = time.perf_counter(), cpu_seconds()
                spent.first_seconds = spent.warm - started
                spent.stream_seconds = spent.place_seconds = 0.0
            if pending is not None:
                report(*pending)
            pending = (step, metrics, stream_state, batch['tokens'].shape[1])
            leaving = leave(step + 1) and step + 1 < plan.steps
            if step + 1 == plan.steps or (step + 1) % plan.save_every == 0 or leaving:
                report(*pending)
                pending = None
                totals = {'tokens': spent.tokens, 'flops': spent.flops}
                checkpoints.save(step + 1, state, stream_state, {**plan.metadata, **totals})
            if leaving:
                checkpoints.wait()
                tell(step + 1, 'preempted', 'told to end: saved, to go on when started again')
                raise Preempted
        checkpoints.wait()
    return state, spent


def _resume(plan: Plan, checkpoints: Checkpoints, state: State, spent: Spent) -> State:
    """The newest saved state, with stream and totals set to it; the given state where nothing was saved yet."""
    arrays = {name: state[name] for name in ('params', 'balance', 'optimizer')}
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
    restored = checkpoints.restore(wanted)
    step = 0
    if restored is not None:
        step = int(restored.metadata['step'])
        state = {**state, **restored.arrays, 'step': state['step'] + step}
        spent.tokens, spent.flops = int(restored.metadata['tokens']), float(restored.metadata['flops'])
        plan.stream.restore(restored.stream)
    if is_primary():
        set_aside(plan.folder, step)
    return state
