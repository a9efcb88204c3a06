"""A checkpoint under lm-eval: the same numbers as from the model itself, and as from our own evaluations."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small import model_config, one_device
from text import small_tokenizer

from data.errors import InputError
from model.transformer import Model
from train import harness
from train.checkpoint import Loaded
from train.evaluate import evaluate
from train.harness import harness_model, main

HERE = importlib.util.find_spec('lm_eval') is not None
needs_it = pytest.mark.skipif(not HERE, reason='requirements-lm-eval.txt is not installed')
WORDS = ['red', 'green', 'blue', 'a long walk', 'nothing', 'two of them', 'return x']


@pytest.fixture(scope='module')
def loaded() -> Loaded:
    config = model_config(num_hidden_layers=1, n_routed_experts=0, initializer_range=0.3, max_position_embeddings=64)
    model = Model(config)
    return Loaded(model, model.init(0, one_device()), small_tokenizer(), {'evaluations': {}}, {})


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def logprobs(loaded: Loaded, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each token but the first the log-probability, and which would have been likeliest."""
    logits = np.asarray(loaded.model.apply(loaded.variables, np.array([tokens])).logits[0], np.float64)[:-1]
    said = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return said[np.arange(len(tokens) - 1), tokens[1:]], logits.argmax(1)


@pytest.mark.skipif(HERE, reason='lm-eval is installed')
def test_without_lm_eval_one_line_says_so(loaded: Loaded) -> None:
    with pytest.raises(InputError, match='^lm-eval is not installed: pip install -r requirements-lm-eval.txt$'):
        harness_model(loaded)


def test_answers_end_where_the_task_says() -> None:
    assert harness._cut('one\ntwo. three', ['.', '\n']) == 'one' and harness._cut('one two', '\n') == 'one two'
    assert harness._cut('one', ['']) == 'one'


@needs_it
def test_likelihoods_are_those_of_the_model(loaded: Loaded) -> None:
    tokenizer, model = loaded.tokenizer, harness_model(loaded)
    pairs = [('What is it?', ' ' + word) for word in WORDS] + [('', 'x'), ('if x', ':\n')]
    for (context, text), (value, _) in zip(pairs, model.loglikelihood([asked(*p) for p in pairs]), strict=True):
        whole = [tokenizer.begin_id, *tokenizer.encode(context + text)]
        own = len(tokenizer.encode(context + text)) - len(tokenizer.encode(context))
        assert value == pytest.approx(logprobs(loaded, whole)[0][-own:].sum(), abs=1e-4)
    # What the model says next is what it would have said, and another token is not.
    start = [tokenizer.begin_id, *tokenizer.encode('What is')]
    best = int(logprobs(loaded, [*start, 0])[1][-1])
    texts = [tokenizer.decode([best]), tokenizer.decode([best + 1])]
    assert [tokenizer.encode('What is' + text) for text in texts] == [[*start[1:], best], [*start[1:], best + 1]]
    said = model.loglikelihood([asked('What is', text) for text in texts])
    assert [same for _, same in said] == [True, False]
    chat = model.apply_chat_template([{'role': 'user', 'content': 'Hi'}])
    ((value, _),) = model.loglikelihood([asked(chat, 'Yes')])
    assert value < 0


@needs_it
def test_long_texts_are_scored_in_windows(loaded: Loaded) -> None:
    tokenizer, model = loaded.tokenizer, harness_model(loaded)
    short, long = 'def f(x):\n    return x', ' '.join(WORDS * 8)
    values = model.loglikelihood_rolling([asked(short), asked(''), asked(long)])
    whole = [tokenizer.begin_id, *tokenizer.encode(short)]
    assert values[0] == pytest.approx(logprobs(loaded, whole)[0].sum(), abs=1e-4) and values[1] == 0
    tokens = tokenizer.encode(long)
    size = 63  # the context less one, as a window has one more token before what it predicts
    assert len(tokens) > 2 * size
    first = logprobs(loaded, [tokenizer.begin_id, *tokens[:size]])[0].sum()
    total, at = first, size
    while at < len(tokens):
        end = min(at + size, len(tokens))
        window = tokens[end - size - 1 : end]
        total += logprobs(loaded, window)[0][-(end - at) :].sum()
        at = end
    assert values[2] == pytest.approx(total, abs=1e-3)


@needs_it
def test_greedy_answers_are_the_models(loaded: Loaded) -> None:
    tokenizer, model = loaded.tokenizer, harness_model(loaded)
    tokens = [tokenizer.begin_id, *tokenizer.encode('What is')]
    for _ in range(6):
        tokens.append(int(logprobs(loaded, [*tokens, 0])[1][-1]))
    expected = tokenizer.decode(tokens[len(tokens) - 6 :])
    settings = {'max_gen_toks': 6, 'until': []}
    (answer,) = model.generate_until([asked('What is', settings)])
    assert tokenizer.end_id not in tokens and answer == expected
    (cut,) = model.generate_until([asked('What is', {**settings, 'until': [expected[2:4]]})])
    assert cut == expected[: expected.index(expected[2:4])]
    with pytest.raises(InputError, match='^max_gen_toks is 64: expected less than the context of 64 tokens$'):
        model.generate_until([asked('What is', {'max_gen_toks': 64})])


@needs_it
def test_the_harness_agrees_with_our_own_evaluation(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        choices = [' ' + word for word in rng.permutation(WORDS)[:4]]
        rows.append({'prompt': f'Number {number}:', 'choices': choices, 'answer': int(rng.integers(4))})
    path = tmp_path / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    ours = evaluate(
        loaded.model,
        loaded.variables,
        loaded.tokenizer,
        {'type': 'choice', 'source': {'type': 'jsonl', 'path': str(path)}},
    )
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    (tmp_path / 'tasks').mkdir()
    (tmp_path / 'tasks' / 'rows.yaml').write_text(
        f"""task: torso_rows
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {tmp_path / 'cache'}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    monkeypatch.setattr('train.checkpoint.load', lambda path: loaded)
    assert main(['run/stage', '--tasks=torso_rows', f'--include_path={tmp_path / "tasks"}']) == 0
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert said['task'] == 'torso_rows' and said['acc,none'] == pytest.approx(ours['value'])
    assert 0.1 < ours['value'] < 0.9
    assert main(['run/stage', '--tasks=torso_row', f'--include_path={tmp_path / "tasks"}']) == 1
    assert "knows no task 'torso_row'" in capsys.readouterr().err
