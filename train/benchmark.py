"""How fast a config trains on this machine, and how much of the time is not spent in the step.

python -m train.benchmark --config=configs/demo.py [--stage=NAME] [--steps=20] [--workdir=DIR] [--config...]

The real loop takes the first steps of a stage from its real stream, in a temporary folder, without evaluations. The
first step compiles, so rates begin after it. Weights are fresh, whatever the stage's parents are. That is all the same
where speed does not depend on them, but an untrained model that is to learn from its own answers gives long and useless
ones: with --workdir=DIR, such a stage begins with the checkpoints of its parents in a run.

With --operations it measures instead, at the sizes of the config's model, the grouped matmul beside a dense one,
decoding by the length of what is cached, and latents kept beside latents expanded: medians of --steps calls. With
--stream it takes batches from the stage's stream alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from data.errors import InputError
from train.__main__ import parse
from train.launch import operations
from train.launch.chips import known_peak, si
from train.launch.command import command
from train.launch.edges import needed_for, stage_model
from train.launch.graph import Run
from train.launch.host import prepare
from train.loop import Spent, train

_STEPS = flags.DEFINE_integer('steps', 20, 'How many steps to take, or calls of each operation.')
_OPERATIONS = flags.DEFINE_boolean('operations', False, 'Measure single operations instead of training.')
_STREAM = flags.DEFINE_boolean('stream', False, 'Measure the stream of a stage alone.')

COMPILATION = tuple(  # tracing, which nests, lowering, and compiling or reading a compiled program from disk
    f'/jax/core/compile/{part}_duration' for part in ('jaxpr_trace', 'jaxpr_to_mlir_module', 'backend_compile')
)
CACHED = '/jax/compilation_cache/cache_hits'
MATMUL = 2048


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a benchmark found.

    Attributes:
        title: what was measured, on what.
        steps: after the first; tokens, flops: trained in, and model FLOPs of (sampling included), these.
        spent: the loop's own account of its time.
        work: what the stream does itself, such as 'sampling'; '' where it makes batches beside the step.
        compile_seconds: spent on compilation in the first step; cached: programs it took from the cache on disk.
        late_compile_seconds: spent on compilation after it, which the rates contain.
        peak: FLOP/s of all devices, None if unknown; peak_source: where that number is from.
        plain: on CPU, the model FLOPs of a CPU-second of plain matrix products.
    """

    title: str
    steps: int
    tokens: int
    flops: float
    spent: Spent
    work: str
    compile_seconds: float
    cached: int
    late_compile_seconds: float
    peak: float | None
    peak_source: str
    plain: float | None

    @property
    def outside(self) -> dict[str, float]:
        """Shares of the time after the first step that went into data and logging.

        Devices may be at work meanwhile, so this is the most that could be won.
        """
        waited = 0.0 if self.work else self.spent.stream_seconds
        seconds = {'data': waited + self.spent.place_seconds, 'logging': self.spent.log_seconds}
        return {name: value / self.spent.total_seconds for name, value in seconds.items()}


def measure(config: dict[str, Any], stage: str, steps: int, folder: Path, workdir: Path | None = None) -> Measurement:
    """Takes the first `steps` steps of a stage ('' for the run's first stage).

    Args:
        folder: an empty one to write to.
        workdir: of a run whose checkpoints the stage begins with, only read; fresh weights without it.

    Raises:
        InputError: fewer than two steps, an unknown stage, or a config that `train` would not run either.
    """
    if steps < 2:
        raise InputError(f'--steps is {steps}: expected 2 or more, as the first, which compiles, is left out')
    if workdir is not None and not (workdir / 'tokenizer').is_dir():
        raise InputError(f'{workdir}: expected the folder of a run, with a tokenizer in it')
    run = Run(config, workdir or folder)
    name = needed_for(run.config, stage)[-1] if stage else run.order[0]
    settings = run.stages[name]
    plan, state = run.begin(name, fresh=workdir is None)
    plan = dataclasses.replace(plan, folder=folder / name, steps=steps, save_every=steps)
    plan.folder.mkdir()
    with compilations() as (compiled, cached):
        _, spent = train(plan, state)
    first, *_, last = map(json.loads, (plan.folder / 'metrics.jsonl').read_text().splitlines())
    peak, source, plain = peak_flops(run.mesh)
    kind = run.mesh.devices.flat[0].device_kind
    return Measurement(
        title=(
            f'{config["name"]}, stage {name}: {steps} steps of {settings["batch_size"]} x '
            f'{settings["sequence_length"]} tokens on {run.mesh.size} x {kind}'
        ),
        steps=steps - 1,
        tokens=last['tokens'] - first['tokens'],
        flops=last['flops'] - first['flops'],
        spent=spent,
        work=getattr(plan.stream, 'work', ''),
        compile_seconds=covered(compiled, spent.warm - spent.first_seconds, spent.warm),
        cached=sum(when <= spent.warm for when in cached),
        late_compile_seconds=covered(compiled, spent.warm, spent.warm + spent.total_seconds),
        peak=peak,
        peak_source=source,
        plain=plain,
    )


@contextmanager
def compilations() -> Iterator[tuple[list[tuple[float, float]], list[float]]]:
    """Notes parts of compilations meanwhile, as (start, end), and when a program came from the cache on disk."""
    compiled: list[tuple[float, float]] = []
    cached: list[float] = []

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        if event in COMPILATION:
            now = time.perf_counter()
            compiled.append((now - duration_secs, now))

    def on_event(event: str, **_: Any) -> None:
        if event == CACHED:
            cached.append(time.perf_counter())

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        yield compiled, cached
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)


