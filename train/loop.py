"""The train loop. There is one, and it does not know which stage it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from data.errors import InputError
from data.stream import Stream
from model.transformer import Model, Variables
from train.checkpoint import Checkpoints, read_json, write_json
from train.launch.events import note
from train.launch.goodput import Clock
from train.launch.host import cpu_seconds, is_primary
from train.launch.log import Log, set_aside
from train.launch.pace import Pace
from train.launch.peers import deadline, lost
from train.launch.preemption import Preempted, notice
from train.learn.health import Rewind, Watch, guard, restored_health, saved_health
from train.learn.objectives import Objective
from train.learn.replicas import Prints, agreement, twice
from train.learn.step import Layout, State, make_step
from train.learn.together import Step, alone
from train.measure.lineage import PARTS

# Of a stage's config, what is in its Plan as it is.
FIELDS = (
    'trainable',
    'steps',
    'save_every',
    'keep',
    'guard',
    'alarms',
    'step_deadline',
    'compare_every',
    'replay_every',
    'qk_clip',
    'evaluate_every',
)
SKIPPED = 'skipped.json'  # in a stage's folder: the steps whose batches are left out


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything the loop needs to know.

    Attributes:
        name: shown beside the progress bar.
        folder: where metrics, events and checkpoints go.
        model, objective, optimizer, stream: what is trained, on what, and how.
        trainable: an expression that selects the parameters which learn (see `train.learn.step.trained`).
        learning_rate: of the step; a factor on the optimizer's updates.
        steps, save_every, keep: counts; pinned: steps whose checkpoints stay, whatever `keep` says.
        guard: against spikes, and alarms: limits of metrics (see `train.learn.health`).
        step_deadline: seconds that no step but the first takes (see `train.launch.peers`).
        compare_every, replay_every: steps between comparisons of copies of the state, and between those that are taken
            twice and compared (see `train.learn.replicas`).
        qk_clip: see `model.clip`; 0: no clipping.
        layout: of a batch on the devices.
        tokens, flops: what the checkpoint the stage starts from has already cost.
        metadata: goes into every checkpoint.
        clock: is told what time goes by for.
        wandb: the project of Weights & Biases that metrics go to; '': none.
        compiled: compiles the step function.
        evaluate_every: steps between calls of `measure`, with the step, the FLOPs so far and the variables; 0: none.
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
    guard: Mapping[str, Any]
    alarms: Mapping[str, Any]
    step_deadline: float
    compare_every: int
    replay_every: int
    qk_clip: float
    layout: Layout
    tokens: int
    flops: float
    metadata: dict[str, Any]
    clock: Clock = dataclasses.field(default_factory=Clock)
    compiled: Callable[[Step], Step] = functools.partial(alone, '')
    evaluate_every: int = 0
    wandb: str = ''
    measure: Callable[[int, float, Variables], None] = lambda step, flops, variables: None


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
    The last state is always saved, and is on disk when this returns. Told to end (see `train.launch.preemption`), it
    saves after the step under way.

    Raises:
        Preempted: it was told to end before the last step.
        InputError: the last state could not be saved (of other saves that fail, the next is waited for); what the guard
            stops for, or would go back for where nothing was saved yet.
    """
    last = None
    while True:
        try:
            return _train(plan, state)
        except Rewind as back:
            if back.reason == last:
                raise InputError(f'{plan.folder}: {last}, and again when the steps before it were taken anew') from None
            last = back.reason
            _go_back(plan, back)


