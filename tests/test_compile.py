"""What `train.compile` counts, on programs whose counts are known; the published models; and a real TPU compilation."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from jax import lax
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from small import get_config, model_config
from text import small_tokenizer

from configs import deepseek_v2_lite, deepseek_v3, moonlight
from data.errors import InputError
from model.backend import platform, trips
from model.sharding import make_mesh
from model.transformer import Model
from train import compile as command
from train.launch.chips import chip_of
from train.launch.edges import stage_model
from train.launch.graph import Run
from train.launch.hlo import Cost, cost, group_size
from train.learn.optimizer import make_optimizer
from train.learn.programs import compiled_programs
from train.learn.step import Layout, initial_state, optimizer_shapes
from train.stages import KINDS, batch_shapes


def cost_of(function: Any, *shapes: tuple[int, ...], dtype: Any = jnp.float32) -> Cost:
    """The cost of a function of arrays of these shapes."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return cost(jax.jit(function).lower(*arrays).compile().as_text())


def over_eight(function: Any, inputs: Any, outputs: Any) -> Any:
    """A function of each device's part, on eight devices."""
    return jax.shard_map(function, mesh=make_mesh({'fsdp': 8}), in_specs=inputs, out_specs=outputs, check_vma=False)


# FLOPs.


def test_products_in_nested_loops() -> None:
    def layer(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, None]:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0], None

    counted = cost_of(lambda x, w: lax.scan(layer, x, w)[0], (16, 32), (3, 5, 32, 32))
    assert counted.flops == 3 * 5 * 2 * 16 * 32 * 32
    assert not counted.assumed and not counted.payload


def test_products_with_batches_and_their_gradients() -> None:
    def loss(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sin(jnp.einsum('bhtd,bhsd->bhts', x, y)).sum()

    shapes = (2, 3, 8, 16), (2, 3, 24, 16)
    forward = 2 * 2 * 3 * 8 * 24 * 16
    assert cost_of(loss, *shapes).flops == forward
    assert cost_of(jax.grad(loss, argnums=(0, 1)), *shapes).flops == 3 * forward


def test_a_loop_of_unknown_length_runs_as_often_as_is_noted() -> None:
    def run(x: jax.Array, count: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count[0], lambda _, x: jnp.tanh(x @ x), x)

    def noted(x: jax.Array, count: jax.Array) -> jax.Array:
        with trips(7):
            return run(x, count)

    shapes = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    for function, times in ((run, 1), (noted, 7)):
        counted = cost(jax.jit(function).lower(*shapes).compile().as_text())
        assert counted.flops == times * 2 * 8**3
        assert list(counted.assumed.values()) == [times]


def test_of_two_branches_the_longer_counts() -> None:
    def choose(x: jax.Array) -> jax.Array:
        return lax.cond(x.sum() > 0, lambda x: jnp.tanh(jnp.tanh(x @ x) @ x), lambda x: x @ x, x)

    assert cost_of(choose, (8, 8)).flops == 2 * 2 * 8**3


def test_the_model_costs_about_what_it_says() -> None:
    """Dense, with short rows, so that the masked half of attention weighs little."""
    model = Model(model_config(n_routed_experts=0, hidden_size=64, num_hidden_layers=3))
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    variables = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.shapes(make_mesh({}, jax.devices()[:1]))
    )
    text = jax.jit(lambda v, t: model.apply(v, t).logits).lower(variables, tokens).compile().as_text()
    assert cost(text).flops == pytest.approx(2 * 32 * model.flops_per_token(32, backward=False), rel=0.05)


# Collectives.


def test_gathering_in_a_loop() -> None:
    def gather(x: jax.Array) -> jax.Array:
        return lax.scan(lambda total, row: (total + lax.all_gather(row, 'fsdp', tiled=True), None), jnp.zeros(64), x)[0]

    counted = cost_of(over_eight(gather, P(None, 'fsdp'), P()), (5, 64))
    assert counted.calls == {'all-gather': 5}
    assert counted.payload['all-gather'] == 5 * 64 * 4
    assert counted.wire['all-gather'] == 5 * 64 * 4 * 7 / 8


