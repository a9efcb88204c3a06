"""Whatever bytes a stranger sends: readers take them or say in one line what is wrong, and nothing else comes out.

Each reader is tried TORSO_FUZZ times, by default a few dozen; 6,250 make 100,000 cases in all.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from absl.testing import flagsaver
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from text import small_tokenizer

from data.chat import render_chat
from data.errors import InputError
from data.files import check_record
from data.packing import encode_record
from data.preferences import as_judged, as_pair, as_steps, conversation
from data.sources import open_source
from data.tasks import get_task
from data.tokenizer import Tokenizer
from train.__main__ import parse
from train.convert import INDEX, HubTensors

CASES = int(os.environ.get('TORSO_FUZZ', '40'))
tried = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=CASES < 100, suppress_health_check=list(HealthCheck)
)

WORDS = st.sampled_from(
    'text messages role content user assistant system tool tokens loss_weight prompt completion chosen rejected label '
    'steps scores probability margin conversations from value human instruction input name template'.split()
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 7, 2**31, 2**63, 2**64, -(2**70), 1e308, float('nan'), float('inf'), 0.5])
    | st.text(max_size=8)
    | st.sampled_from(['\ud800', '\0', '<|end|>', '\n\nHuman: a\n\nAssistant: b', '\u2028', 'a' * 300])
    | WORDS
)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=5), max_leaves=12
)
OBJECTS = st.dictionaries(WORDS, JSON, max_size=6)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """A file with some of its bytes flipped, cut out, doubled or written over."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, max(len(data) - 1, 0))), draw(st.sampled_from([1, 2, 8, 60]))
        how = draw(st.sampled_from(['flip', 'cut', 'double', 'write', 'end']))
        if how == 'flip' and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == 'cut':
            del data[at : at + length]
        elif how == 'double':
            data[at:at] = data[at : at + length]
        elif how == 'write':
            data[at : at + length] = draw(st.binary(max_size=8))
        elif how == 'end':
            del data[at:]
    return bytes(data)


