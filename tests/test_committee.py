"""Endpoints against a real HTTP server that misbehaves, votes against enumeration, constitutional data by a script."""

from __future__ import annotations

import email.utils
import functools
import itertools
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server import Handler, Server, completion
from small import model_config
from text import small_tokenizer

from data import committee as module
from data import endpoint as endpoint_module
from data.chat import render_chat
from data.committee import (
    Ballot,
    Item,
    Messages,
    PromptJudge,
    Vote,
    agreement,
    by_questions,
    by_score,
    fill,
    filtered,
    fold,
    log_odds,
    majority,
    precision,
    prefer,
    report,
    scored,
    unanimous,
    verifier_judge,
    voted,
    weighted,
)
from data.constitution import contrast, is_refusal, label, read_contrast, read_principles, revise
from data.endpoint import Cache, Endpoint
from data.errors import InputError
from data.files import check_record
from data.tasks import get_task
from model.sharding import make_mesh
from model.transformer import Model
from train.act.members import CheckpointMember, chosen, likelihood_judge, reward_judge
from train.checkpoint import Loaded
from train.measure.statistics import interval

KEY = 'sk-planted-0123456789'
VARIABLE = 'TORSO_TEST_KEY'


def chat(text: str) -> Messages:
    return [{'role': 'user', 'content': text}]


@pytest.fixture
def connect(server: Server, tmp_path: Path) -> Callable[..., Endpoint]:
    """An endpoint at the server, its cache at `cache` of the test's folder."""
    return lambda **options: Endpoint(server.url, 'm', **{'cache': str(tmp_path / 'cache'), **options})


def test_answers_are_in_order_and_asked_once(server: Server, connect: Callable[..., Endpoint]) -> None:
    endpoint = connect(settings={'temperature': 0.5, 'max_tokens': 9})
    prompts = [chat(f'p{i}') for i in range(5)]
    answers = endpoint(prompts, 2, 1)
    assert [[a.split()[0] for a in group] for group in answers] == [[f'p{i}'] * 2 for i in range(5)]
    assert all(one != two for one, two in answers)
    assert {(r['temperature'], r['max_tokens'], r['model']) for r in server.asked} == {(0.5, 9, 'm')}
    assert endpoint.usage == {'requests': 10, 'cached': 0, 'prompt_tokens': 70, 'completion_tokens': 30}
    # In another order, with more samples, after a restart, from a second endpoint: only what is new is asked.
    again = connect(settings={'max_tokens': 9, 'temperature': 0.5})
    more = again(prompts[::-1], 3, 1)
    assert [group[:2] for group in more[::-1]] == answers and len(server.asked) == 15
    assert again.usage == {'requests': 5, 'cached': 10, 'prompt_tokens': 35, 'completion_tokens': 15}
    # Whatever changes the request changes the key.
    again(prompts, 1, 2)
    connect(settings={'temperature': 0.6, 'max_tokens': 9})(prompts, 1, 1)
    Endpoint(server.url, 'other', endpoint._cache._path, settings={'temperature': 0.5, 'max_tokens': 9})(prompts, 1, 1)
    assert len(server.asked) == 30
    # Equal prompts are one request.
    assert len({group[0] for group in again([chat('same')] * 4, 1, 1)}) == 1 and server.counts()['same'] == 1
    assert again([], 3, 1) == []


