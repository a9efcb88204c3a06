"""Held-out measurements against direct computations."""

import itertools
import json
import lzma
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small import model_config, one_device
from text import small_tokenizer

from data.chat import render_chat
from data.errors import InputError
from data.tasks import get_task
from model.transformer import Model
from train import evaluate as module
from train.evaluate import checked, evaluate
from train.measure.statistics import interval, majority, pass_at_k
from train.measure.traces import cut_short
from train.sampler import Completion, row_keys

SHORT = 'def add(a, b):\n    return a + b\n'
TASK = {'name': 'arithmetic', 'operations': 1, 'digits': 1}


def test_pass_at_k_is_the_share_of_k_draws_with_a_right_one() -> None:
    """Every way to take k of the n answers, counted."""
    n = 6
    for k in range(1, n + 1):
        counted = [
            np.mean([any(i < right for i in taken) for taken in itertools.combinations(range(n), k)])
            for right in range(n + 1)
        ]
        np.testing.assert_allclose(pass_at_k(n, np.arange(n + 1), k), counted, atol=1e-12)


def test_interval_covers_the_mean_and_narrows_with_items() -> None:
    values = (np.random.default_rng(0).random(400) < 0.3).astype(float)
    low, high = interval(values)
    assert low < values.mean() < high
    expected = 1.96 * values.std() / math.sqrt(400)
    assert high - low == pytest.approx(2 * expected, rel=0.15)
    assert interval(values) == (low, high)
    few = interval(values[:40])
    assert few[1] - few[0] > 2 * (high - low)
    assert interval(np.ones(10)) == (1.0, 1.0)


def test_interval_weighs_items() -> None:
    """A document a thousand times as long as the others decides."""
    values, weights = np.array([1.0] + [3.0] * 9), np.array([1000.0] + [1.0] * 9)
    assert interval(values, weights)[0] < 1.1


def test_the_majority_of_answers() -> None:
    right = np.array([True, False, True, False, False])
    assert majority(['7', '8', '7', '9', ''], right) == (1.0, 0.4)
    assert majority(['7', '8', '7', '8', '9'], right) == (0.5, 0.4)  # as common: one of two
    assert majority(['7', '8', '8', '8', '7'], right) == (1 / 3, 0.6)  # the same answer may be worked out wrongly
    assert majority(['', ''], right[:2]) == (0.0, 0.0)


def test_answers_that_are_cut_short() -> None:
    """Work of two lines, cut after none, some and all of it; whoever is made to answer says the right number."""
    tokenizer, task = small_tokenizer(), get_task('arithmetic', operations=2, digits=1, max_value=10)
    problems = [task.prompt(i) for i in range(3)]

    def said(text: str, stopped: bool = True) -> Completion:
        tokens = tokenizer.encode(text)
        return Completion(text, tokens, [0.0] * len(tokens), stopped)

    answers = [[said('1+1=2\n1+1=2\nAnswer: 999')] for _ in problems]
    answers[2] = [said('5')]  # it ends before most budgets do
    heard: list[str] = []

    def sample(prompts: list[list[int]], keys: Any) -> list[list[Completion]]:
        heard.extend(map(tokenizer.decode, prompts))
        return [[said(f' {problems[min(i, 2)].info["answer"]}', stopped=i != 1)] for i in range(len(prompts))]

    def at(budget: int) -> tuple[list[float], list[float]]:
        heard.clear()
        keys = row_keys(0, range(3), 1)
        return tuple(
            x.tolist() for x in cut_short(task, problems, answers, np.zeros((3, 1)), tokenizer, sample, keys, budget)
        )

    assert at(3) == ([1, 0, 0], [1, 1, 0])  # the second was not ended by the stop token
    assert heard[0].endswith(tokenizer.decode(answers[0][0].tokens[:3]) + '\nAnswer:')
    assert at(0) == ([1, 0, 1], [1, 1, 1]) and heard[0].endswith('Answer:') and '=' not in heard[0]
    assert at(len(tokenizer.encode('1+1=2\n1+1=2'))) == ([0, 0, 0], [0, 0, 0]) and not heard