@pytest.mark.parametrize(
    ('kind', 'function', 'output', 'wire'),
    [
        ('all-reduce', lambda x: lax.psum(x, 'fsdp'), P(), 2 * 7 / 8),
        ('reduce-scatter', lambda x: lax.psum_scatter(x, 'fsdp', tiled=True), P('fsdp'), 7 / 8),
        ('all-to-all', lambda x: lax.all_to_all(x, 'fsdp', 0, 0, tiled=True), P('fsdp'), 7 / 8),
        (
            'collective-permute',
            lambda x: lax.ppermute(x, 'fsdp', [(i, (i + 1) % 8) for i in range(8)]),
            P('fsdp'),
            1.0,
        ),
    ],
)
def test_collectives(kind: str, function: Any, output: Any, wire: float) -> None:
    counted = cost_of(over_eight(function, P('fsdp'), output), (8 * 16, 4))
    assert counted.calls == {kind: 1}
    assert counted.payload[kind] == 16 * 4 * 4
    assert counted.wire[kind] == 16 * 4 * 4 * wire


@pytest.mark.parametrize(
    ('written', 'size'),
    [
        ('replica_groups={{0,1,2,3},{4,5,6,7}}', 4),
        ('replica_groups=[2,8]<=[16]', 8),
        ('replica_groups=[4,2]<=[2,4]T(1,0)', 2),
        ("replica_groups=mesh['a'=2,'b'=8,'c'=1] {'b'}", 8),
        ("replica_groups=mesh['a'=2,'b'=8] {'a','b'}", 16),
        ('to_apply=%add', 1),
    ],
)
def test_groups_in_every_notation(written: str, size: int) -> None:
    assert group_size(f'channel_id=1, {written}, dimensions={{0}}') == size


# Text as XLA:TPU writes it: products as convolutions, asynchronous pairs, memory spaces, kernels.

