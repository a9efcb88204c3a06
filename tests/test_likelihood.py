"""Choices by likelihood against direct computations; calibration against its definition."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small import model_config, one_device
from text import small_tokenizer

from data.errors import InputError
from model.transformer import Model
from train.evaluate import checked, evaluate
from train.measure.likelihood import as_choice, calibration_error

RECORDS: list[dict[str, Any]] = [
    *(
        {'prompt': f'{n} plus {n} is', 'choices': [f' {2 * n}', f' {n} and more', ' no'], 'answer': n % 3}
        for n in range(12)
    ),
    *({'prompt': f'return {n} ', 'choices': ['x', f'y{n}'], 'answer': 1} for n in range(6)),  # a space at the border
    *({'good': f'def f({n}):', 'bad': f'def f {n}:'} for n in range(6)),
]


def test_the_likeliest_choice_by_direct_computation(tmp_path: Path) -> None:
    model, tokenizer = Model(model_config(num_hidden_layers=1, initializer_range=0.3)), small_tokenizer()
    variables = model.init(0, one_device())
    path = tmp_path / 'choices.jsonl'
    path.write_text(''.join(json.dumps(record) + '\n' for record in RECORDS))
    spec = {'type': 'choice', 'source': {'type': 'jsonl', 'path': str(path)}}
    result = evaluate(model, variables, tokenizer, spec)

    apply = jax.jit(model.apply)
    right, per_byte, confidence = [], [], []
    for i, record in enumerate(RECORDS):
        prompt, texts, answer = as_choice(record, i)
        nats = []
        for text in texts:
            ids = [tokenizer.begin_id, *tokenizer.encode(prompt + text)]
            logits = np.asarray(apply(variables, np.array([ids + [0] * (40 - len(ids))])).logits[0], np.float64)
            logprob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            start = 1 + len(tokenizer.encode(prompt.rstrip())) if prompt.rstrip() else 1
            nats.append(sum(logprob[at - 1, ids[at]] for at in range(start, len(ids))))
        right.append(float(np.argmax(nats) == answer))
        per_byte.append(np.argmax([x / len(text.encode()) for x, text in zip(nats, texts, strict=True)]) == answer)
        confidence.append(np.exp(max(nats)) / np.exp(nats).sum())
    assert 0 < np.mean(right) < 1 and right != per_byte
    assert result['details']['scores'] == right and result['value'] == pytest.approx(np.mean(right))
    assert result['details']['per_byte'] == pytest.approx(np.mean(per_byte))
    expected = calibration_error(np.array(confidence), np.array(right))
    assert result['details']['calibration_error'] == pytest.approx(expected, abs=1e-4)


def test_calibration_error_is_the_gap_in_each_bin() -> None:
    assert calibration_error(np.array([0.7, 0.7, 0.75]), np.array([1.0, 1.0, 0.0])) == pytest.approx(0.15 / 3)
    assert calibration_error(np.array([1.0, 0.05]), np.array([0.0, 0.0])) == pytest.approx(1.05 / 2)
    sure = np.random.default_rng(0).random(20_000)
    assert calibration_error(sure, (np.random.default_rng(1).random(20_000) < sure).astype(float)) < 0.02


@pytest.mark.parametrize(
    'record',
    [
        {},
        {'prompt': 'a', 'choices': ['b'], 'answer': 0},
        {'prompt': 'a', 'choices': ['b', ''], 'answer': 0},
        {'prompt': 'a', 'choices': ['b', 'c'], 'answer': 2},
        {'prompt': 'a', 'choices': ['b', 'c'], 'answer': True},
        {'prompt': 1, 'choices': ['b', 'c'], 'answer': 0},
        {'good': 'a', 'bad': None},
    ],
    ids=str,
)
def test_records_of_another_form_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(InputError, match='record 7: expected prompt, choices'):
        as_choice(record, 7)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match='nowhere'):
        checked({'type': 'choice', 'source': {'type': 'jsonl', 'path': 'nowhere.jsonl'}})