@pytest.fixture(scope='module')
def model() -> tuple[Model, Any]:
    made = Model(model_config(num_hidden_layers=1, initializer_range=0.3))
    return made, made.init(0, one_device())


def measured(model: tuple[Model, Any], spec: dict[str, Any]) -> dict[str, Any]:
    return evaluate(*model, small_tokenizer(), spec)


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Three documents, of which the last two are longer than a window."""
    written = [SHORT, SHORT * 4 + 'x = 1\n', 'import json\n' * 20]
    for number, text in enumerate(written):
        (tmp_path / f'{number}.txt').write_text(text)
    return written


def nats(model: tuple[Model, Any], text: str, length: int) -> float:
    """The surprise of a text, every token predicted from its window: half of it is context once the text is longer."""
    made, variables = model
    tokenizer = small_tokenizer()
    ids = [tokenizer.begin_id, *tokenizer.encode(text), tokenizer.end_id]
    total = 0.0
    for place in range(1, len(ids)):
        start = max(0, (place // (length // 2) - 1) * (length // 2))
        window = ids[start : place + 1]
        row = np.full((1, length), tokenizer.pad_id, np.int32)
        row[0, : len(window)] = window
        logits = np.asarray(_logits(made, variables, row)[0, len(window) - 2], np.float64)
        total -= logits[ids[place]] - np.log(np.exp(logits).sum())
    return total


_logits = jax.jit(lambda model, variables, row: model.apply(variables, row).logits, static_argnums=0)


def test_bits_per_byte_is_the_direct_computation(model: Any, texts: list[str], tmp_path: Path) -> None:
    source = {'type': 'text', 'path': str(tmp_path / '*.txt')}
    result = measured(model, {'type': 'text', 'source': source, 'length': 32})
    expected = sum(nats(model, text, 32) for text in texts) / math.log(2) / sum(len(t.encode()) for t in texts)
    assert result['value'] == pytest.approx(expected, rel=1e-4)
    assert result['low'] <= result['value'] <= result['high'] and result['items'] == 3
    together = b''.join((tmp_path / name).read_bytes() for name in sorted(x.name for x in tmp_path.glob('*.txt')))
    xz = 8 * len(lzma.compress(together, preset=9)) / len(together)
    sizes = [len(text.encode()) for text in texts]
    each = [nats(model, text, 32) / math.log(2) / size for text, size in zip(texts, sizes, strict=True)]
    assert result['details'].pop('scores') == pytest.approx(each, rel=1e-4)
    facts = {'bytes': len(together), 'context': 32, 'weights': sizes}
    assert result['details'] == {**facts, 'xz_bits_per_byte': pytest.approx(xz)}
    # A text that fits into one window has a single full one.
    alone = measured(model, {'type': 'text', 'source': source, 'length': 32, 'documents': 1})
    tokenizer = small_tokenizer()
    ids = np.array([[tokenizer.begin_id, *tokenizer.encode(SHORT), tokenizer.end_id]], np.int32)
    assert ids.size <= 32
    logprob = np.asarray(model[0].apply(model[1], ids).logprob, np.float64)
    assert alone['value'] == pytest.approx(-logprob.sum() / math.log(2) / len(SHORT), rel=1e-4)


def test_a_window_that_is_a_token_longer_is_scored_once(model: Any, tmp_path: Path) -> None:
    """Lengths around the edges of windows: nothing is counted twice or left out."""
    tokenizer = small_tokenizer()
    for count in (14, 15, 22, 23, 30, 31):
        text = '7' * count  # each digit is a token
        assert len(tokenizer.encode(text)) == count
        (tmp_path / 'a.txt').write_text(text)
        spec = {'type': 'text', 'source': {'type': 'text', 'path': str(tmp_path / 'a.txt')}, 'length': 16}
        expected = nats(model, text, 16) / math.log(2) / count
        assert measured(model, spec)['value'] == pytest.approx(expected, rel=1e-4), count


def test_task_accuracy_counts_what_stopped_and_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answerer in the sampler's place: of four answers a problem, problem i gets i % 5 right; one never stops."""
    wide = {'name': 'arithmetic', 'operations': 3, 'digits': 3, 'max_value': 999}
    task = get_task(split='heldout', **wide)

    def answerer(*given: Any, samples: int, **settings: Any) -> list[list[Completion]]:
        groups = []
        for index in range(len(given[3])):
            reference = task.prompt(index).reference
            right = Completion(reference, [1, 2], [0.0, 0.0], stopped=True)
            endless = Completion(reference, [1, 2, 3], [0.0] * 3, stopped=False)
            groups.append([right] * (index % 5) + [endless] * (4 - index % 5))
        return groups

    monkeypatch.setattr(module, 'sample_tokens', answerer)
    spec = {'type': 'task', 'task': wide, 'items': 10, 'samples': 4, 'temperature': 1.0}
    result = evaluate(None, {}, small_tokenizer(), spec)  # type: ignore[arg-type]
    assert result['value'] == pytest.approx(0.5)
    details = result['details']
    assert details['pass@1'] == pytest.approx(0.5) and details['pass@4'] == pytest.approx(0.8)
    assert details['pass@2'] == pytest.approx(np.mean([0, 1 / 2, 5 / 6, 1, 1])) and details['maj@4'] == 0.8
    assert details['intervals']['pass@4'] == interval(np.array([0.0, 1, 1, 1, 1] * 2))
    # The right answer's share of the four is 0, 1/4, ..., 1, and what stopped is right.
    assert details['calibration_error'] == pytest.approx((3 / 4 + 2 / 4 + 1 / 4) / 5)
    assert details['stopped'] == pytest.approx(0.5) and details['answer_tokens'] == pytest.approx(2.5)
    assert result['details']['scores'] == [0.0, 0.25, 0.5, 0.75, 1.0] * 2
    assert result['low'] < 0.5 < result['high'] and len(result['samples']) == 3


