"""Runs whose steps are taken in one program: they come to what each comes to alone, and end or fail alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import get_config, one_device

from data.errors import InputError
from train.checkpoint import load
from train.launch.edges import _GIVEN, _RATE, program
from train.launch.preemption import Preempted, notice
from train.learn.together import Step, Together
from train.learn.together import _several as several_of
from train.sweep import arms, check_together, commands, link, run_arms, shared_stages, side_by_side


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from('ab')), min_size=1, max_size=5))
def test_threads_of_any_length_come_to_their_own_end(asked: list[tuple[int, str]]) -> None:
    """`a` adds what it is given, `b` takes it away; each thread has numbers of its own."""
    together = Together()
    steps: dict[str, Step] = {
        'a': lambda state, batch, rate: (state + rate * batch, batch),
        'b': lambda state, batch, rate: (state - rate * batch, batch),
    }
    ends: dict[int, float] = {}

    def work(number: int, count: int, program: str) -> Callable[[], None]:
        def body() -> None:
            step, state = together.compiled(program, steps[program]), jnp.float32(number)
            for i in range(count):
                state, metrics = step(state, jnp.float32(i + 1), np.float32(number))
                assert metrics == i + 1
            ends[number] = float(state)

        return body

    together({str(i): work(i, *how) for i, how in enumerate(asked)})
    signs = {'a': 1, 'b': -1}
    assert ends == {i: i + signs[program] * i * count * (count + 1) / 2 for i, (count, program) in enumerate(asked)}


def test_what_fails_fails_alone() -> None:
    together, ends = Together(), []

    def works() -> None:
        step, state = together.compiled('', lambda state, batch, rate: (state + batch, {})), jnp.float32(0)
        for _ in range(3):
            state, _ = step(state, jnp.float32(1), np.float32(1))
        ends.append(float(state))

    def fails() -> None:
        together.compiled('', lambda state, batch, rate: (state, {}))(jnp.float32(0), jnp.float32(1), np.float32(1))
        raise ValueError('of its own')

    with pytest.raises(ValueError, match='of its own'):
        together({'one': works, 'two': fails, 'three': works})
    assert ends == [3, 3]


def test_what_a_step_of_several_fails_with_ends_them_all() -> None:
    together, ended = Together(), []

    def work(number: int) -> Callable[[], None]:
        def body() -> None:
            try:
                together.compiled('', lambda state, batch, rate: (state @ batch, {}))(
                    jnp.ones(2), jnp.ones(3), np.float32(1)
                )
            finally:
                ended.append(number)

        return body

    with pytest.raises(TypeError, match='dot_general'):
        together({'one': work(1), 'two': work(2)})
    assert sorted(ended) == [1, 2]


@pytest.mark.parametrize(('number', 'ends_with'), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)])
def test_signals_reach_all_runs(number: int, ends_with: type[BaseException]) -> None:
    """Ctrl-C ends them before their next step; told to end soon, each leaves behind one, where it saves."""
    together, left, ended = Together(), [], []

    def work(name: str) -> Callable[[], None]:
        def body() -> None:
            step, state = together.compiled('', lambda state, batch, rate: (state + batch, {})), jnp.float32(0)
            with contextlib.ExitStack() as stack:
                stack.callback(ended.append, name)
                leave = stack.enter_context(notice())
                for i in range(10_000):
                    state, _ = step(state, jnp.float32(1), np.float32(1))
                    if i == 2 and name == 'one':
                        os.kill(os.getpid(), number)
                    if leave(i):
                        left.append(name)
                        raise Preempted

        return body

    with pytest.raises(ends_with):
        together({'one': work('one'), 'two': work('two')})
    assert sorted(ended) == ['one', 'two']
    assert len(left) == (2 if number == signal.SIGTERM else 0)


def test_a_program_depends_on_all_but_seeds_data_and_rates() -> None:
    config = get_config().to_dict()
    stage = config['stages']['sft']
    optimizer = stage['optimizer']

    def of(**changes: Any) -> str:
        changed = {**stage, **changes}
        return program({**config, 'stages': {**config['stages'], 'sft': changed}}, 'sft')

    own = of()
    mixture = ((0.0, {'stdlib': 1.0}),)
    for changes in ({'seed': 3}, {'mixture': mixture}, {'steps': 9}, {'parent': 'midtrain@2'}, {'save_every': 7}):
        assert of(**changes) == own
    for field, value in {'learning_rate': 0.1, 'schedule': 'cosine', 'warmup': 0.3, 'decay': 0.4, 'final': 0.5}.items():
        assert optimizer[field] != value and of(optimizer={**optimizer, field: value}) == own
    for field in {*stage} - {*_GIVEN, 'optimizer'}:
        assert of(**{field: 'other'} if field != 'model' else {'model': {'rope_theta': 3.0}}) != own, field
    for field in {*optimizer} - {*_RATE}:
        assert of(optimizer={**optimizer, field: 'other'}) != own, field
    assert program({**config, 'model': {**config['model'], 'rms_norm_eps': 0.1}}, 'sft') != own


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('step_deadline', 5.0, 'stages.pretrain.step_deadline: expected 0'),
        ('replay_every', 2, 'stages.pretrain.replay_every: expected 0, or more'),
    ],
)
def test_what_arms_side_by_side_cannot_have(
    field: str, value: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = get_config()
    config.stages.pretrain[field] = value
    made = arms(config.to_dict(), [{'seed': 0}, {'seed': 1}])
    with pytest.raises(InputError, match='8 devices: expected one'):
        check_together(made, {arm.name: ['pretrain'] for arm in made})
    monkeypatch.setattr('train.sweep.jax.device_count', lambda: 1)
    with pytest.raises(InputError, match=message):
        check_together(made, {arm.name: ['pretrain'] for arm in made})


def test_arms_side_by_side_come_to_what_they_come_to_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds, rates, mixtures and lengths in one program; another width beside it, in one of its own."""
    monkeypatch.setattr('train.launch.graph.make_mesh', lambda sizes: one_device())
    made = get_config()
    for name in ('midtrain', 'sft', 'grpo'):
        del made.stages[name]
    made.stages.pretrain.update(steps=3, save_every=3, batch_size=2, sequence_length=32)
    made.model.update(n_routed_experts=0, num_hidden_layers=1)
    made.stages.pretrain.optimizer.name = 'adamw'
    arithmetic, rate = ((0.0, {'arithmetic': 1.0}),), 'stages.pretrain.optimizer.learning_rate'
    changes: list[dict[str, Any]] = [
        {'seed': 0},
        {'seed': 1, rate: 0.003},
        {'model.intermediate_size': 48},
        {'stages.pretrain.mixture': arithmetic, 'stages.pretrain.steps': 2},
    ]
    swept = arms(made.to_dict(), changes)
    names = {arm.name: ['pretrain'] for arm in swept}
    together = side_by_side(swept, names, 3)
    assert [[arm.name for arm in several] for several in together] == [
        [swept[0].name, swept[1].name, swept[3].name],
        [swept[2].name],
    ]
    assert [len(several) for several in side_by_side(swept, names, 2)] == [2, 1, 1]
    assert not shared_stages(swept, names)
    programs: list[int] = []

    def counted(step: Step) -> Any:
        program = several_of(step)
        return lambda *given: programs.append(len(given[0])) or program(*given)

    monkeypatch.setattr('train.learn.together._several', counted)
    for folder, groups in ((tmp_path / 'alone', [[arm] for arm in swept]), (tmp_path / 'together', together)):
        for arm in swept:
            link(folder, arm, ['pretrain'])
        for several in groups:
            run_arms(folder, several, '', [commands(folder, [arm], names, [])[-1] for arm in several])
    assert programs == [3, 3, 2]  # without the one that ends first
    for arm in swept:
        one, other = (_outcome(tmp_path / folder / arm.name / 'pretrain') for folder in ('alone', 'together'))
        assert one['steps'] == other['steps'] == list(range(1, 3 if 'steps' in arm.name else 4))
        np.testing.assert_allclose(one['losses'], other['losses'], rtol=2e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one['params'], other['params'])


def _outcome(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return {
        'steps': [line['step'] for line in lines],
        'losses': [line['loss'] for line in lines],
        'params': load(folder).variables['params'],
    }
