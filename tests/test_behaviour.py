"""What a stage changed in answers and weights, on models and answers for which it is known."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small import model_config, one_device
from text import small_tokenizer

from data.errors import InputError
from data.tasks import Prompt, Verdict, get_task
from model.transformer import Model
from train.checkpoint import Loaded
from train.compare import main
from train.measure.behaviour import (
    Read,
    behaviour,
    coverage,
    diversity,
    drift,
    embedded,
    page,
    read,
    routing,
    shift,
    spread,
)
from train.measure.traces import traces
from train.sampler import Completion

TASK = {'type': 'task', 'task': {'name': 'arithmetic', 'operations': 1, 'digits': 1}, 'items': 6, 'max_tokens': 8}


@pytest.fixture(scope='module')
def base() -> Loaded:
    model = Model(
        model_config(num_hidden_layers=1, n_routed_experts=0, initializer_range=0.3, tie_word_embeddings=False)
    )
    return Loaded(model, model.init(0, one_device()), small_tokenizer(), {'evaluations': {'sums': TASK}}, {})


def changed(loaded: Loaded, **params: Any) -> Loaded:
    variables = {**loaded.variables, 'params': {**loaded.variables['params'], **params}}
    return dataclasses.replace(loaded, variables=variables)


def test_a_model_has_not_shifted_from_itself(base: Loaded) -> None:
    found = behaviour(base, base, TASK, samples=4)
    assert found['shift']['unshifted'] == 1 and found['shift']['most'] == [] and found['shift']['shifted'] == 0
    assert found['shift']['kl'] == pytest.approx(0, abs=1e-6)
    assert found['drift']['changed'] == 0 and not any(found['drift']['relative'].values())
    assert found['diversity']['base'] == found['diversity']['tuned']
    assert found['coverage']['only_base'] == found['coverage']['only_tuned'] == 0


def test_ranks_are_those_of_a_head_whose_rows_moved(base: Loaded) -> None:
    """The tuned head says token t + 1 where the base says t, with the same probability."""
    head = base.variables['params']['lm_head']
    tuned = changed(base, lm_head=jax.numpy.roll(head, 1, axis=0))
    prompts = [[1, 5, 9, 20], [1, 7]]
    answers = [[3, 4, 5, 6, 7], [30, 31]]
    said = read(base, tuned, prompts, answers)
    for one, prompt, answer in zip(said, prompts, answers, strict=True):
        logits = np.asarray(base.model.apply(base.variables, np.array([prompt + answer])).logits[0], np.float64)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        before = np.array([x - np.log(np.exp(x).sum()) for x in logits[list(places)]])
        after = np.roll(before, 1, axis=1)
        assert one.tokens == answer
        assert one.ranks.tolist() == [1 + int((x > x[t]).sum()) for x, t in zip(before, answer, strict=True)]
        np.testing.assert_allclose(one.kl, (np.exp(after) * (after - before)).sum(1), rtol=1e-4)
    found = behaviour(base, tuned, TASK, samples=2)
    assert found['shift']['unshifted'] == 0
    assert found['drift']['changed'] > 0 and [n for n, x in found['drift']['relative'].items() if x] == ['lm_head']


def test_shares_of_shift_by_hand() -> None:
    reads = [
        Read([10, 11, 12, 13], np.array([1, 2, 3, 4]), np.array([0.0, 1.0, 2.0, 3.0])),
        Read([13, 13], np.array([9, 1]), np.array([4.0, 2.0])),
    ]
    found = shift(reads, small_tokenizer())
    assert (found['unshifted'], found['marginal'], found['shifted']) == pytest.approx((2 / 6, 2 / 6, 2 / 6))
    assert found['kl'] == 2 and found['tokens'] == 6
    assert found['most'] == [[small_tokenizer().decode([13]), 2, 3]]
    assert found['along'][0] == (0.5, 2.0, 5.0)  # the first token of each answer


def test_diversity_by_its_definition() -> None:
    groups = [[[1, 2, 1, 2], [1, 2, 1, 2], [3]], [[4, 4, 4, 4]] * 3]
    found = diversity(groups, vocabulary=50)
    assert found['distinct_1'] == pytest.approx((3 / 9 + 1 / 12) / 2)
    assert found['distinct_2'] == pytest.approx((2 / 6 + 1 / 9) / 2)
    assert found['distinct_2_across'] == pytest.approx(3 / 15)
    assert found['adjusted'] == pytest.approx(4 / (50 * (1 - (49 / 50) ** 21)))
    assert found['unique'] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found['entropy'] == pytest.approx((-(2 / 3) * math.log(2 / 3) - math.log(1 / 3) / 3) / 2)
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, 9, rng.integers(1, 30)).tolist() for _ in range(5)]
    for n in (1, 2, 3, 4):
        grams = Counter(tuple(a[i : i + n]) for a in answers for i in range(len(a) - n + 1))
        assert diversity([answers], 9)[f'distinct_{n}'] == pytest.approx(len(grams) / sum(grams.values()))


def test_self_bleu_is_the_mean_of_each_with_the_others() -> None:
    answers = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 6, 8], [2, 2, 3, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    # By a program of its own, after Papineni et al. 2002, section 2.3, and Chen and Cherry 2014, smoothing 1.
    assert diversity([answers], 50)['self_bleu'] == pytest.approx(0.520864477293731, abs=1e-12)
    alike, apart, alone = [[1, 2, 3, 4]] * 3, [[1, 2], [3, 4]], [[1, 2]]
    for groups, expected in (([alike], 1.0), ([apart], 0.0), ([alone], 0.0), ([alike, apart], 0.5)):
        assert diversity(groups, 50)['self_bleu'] == expected


def test_experts_that_were_renamed(base: Loaded) -> None:
    """The tuned model's only router calls expert e what the base calls e - 1; nothing above it matters to routing."""
    model = Model(model_config(num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=8, num_experts_per_tok=2))
    one = dataclasses.replace(base, model=model, variables=model.init(0, one_device()))
    prompts, answers = [[1, 5, 9, 20], [1, 7, 30, 31]], [[3, 4, 5, 6, 7], [30, 31, 8, 9, 2]]
    assert routing(one, one, prompts, answers) == {'kept': [1.0], 'moved': [0.0]}
    assert routing(base, base, prompts, answers) == {}
    assert routing(base, one, prompts, answers) == {}

    def renamed(path: Any, x: Any) -> Any:
        return jax.numpy.roll(x, 1, axis=list(x.shape).index(8)) if "'gate'" in jax.tree_util.keystr(path) else x

    other = dataclasses.replace(one, variables=jax.tree_util.tree_map_with_path(renamed, one.variables))
    rows = np.array([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    before = np.asarray(jax.jit(model.apply)(one.variables, rows).expert_ids)[:, 3:-1, 0].reshape(-1, 2)
    load = np.bincount(before.ravel(), minlength=8) / before.size
    found = routing(one, other, prompts, answers)
    kept = [x in (y + 1) % 8 for y in before for x in y]
    assert found['kept'] == pytest.approx([np.mean(kept)]) and 0 < np.mean(kept) < 1
    assert found['moved'] == pytest.approx([np.abs(load - np.roll(load, 1)).sum() / 2]) and found['moved'][0] > 0


def test_spread_of_states(base: Loaded) -> None:
    assert spread(np.array([[2.0, 0], [0, 1], [3, 0]])) == pytest.approx((1 + 1 + 0) / 3)
    assert spread(np.ones((3, 5))) == pytest.approx(0) and spread(np.ones((1, 5))) == 0
    prompts, answers = [[1, 5, 9, 20], [1, 7]], [[3, 4, 5, 6, 7], [30, 31]]
    for found, prompt, answer in zip(embedded(base, prompts, answers), prompts, answers, strict=True):
        hidden = np.asarray(base.model.apply(base.variables, np.array([prompt + answer])).hidden[0])
        np.testing.assert_allclose(found, hidden[len(prompt) :].mean(0), rtol=1e-4, atol=1e-5)


def test_traces_of_answers_that_are_known() -> None:
    task = get_task('arithmetic', operations=2, digits=1, max_value=10, worked=True, split='train')
    problem = task.prompt(3)
    right = problem.reference
    *steps_before, last, answer = right.split('\n')
    wrong = '\n'.join([*steps_before, last + '1', answer])
    doubt = 'Wait, that is wrong. Let me go back and try again. Actually no.'

    def said(text: str, tokens: int, stopped: bool = True) -> Completion:
        return Completion(text, [0] * tokens, [0.0] * tokens, stopped)

    steps = len(task.verify(problem, right).parts)
    assert steps >= 2 and task.verify(problem, right).score == 1
    found = traces(task, [problem], [[said(right, 10), said(wrong, 20), said(doubt, 70, stopped=False)]])
    assert found['tokens'] == pytest.approx(100 / 3) and found['ended'] == pytest.approx(2 / 3)
    assert (found['corrections'], found['backtracking']) == (30, 20)
    assert (found['corrects_ever'], found['backtracks_ever']) == (1, 1)  # one of three answers to the only problem
    assert found['steps'] == pytest.approx(2 * steps / 3)  # there are none in the third
    assert found['steps_right'] == (2 * steps - 1) / (2 * steps)
    assert 'steps' not in traces(Whole(), [problem], [[said(right, 10)]])


class Whole:
    """A task that judges answers as a whole."""

    name = 'whole'

    def prompt(self, index: int) -> Prompt:
        raise NotImplementedError

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        return Verdict(1.0)


def test_coverage_and_where_curves_cross() -> None:
    base = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    tuned = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]], bool)
    found = coverage(base, tuned)
    assert found['base'] == pytest.approx({1: 3 / 16, 2: 3 / 8, 4: 3 / 4})
    assert found['tuned'][1] == pytest.approx(7 / 16) and found['tuned'][4] == 0.5
    assert (found['crossing'], found['only_base'], found['only_tuned']) == (4, 2, 1)