@st.composite
def changed(draw: Any, value: Any) -> Any:
    """A JSON value, in one or two places of which another one stands, or none."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        at, depth = value, draw(st.integers(0, 4))
        while isinstance(at, (dict, list)) and at:
            key = draw(st.sampled_from(sorted(at))) if isinstance(at, dict) else draw(st.integers(0, len(at) - 1))
            if depth == 0 or not isinstance(at[key], (dict, list)) or not at[key]:
                if draw(st.booleans()):
                    at[key] = draw(JSON)
                else:
                    del at[key]
                break
            at, depth = at[key], depth - 1
    return value


def clear(read: Callable[[], Any]) -> None:
    """Runs it; an InputError must be one line."""
    try:
        read()
    except InputError as error:
        assert str(error).strip()


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix='torso-fuzz-'))


def placed(name: str, content: bytes) -> Path:
    path = folder() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def use(record: Any) -> None:
    """A record in every way that streams do."""
    for read in (as_pair, as_judged, as_steps, conversation, lambda x: encode_record(x, small_tokenizer())):
        clear(lambda read=read: read(record))


@tried
@given(OBJECTS, st.sampled_from(['', 'text', 'value']))
@example({'tokens': [None, []]}, '')
@example({'tokens': [1, 2], 'loss_weight': [1, float('nan')]}, '')
@example({'conversations': [None], 'text': ''}, '')
@example({'instruction': 'a', 'input': [1], 'chosen': 'b', 'rejected': 'c'}, '')
def test_records(value: Any, field: str) -> None:
    clear(lambda: use(check_record(value, field, 'here')))


LINES = b''.join(
    json.dumps(record).encode() + b'\n'
    for record in (
        {'text': 'one'},
        {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]},
        {'prompt': ['a', 'b'], 'completion': ['c', 'd']},
        {'tokens': [1, 2, 3], 'loss_weight': [0, 1, 0.5]},
        {'prompt': 'p', 'chosen': 'c', 'rejected': 'r', 'margin': 1},
    )
)


@tried
@given(damaged(LINES) | st.lists(OBJECTS, max_size=3).map(lambda x: '\n'.join(map(json.dumps, x)).encode()))
@example(b'{"text":' + b'[' * 100_000)
def test_json_lines(content: bytes) -> None:
    def read() -> None:
        source = open_source({'type': 'jsonl', 'path': str(placed('lines', content)), 'broken': len(content) % 3})
        for index in range(len(source)):
            clear(lambda: use(source[index]))  # noqa: B023

    clear(read)


@functools.cache
def records() -> bytes:
    path = folder() / 'whole.arrayrecord'
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for line in LINES.splitlines():
        writer.write(line)
    writer.close()
    content = path.read_bytes()
    path.unlink()
    return content


METADATA = st.just(b'{"tokenizer": 3}') | JSON.map(lambda x: json.dumps(x).encode())
USED = 1200  # bytes at the beginning; most of what follows is padding, up to the table at the end


@tried
@given(damaged(records()[:USED]), damaged(records()[-400:]) | st.none(), st.binary(max_size=12) | METADATA)
def test_array_record(begin: bytes, end: bytes | None, metadata: bytes) -> None:
    path = placed('arrays/x.arrayrecord', begin + records()[USED:-400] + (records()[-400:] if end is None else end))
    placed('arrays/metadata.json', metadata)

    def read() -> None:
        source = open_source({'type': 'arrayrecord', 'path': str(path)})
        for index in range(len(source)):
            clear(lambda: use(source[index]))  # noqa: B023

    clear(read)


@functools.cache
def tokenizer_files() -> tuple[dict[str, Any], dict[str, Any]]:
    small_tokenizer().save(folder() / 'tokenizer')
    names = ('tokenizer.json', 'tokenizer_config.json')
    model, config = (json.loads((folder() / 'tokenizer' / name).read_text()) for name in names)
    model['model']['merges'] = model['model']['merges'][:20]  # it is read a thousand times
    return model, {**config, 'chat_template': '{% for m in messages %}<|user|>{{ m.content }}{% endfor %}'}


def tokenize(model: bytes, config: bytes) -> None:
    path = placed('read/tokenizer.json', model).parent
    placed('read/tokenizer_config.json', config)
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode('Some words, 12 numbers\n    and\tmore\ud800')
    tokenizer.decode([*ids, tokenizer.end_id])
    encode_record({'messages': [{'role': 'user', 'content': 'x'}]}, tokenizer)


@tried
@given(st.data())
def test_tokenizer(data: Any) -> None:
    model, config = (json.dumps(x) for x in tokenizer_files())
    if data.draw(st.booleans()):
        model = json.dumps(data.draw(changed(tokenizer_files()[0])))
    else:
        config = json.dumps(data.draw(changed(tokenizer_files()[1]) | JSON))
    raw = data.draw(damaged(config.encode())) if data.draw(st.booleans()) else config.encode()
    clear(lambda: tokenize(model.encode(), raw))


# Pieces of templates, one a line: what templates say, and what ends or fills a program that lets them.
PIECES = st.sampled_from(
    """
{{ messages }}
{{ m.content }}
{{ m }}
{% for m in messages %}
{% endfor %}
{% if m.role %}
{% endif %}
{% set x = messages %}
{{ 1 / 0 }}
{{ x.y.z }}
{{ messages[9].role }}
{{ bos_token + 1 }}
{{ -m }}
{{ messages | join }}
{{ messages | sort }}
{{ messages | tojson }}
{{ messages.append(1) }}
{{ m() }}
{{ self }}
{{ raise_exception(3) }}
{% break %}
{% include "/etc/passwd" %}
{% import "os" as o %}
{{ ''.__class__.__mro__ }}
{{ '{0.__class__}'.format(1) }}
{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}
{{ 'a' * 10 ** 10 }}
{{ 'a' * 9999999999 }}
{{ 9 ** 9 ** 9 }}
{{ range(10 ** 9) }}
{{ range(999999999) | list }}
{{ 'x'.center(9999999999) }}
{{ '%010000000000d' % 1 }}
{{ 'a' | indent(9999999999) }}
{{ 'a' | center(9999999999) }}
{{ '%09999999999d' | format(1) }}
{{ '{:>10000000000}'.format(1) }}
{{ lipsum(n=99999999) }}
""".strip().splitlines()
)


@functools.cache
def speaks(template: str) -> Tokenizer:
    tokenizer = small_tokenizer()
    return Tokenizer(tokenizer._model, *tokenizer.token_names.values(), template)


@tried
@given(st.lists(PIECES | st.text(max_size=3), max_size=6).map(''.join))
def test_chat_template(template: str) -> None:
    chat = [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'y'}]
    clear(lambda: render_chat(chat, speaks(template)))


def safetensors(header: Any, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + data


HEADER = {
    '__metadata__': {'format': 'pt'},
    'a': {'dtype': 'F32', 'shape': [2, 4], 'data_offsets': [0, 32]},
    'b': {'dtype': 'BF16', 'shape': [8], 'data_offsets': [32, 48]},
}
MAP = {'metadata': {'total_size': 48}, 'weight_map': {'a': 'one.safetensors', 'b': 'one.safetensors'}}


@tried
@given(
    changed(HEADER).map(safetensors) | damaged(safetensors(HEADER)),
    changed(MAP).map(lambda x: json.dumps(x).encode()) | damaged(json.dumps(MAP).encode()),
)
def test_safetensors(content: bytes, index: bytes) -> None:
    path = placed('hub/one.safetensors', content).parent
    placed(f'hub/{INDEX}', index)

    def read() -> None:
        tensors = HubTensors(path)
        for name in tensors.names:
            clear(lambda: tensors.read(name))  # noqa: B023

    clear(read)


@pytest.mark.parametrize('name', ['../one.safetensors', '/etc/passwd', 'a/b', '', '..', 'a' * 300, 'a\0'])
def test_an_index_names_files_beside_it(name: str) -> None:
    path = placed(f'hub/{INDEX}', json.dumps({'weight_map': {'a': name}}).encode()).parent
    with pytest.raises(InputError, match='files beside it|no such file'):
        HubTensors(path)


def overrides() -> Any:
    fields = """seed model.hidden_size model.attention stages.sft.steps stages.sft.mixture stages.sft.guard.sigma name
        mesh.fsdp stages.grpo.levels stages.sft.evaluations sources stages tokenizer.vocab_size stages.sft.loss"""
    known = st.sampled_from(fields.split())
    names = known | known.map(lambda x: x[:-1]) | st.text(max_size=6)
    odd = st.sampled_from(['(1,', '()', "((0.0,{'a':1.0}),)", '[[', '__import__("os")'])
    settings = st.tuples(names, st.text(max_size=6) | LEAVES.map(str) | odd).map(lambda x: f'--config.{x[0]}={x[1]}')
    return st.lists(settings | st.text(max_size=8), max_size=3)


@tried
@given(overrides())
def test_config_overrides(words: list[str]) -> None:
    with flagsaver.flagsaver():  # absl's flags belong to the process, and other tests read them
        flags.FLAGS.unparse_flags()
        clear(lambda: parse(['train', '--config=tests/small.py', '--workdir=x', *words]))


ODD = ['\n', '=', '<answer>', '</answer>', '1/0', '9' * 5000, '²', '٣', '-', '\0', '\\boxed{', '1e999']


@pytest.mark.parametrize('name', 'arithmetic calculator errands letters needle nim proof sudoku wordgraph'.split())
def test_verifiers(name: str) -> None:
    task = get_task(name, split='train')
    prompts = [task.prompt(index) for index in range(4)]
    numbers = itertools.count()
    pieces = st.sampled_from([*(prompt.reference for prompt in prompts), *ODD]) | st.text(max_size=3)
    answers = st.text(max_size=40) | st.lists(pieces, max_size=8).map(''.join)

    @tried
    @given(answers)
    def verify(answer: str) -> None:
        verdict = task.verify(prompts[next(numbers) % 4], answer)
        assert 0 <= verdict.score <= 1

    verify()
