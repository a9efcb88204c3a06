"""The tokenizer: nothing is lost, nothing is forged, and the same text gives the same tokenizer."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Model

from data.errors import InputError
from data.tokenizer import CONTROL_TOKENS, Tokenizer, train_tokenizer
from tests.text import small_tokenizer

CONTROL_IDS = {small_tokenizer().control(name) for name in CONTROL_TOKENS}


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives(text):
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*CONTROL_TOKENS, '<|', 'end', '|>', ' ', '\n', '<', 'x', '7'])).map(''.join))
def test_text_never_makes_control_tokens(text):
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    assert not CONTROL_IDS.intersection(ids)
    assert tokenizer.decode(ids) == text


def test_control_tokens_are_distinct_and_skipped():
    tokenizer = small_tokenizer()
    assert len(CONTROL_IDS) == len(CONTROL_TOKENS)
    ids = [tokenizer.begin_id, *tokenizer.encode('hi'), tokenizer.end_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == 'hi'
    assert tokenizer.decode(ids, skip_control=False) == '<|begin|>hi<|end|><|pad|>'
    with pytest.raises(InputError, match='no control token .*<.robot'):
        tokenizer.control('<|robot|>')


def test_digits_stand_alone():
    tokenizer = small_tokenizer()
    assert [tokenizer.decode([i]) for i in tokenizer.encode('12345')] == list('12345')
    text = 'x = 1234 + 56\n'
    for i in tokenizer.encode(text):
        piece = tokenizer.decode([i])
        assert len(piece) == 1 or not any(character.isdigit() for character in piece)


def test_lone_surrogates_do_not_stop_a_run():
    assert small_tokenizer().decode(small_tokenizer().encode('a\ud800b')) == 'a?b'


def test_the_same_in_another_process():
    code = 'from tests.text import small_tokenizer; print(small_tokenizer().fingerprint)'
    env = {**os.environ, 'PYTHONHASHSEED': '7', 'RAYON_NUM_THREADS': '1'}
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == small_tokenizer().fingerprint


def test_fingerprint_tells_tokenizers_apart():
    assert small_tokenizer(400).fingerprint != small_tokenizer(401).fingerprint
    assert small_tokenizer(400).vocab_size == 400


def test_save_and_load(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path / 'tokenizer')
    loaded = Tokenizer.load(tmp_path / 'tokenizer')
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode('def f():\n    return <|end|>') == tokenizer.encode('def f():\n    return <|end|>')
    assert (loaded.begin_id, loaded.end_id, loaded.pad_id) == (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id)


def test_too_small_a_vocabulary():
    with pytest.raises(InputError, match='at least 263'):
        train_tokenizer(['text'], 200)


def foreign(tmp_path, config, special=('</s>',)):
    """A tokenizer folder as others write it."""
    model = Model(models.WordLevel({'a': 0, 'b': 1, '?': 2}, unk_token='?'))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.add_special_tokens([AddedToken(name, special=True) for name in special])
    model.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    return tmp_path


def test_foreign_tokenizer(tmp_path):
    config = {
        'eos_token': {'content': '</s>'},
        'pad_token': '<pad>',
        'chat_template': [{'name': 'default', 'template': 't'}],
    }
    tokenizer = Tokenizer.load(foreign(tmp_path, config, ['</s>', '<pad>']))
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id) == (3, 3, 4)  # no begin token: the end one serves
    assert tokenizer.chat_template == 't'
    assert 3 not in tokenizer.encode('a </s> b')


def test_foreign_padding(tmp_path):
    config = {'eos_token': '</s>', 'pad_token': '</s>'}
    with pytest.raises(InputError, match='no pad_token of its own'):
        Tokenizer.load(foreign(tmp_path, config))
    assert Tokenizer.load(foreign(tmp_path, config, ['</s>', '<|reserved_0|>'])).pad_id == 4


@pytest.mark.parametrize(
    ('file', 'content', 'message'),
    [
        ('tokenizer.json', '{', 'tokenizer.json: not a tokenizer'),
        ('tokenizer_config.json', '{', 'tokenizer_config.json: expected a JSON object'),
        ('tokenizer_config.json', '{}', 'no eos_token'),
        ('tokenizer_config.json', None, 'tokenizer_config.json: no such file'),
    ],
)
def test_broken_folders(tmp_path, file, content, message):
    small_tokenizer().save(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=message):
        Tokenizer.load(tmp_path)
