"""Every kind of stage, run through the real loop: it learns what it should, and a killed one comes back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import players  # noqa: F401  (registers a game)
import pytest
from ml_collections import ConfigDict
from small import get_config, one_device
from text import small_tokenizer

from configs.base import add_stage
from data.errors import InputError
from train.launch import graph
from train.launch.graph import Run
from train.stages import KINDS

PAIRS = [
    {'prompt': f'say {i}', 'chosen': f'yes {i}', 'rejected': f'no no {i}', 'probability': 0.9, 'margin': 0.1}
    for i in range(12)
]
JUDGED = [{'prompt': f'say {i}', 'completion': f'yes {i}', 'label': i % 2 == 0} for i in range(12)]
STEPS = [{'prompt': f'say {i}', 'steps': ['yes ', f'{i}'], 'scores': [1.0, i % 2]} for i in range(12)]
RECORDS: dict[str, dict[str, Any]] = {
    'dpo': {'models': {'reference': 'sft'}},
    'simpo': {},
    'orpo': {},
    'kto': {'models': {'reference': 'sft'}},
    'reward_model': {},
    'process_reward_model': {},
}
LONGER = {'sequence_length': 128}
SAMPLED: dict[str, dict[str, Any]] = {
    'grpo': {'models': {'reference': 'sft'}, 'loss': {'kl_coefficient': 0.1}, 'replay_experts': True},
    'dr_grpo': {},
    'dapo': {'curriculum': 'solve_rate', 'levels': ({'operations': 1}, {'operations': 2})},
    'gspo': {},
    'cispo': {},
    'rloo': {},
    'reinforce_plus_plus': {'models': {'reference': 'sft'}, 'kl_reward': 0.05, 'kl_target': 0.1},
    'ppo': {'loss': {'importance': 'truncate'}, 'minibatches': 2, 'epochs': 2},
    'on_policy_distill': {'models': {'teacher': 'pretrain'}},
    # Saved at every step: the pool is read back from what the stage has saved itself.
    'self_play': {'task': {'name': 'parity'}, 'opponent_share': 0.7, 'save_every': 1, 'batch_size': 32, **LONGER},
    # Hot, as a model that has not learnt to propose would otherwise hardly ever stop.
    'proposer_solver': {
        **{'task': {'name': 'parity'}, 'reward': 'verifier', 'temperature': 10.0, 'max_tokens': 64, **LONGER},
        **{'prompts': 8, 'samples': 2, 'batch_size': 24},
    },
}


def with_methods(folder: Path, names: tuple[str, ...], prefix: str = 'a') -> ConfigDict:
    """The small run with one stage more of each of these kinds, behind fine-tuning."""
    config = get_config()
    for name in ('pairs', 'judged', 'steps'):
        records = {'pairs': PAIRS, 'judged': JUDGED, 'steps': STEPS}[name]
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
        config.sources[name] = ConfigDict({'type': 'jsonl', 'path': str(folder / f'{name}.jsonl')})
    for kind in names:
        common: dict[str, Any] = {'parent': 'sft', 'steps': 4, 'save_every': 2, 'sequence_length': 64, 'keep': 4}
        if kind in RECORDS:
            source = {'kto': 'judged', 'process_reward_model': 'steps'}.get(kind, 'pairs')
            own = {'batch_size': 8, 'records': 6, 'mixture': ((0.0, {source: 1.0}),), **RECORDS[kind]}
        elif kind == 'distill':
            mixture = ((0.0, {'arithmetic_chat': 1.0}),)
            own = {'batch_size': 8, 'top': 4, 'models': {'teacher': 'pretrain'}, 'mixture': mixture}
        else:
            task = {**config.stages.grpo.task.to_dict(), 'operations': 1}
            own = {'batch_size': 16, 'microbatches': 2, 'prompts': 4, 'samples': 4, 'max_tokens': 8, 'task': task}
            # A model that knows nothing earns nothing: throw coins, and something is there to be learnt.
            own |= {'reward': KINDS[kind].defaults['reward'].replace('verifier', 'random'), **SAMPLED[kind]}
        add_stage(config, f'{prefix}_{kind}', kind, **{**common, **own})
    return config


@pytest.fixture(autouse=True, scope='module')
def one_mesh() -> Iterator[None]:
    """One device: tests/test_sharding.py has what more of them do to objectives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, 'make_mesh', lambda _: one_device())
        yield


def prepared(folder: Path, names: tuple[str, ...]) -> Run:
    if not (folder / 'tokenizer').exists():
        small_tokenizer().save(folder / 'tokenizer')
    return Run(with_methods(folder, names).to_dict(), folder)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_no_kind_is_left_out() -> None:
    trained = {name for name, kind in KINDS.items() if kind.trains}
    assert trained == {'pretrain', 'midtrain', 'sft', 'distill', *RECORDS, *SAMPLED}


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir in which the stages before are finished."""
    folder = tmp_path_factory.mktemp('methods')
    prepared(folder, ())('sft')
    return folder


FAST = ('dpo', 'ppo')  # the others take their time to compile


@pytest.mark.parametrize(
    'kind',
    [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in ('distill', *RECORDS, *SAMPLED)],
)
def test_a_kind_trains_and_comes_back_bit_for_bit(kind: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metrics are finite and it changes what it should; taken up at step 2 it ends where it had ended."""
    run = prepared(base, (kind,))
    name = f'a_{kind}'
    run(name)
    said = lines(base / name)
    assert [line['step'] for line in said] == [1, 2, 3, 4]
    for line in said:
        assert all(np.isfinite(value) for value in line.values()), line
    assert any(line['gradient_norm'] > 0 for line in said)
    before = _weights(run, name)
    for path in (base / name / 'checkpoints').iterdir():
        if path.name == '4':
            path.rename(path.with_name('4.aside'))
    (base / name / 'finished.json').unlink()
    again = prepared(base, (kind,))
    again(name)
    replayed = lines(base / name)
    for one, other in zip(said, replayed, strict=True):
        assert all(one[name] == other[name] for name in (one.keys() | other.keys()) - {'tokens_per_second', 'goodput'})
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(_weights(again, name)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _weights(run: Run, name: str) -> Any:
    shapes = run._model(name).shapes(run.mesh)
    return run._restore(name, 4, shapes)[0]


@pytest.mark.parametrize(
    ('kind', 'change', 'message'),
    [
        ('dpo', lambda s: s.models.update(reference=''), 'models.reference is empty'),
        ('dpo', lambda s: s.loss.update(variant='sigmod'), "loss.variant is 'sigmod'; did you mean 'sigmoid'"),
        ('grpo', lambda s: s.loss.update(ratio='tokens'), "loss.ratio is 'tokens'; did you mean 'token'"),
        ('on_policy_distill', lambda s: s.models.update(teacher=''), 'models.teacher is empty'),
        ('dapo', lambda s: s.update(curriculum='solved'), "curriculum is 'solved'"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    kind: str, change: Callable[[Any], None], message: str, base: Path
) -> None:
    config = with_methods(base, (kind,), 'b')
    change(config.stages[f'b_{kind}'])
    with pytest.raises(InputError, match=message):
        Run(config.to_dict(), base)(f'b_{kind}')
