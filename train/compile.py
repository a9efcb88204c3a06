"""Would it run there? Compiles a stage for a TPU slice on a machine without a TPU, and says what it would take.

python -m train.compile --config=configs/deepseek_v3.py --topology=v5p:8x8x16 [--stage=NAME] [--config.X=VALUE ...]

Needs libtpu: pip install -r requirements-compile.txt. No TPU, data, tokenizer or checkpoint: only shapes count. The
real train step is compiled by the real compiler (and for a stage that samples, reading prompts and writing answers),
which takes minutes for the largest models. For each program you get, of one chip:

  arguments, temporaries, output, aliased    bytes; arguments that are updated in place are aliased
  peak                                       the most memory in use at one time, against what the chip has
  FLOPs                                      of all matrix products as compiled, recomputation and padding included,
                                             and the model FLOPs, which count neither
  memory traffic                             an estimate of the bytes to and from HBM
  collectives                                by kind: how many, their bytes, and what a ring of chips has to send
  roofline                                   seconds for the matrix unit, HBM and links, each as if it were alone and at
                                             its peak; the longest binds, and no step can be faster

Exit status 1 and one line with what to change if the compiler refuses or the peak exceeds the chip's memory.

  --topology   generation and chips along each axis, such as v5p:2x2x4 or v6e:4x4; by default the config's own
  --stage      which stage; the run's first by default
  --config.X   any field of the config, as in `python -m train`
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from data.errors import InputError
from train.__main__ import parse
from train.launch.chips import Chip, chip_of, si
from train.launch.command import command

if TYPE_CHECKING:
    from train.launch.hlo import Cost
    from train.learn.programs import Program

_TOPOLOGY = flags.DEFINE_string('topology', '', 'TPU slice to compile for, such as v5p:8x8x16.')

# libtpu is to describe another machine, not to look for a TPU in this one. JAX reads these when it is imported.
ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_MIN_LOG_LEVEL': '3',
}


def check(config: Mapping[str, Any], stage: str, topology: str) -> None:
    """Compiles a stage ('' for the first) for a slice and prints what it takes.

    Raises:
        InputError: no libtpu, an unknown slice or stage, a mesh or batch that does not fit the slice; the compiler
            refuses, or the peak exceeds the chip's memory.
    """
    if importlib.util.find_spec('libtpu') is None:
        raise InputError('libtpu is not installed: pip install -r requirements-compile.txt')
    # Imported late: the environment has to be set before JAX is.
    import jax
    from jax.experimental import topologies

    from model.sharding import make_mesh
    from model.transformer import Model
    from train.launch.edges import needed_for, order, stage_model
    from train.launch.hlo import cost
    from train.learn.programs import compiled_programs

    name = needed_for(config, stage)[-1] if stage else order(config)[0]
    model = Model(stage_model(config, name))
    try:
        devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    except (ValueError, RuntimeError) as error:
        raise InputError(f'--topology={topology}: {_reason(error)}; expected such as v5p:2x2x4 or v6e:4x4') from None
    kind = devices[0].device_kind  # type: ignore[attr-defined]
    chip = chip_of(kind)
    if chip is None:
        raise InputError(f'--topology={topology}: nothing is known of {kind!r}; expected v5e, v5p, v6e or tpu7x')
    try:
        mesh = make_mesh(config['mesh'], devices)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise InputError(f'--topology={topology}: {_reason(error)}') from None
    axes = ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1)
    counts = model.parameter_counts
    print(f'{config["name"]}, stage {name}, on {topology}: {mesh.size} x {kind}, mesh {axes or "of one device"}')
    print(f'  {"parameters":<18}{counts["total"]:,}, {counts["active"]:,} of them active for a token')
    print(
        f'  {"of a chip":<18}{chip.flops / 1e12:.0f} TFLOP/s in bfloat16, {_bytes(chip.memory)} of HBM at '
        f'{chip.bandwidth / 1e9:.0f} GB/s, {chip.links / 1e9:.0f} GB/s sent over all links: {chip.source}',
        flush=True,
    )
    settings = config['stages'][name]
    programs = compiled_programs(config, name, mesh)
    while True:
        try:
            program = next(programs, None)
        except jax.errors.JaxRuntimeError as error:
            raise InputError(f'stages.{name}: {_refusal(error)}: {advice(name, settings, model, mesh.size)}') from None
        if program is None:
            return
        print(table(program, cost(program.text), chip, mesh.size), flush=True)
        peak = program.memory.peak_memory_in_bytes
        if peak > chip.memory:
            raise InputError(
                f'stages.{name}: the {program.name} takes {_bytes(peak)} of the {_bytes(chip.memory)} of a chip: '
                + advice(name, settings, model, mesh.size)
            )


def table(program: Program, cost: Cost, chip: Chip, chips: int) -> str:
    """What a program takes of a chip, for people to read."""
    memory = program.memory
    model_flops = program.model_flops / chips
    peak = memory.peak_memory_in_bytes
    rows = [
        ('compilation', f'{program.wall_seconds:.0f} s, {program.cpu_seconds:.0f} CPU-seconds'),
        ('arguments', _bytes(memory.argument_size_in_bytes)),
        ('temporaries', _bytes(memory.temp_size_in_bytes)),
        ('output', _bytes(memory.output_size_in_bytes)),
        ('aliased', _bytes(memory.alias_size_in_bytes)),
        ('peak', f'{_bytes(peak)}, {peak / chip.memory:.0%} of HBM'),
        ('FLOPs', f'{_flops(cost.flops)}, {cost.flops / max(model_flops, 1):.2f} times the model FLOPs'),
        ('model FLOPs', _flops(model_flops)),
    ]
    for name, flops in cost.kernels.items():
        known = 'under a causal mask' if name.startswith('splash') else 'as it states'
        rows.append(('  in a kernel', f'{_flops(flops)} in {name}, {known}'))
    rows += [('  not counted', f'kernel {name}, {int(n)} times') for name, n in cost.uncounted.items()]
    rows.append(('memory traffic', _bytes(cost.memory)))
    rows += [
        (name, f'{int(cost.calls[name]):,} times, {_bytes(size)}, {_bytes(cost.wire[name])} sent')
        for name, size in sorted(cost.payload.items(), key=lambda item: -item[1])
    ]
    loops = sorted({(count, _loop(scope)) for scope, count in cost.assumed.items()}, reverse=True)
    rows += [('loop, as assumed', f'{count} times: {scope}') for count, scope in loops]
    terms = {
        'matrix unit': cost.flops / chip.flops,
        'HBM': cost.memory / chip.bandwidth,
        'links': sum(cost.wire.values()) / chip.links,
    }
    rows.append(('roofline', ', '.join(f'{name} {seconds:.3g} s' for name, seconds in terms.items())))
    for note, seconds in (
        (f'bound by {max(terms, key=lambda name: terms[name])}', max(terms.values())),
        ('if nothing overlaps', sum(terms.values())),
    ):
        rows.append((note, f'{seconds:.3g} s, model FLOPs utilisation {model_flops / chip.flops / seconds:.1%}'))
    return '\n'.join([f'{program.name}, {program.work}; of one chip:', *(f'  {n:<18}  {text}' for n, text in rows)])


def advice(name: str, stage: Mapping[str, Any], model: Any, chips: int) -> str:
    """What to change where memory does not suffice, the cheapest first."""
    rows = stage['batch_size'] // stage['microbatches']
    if model.config.remat != 'full':
        return f'try --config.model.remat=full, which is {model.config.remat!r}'
    if rows >= 2 * chips:
        return f'try --config.stages.{name}.microbatches={2 * stage["microbatches"]} or more chips'
    return 'try more chips, or a mesh that shards more'


def _refusal(error: Exception) -> str:
    """The compiler's message in a few words."""
    text = str(error)
    used = re.search(r'Used ([\d.]+\w) of ([\d.]+\w) (\w+)', text)
    if used:
        return f'the compiler needs {used.group(1)} of the {used.group(2)} of {used.group(3)} of a chip'
    return f'the compiler refuses, {_reason(error)}'


def _reason(error: Exception) -> str:
    """The first sentence of an error."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return re.split(r'(?<=[a-z\])"])\. ', re.sub(r'^[A-Z_]+: ', '', line))[0].rstrip('.')[:300]


def _loop(scope: str) -> str:
    """The end of a scope's name, without what autodiff and the tracer wrap around it."""
    parts = [part for part in scope.split('/') if not re.match(r'(while|body|closed_call|checkpoint|jit\(.*)$', part)]
    return '/'.join(parts[-3:]) or scope


def _bytes(size: float) -> str:
    return f'{si(size)}B'


def _flops(count: float) -> str:
    return f'{si(count)}FLOP'


@command('train.compile')
def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    if '--help' in arguments or '-h' in arguments:
        print(__doc__)
        return 0
    os.environ.update(ENVIRONMENT)
    config = parse(arguments, required=('config',))
    topology = _TOPOLOGY.value or config['topology']
    if not topology:
        raise InputError('--topology is missing: try --topology=v5p:2x2x4')
    check(config, flags.FLAGS.stage, topology)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
