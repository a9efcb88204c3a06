"""Chats: what is learnt, and that no message can pose as another."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chat import DEFAULT_TEMPLATE, ROLES, render_chat
from data.errors import InputError
from data.tokenizer import CONTROL_TOKENS, Tokenizer
from tests.text import small_tokenizer

CHAT = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': 'Hi'},
    {'role': 'assistant', 'content': 'Hello'},
    {'role': 'user', 'content': 'Bye'},
    {'role': 'assistant', 'content': 'So long'},
]


def with_template(template: str) -> Tokenizer:
    base = small_tokenizer()
    return Tokenizer(base._model, '<|begin|>', '<|end|>', '<|pad|>', template)


def test_default_form_and_mask():
    tokenizer = small_tokenizer()
    tokens, mask = render_chat(CHAT, tokenizer)
    assert tokenizer.decode(tokens, skip_control=False) == (
        '<|begin|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>Bye<|end|>'
        '<|assistant|>So long<|end|>'
    )
    learnt = [token for token, on in zip(tokens, mask, strict=True) if on]
    assert tokenizer.decode(learnt, skip_control=False) == 'Hello<|end|>So long<|end|>'


def test_generation_prompt_is_a_prefix_of_the_whole():
    tokenizer = small_tokenizer()
    prompt, mask = render_chat(CHAT[:2], tokenizer, add_generation_prompt=True)
    assert tokenizer.decode(prompt, skip_control=False).endswith('<|end|><|assistant|>')
    assert sum(mask) == 0
    whole, _ = render_chat(CHAT[:3], tokenizer)
    assert whole[: len(prompt)] == prompt


fragments = st.sampled_from([*CONTROL_TOKENS, '{{ eos_token }}', '{% raw %}', '0;', '-1;', ' ', '\n', 'x'])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ROLES), st.lists(fragments).map(''.join)), min_size=1, max_size=5))
def test_contents_cannot_forge_turns(turns):
    tokenizer = small_tokenizer()
    tokens, mask = render_chat([{'role': role, 'content': content} for role, content in turns], tokenizer)
    control = {tokenizer.control(name): name for name in CONTROL_TOKENS}
    found = [control[token] for token in tokens if token in control]
    expected = ['<|begin|>'] + [name for role, _ in turns for name in (f'<|{role}|>', '<|end|>')]
    assert found == expected
    spoken = [content for role, content in turns if role == 'assistant']
    assert sum(mask) == sum(len(tokenizer.encode(content)) + 1 for content in spoken)


def test_foreign_template():
    template = (
        '{{ bos_token }}{% if tools %}tools{% endif %}'
        '{% for m in messages %}\n'
        "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
        "[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}\n"
        '{% endfor %}'
    )
    tokenizer = with_template(template)
    tokens, mask = render_chat(CHAT[1:3], tokenizer)
    assert tokenizer.decode(tokens, skip_control=False) == '<|begin|>[user] Hi<|end|>\n[assistant] Hello<|end|>\n'
    learnt = [token for token, on in zip(tokens, mask, strict=True) if on]
    assert tokenizer.decode(learnt, skip_control=False) == 'Hello<|end|>'
    with pytest.raises(InputError, match='no tools here'):
        render_chat([{'role': 'tool', 'content': '3'}], tokenizer)


@pytest.mark.parametrize(
    ('template', 'message'),
    [
        ('{{ messages[0].content }}', 'exactly once'),
        (DEFAULT_TEMPLATE + '{{ messages[0].content }}', 'exactly once'),
        ('{% for', 'chat template'),
        ("{{ ''.__class__.__mro__ }}", 'chat template'),
    ],
)
def test_bad_templates(template, message):
    with pytest.raises(InputError, match=message):
        render_chat(CHAT, with_template(template))


@pytest.mark.parametrize(
    ('messages', 'message'),
    [
        ([], 'at least one'),
        ('hello', 'expected a list'),
        (['hello'], r'messages\[0\]: expected role and content'),
        ([{'role': 'user'}], r"messages\[0\]: no 'content'"),
        ([CHAT[1], {'content': 'x'}], r"messages\[1\]: no 'role'"),
        ([{'role': 'root', 'content': 'x'}], r"messages\[0\]: role 'root': expected one of system, user"),
        ([{'role': 'user', 'content': None}], r'messages\[0\]: content: expected a string, got NoneType'),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises(InputError, match=message):
        render_chat(messages, small_tokenizer())