def _train(plan: Plan, state: State) -> tuple[State, Spent]:
    tell = functools.partial(note, plan.folder)
    checkpoints = Checkpoints(plan.folder / 'checkpoints', plan.keep, plan.save_every, plan.pinned, note=tell)
    spent = Spent(plan.tokens, plan.flops)
    with plan.clock.spend('restore'):
        state = _resume(plan, checkpoints, state, spent)
    first = int(state['step'])
    plan.clock.resumed(plan.name, first)
    one_step = make_step(plan.model, plan.objective, plan.optimizer, plan.trainable, guard(plan.guard), plan.qk_clip)
    step_function = plan.compiled(one_step)
    # All at once, as asking for one would wait for the devices.
    rates = np.asarray(jax.jit(jax.vmap(plan.learning_rate))(np.arange(plan.steps)), np.float32)
    left_out = set(read_json(plan.folder / SKIPPED)) if (plan.folder / SKIPPED).exists() else set()
    watch = Watch(plan.guard, plan.alarms, tell)
    prints = Prints(state, plan.layout.mesh, plan.folder)
    compare = agreement(prints, plan.layout.mesh) if plan.compare_every else lambda step, state: None
    step_twice = twice(step_function, prints) if 0 < plan.replay_every <= plan.steps else None
    stream_works = bool(getattr(plan.stream, 'work', ''))
    pace = Pace(tell)
    cpu_before = 0.0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(checkpoints))  # an interrupted run still finishes the save it has begun
        stack.enter_context(jax.set_mesh(plan.layout.mesh))
        log = stack.enter_context(Log(plan.folder, plan.name, plan.steps, first, plan.wandb)) if is_primary() else None
        leave = stack.enter_context(notice())
        stack.enter_context(plan.clock.spend('compile'))
        step = first
        stack.enter_context(lost(lambda: step + 1, tell))
        began = stack.enter_context(deadline(plan.step_deadline, tell))
        reported = time.perf_counter()

        def report(step: int, device: dict[str, jax.Array], stream_state: dict[str, Any], length: int) -> None:
            nonlocal reported
            now = time.perf_counter()
            values = {name: float(value) for name, value in jax.device_get(device).items()}
            ready = time.perf_counter()
            waited = ready - now
            tokens = int(values.pop('tokens'))  # of all processes
            verdict, row = int(values.pop('verdict', 0)), int(values.pop('row', 0))  # of the guard, where there is one
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
                'goodput': plan.clock.goodput(),
            }
            reported = ready
            if log is not None:
                log.write(line, tokens)
            watch(step + 1, verdict, row, line, asked=step + 1 in left_out)
            spent.log_seconds += time.perf_counter() - now - waited
            spent.total_seconds = time.perf_counter() - spent.warm
            spent.cpu_seconds = cpu_seconds() - cpu_before

        pending: tuple[Any, ...] | None = None
        for step in range(first, plan.steps):
            started = time.perf_counter()
            if step > first:
                began(step + 1)
            variables = {'params': state['params'], 'balance': state['balance']}
            # What a kill after the save cost is made up for when the stage goes on.
            if step and plan.evaluate_every and step % plan.evaluate_every == 0:
                if pending is not None:
                    report(*pending)
                    pending = None
                plan.measure(step, spent.flops, variables)
                reported = time.perf_counter()
            if stream_works:  # it needs them at once, and the rest of the last step is not its time
                jax.block_until_ready(variables)
            asked = time.perf_counter()
            with plan.clock.spend('' if stream_works else 'data'):
                batch, stream_state = plan.stream.next(step, variables)
            made = time.perf_counter()
            placed = plan.layout.place(batch, plan.stream.rows)
            while told := getattr(plan.stream, 'events', None):
                tell(step + 1, *told.pop(0))
            spent.stream_seconds += made - asked
            spent.place_seconds += time.perf_counter() - made
            rate = np.float32(np.nan) if step + 1 in left_out else rates[step]
            if step_twice and (step + 1) % plan.replay_every == 0:
                state, metrics = step_twice(step + 1, state, placed, rate)
            else:
                state, metrics = step_function(state, placed, rate)
            if step == first:
                jax.block_until_ready(state)
                spent.warm, cpu_before = time.perf_counter(), cpu_seconds()
                spent.first_seconds = spent.warm - started
                spent.stream_seconds = spent.place_seconds = 0.0
                plan.clock.now('step')
            if pending is not None:
                report(*pending)
            pending = (step, metrics, stream_state, batch['tokens'].shape[1])
            leaving = leave(step + 1) and step + 1 < plan.steps
            saves = step + 1 == plan.steps or (step + 1) % plan.save_every == 0 or leaving
            if saves or (plan.compare_every and (step + 1) % plan.compare_every == 0):
                compare(step + 1, state)
                pace(step + 1, 0.0 if stream_works else spent.stream_seconds)
            if saves:
                report(*pending)
                pending = None
                more = {'tokens': spent.tokens, 'flops': spent.flops, 'health': saved_health(state.get('health', {}))}
                with plan.clock.spend('save'):
                    checkpoints.save(step + 1, state, stream_state, {**plan.metadata, **more})
                plan.clock.saved(step + 1)
            if leaving:
                with plan.clock.spend('save'):
                    checkpoints.wait()
                tell(step + 1, 'preempted', 'told to end: saved, to go on when started again')
                raise Preempted
        with plan.clock.spend('save'):
            checkpoints.wait()
    return state, spent


def _resume(plan: Plan, checkpoints: Checkpoints, state: State, spent: Spent) -> State:
    """The newest saved state, with stream and totals set to it; the given state where nothing was saved yet."""
    arrays = {name: state[name] for name in ('params', 'balance', 'optimizer')}
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
    restored = checkpoints.restore(wanted)
    step, health = 0, None
    if restored is not None:
        step = int(restored.metadata['step'])
        state = {**state, **restored.arrays, 'step': jax.device_put(np.int32(step), state['step'].sharding)}
        health = restored.metadata.get('health')
        spent.tokens, spent.flops = int(restored.metadata['tokens']), float(restored.metadata['flops'])
        plan.stream.restore(restored.stream)
    if is_primary():
        for name in ('metrics.jsonl', PARTS):
            set_aside(plan.folder / name, step)
    if plan.guard['sigma']:
        whole = jax.sharding.NamedSharding(plan.layout.mesh, jax.sharding.PartitionSpec())
        state['health'] = jax.device_put(restored_health(plan.guard, health), whole)
    return state


def _go_back(plan: Plan, back: Rewind) -> None:
    """Puts checkpoints after a step aside, for the stage to go on from the one before; notes what to leave out."""
    checkpoints = Checkpoints(plan.folder / 'checkpoints', plan.keep, plan.save_every, plan.pinned)
    with contextlib.closing(checkpoints):
        step = checkpoints.go_back(back.step)
    if step is None:
        raise InputError(f'{plan.folder}: {back.reason}, and no checkpoint to go back to: set a smaller save_every')
    path = plan.folder / SKIPPED
    write_json(path, sorted({*(read_json(path) if path.exists() else ()), *back.skip}))
    note(plan.folder, step, 'went back', f'{back.reason}; steps left out from now on: {list(back.skip)}')