def test_answers_in_the_chat_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Good is what says something, ends by the stop token and holds no other control token."""
    tokenizer = small_tokenizer()
    end, user = tokenizer.end_id, tokenizer.control('<|user|>')
    kinds = [([50, end], True), ([end], False), ([50, 51], False), ([50, user, end], False)]
    answers = [[Completion('x', tokens, [0.0] * len(tokens), tokens[-1] == end)] for tokens, _ in kinds]
    monkeypatch.setattr(module, 'sample_tokens', lambda *given, **settings: answers)
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / 'chats.jsonl').write_text(line * 4)
    spec = {'type': 'stopped', 'source': {'type': 'jsonl', 'path': str(tmp_path / 'chats.jsonl')}}
    result = evaluate(None, {}, tokenizer, spec)  # type: ignore[arg-type]
    assert result['value'] == np.mean([good for _, good in kinds]) and result['items'] == 4


def test_refusals_are_counted_on_both_sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [('safe', 'I kill the process.'), ('safe', 'I will not.'), ('unsafe', 'I will not.'), ('unsafe', 'Sure.')]
    rows += [('unsafe', 'I cannot do it.'), ('safe', '')]  # the last is cut
    answers = [[Completion(text, [50], [0.0], bool(text))] for _, text in rows]
    monkeypatch.setattr(module, 'sample_tokens', lambda *given, **settings: answers)
    path = tmp_path / 'pairs.csv'
    path.write_text('id,prompt,type,label\n' + ''.join(f'{i},q{i},homonyms,{x}\n' for i, (x, _) in enumerate(rows)))
    result = evaluate(None, {}, small_tokenizer(), {'type': 'contrast', 'path': str(path)})  # type: ignore[arg-type]
    assert result['details']['scores'] == [1, 0, 1, 0, 1, 0] and result['value'] == 0.5
    assert result['details']['over_refusal']['value'] == 1 / 2 and result['details']['unanswered'] == 1
    assert 'over refusal 50.0% [0.0, 100.0], unsafe compliance 33.3%' in result['metric']
    with pytest.raises(InputError, match='expected a CSV file'):
        checked({'type': 'contrast', 'path': str(tmp_path / 'none.csv')})


@pytest.mark.parametrize('value_head', [False, True])
def test_pairs_put_in_order(value_head: bool, tmp_path: Path) -> None:
    """By the value at the stop token where the model has that head, else by the mean log-probability of the answer."""
    made = Model(model_config(num_hidden_layers=1, initializer_range=0.3, value_head=value_head))
    variables = made.init(0, one_device())
    if value_head:
        head = np.random.default_rng(0).normal(size=made.config.hidden_size)
        variables['params']['value_head'] = jax.numpy.asarray(head, jax.numpy.float32)
    records = [{'prompt': f'say {n}', 'chosen': f'{n} it is', 'rejected': f'no {n * n}'} for n in range(20)]
    path = tmp_path / 'pairs.jsonl'
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    spec = {'type': 'pairs', 'source': {'type': 'jsonl', 'path': str(path)}, 'items': 20}
    tokenizer = small_tokenizer()
    result = evaluate(made, variables, tokenizer, spec)
    answers = [
        render_chat([{'role': 'user', 'content': r['prompt']}, {'role': 'assistant', 'content': r[side]}], tokenizer)
        for r in records
        for side in ('chosen', 'rejected')
    ]
    length = max(len(tokens) for tokens, _ in answers)
    tokens, mask = (np.array([row + [0] * (length - len(row)) for row in rows]) for rows in zip(*answers, strict=True))
    output = jax.jit(made.apply)(variables, tokens)
    last = length - 1 - mask[:, ::-1].argmax(1)
    by_value = np.asarray(output.value)[range(len(last)), last] if value_head else None
    scores = (np.asarray(output.logprob) * mask).sum(1) / mask.sum(1) if by_value is None else by_value
    right = (scores[0::2] > scores[1::2]).astype(float).tolist()
    assert 0 < np.mean(right) < 1
    assert result['value'] == pytest.approx(np.mean(right)) and result['details']['scores'] == right


def test_a_task_is_measured_on_its_heldout_split(model: Any) -> None:
    spec = {'type': 'task', 'task': TASK, 'items': 3, 'max_tokens': 8}
    result = measured(model, spec)
    assert result['metric'] == 'accuracy (greedy)' and result['value'] == 0.0 and result['items'] == 3
    heldout = get_task(split='heldout', **TASK)
    different = list(dict.fromkeys(heldout.prompt(i).text for i in range(20)))
    assert [s['prompt'] for s in result['samples']] == different[:3]
    assert measured(model, spec) == result
    trained = measured(model, {**spec, 'task': {**TASK, 'split': 'train'}})
    assert trained['samples'][0]['prompt'] == get_task(**TASK).prompt(0).text


def test_problems_are_different_and_as_many_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items that repeat one another would make the interval narrower than what was seen allows."""
    asked: list[int] = []

    def silent(*given: Any, **settings: Any) -> list[list[Completion]]:
        asked.append(len(given[3]))
        return [[Completion('', [1], [0.0], stopped=True)] for _ in given[3]]

    monkeypatch.setattr(module, 'sample_tokens', silent)
    heldout = get_task(split='heldout', **TASK)
    known = {heldout.prompt(i).text for i in range(3000)}
    assert 5 < len(known) < 40  # there are few, and many of the first 40 are the same
    for items in (5, 40):
        spec = {'type': 'task', 'task': TASK, 'items': items}
        result = evaluate(None, {}, small_tokenizer(), spec)  # type: ignore[arg-type]
        assert result['items'] == asked[-1] == min(items, len(known))


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ({'type': 'tsk'}, "evaluation type 'tsk'; did you mean 'task'"),
        ({'type': 'text', 'lenght': 3}, "evaluation text: no field 'lenght'; did you mean 'length'"),
        (
            {'type': 'text', 'source': {'type': 'task', **TASK, 'format': 'chat'}},
            'its records have .*messages.*: expected text',
        ),
        ({'type': 'task', 'task': TASK, 'budgets': (4,), 'format': 'text'}, 'budgets: expected format chat'),
        ({'type': 'task', 'task': {'name': 'arithmetik'}}, "did you mean 'arithmetic'"),
    ],
)
def test_what_cannot_be_measured_is_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(None, {}, small_tokenizer(), spec)  # type: ignore[arg-type]