TPU = """HloModule jit_step, is_scheduled=true

%inside (p: bf16[64,512], q: bf16[512,256]) -> bf16[64,256] {
  %p = bf16[64,512]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[512,256]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[64,256]{1,0:T(8,128)(2,1)} convolution(%p, %q), dim_labels=bf_io->bf
}

%condition (state: (s32[], bf16[64,512])) -> pred[] {
  %state = (s32[]{:T(128)}, /*index=1*/bf16[64,512]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} constant(9)
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (state.1: (s32[], bf16[64,512])) -> (s32[], bf16[64,512]) {
  %state.1 = (s32[]{:T(128)}, bf16[64,512]{1,0}) parameter(0)
  %x = bf16[64,512]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %w = bf16[512,256]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %fusion.1 = bf16[64,256]{1,0:T(8,128)(2,1)} fusion(%x, %w), kind=kOutput, calls=%inside
  %all-gather-start.1 = (bf16[64,256]{1,0}, bf16[64,512]{1,0}) all-gather-start(%fusion.1), replica_groups=[4,2]<=[8]
  %all-gather-done.1 = bf16[64,512]{1,0} all-gather-done(%all-gather-start.1)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %stride = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)S(6)} add(%counter.1, %stride)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[64,512]{1,0}) tuple(%next, %all-gather-done.1)
}

ENTRY %main (a: bf16[64,512]) -> bf16[64,512] {
  %a = bf16[64,512]{1,0:T(8,128)(2,1)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %copy.1 = s32[]{:T(128)} copy(%two)
  %begin = (s32[]{:T(128)}, bf16[64,512]{1,0}) tuple(%copy.1, %a)
  %while.1 = (s32[]{:T(128)}, bf16[64,512]{1,0}) while(%begin), condition=%condition, body=%body
  ROOT %result = bf16[64,512]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_a_loop_between_constants_with_an_asynchronous_gather() -> None:
    counted = cost(TPU)
    assert counted.flops == 4 * 2 * 64 * 512 * 256  # 2, 4, 6 and 8
    assert counted.calls == {'all-gather': 4} and counted.payload['all-gather'] == 4 * 64 * 512 * 2
    assert counted.wire['all-gather'] == 4 * 64 * 512 * 2 / 2
    # The weight is in the vector memory; what is fused is not written.
    assert counted.memory == 4 * 2 * ((64 * 512 + 64 * 256) + (64 * 256 + 64 * 512)) + 8 + 4 * 8  # and scalars


def module(*lines: str) -> str:
    """A module with one computation."""
    return '\n'.join(['HloModule m', '', 'ENTRY %main () -> f32[] {', *(f'  {line}' for line in lines), '}'])


@pytest.mark.parametrize(
    ('left', 'right', 'out', 'attributes', 'products'),
    [
        # Batches of four by four, written as spatial dimensions of which each output meets one element.
        (
            '4,4,128,192',
            '4,4,256,192',
            '4,4,128,256',
            'window={size=4x4 stride=3x3 lhs_dilate=4x4}, dim_labels=01bf_01oi->01bf',
            4 * 4 * 128 * 256 * 192,
        ),
        # Heads as a window over padding, turned around.
        (
            '4,512,128,1',
            '128,4,256,1',
            '4,512,4,256',
            'window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f',
            4 * 512 * 4 * 256 * 128,
        ),
        # A sum over heads and their width.
        ('4,4,512,128', '4,128,256,1', '4,512,256,1', 'window={size=1x4}, dim_labels=0b1f_1io0->0bf1', None),
    ],
)
def test_products_written_as_convolutions(
    left: str, right: str, out: str, attributes: str, products: int | None
) -> None:
    if products is None:
        left, products = '4,512,4,128', 4 * 512 * 256 * 4 * 128
    counted = cost(
        module(
            f'%l = bf16[{left}]{{3,2,1,0}} parameter(0)',
            f'%r = bf16[{right}]{{3,2,1,0}} parameter(1)',
            f'ROOT %c = bf16[{out}]{{3,2,1,0}} convolution(%l, %r), {attributes}',
        )
    )
    assert counted.flops == 2 * products


def test_kernels() -> None:
    call = 'custom-call(%m, %q, %k, %v), custom_call_target="tpu_custom_call"'
    stated = json.dumps({'custom_call_config': {'cost_estimate': {'flops': '1000'}}}, separators=(',', ':'))
    counted = cost(
        module(
            '%m = s8[1,8,8]{2,1,0} parameter(0)',
            '%q = bf16[16,1024,192]{2,1,0} parameter(1)',
            '%k = bf16[16,1024,192]{2,1,0} parameter(2)',
            '%v = bf16[16,1024,128]{2,1,0} parameter(3)',
            f'%gmm.3 = bf16[64,64]{{1,0}} {call}, backend_config={stated}',
            f'%splash_mha_fwd_residuals.1 = bf16[16,1024,128]{{2,1,0}} {call}, backend_config={{}}',
            f'ROOT %mystery.2 = bf16[64]{{0}} {call}, backend_config={{}}',
        )
    )
    # Of 8 x 8 blocks 36 lie on or below the diagonal.
    assert counted.kernels == {'gmm': 1000, 'splash_mha_fwd_residuals': 2 * 16 * 1024 * 1024 * (192 + 128) * 36 / 64}
    assert counted.uncounted == {'mystery': 1}
    assert counted.flops == sum(counted.kernels.values())


def test_a_slice_of_stacked_weights_is_read_alone() -> None:
    counted = cost_of(lambda x, w: lax.scan(lambda x, w: (x + w, None), x, w)[0], (1024,), (16, 1024))
    row = 1024 * 4
    assert 16 * 3 * row <= counted.memory < 16 * 6 * row  # not 16 times all 16 rows


# The programs.


@pytest.mark.slow
def test_states_and_batches_are_those_of_a_run(tmp_path: Path) -> None:
    """Shapes, dtypes and shardings that are compiled for are those that the loop will meet."""
    mesh, config = make_mesh({'fsdp': 4, 'expert': 2}), get_config()
    config.mesh.update(data=1, fsdp=4, expert=2)
    config.model.update(n_routed_experts=0, num_hidden_layers=1)
    config.stages.grpo.batch_size = 16
    config.tokenizer.path = str(tmp_path / 'tokenizer')
    small_tokenizer().save(tmp_path / 'tokenizer')
    plain = config.to_dict()
    for name, stage in plain['stages'].items():
        model = Model(stage_model(plain, name))
        optimizer = make_optimizer(stage['optimizer'], model.declared['params'])
        params = model.shapes(mesh)['params']
        layout = Layout(mesh, stage['batch_size'], stage['sequence_length'], stage['microbatches'])
        expected = layout.shapes(batch_shapes(stage))
        stage['steps'] = 1
        run = Run(plain, tmp_path / 'work')
        with jax.set_mesh(mesh):
            variables = model.init(0, mesh)
            stream = KINDS[stage['kind']].stream(run._context(name, model, {}))
            batch = layout.place(stream.next(0, variables)[0], stream.rows)
            state = initial_state(variables, optimizer)
        assert {n: (x.shape, x.dtype, x.sharding) for n, x in batch.items()} == {
            n: (x.shape, x.dtype, x.sharding) for n, x in expected.items()
        }
        shapes = optimizer_shapes(optimizer, params)
        for real, shape in zip(jax.tree.leaves(state['optimizer']), jax.tree.leaves(shapes), strict=True):
            assert (real.shape, real.dtype) == (shape.shape, shape.dtype)
            assert real.sharding.is_equivalent_to(shape.sharding, real.ndim)


def test_moments_are_sharded_as_their_weights() -> None:
    mesh, model = make_mesh({'fsdp': 4, 'expert': 2}), Model(model_config())
    params = model.shapes(mesh)['params']
    weight = params['layers']['mlp']['experts_gate_proj']
    assert not weight.sharding.is_fully_replicated
    for name in ('adamw', 'muon'):
        settings = {**get_config().stages.pretrain.optimizer.to_dict(), 'name': name}
        shapes = optimizer_shapes(make_optimizer(settings, model.declared['params']), params)
        moments = [
            x.sharding
            for path, x in jax.tree_util.tree_leaves_with_path(shapes)
            if 'experts_gate_proj' in jax.tree_util.keystr(path)
        ]
        assert moments and all(sharding == weight.sharding for sharding in moments)


@pytest.mark.slow
def test_programs_of_a_stage_that_samples() -> None:
    """On the fake devices here, which need no libtpu: a step, a prefill and a decode, with all loops accounted for."""
    config = get_config()
    config.model.update(n_routed_experts=0, num_hidden_layers=1)
    config.stages.grpo.batch_size = 16
    programs = list(compiled_programs(config.to_dict(), 'grpo', make_mesh({'fsdp': 8})))
    assert [program.name for program in programs] == ['train step', 'prefill', 'decode']
    for program in programs:
        counted = cost(program.text)
        assert counted.flops * 8 >= 0.5 * program.model_flops > 0
        assert program.wall_seconds > 0 and program.memory.argument_size_in_bytes > 0
    assert list(counted.assumed.values()) == [config.stages.grpo.max_tokens]


def test_the_platform_is_that_of_the_mesh() -> None:
    assert platform() == 'cpu'
    device = jax.sharding.AbstractDevice(device_kind='TPU v5', num_cores=2, platform='tpu')
    mesh = jax.sharding.AbstractMesh((8,), ('fsdp',), abstract_device=device)
    seen = []
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda x: seen.append(platform()) or x, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert seen == ['tpu'] and platform() == 'cpu'


# The published models.


@pytest.mark.parametrize(
    ('config', 'total', 'active'),
    [
        # 671 and 37 billion (report, abstract); 671.03 is what the weights on the hub add up to without the module.
        (deepseek_v3.get_config(), 671.03e9, 37e9),
        # 15.7 and 2.4 billion (report, appendix B), the looked-up embedding not counted as active.
        (deepseek_v2_lite.get_config(), 15.706e9, 2.45e9 + 102_400 * 2048),
        # 15.29 and 2.24 billion without embedding and head (report, table 4).
        (moonlight.get_config(), 15.29e9 + 2 * 163_840 * 2048, 2.24e9 + 2 * 163_840 * 2048),
    ],
    ids=['v3', 'v2 lite', 'moonlight'],
)
def test_sizes_are_the_published_ones(config: ConfigDict, total: float, active: float) -> None:
    shape = dataclasses.replace(stage_model(config.to_dict(), 'pretrain'), num_nextn_predict_layers=0)
    counts = Model(shape).parameter_counts
    assert counts['total'] == pytest.approx(total, rel=5e-4)
    assert counts['active'] == pytest.approx(active, rel=0.02)


def test_the_module_of_deepseek_v3() -> None:
    """11.5 billion parameters of its own (README_WEIGHTS.md beside the weights); 61 layers of 576 cached numbers."""
    shape = stage_model(deepseek_v3.get_config().to_dict(), 'pretrain')
    without = dataclasses.replace(shape, num_nextn_predict_layers=0)
    module = Model(shape).parameter_counts['total'] - Model(without).parameter_counts['total']
    assert module == pytest.approx(11.5e9, rel=0.02)
    assert shape.cache_elements_per_token == 61 * 576


@pytest.mark.parametrize(
    'config',
    [deepseek_v3.get_config(), deepseek_v2_lite.get_config(), moonlight.get_config(), moonlight.get_config('long')],
    ids=['v3', 'v2 lite', 'moonlight', 'moonlight long'],
)
def test_batches_divide_among_the_chips_of_the_config(config: ConfigDict) -> None:
    chips = int(np.prod([int(n) for n in config.topology.split(':')[1].split('x')]))
    sizes = {axis: size for axis, size in config.mesh.items() if size != -1}
    fsdp = chips // int(np.prod(list(sizes.values())))
    ways = sizes['data'] * fsdp * sizes['expert']
    for stage in config.stages.values():
        assert stage.batch_size % (stage.microbatches * ways) == 0
        assert stage.sequence_length % sizes['context'] == 0
    with pytest.raises(ValueError, match='expected no variant, or long'):
        moonlight.get_config('short')


# The command.


@flagsaver.flagsaver
def test_bad_arguments_end_with_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in command.ENVIRONMENT:  # what the command sets is for its own process
        monkeypatch.setenv(name, command.ENVIRONMENT[name])
    config = f'--config={root}/tests/small.py'
    assert command.main(['compile']) == 1
    assert '--config is missing' in capsys.readouterr().err
    assert command.main(['compile', config]) == 1
    assert '--topology is missing: try --topology=v5p:2x2x4' in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert command.main(['compile', config, '--topology=v5p:2x2x1']) == 1
    line = capsys.readouterr().err
    assert line == 'train.compile: libtpu is not installed: pip install -r requirements-compile.txt\n'
    assert command.main(['compile', '--help']) == 0
    assert '--topology' in capsys.readouterr().out


def test_a_refusal_says_what_to_change() -> None:
    message = (
        'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
        'Used 112.51G of 95.74G hbm. Exceeded hbm capacity by 16.77G.\n\nTotal hbm usage >= 112.77G:'
    )
    assert command._refusal(RuntimeError(message)) == 'the compiler needs 112.51G of the 95.74G of hbm of a chip'
    other = RuntimeError('INTERNAL: Mosaic failed to compile TPU kernel: bad tile. See below.\nmore')
    assert command._refusal(other) == 'the compiler refuses, Mosaic failed to compile TPU kernel: bad tile'
    stage = {'batch_size': 64, 'microbatches': 2}
    plain, full = Model(model_config()), Model(model_config(remat='full'))
    assert "--config.model.remat=full, which is 'none'" in command.advice('sft', stage, plain, 16)
    assert '--config.stages.sft.microbatches=4' in command.advice('sft', stage, full, 16)
    assert 'more chips' in command.advice('sft', stage, full, 32)


def test_chips() -> None:
    chip = chip_of('TPU v5')
    assert chip is not None and chip.flops == 459e12 and chip.memory == pytest.approx(102e9, rel=1e-3)
    assert chip_of('NVIDIA H100') is None and chip_of('cpu') is None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_a_small_model_compiles_for_a_tpu(root: Path, one_device: dict[str, str]) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, '-m', 'train.compile', '--config=tests/small.py', '--stage=grpo', *arguments]
        return subprocess.run(line, cwd=root, env=one_device, capture_output=True, text=True, timeout=900)

    small = ('--config.model.n_routed_experts=0', '--config.model.num_hidden_layers=1')
    done = run('--topology=v5e:2x2', *small, '--config.mesh.data=1', '--config.mesh.fsdp=-1')
    assert done.returncode == 0, done.stderr
    for words in ('4 x TPU v5 lite, mesh fsdp 4', 'train step', 'prefill', 'decode', 'bound by', '16 times: '):
        assert words in done.stdout
    assert len(re.findall(r'  peak  .*% of HBM', done.stdout)) == 3
    for arguments, words in (
        (('--topology=v5p:3x3',), '--topology=v5p:3x3'),
        (('--topology=v5e:4x4', '--config.mesh.expert=3'), 'mesh'),
        (('--topology=v5e:2x4', '--config.mesh.data=8'), 'batch_size 8 is no multiple'),
    ):
        failed = run(*arguments, *small)
        assert failed.returncode == 1 and words in failed.stderr and failed.stderr.count('\n') == 1, failed.stderr


def test_a_batch_that_does_not_divide_is_told() -> None:
    config = get_config().to_dict()
    with pytest.raises(InputError, match='batch_size 8 is no multiple of 3 microbatches on 8 ways'):
        config['stages']['sft']['microbatches'] = 3
        list(compiled_programs(config, 'sft', make_mesh({'fsdp': 8})))