def test_drift_is_by_layer() -> None:
    rng = np.random.default_rng(0)
    layers = {'layers': {'w': rng.normal(size=(2, 3, 4))}, 'norm': rng.normal(size=4)}
    moved = {'layers': {'w': layers['layers']['w'] + np.array([0.0, 0.5])[:, None, None]}, 'norm': layers['norm']}
    found = drift(layers, moved)
    expected = np.sqrt(12 * 0.25) / np.linalg.norm(layers['layers']['w'][1])
    assert found['relative'] == pytest.approx({'layers 0': 0, 'layers 1': expected, 'norm': 0})
    assert found['changed'] == pytest.approx(12 / 28)


def test_the_page_escapes_what_models_say() -> None:
    tokenizer = small_tokenizer()
    tokens = tokenizer.encode('<script>alert(1)</script>')
    one = Read(tokens, np.arange(1, len(tokens) + 1), np.zeros(len(tokens)))
    found = {'shift': shift([one], tokenizer), 'answers': [('<b>', one)]}
    text = page(found, tokenizer, 'a & b')
    assert '<script' not in text and '&lt;b&gt;' in text and 'a &amp; b' in text and 'http' not in text


def test_the_command(
    base: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('train.checkpoint.load', lambda path: base)
    html = tmp_path / 'tokens.html'
    assert main(['a', 'b', '--answers=sums', '--samples=2', f'--html={html}']) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [next(iter(line)) for line in said] == [
        'shift',
        'routing',
        'diversity',
        'traces',
        'coverage',
        'drift',
    ] and html.exists()
    assert main(['a', 'b', '--answers=sum']) == 1
    assert "did you mean 'sums'" in capsys.readouterr().err
    for other in ({'type': 'text'}, {'format': 'completion'}):
        with pytest.raises(InputError, match='expected one of type task and format chat'):
            behaviour(base, base, {**TASK, **other})