def covered(intervals: list[tuple[float, float]], start: float, end: float) -> float:
    """How much of the time from start to end lies in at least one of the intervals."""
    seconds = 0.0
    for first, last in sorted(intervals):
        first, last = max(first, start), min(last, end)
        if last > first:
            seconds += last - first
            start = last
    return seconds


def peak_flops(mesh: jax.sharding.Mesh) -> tuple[float | None, str, float | None]:
    """FLOP/s of all devices of a mesh together, and the source of that number; None where it is not known.

    A CPU has no number that holds for its clock of the day, so it is measured, once for all of its devices: they share
    its cores. What a CPU-second of such products does is third; None elsewhere.
    """
    device = mesh.devices.flat[0]
    if device.platform == 'cpu':
        fastest, plain = measured_matmul()
        return fastest, f'a float32 matrix product of {MATMUL}^3, measured here', plain
    found = known_peak(device.device_kind)
    if found is None:
        return None, f'no peak is on record for {device.device_kind!r}', None
    return found[0] * mesh.size, f'dense bfloat16, {found[1]}', None


def measured_matmul(repeats: int = 9) -> tuple[float, float]:
    """FLOP/s of the fastest of some float32 matrix products, and FLOPs of a CPU-second of all of them."""
    x = jnp.ones((MATMUL, MATMUL), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds, cpu = [], time.process_time()
    for _ in range(repeats):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * MATMUL**3 / min(seconds), 2 * MATMUL**3 * repeats / (time.process_time() - cpu)


def stream_report(config: dict[str, Any], stage: str, steps: int, folder: Path) -> str:
    """How many tokens a CPU-second the stream of a stage packs, over so many steps, for people to read.

    Raises:
        InputError: a stage whose stream samples.
    """
    run = Run(config, folder)
    name = needed_for(run.config, stage)[-1] if stage else run.order[0]
    stream = run.begin(name, fresh=True)[0].stream
    if getattr(stream, 'work', ''):
        raise InputError(f'--stream: the stream of stage {name!r} samples: expected one that reads records')
    stream.next(0)
    began = time.process_time()
    tokens = sum(int((stream.next(step)[0]['segments'] > 0).sum()) for step in range(1, steps + 1))
    spent = time.process_time() - began
    stream.close()
    settings = run.stages[name]
    shape = f'{settings["batch_size"]} x {settings["sequence_length"]}'
    return f'{config["name"]}, stage {name}: {steps} batches of {shape} tokens: {tokens / spent:,.0f} a CPU-second'


def table(m: Measurement) -> str:
    """The measurement for people to read."""
    spent = m.spent
    rate = m.flops / spent.total_seconds
    compiling = f'{m.compile_seconds:.1f} s of it compiling'
    if m.cached:
        compiling += f'; programs from the cache on disk: {m.cached}'
    used = '-' if m.peak is None else f'{rate / m.peak:.1%}'
    source = m.peak_source if m.peak is None else f'of {si(m.peak)}FLOP/s: {m.peak_source}'
    rows = [
        ('first step', f'{spent.first_seconds:.1f} s', compiling),
        ('tokens per second', f'{m.tokens / spent.total_seconds:,.0f}', 'trained on, padding not counted'),
        ('tokens per CPU-second', f'{m.tokens / spent.cpu_seconds:,.0f}', f'{spent.cpu_seconds:.1f} s on all cores'),
        ('model FLOP/s', f'{si(rate)}FLOP/s', 'recomputation not counted'),
        ('model FLOPs utilisation', used, source),
        ('not in the step', f'{sum(m.outside.values()):.2%}', ', '.join(f'{n} {s:.2%}' for n, s in m.outside.items())),
    ]
    if m.plain is not None:
        each, bound = spent.cpu_seconds / m.steps, m.flops / m.steps / m.plain
        note = f'{each / bound:.2f} times those of its model FLOPs as plain matrix products, {bound:.2f}'
        rows.insert(3, ('CPU-seconds a step', f'{each:.2f}', note))
    if m.work:
        rows.append((m.work, f'{spent.stream_seconds / spent.total_seconds:.1%}', 'work of the stream, not waiting'))
    if m.late_compile_seconds > 0.01 * spent.total_seconds:
        note = 'compiled after the first step: the rates contain it'
        rows.append(('late compilation', f'{m.late_compile_seconds:.1f} s', note))
    return '\n'.join([m.title, *(f'  {name:<24}{value:>16}  {note}' for name, value, note in rows)])


@command('train.benchmark')
def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    if '--help' in arguments or '-h' in arguments:
        print(__doc__)
        return 0
    config = parse(arguments, required=('config',))
    prepare()
    if _OPERATIONS.value:
        print(operations.report(stage_model(config, flags.FLAGS.stage or min(config['stages'])), _STEPS.value))
        return 0
    workdir = Path(flags.FLAGS.workdir) if flags.FLAGS.workdir else None
    with tempfile.TemporaryDirectory(prefix='torso-benchmark-') as folder:
        if _STREAM.value:
            print(stream_report(config, flags.FLAGS.stage, _STEPS.value, Path(folder)))
            return 0
        print(table(measure(config, flags.FLAGS.stage, _STEPS.value, Path(folder), workdir)))
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