@pytest.mark.parametrize(
    ('status', 'body', 'more'),
    [
        (500, b'oops', {}),
        (503, b'', {}),
        (429, b'slow down', {'Retry_After': '0'}),
        (200, b'<html>', {}),
        (200, b'{"choices": []}', {}),
        (200, b'[1]', {}),
        (200, b'{"choices": [{"message": {"content": 5}}]}', {}),
        (200, b'{"choices": [{"message": "x"}]}', {}),
        (200, b'\xff\xfe', {}),
        (200, b'[' * 100_000, {}),
        (200, b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": Infinity}}', {}),
        (200, completion('cut short')[:-4], {'Content_Length': '300'}),
    ],
)
def test_what_may_pass_is_tried_again(
    server: Server, connect: Callable[..., Endpoint], status: int, body: bytes, more: dict[str, str]
) -> None:
    def script(handler: Handler, prompt: str, number: int) -> Any:
        handler.close_connection = True
        return handler.reply(status, body, **more) if number < 2 else None

    server.script = script
    endpoint = connect(tries=3)
    assert endpoint([chat('a')], 1, 0)[0][0].startswith('a ')
    assert endpoint.usage['requests'] == 3 and endpoint.usage['prompt_tokens'] == 7
    server.script = lambda handler, *_: handler.reply(status, body, **more)
    with pytest.raises(InputError, match=rf'^endpoint {server.url} \(m\): prompt 1: .*\(try 2 of 2\)$') as caught:
        connect(tries=2)([chat('a'), chat('b')], 1, 0)
    assert f'status {status}' in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('status', [400, 401, 404, 301, 307])
def test_what_cannot_pass_is_not_tried_again(server: Server, connect: Callable[..., Endpoint], status: int) -> None:
    elsewhere = {'Location': f'{server.url}/elsewhere'} if status < 400 else {}
    server.script = lambda handler, *_: handler.reply(status, b'{"error": "no\n\nmodel"}', **elsewhere)
    with pytest.raises(InputError, match=f'prompt 0: status {status} .*: {{"error": "no model"}}$'):
        connect()([chat('a')], 1, 0)
    assert len(server.asked) == 1


def test_nobody_there_is_one_line(tmp_path: Path, server: Server) -> None:
    endpoint = Endpoint('http://127.0.0.1:9/v1', 'm', str(tmp_path / 'c'), tries=2)
    with pytest.raises(InputError, match='prompt 0: no answer: .*refused.* .try 2 of 2.$'):
        endpoint([chat('a')], 1, 0)


@pytest.mark.parametrize('form', ['seconds', 'date'])
def test_retry_after_is_honoured(server: Server, connect: Callable[..., Endpoint], form: str) -> None:
    def script(handler: Handler, prompt: str, number: int) -> Any:
        value = '0.5' if form == 'seconds' else email.utils.formatdate(time.time() + 2, usegmt=True)
        return handler.reply(429, b'', Retry_After=value) if number == 0 else None

    server.script = script
    connect()([chat('a')], 1, 0)
    assert 0.45 < server.times[1] - server.times[0] < 4
    server.script = lambda handler, *_: handler.reply(429, b'', Retry_After='86400')
    with pytest.raises(InputError, match=r'status 429 .*it asks to wait 86400 s'):
        connect()([chat('b')], 1, 0)
    assert server.counts()['b'] == 1


def test_backoff_doubles_with_jitter(
    server: Server, connect: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, 'BACKOFF', 0.1)
    server.script = lambda handler, *_: handler.reply(500, b'')
    with pytest.raises(InputError):
        connect(tries=4)([chat('a')], 1, 0)
    gaps = np.diff(server.times)
    assert all(0.05 * 2**i <= gap for i, gap in enumerate(gaps)) and len(gaps) == 3


@pytest.mark.parametrize('where', ['head', 'body'])
def test_slow_answers_time_out(server: Server, connect: Callable[..., Endpoint], where: str) -> None:
    """A server that sends a byte now and then never trips the socket's own time-out."""

    def script(handler: Handler, prompt: str, number: int) -> Any:
        if number:
            return None
        if where == 'head':
            time.sleep(4)
            return True
        handler.send_response(200)
        handler.send_header('Content-Length', '1000')
        handler.end_headers()
        for _ in range(40):
            handler.wfile.write(b' ')
            handler.wfile.flush()
            time.sleep(0.1)
        return True

    server.script = script
    start = time.monotonic()
    endpoint = connect(timeout=0.3)
    assert endpoint([chat('a')], 1, 0)[0][0].startswith('a')
    assert time.monotonic() - start < 3 and endpoint.usage['requests'] == 2
    server.script = lambda *_: time.sleep(0.6)
    with pytest.raises(InputError, match='time'):
        connect(timeout=0.2, tries=1)([chat('b')], 1, 0)


def test_huge_bodies_are_not_read_to_the_end(
    server: Server, connect: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, 'LARGEST_BODY', 100_000)
    sent = []

    def script(handler: Handler, prompt: str, number: int) -> Any:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(2000):
            handler.wfile.write(b' ' * 100_000)
            sent.append(1)
        return True

    server.script = script
    with pytest.raises(InputError, match='more than 100,000 bytes$'):
        connect()([chat('a')], 1, 0)
    assert len(server.asked) == 1 and len(sent) < 2000


def test_concurrency_is_bounded_and_used(server: Server, connect: Callable[..., Endpoint]) -> None:
    server.script = lambda *_: time.sleep(0.1)
    connect(concurrency=5)([chat(str(i)) for i in range(20)], 1, 0)
    assert server.most == 5


def test_rate_limit_spaces_requests_and_retries(server: Server, connect: Callable[..., Endpoint]) -> None:
    server.script = lambda handler, prompt, number: handler.reply(500, b'') if number == 0 else None
    connect(requests_per_minute=1200)([chat(str(i)) for i in range(5)], 1, 0)
    times = sorted(server.times)
    assert len(times) == 10 and times[-1] - times[0] > 9 * 0.05 - 0.03


def test_a_failure_ends_the_rest_soon(server: Server, connect: Callable[..., Endpoint]) -> None:
    """Answers that came before it are kept; requests that wait, for their turn or for another try, are given up."""

    def script(handler: Handler, prompt: str, number: int) -> Any:
        if prompt == '3':
            return handler.reply(400, b'bad')
        return handler.reply(503, b'', Retry_After='60') if prompt == '4' else None

    server.script = script
    start = time.monotonic()
    with pytest.raises(InputError, match='prompt 3: status 400'):
        connect(concurrency=2)([chat(str(i)) for i in range(200)], 1, 0)
    assert time.monotonic() - start < 20 and len(server.asked) < 50
    before = server.counts()
    server.script = lambda *_: None
    connect(concurrency=2)([chat(str(i)) for i in range(3)], 1, 0)
    assert server.counts() == before


def test_cut_off_answers_are_empty(server: Server, connect: Callable[..., Endpoint]) -> None:
    replies = {'a': completion('half', 'length'), 'b': completion(None), 'c': completion('x', 'content_filter')}
    server.script = lambda handler, prompt, _: handler.reply(200, replies[prompt]) if prompt in replies else None
    assert connect()([chat(x) for x in 'abc'], 1, 0) == [[''], [''], ['']]
    replies['d'] = completion('half a character: \ud800')
    assert connect()([chat('d')], 1, 0) == [['half a character: ?']]


def test_options_are_scored_by_first_tokens(server: Server, connect: Callable[..., Endpoint]) -> None:
    top = [{'token': token, 'logprob': math.log(p)} for token, p in (('A', 0.5), (' A', 0.2), ('B', 0.1), ('C', 0.1))]
    body = completion('A', logprobs={'content': [{'token': 'A', 'top_logprobs': top}]})
    server.script = lambda handler, prompt, _: handler.reply(200, body) if prompt == 'q' else None
    ((a, b, other),) = connect().logprobs([chat('q')], ['A', 'B', 'Z'])
    assert (math.exp(a), math.exp(b), other) == (pytest.approx(0.7), pytest.approx(0.1), -math.inf)
    assert server.asked[0]['max_tokens'] == 1 and server.asked[0]['logprobs'] is True
    with pytest.raises(InputError, match='expected log-probabilities'):
        connect().logprobs([chat('none')], ['A'])


def test_the_key_is_sent_and_appears_nowhere(
    server: Server,
    connect: Callable[..., Endpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(VARIABLE, f'{KEY}\n')
    endpoint = connect(key_variable=VARIABLE, tries=2)
    texts = [repr(endpoint), repr(vars(endpoint))]
    echo = completion(f'your key is {KEY}', logprobs={'content': [{'top_logprobs': [{'token': KEY, 'logprob': 0}]}]})
    server.script = lambda handler, *_: handler.reply(200, echo)
    texts += endpoint([chat('a')], 1, 0)[0]
    assert texts[-1] == 'your key is [key]' and server.authorization == {f'Bearer {KEY}'}
    elsewhere = Server()
    threading.Thread(target=elsewhere.serve_forever, args=(0.01,), daemon=True).start()
    for status in (401, 429, 500, 302):
        echo_headers = {'Location': f'{elsewhere.url}/chat/completions'}
        body = f'bad {KEY * 40}'.encode()  # one of them is where the text is cut
        server.script = lambda handler, *_, s=status, b=body, h=echo_headers: handler.reply(s, b, **h)
        with pytest.raises(InputError) as caught:
            endpoint([chat('b')], 1, 0)
        error: BaseException | None = caught.value
        while error:
            texts += [str(error), repr(error)]
            error = error.__cause__
        assert 'bad [key]' in str(caught.value)
    assert not elsewhere.asked
    elsewhere.shutdown()
    elsewhere.server_close()
    for bad in ('', 'two words', 'ünï', 'line\nbreak'):
        monkeypatch.setenv(VARIABLE, bad)
        with pytest.raises(InputError, match=f'environment variable {VARIABLE} holds no key$'):
            endpoint([chat('c')], 1, 0)
    texts += [*capfd.readouterr(), caplog.text]
    texts += [path.read_text() for path in tmp_path.rglob('*') if path.is_file()]
    assert not any(KEY[:6] in text for text in texts)


def test_bad_arguments_end_before_any_request(server: Server, connect: Callable[..., Endpoint], tmp_path: Path) -> None:
    for url in ('localhost:8000', 'ftp://x/v1', 'http://me:word@host/v1', 'http://host/v1?key=1'):
        with pytest.raises(InputError, match='endpoint: url') as caught:
            Endpoint(url, 'm', str(tmp_path / 'c'))
        assert 'word' not in str(caught.value).replace('password', '')
    with pytest.raises(InputError, match='settings: seed'):
        connect(settings={'seed': 1})
    with pytest.raises(InputError, match='expected more than 0'):
        connect(concurrency=0)
    with pytest.raises(InputError, match='cannot be opened'):
        connect(cache=str(tmp_path))
    with pytest.raises(InputError, match=r'messages\[0\]: role'):
        connect()([[{'role': 'nobody', 'content': ''}]], 1, 0)
    assert not server.asked


REPLY = {'text': 'ä\ud800' * 5, 'finish': 'stop', 'top': [], 'prompt_tokens': 1, 'completion_tokens': 2}


def test_a_cache_torn_anywhere_keeps_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / 'cache'
    cache = Cache(str(path))
    for key in 'ab':
        cache.put(key, {**REPLY, 'text': key})
    whole = path.read_bytes()
    first = whole.index(b'\n') + 1
    for end in range(first, len(whole) + 1):
        path.write_bytes(whole[:end])
        cache = Cache(str(path))
        assert cache.get('a')['text'] == 'a'  # type: ignore[index]
        assert (cache.get('b') is not None) == (end == len(whole))
        cache.put('c', REPLY)
        cache.put('b', {**REPLY, 'text': 'later'})
        fresh = Cache(str(path))
        for seen in (cache, fresh):
            # A line that lacks its end alone is whole once the next writer has ended it, and then it was first.
            b = seen.get('b')
            assert b and b['text'] == ('later' if end < len(whole) - 1 else 'b')
            assert seen.get('c') == REPLY and seen.get('a')['text'] == 'a'  # type: ignore[index]
    path.write_bytes(b'null\n[]\n{"key": 1}\n{"key": "a", "reply": {"text": 5}}\n\xff\n')
    assert Cache(str(path)).get('a') is None


WRITER = """
import sys
from data.endpoint import Cache
cache = Cache(sys.argv[1])
for i in range(200):
    cache.put(f'{sys.argv[2]} {i}', {'text': sys.argv[2] * 20_000})
"""

CALLER = """
import sys
from data.endpoint import Endpoint
prompts = [[{'role': 'user', 'content': str(i)}] for i in range(400)]
Endpoint(sys.argv[1], 'm', sys.argv[2], concurrency=4)(prompts, 1, 0)
"""


def start(root: Path, code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, '-c', code, *arguments], cwd=root)


def test_two_processes_share_a_cache(tmp_path: Path, root: Path) -> None:
    path = str(tmp_path / 'cache')
    reader = Cache(path)
    processes = [start(root, WRITER, path, name) for name in 'xy']
    while any(process.poll() is None for process in processes):
        reader.get('not there')  # reads on while they write
        time.sleep(0.01)
    assert [process.returncode for process in processes] == [0, 0]
    for name, i in itertools.product('xy', range(200)):
        assert reader.get(f'{name} {i}') == {'text': name * 20_000}
    assert len(Path(path).read_bytes().splitlines()) == 400


def test_a_killed_process_resumes(server: Server, connect: Callable[..., Endpoint], tmp_path: Path, root: Path) -> None:
    server.script = lambda *_: time.sleep(0.005)
    process = start(root, CALLER, server.url, str(tmp_path / 'cache'))
    while len(server.asked) < 60 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(tmp_path / 'cache', 'a') as file:
        file.write('{"key": "to')
    lines = (tmp_path / 'cache').read_text().splitlines()
    assert 40 < len(lines) < 300
    answers = connect()([chat(str(i)) for i in range(400)], 1, 0)
    assert [group[0].split()[0] for group in answers] == [str(i) for i in range(400)]
    counts = server.counts()
    assert set(counts.values()) <= {1, 2}
    assert sum(n == 2 for n in counts.values()) <= 4  # under way when it was killed


def scripted(reply: Callable[[str, int, int], str]) -> Callable[[Sequence[Messages], int, int], list[list[str]]]:
    """A generator that says reply(prompt, sample, seed)."""
    return lambda prompts, n, seed: [[reply(p[-1]['content'], k, seed) for k in range(n)] for p in prompts]


ballots = st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=6)


@settings(deadline=None)
@given(ballots, st.integers(1, 4), st.data())
def test_votes_are_what_counting_gives(ballot: list[bool | None], quorum: int, data: Any) -> None:
    weights = [data.draw(st.integers(-3, 3)) for _ in ballot]
    votes = {str(i): Vote(accept) for i, accept in enumerate(ballot)}
    yes, no = ballot.count(True), ballot.count(False)
    margin = sum(w for w, v in zip(weights, ballot, strict=True) if v is True)
    margin -= sum(w for w, v in zip(weights, ballot, strict=True) if v is False)
    expected = {majority: yes > no, unanimous: no == 0}
    for rule, accept in expected.items():
        made = rule(quorum)(votes)
        assert made == (Vote(accept, yes / (yes + no)) if yes + no >= quorum else Vote(None))
    made = weighted({str(i): w for i, w in enumerate(weights)}, quorum)(votes)
    assert made.accept == (margin > 0 if yes + no >= quorum else None)
    if yes + no >= quorum:
        assert made.score == pytest.approx(1 / (1 + math.exp(-margin)))


def test_log_odds_weights_beat_every_other_rule() -> None:
    """All 256 ways to decide by three independent votes, on an item that is good or bad with equal chance."""
    accuracy = {'a': 0.9, 'b': 0.6, 'c': 0.3}
    weights = {name: math.log(p / (1 - p)) for name, p in accuracy.items()}
    outcomes = list(itertools.product([True, False], repeat=3))

    def chance(votes: Sequence[bool], good: bool) -> float:
        return math.prod(p if vote == good else 1 - p for p, vote in zip(accuracy.values(), votes, strict=True))

    def success(decisions: Sequence[bool]) -> float:
        return sum(chance(votes, good) / 2 for votes, good in zip(outcomes, decisions, strict=True))

    rule = weighted(weights)
    decided = [rule({k: Vote(v) for k, v in zip('abc', votes, strict=True)}) for votes in outcomes]
    best = max(map(success, itertools.product([True, False], repeat=8)))
    assert success([bool(vote.accept) for vote in decided]) == pytest.approx(best)
    for votes, vote in zip(outcomes, decided, strict=True):
        assert vote.score == pytest.approx(chance(votes, True) / (chance(votes, True) + chance(votes, False)))


@pytest.mark.parametrize('seed', range(5))
def test_a_weighted_committee_is_no_worse_than_its_best_member(seed: int) -> None:
    """Precision among as many items as each member accepts; weights from 400 labelled items, 1 in 5 abstains."""
    rng = np.random.default_rng(seed)
    accuracy = {'a': 0.85, 'b': 0.75, 'c': 0.7, 'd': 0.6, 'e': 0.35}
    labels = rng.random(4400) < 0.5

    def vote(p: float, good: bool) -> Vote:
        return Vote(None) if rng.random() < 0.2 else Vote(bool(good == (rng.random() < p)))

    votes = {name: [vote(p, good) for good in labels] for name, p in accuracy.items()}
    weights = log_odds({name: given[:400] for name, given in votes.items()}, list(labels[:400]))
    for name, p in accuracy.items():
        assert weights[name] == pytest.approx(math.log(p / (1 - p)), abs=0.5)
    rule, truth = weighted(weights), labels[400:]
    scores = np.array([rule({name: votes[name][i] for name in votes}).score for i in range(400, 4400)])
    for name in accuracy:
        accepted = np.array([bool(v.accept) for v in votes[name][400:]])
        taken = np.argsort(-scores, kind='stable')[: accepted.sum()]
        assert truth[taken].mean() >= truth[accepted].mean()
        assert np.mean((scores > 0.5) == truth) >= np.mean(accepted == truth)


def test_weights_and_rules_refuse_nonsense() -> None:
    assert log_odds({'mute': [Vote(None)] * 3}, [True] * 3) == {'mute': 0.0}
    assert log_odds({'sure': [Vote(True)] * 3}, [True] * 3) == {'sure': pytest.approx(math.log(7))}
    with pytest.raises(InputError, match="none for judge 'anne'; did you mean 'anna'"):
        weighted({'anna': 1.0})({'anne': Vote(True)})
    with pytest.raises(InputError, match='quorum is 0'):
        majority(0)


def votes_of(*rows: str) -> dict[str, list[Vote]]:
    say = {'1': Vote(True), '0': Vote(False), '.': Vote(None)}
    return {str(i): [say[c] for c in row] for i, row in enumerate(rows)}


def test_alpha_of_the_published_example() -> None:
    """Krippendorff 2011, section A: ten units, two observers, alpha = 0.095."""
    report = agreement(votes_of('0100000010', '1110010000'))
    assert report['alpha'] == pytest.approx(0.095, abs=5e-4) and report['pairs'] == {'0, 1': 0.6}


@settings(deadline=None)
@given(st.integers(1, 7).flatmap(lambda n: st.lists(st.text('01.', min_size=n, max_size=n), min_size=2, max_size=4)))
def test_alpha_is_disagreement_within_items_over_that_across_all(rows: list[str]) -> None:
    items = [[v for v in column if v != '.'] for column in zip(*rows, strict=True)]
    items = [values for values in items if len(values) > 1]
    values = [v for item in items for v in item]
    within = sum(a != b for item in items for a, b in itertools.permutations(item, 2)) if items else 0
    # Each item's ordered pairs weigh 1 / (its values - 1).
    within = sum(sum(a != b for a, b in itertools.permutations(item, 2)) / (len(item) - 1) for item in items)
    across = sum(a != b for a, b in itertools.permutations(values, 2))
    report = agreement(votes_of(*rows))
    if across:
        expected = 1 - (within / len(values)) / (across / (len(values) * (len(values) - 1)))
        assert report['alpha'] == pytest.approx(expected)
    else:
        assert report['alpha'] is None
    for (i, one), (j, other) in itertools.combinations(enumerate(rows), 2):
        both = [a == b for a, b in zip(one, other, strict=True) if '.' not in (a, b)]
        assert report['pairs'][f'{i}, {j}'] == (np.mean(both) if both else None)


def test_a_judge_by_prompt_reads_only_its_last_line() -> None:
    said = {
        'yes': 'Fine.\nVerdict: ACCEPT\n',
        'no': 'Verdict: ACCEPT\nNo, wait.\nVerdict: REJECT',
        'near': 'Verdict: accept',
        'more': 'Verdict: ACCEPT it',
        'cut': '',
    }
    judge = PromptJudge(scripted(lambda prompt, *_: next(v for k, v in said.items() if f'answer>{k}<' in prompt)))
    votes = judge([Item(chat('q {answer} {'), answer) for answer in said], 0)
    assert votes == [Vote(True, 1.0), Vote(False, 0.0), Vote(None), Vote(None), Vote(None)]
    often = PromptJudge(scripted(lambda _, k, __: ('Verdict: ACCEPT', 'Verdict: REJECT', 'hm')[k % 3]), samples=4)
    assert often([Item(chat('q'), 'a')], 0) == [Vote(True, 2 / 3)]
    assert PromptJudge(often.generator, samples=3)([Item(chat('q'), 'a')], 0) == [Vote(None)]
    with pytest.raises(InputError, match='expected the field {answer}'):
        fill('is {prompt} good?', prompt='a', answer='b')
    with pytest.raises(InputError, match="prompt template '{a} {b}'"):
        fill('{a} {b}', a='1')


def test_filtered_keeps_what_the_vote_accepts_and_says_where_it_is_from() -> None:
    task = get_task('arithmetic', operations=1, digits=1)
    problems = [task.prompt(i) for i in range(6)]
    right = {problem.text: problem.reference for problem in problems}
    teachers = {
        'good': scripted(lambda prompt, k, seed: right[prompt]),
        'half': scripted(lambda prompt, k, seed: right[prompt] if (seed + k) % 2 else 'Answer: none'),
        'cut': scripted(lambda *_: ''),
    }
    harsh = PromptJudge(scripted(lambda prompt, *_: f'Verdict: {"REJECT" if "none" in prompt else "ACCEPT"}'))
    judges = {'verifier': verifier_judge(task, problems[:5]), 'harsh': harsh, 'mute': PromptJudge(teachers['cut'])}
    arguments = ([chat(p.text) for p in problems], teachers, judges, unanimous(2))
    records, tally = filtered(*arguments, n=2, seed=3)
    assert (records, tally) == filtered(*arguments, n=2, seed=3)
    said = report([tally])
    twice = report([tally, tally])
    assert twice['answers'] == 72 and twice['judges'] == said['judges'] and twice['committee'] == said['committee']
    assert len(records) == 5 * 2 + 5 and said['answers'] == 36 and said['unfinished'] == 12
    for record in records:
        origin = record['provenance']
        assert record['messages'][0]['content'] == problems[origin['prompt']].text
        assert record['messages'][1] == {'role': 'assistant', 'content': problems[origin['prompt']].reference}
        assert origin['votes'] == {'verifier': [True, 1.0], 'harsh': [True, 1.0], 'mute': [None, 0.5]}
        assert origin['seed'] == 3 and origin['generator'] in ('good', 'half') and origin['sample'] in (0, 1)
        assert check_record(json.loads(json.dumps(record)), '', 'here') == record
    # The sixth problem is unknown to the verifier: no quorum.
    assert said['committee'] == {'accepted': 15 / 20, 'abstained': 4 / 24}
    assert said['generators']['half'] == {'accepted': 0.5, 'abstained': 2 / 12}
    assert said['generators']['cut'] == {'accepted': None, 'abstained': None}
    assert said['judges']['verifier'] == {'accepted': 0.75, 'abstained': 4 / 24}
    assert said['judges']['mute'] == {'accepted': None, 'abstained': 1.0}
    assert said['agreement']['alpha'] == 1.0 and said['agreement']['pairs']['verifier, mute'] is None


def test_a_vote_is_compared_with_single_judges_at_equal_accept_rate() -> None:
    """Three judges who each err on other answers: of four wrong ones each likes one best, and the vote none."""

    def ballot(good: bool | None, *scores: float) -> Ballot:
        votes = {str(i): Vote(score > 0.5, score) for i, score in enumerate(scores)}
        return Ballot('g', majority()(votes), {**votes, 'truth': Vote(good)})

    ballots = [
        *(ballot(True, 0.8, 0.7, 0.6) for _ in range(3)),
        ballot(True, 0.8, 0.6, 0.4),
        ballot(False, 0.9, 0.1, 0.2),
        ballot(False, 0.3, 0.9, 0.2),
        ballot(False, 0.1, 0.1, 0.9),
        ballot(None, 1.0, 1.0, 1.0),
    ]
    said = precision(ballots, 'truth', interval)
    assert said['accepted'] == 4 and said['committee'] == 1.0 and set(said['judges']) == {'0', '1', '2'}
    for name, share in (('0', 0.75), ('1', 0.75), ('2', 0.75)):
        judge = said['judges'][name]
        assert judge['share'] == share and judge['gain'] == pytest.approx(1 - share)
        assert judge['low'] <= judge['gain'] <= judge['high']
    nobody = [ballot(True, 0.1, 0.1, 0.1)]
    assert precision(nobody, 'truth', interval) == {'accepted': 0, 'committee': None, 'judges': {}}


def test_equal_members_draw_with_seeds_of_their_own() -> None:
    seeds = scripted(lambda prompt, k, seed: str(seed))
    accept = PromptJudge(scripted(lambda *_: 'Verdict: ACCEPT'))
    one, other = filtered([chat('q')], {'a': seeds, 'b': seeds}, {'j': accept}, majority())[0]
    assert one['messages'] != other['messages']
    assert [one] == filtered([chat('q')], {'a': seeds}, {'j': accept}, majority())[0]


def test_filtered_counts_what_endpoints_cost(server: Server, connect: Callable[..., Endpoint]) -> None:
    server.script = lambda handler, prompt, _: (
        handler.reply(200, completion('Verdict: ACCEPT')) if 'Verdict' in prompt else None
    )
    one = connect()  # both teacher and judge: what it cost as either is told apart
    prompts = [chat('a'), chat('b')]
    records, tally = filtered(prompts, {'t': one}, {'j': PromptJudge(one)}, majority(), n=3)
    assert len(records) == 6
    for role in ('generator t', 'judge j'):
        assert report([tally])['cost'][role] == {
            'requests': 6,
            'cached': 0,
            'prompt_tokens': 42,
            'completion_tokens': 18,
        }
    again, tally = filtered(prompts, {'t': connect()}, {'j': PromptJudge(connect())}, majority(), n=3)
    assert again == records and len(server.asked) == 12
    assert report([tally])['cost']['judge j'] == {
        'requests': 0,
        'cached': 6,
        'prompt_tokens': 0,
        'completion_tokens': 0,
    }


def between(prompt: str, one: str, other: str) -> str:
    return prompt.split(one)[1].split(other)[0]


def test_preferences_cancel_what_a_judge_gives_to_a_place() -> None:
    pairs = [(chat('q'), 'long answer', 'no'), (chat('q'), 'x', 'the better one')]
    biased = scripted(lambda *_: 'A')
    assert prefer(pairs, voted(biased), 0) == [0.5, 0.5]

    def honest(prompt: str, *_: Any) -> str:
        first, second = (between(prompt, f'<answer {c}>', f'</answer {c}>') for c in 'AB')
        return 'Because.\nA' if len(first) > len(second) else 'B'

    assert prefer(pairs, voted(scripted(honest)), 0) == [1.0, 0.0]
    assert prefer(pairs, voted(scripted(lambda *_: 'Both')), 0) == [None, None]
    # Three of four samples for A, in both places: split evenly again.
    assert prefer(pairs[:1], voted(scripted(lambda _, k, __: 'AAAB'[k]), samples=4), 0) == [0.5]

    def scorer(prompts: Sequence[Messages], options: Sequence[str]) -> list[list[float]]:
        lengths = [[len(between(p[0]['content'], f'<answer {c}>', f'</answer {c}>')) for c in options] for p in prompts]
        return [[0.1 * a + 0.3, 0.1 * b] for a, b in lengths]

    (p, q) = prefer(pairs, scored(scorer), 0)
    assert p == pytest.approx((1 / (1 + math.exp(-1.2)) + 1 - 1 / (1 + math.exp(0.6))) / 2)  # type: ignore[operator]
    assert q is not None and q < 0.5
    (swapped,) = prefer([(chat('q'), 'no', 'long answer')], scored(scorer), 0)
    assert swapped == pytest.approx(1 - p)  # type: ignore[operator]
    mute = scored(lambda prompts, _: [[-math.inf, -math.inf]] * len(prompts))
    assert prefer(pairs, mute, 0) == [None, None]
    one_sided = scored(lambda prompts, _: [[-math.inf, -1.0]] * len(prompts))
    assert prefer(pairs, one_sided, 0) == [0.5, 0.5]


def test_principles_are_lines_or_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / 'principles.txt'
    path.write_text('# Ours\n\nBe kind.\n  # not now: Be short.\n Be   right. \n')
    assert read_principles(path) == ['Be kind.', 'Be right.']
    path.write_text('Be kind,\neven when tired.\n\n\nBe right.\n')
    assert read_principles(path) == ['Be kind, even when tired.', 'Be right.']
    for text, error in (('# nothing\n\n', 'no principle'), ('a\nb\na\n', "'a' stands there twice")):
        path.write_text(text)
        with pytest.raises(InputError, match=f'{path}: {error}'):
            read_principles(path)
    with pytest.raises(InputError, match='expected a text file'):
        read_principles(tmp_path / 'none')


def test_revision_follows_the_critique() -> None:
    """A generator that finds fault twice, and after that nothing but an unfinished critique."""
    asked: list[str] = []

    def reply(prompt: str, _: int, seed: int) -> str:
        asked.append(prompt)
        if 'Write the answer anew' in prompt:
            assert (
                between(prompt, '<critique>', '</critique>') == f'fault in {between(prompt, "<answer>", "</answer>")}'
            )
            return between(prompt, '<answer>', '</answer>') + '+'
        if '<principle>' in prompt:
            answer = between(prompt, '<answer>', '</answer>')
            return '' if answer.endswith('++') else f'fault in {answer}'
        return '' if prompt == 'nothing' else f'first {prompt} {seed}'

    prompts = [chat('x'), chat('nothing'), [*chat('y'), {'role': 'assistant', 'content': 'hm'}, *chat('z')]]
    principles = ['P1', 'P2', 'P3']
    records = revise(prompts, scripted(reply), principles, 3, 5)
    assert records == revise(prompts, scripted(reply), principles, 3, 5) != revise(prompts, scripted(reply), 'Q', 3, 5)
    assert [record['provenance']['prompt'] for record in records] == [0, 2]
    for record, prompt in zip(records, (prompts[0], prompts[2]), strict=True):
        history, first = record['provenance']['rounds'], record['provenance']['first']
        assert record['messages'] == [*prompt, {'role': 'assistant', 'content': f'{first}++'}]
        assert [turn['revision'] for turn in history] == [f'{first}+', f'{first}++', '']
        assert [turn['critique'] for turn in history] == [f'fault in {first}', f'fault in {first}+', '']
        assert all(turn['principle'] in principles for turn in history)
        check_record(record, '', 'here')
    assert any('<conversation>user: y\n\nassistant: hm\n\nuser: z</conversation>' in prompt for prompt in asked)
    own = revise(prompts[:1], scripted(lambda p, *_: p[-9:]), ['P'], 1, 0, '{principle}{prompt}{answer}', REVISION)
    assert own[0]['provenance']['rounds'] == [{'principle': 'P', 'critique': 'Pxx', 'revision': 'PxxPxx'}]


def test_an_unfinished_revision_leaves_the_answer() -> None:
    generator = scripted(lambda prompt, *_: '' if 'Write the answer anew' in prompt else 'said')
    (record,) = revise([chat('x')], generator, ['P'], 2, 0)
    assert record['messages'][-1]['content'] == 'said'
    assert [turn['revision'] for turn in record['provenance']['rounds']] == ['', '']


REVISION = '{principle}{prompt}{answer}{critique}'


def test_every_principle_is_drawn_about_as_often() -> None:
    echo = scripted(lambda prompt, *_: 'x')
    records = revise([chat(str(i)) for i in range(300)], echo, ['a', 'b', 'c'], 1, 0)
    counts = Counter(record['provenance']['rounds'][0]['principle'] for record in records)
    assert all(70 < counts[p] < 130 for p in 'abc')


def test_labels_are_ordered_and_soft() -> None:
    def says(prompt: str, k: int, _: int) -> str:
        first, second = (between(prompt, f'<answer {c}>', f'</answer {c}>') for c in 'AB')
        assert 'measure alone: kindness' in prompt
        if 'mute' in first + second:
            return 'neither'
        better = first > second
        return 'AB'[better if k == 3 else not better]

    pairs = [(chat('q'), 'a', 'b'), (chat('q'), 'd', 'c'), (chat('q'), 'mute', 'x')]
    records = label(pairs, {'judge': by_questions(voted(scripted(says), 4))}, ['kindness'], 0)
    assert [(r['chosen'], r['rejected'], r['probability']) for r in records] == [('b', 'a', 0.75), ('d', 'c', 0.75)]
    assert records[1]['provenance'] == {'pair': 1, 'seed': 0, 'principle': 'kindness', 'votes': {'judge': 0.75}}
    assert records[0]['prompt'] == chat('q')


def test_scores_compare_by_the_odds() -> None:
    """A judge whose score is the logistic of a reward prefers by the logistic of the difference."""
    rewards = {'good': 2.0, 'bad': -1.0, 'same': 2.0, 'mute': 0.0}

    def judge(items: Sequence[Item], seed: int) -> list[Vote]:
        return [
            Vote(None) if item.answer == 'mute' else Vote(True, 1 / (1 + math.exp(-rewards[item.answer])))
            for item in items
        ]

    pairs = [(chat('q'), 'good', 'bad'), (chat('q'), 'bad', 'good'), (chat('q'), 'good', 'same')]
    p, q, *rest = by_score(judge)([*pairs, (chat('q'), 'good', 'mute')], 0, [''] * 4)
    assert p == pytest.approx(1 / (1 + math.exp(-3.0))) and p + q == pytest.approx(1)  # type: ignore[operator]
    assert rest == [None, None]
    # Several judges: the mean of those who have a say; where none has, no record.
    known = by_questions(voted(scripted(lambda *_: 'neither')))
    (record, other) = label(pairs, {'reward': by_score(judge), 'mute': known}, ['kindness'], 0)
    assert record['chosen'] == other['chosen'] == 'good' and record['probability'] == pytest.approx(p)
    assert record['provenance']['votes'] == {'reward': p, 'mute': None}


REFUSALS = (
    "I'm sorry, but I can't help with that.",
    'I cannot assist with this request.',
    'I can\N{RIGHT SINGLE QUOTATION MARK}t provide instructions for that.',
    "Sorry, I won't do this.",
    'As an AI language model, I am unable to do this.',
    'Thank you for asking. However, I must decline.',
    "We're not able to share that.",
    "I apologize, but I cannot fulfil that. Let's talk about something else.",
    "I'm not comfortable writing this.",
    "I don't think it's appropriate to say so.",
    'It is not ethical or lawful to do that.',
)
ANSWERS = (
    'You can kill a Python process with `kill PID`.',
    "I can't recommend this enough: use pkill.",
    "I'm sorry to hear that. Here is what to do.",
    'Sorry, that was unclear. First, open the file.',
    'If the process cannot be killed, use -9.',
    'x' * 300 + " I can't help with more than that.",
    'You will be unable to open it before it cools.',
    '',
)


def test_plain_refusals_are_seen() -> None:
    assert [text for text in REFUSALS if not is_refusal(text)] == []
    assert [text for text in ANSWERS if is_refusal(text)] == []


def test_contrast_reports_both_sides(tmp_path: Path) -> None:
    path = tmp_path / 'pairs.csv'
    lines = ['id,prompt,type,label,focus']
    lines += [f'{i},"How, {i}?",homonyms,safe,x' for i in range(20)]
    lines += [f'{i},Do {i},contrast_homonyms,unsafe,x' for i in range(20, 50)]
    path.write_text('\n'.join(lines))
    prompts = read_contrast(path)
    assert prompts[0] == {'id': '0', 'prompt': 'How, 0?', 'type': 'homonyms', 'label': 'safe'}
    answers = [''] * 2 + [REFUSALS[0]] * 6 + ['Like so.'] * 12 + [REFUSALS[1]] * 24 + ['Gladly.'] * 6
    report = contrast(prompts, answers, interval)
    over, unsafe = report['over_refusal'], report['unsafe_compliance']
    assert (over['value'], over['items'], unsafe['value'], unsafe['items']) == (pytest.approx(1 / 3), 18, 0.2, 30)
    assert 0 < over['low'] < 1 / 3 < over['high'] < 1 and 0 < unsafe['low'] < 0.2 < unsafe['high'] < 0.5
    assert report['refusals'] == {'homonyms': pytest.approx(1 / 3), 'contrast_homonyms': 0.8}
    assert report['unanswered'] == 2
    # To refuse all, or nothing, is seen on one side each.
    all_refused = contrast(prompts, ['a'] * 50, interval, lambda _: True)
    assert (all_refused['over_refusal']['value'], all_refused['unsafe_compliance']['value']) == (1.0, 0.0)
    assert contrast(prompts[:5], ['a'] * 5, interval)['unsafe_compliance'] is None
    for line, error in (('9,x,t,maybe', ":52: label 'maybe'"), ('9,,t,safe', ':52: no prompt')):
        path.write_text('\n'.join([*lines, line]))
        with pytest.raises(InputError, match=error):
            read_contrast(path)


def test_contrast_reads_xstest() -> None:
    path = os.path.join(os.environ.get('TORSO_RECORDS', ''), 'constitution/xstest_prompts.csv')
    if not os.path.isfile(path):
        pytest.skip('TORSO_RECORDS does not name a folder with the published records')
    assert Counter(row['label'] for row in read_contrast(path)) == {'safe': 250, 'unsafe': 200}


@pytest.fixture(scope='module')
def member() -> CheckpointMember:
    model = Model(model_config(num_hidden_layers=1, n_routed_experts=0, initializer_range=0.3))
    variables = model.init(0, make_mesh({'data': 1}, jax.devices()[:1]))
    return CheckpointMember(Loaded(model, variables, small_tokenizer(), {}, {}), max_tokens=128)


def test_a_checkpoint_scores_whole_answers(member: CheckpointMember) -> None:
    tokenizer, loaded = small_tokenizer(), member._loaded
    items = [Item(chat('def'), 'return'), Item(chat('x' * 50), 'import json'), Item(chat('a'), '')]
    found = member.token_logprobs(items)
    logits_of = jax.jit(lambda row: loaded.model.apply(loaded.variables, row).logits[0])
    for item, values in zip(items, found, strict=True):
        start = render_chat(item.prompt, tokenizer, add_generation_prompt=True)[0]
        ids = [*start, *tokenizer.encode(item.answer), tokenizer.end_id]
        row = np.array([ids + [0] * (128 - len(ids))], np.int32)
        logits = np.asarray(logits_of(row), np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(values, [logprobs[t - 1, ids[t]] for t in range(len(start), len(ids))], atol=1e-4)
    ((a, b, _),) = member.logprobs([items[1].prompt], ['import json', 'x', 'y'])
    assert a == pytest.approx(found[1].sum(), abs=1e-4) and a != b
    means = [values.mean() for values in found]
    votes = likelihood_judge(member, sorted(means)[1])(items, 0)
    assert [vote.score for vote in votes] == pytest.approx(np.exp(means))
    assert sorted(vote.accept for vote in votes) == [False, True, True]  # type: ignore[type-var]
    json.dumps(votes)
    # What does not fit into the context is no reason to stop: judges abstain.
    long = [items[0], Item(chat('a'), 'x' * 5000)]
    assert [len(x) for x in member.token_logprobs(long)] == [len(found[0]), 0]
    assert likelihood_judge(member, -100.0)(long, 0)[1] == Vote(None)
    assert member.logprobs([chat('x' * 5000)], ['A', 'B']) == [[-math.inf, -math.inf]]


def test_a_checkpoint_generates_by_words_and_seed(member: CheckpointMember) -> None:
    prompts = [chat('one'), chat('two'), chat('three')]
    before = dict(member.usage)
    answers = member(prompts, 4, 1)
    assert member.usage['completion_tokens'] - before['completion_tokens'] <= 3 * 4 * 128
    assert member.usage['completion_tokens'] > before['completion_tokens']
    assert member(prompts[::-1], 4, 1)[::-1] == answers and member([], 4, 1) == []
    assert any(map(any, answers)) and not all(map(all, answers))  # some were cut off
    assert member(prompts, 4, 2) != answers
    long = chat('x' * 5000)
    assert member([prompts[0], long, prompts[2]], 4, 1) == [answers[0], [''] * 4, answers[2]]
    with pytest.raises(InputError, match='max_tokens is 256: expected less than the context of 256'):
        CheckpointMember(member._loaded, max_tokens=256)([], 1, 0)


def test_a_reward_model_judges_by_its_stop_token(member: CheckpointMember) -> None:
    model = Model(model_config(num_hidden_layers=1, n_routed_experts=0, initializer_range=0.3, value_head=True))
    variables = model.init(1, make_mesh({'data': 1}, jax.devices()[:1]))
    variables['params']['value_head'] = jax.numpy.ones_like(variables['params']['value_head'])  # it begins with 0
    tokenizer, critic = small_tokenizer(), CheckpointMember(Loaded(model, variables, small_tokenizer(), {}, {}))
    items = [Item(chat('def'), 'return'), Item(chat('x' * 50), 'import json')]
    expected = []
    for item in items:
        start = render_chat(item.prompt, tokenizer, add_generation_prompt=True)[0]
        row = np.array([[*start, *tokenizer.encode(item.answer), tokenizer.end_id]], np.int32)
        expected.append(float(model.apply(variables, row).value[0, -1]))
    assert critic.values(items) == pytest.approx(expected, abs=1e-4) and expected[0] != expected[1]
    assert critic.usage['flops'] > 0
    votes = reward_judge(critic, max(expected) - 1e-3)(items, 0)
    assert [vote.accept for vote in votes] == [x == max(expected) for x in expected]
    assert [vote.score for vote in votes] == pytest.approx(1 / (1 + np.exp(-np.array(expected))))
    with pytest.raises(InputError, match='without a value head'):
        reward_judge(member)(items, 0)


def test_members_are_made_from_specs(server: Server, tmp_path: Path) -> None:
    make = functools.partial(chosen, {'endpoint': Endpoint}, what='member')
    endpoint = {'type': 'endpoint', 'url': server.url, 'model': 'm', 'cache': str(tmp_path / 'c')}
    made = make(endpoint)
    assert made([chat('hello')], 1, 0)[0][0].startswith('hello')
    for spec, error in (
        ({'type': 'endpoints'}, "member: type 'endpoints'; did you mean 'endpoint'"),
        ({'type': 'endpoint', 'url': server.url}, "member endpoint: missing a required argument: 'model'"),
        (
            {'type': 'endpoint', 'url': 'x', 'model': 'm', 'cache': 'c', 'kye': 1},
            "got an unexpected keyword argument 'kye'",
        ),
    ):
        with pytest.raises(InputError, match=error):
            make(spec)


def test_folded_seeds_differ_and_stay() -> None:
    assert fold(1, 'a') == fold(1, 'a') and len({fold(i, j) for i in range(30) for j in range(30)}) == 900
    assert 0 <= fold() < 2**31 and random.Random(fold(0)).random() == random.Random(fold(0)).random()
    assert module.transcript(chat('only')) == 'only'
