"""Chats to tokens: a template around messages whose words can never become control tokens.

The template is rendered with a random sentinel in the place of each message's content. The text between sentinels comes
from the template alone, so control tokens are recognised there and nowhere else; contents are encoded as plain bytes.
No message, however it is spelled, can close its turn or forge another speaker's.
"""

import functools
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.errors import InputError
from data.tokenizer import Tokenizer

Message = Mapping[str, Any]

# Drawn anew in each process and never shown to anyone: no content can contain it but by chance, once in 2^128.
_SECRET = secrets.token_hex(16)
_SENTINEL = re.compile(f'{_SECRET}-([0-9]+);')

ROLES = ('system', 'user', 'assistant', 'tool')

# <|begin|><|user|>Question<|end|><|assistant|>Answer<|end|>
DEFAULT_TEMPLATE = (
    '{{ bos_token }}'
    '{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}'
    '{% if add_generation_prompt %}<|assistant|>{% endif %}'
)


def render_chat(
    messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of a chat and a mask of equal length.

    The mask is 1 on what the assistant says and on the stop token after it, else 0. With `add_generation_prompt` the
    ids end where the assistant is to speak. Raises InputError naming the message at fault (an unknown role, a missing
    content), or the template if it fails or does not show each message exactly once.
    """
    check_messages(messages)
    shown = [{'role': message['role'], 'content': f'{_SECRET}-{i};'} for i, message in enumerate(messages)]
    rendered = _render(shown, tokenizer, add_generation_prompt)
    # Text of the template alternates with the numbers of the messages shown.
    pieces = _SENTINEL.split(rendered)
    order = [int(number) for number in pieces[1::2]]
    if sorted(order) != list(range(len(messages))):
        raise InputError(f'chat template: showed messages {order}, expected each of {len(messages)} exactly once')

    tokens: list[int] = []
    mask: list[int] = []
    spoken_by_assistant = False
    for text, position in zip(pieces[0::2], [*order, None], strict=True):
        ids = tokenizer.encode_trusted(text)
        learnt = ids.index(tokenizer.end_id) + 1 if spoken_by_assistant and tokenizer.end_id in ids else 0
        tokens += ids
        mask += [1] * learnt + [0] * (len(ids) - learnt)
        if position is not None:
            spoken_by_assistant = messages[position]['role'] == 'assistant'
            ids = tokenizer.encode(messages[position]['content'])
            tokens += ids
            mask += [int(spoken_by_assistant)] * len(ids)
    return tokens, mask


def check_messages(messages: Any) -> None:
    """Raises InputError, naming the message, unless this is a list of {role, content} with known roles and text."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError(f'messages: expected a list of at least one, got {str(messages)[:60]}')
    for position, message in enumerate(messages):
        where = f'messages[{position}]'
        if not isinstance(message, Mapping):
            raise InputError(f'{where}: expected role and content, got {type(message).__name__}')
        for field in ('role', 'content'):
            if field not in message:
                raise InputError(f'{where}: no {field!r}')
        if message['role'] not in ROLES:
            raise InputError(f'{where}: role {message["role"]!r}: expected one of {", ".join(ROLES)}')
        if not isinstance(message['content'], str):
            raise InputError(f'{where}: content: expected a string, got {type(message["content"]).__name__}')


def _render(messages: list[dict[str, Any]], tokenizer: Tokenizer, add_generation_prompt: bool) -> str:
    names = tokenizer.token_names
    if tokenizer.chat_template is None:
        for role in ROLES:
            tokenizer.control(f'<|{role}|>')  # the default template needs them: say so rather than spell them in bytes
    try:
        return _template(tokenizer.chat_template or DEFAULT_TEMPLATE).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=names['begin'],
            eos_token=names['end'],
            pad_token=names['pad'],
        )
    except Exception as error:  # whatever the expressions in it may raise
        raise InputError(f'chat template: {" ".join(str(error).split()) or type(error).__name__}') from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own keeps a template away from the program. This one has no means either to fill the memory by one
    expression: texts are not repeated or padded, and numbers have no powers."""

    intercepted_binops = frozenset(('*', '**', '%'))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
        del self.globals['lipsum'], self.filters['center'], self.filters['format'], self.filters['indent']

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == '**' or not all(isinstance(x, int | float) and abs(x) < 2**64 for x in (left, right)):
            raise jinja2.TemplateError(f'{operator}: expected two numbers, and no power')
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Nothing: Jinja's own would let it through before it is asked for."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        padding = ('center', 'ljust', 'rjust', 'zfill', 'expandtabs', 'format', 'format_map')
        return attr not in padding and super().is_safe_attribute(obj, attr, value)


@functools.lru_cache(maxsize=8)
def _template(source: str) -> jinja2.Template:
    """A compiled template, in the sandbox and with the helper that templates in the wild call."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = _Sandbox()
    environment.globals['raise_exception'] = raise_exception
    return environment.from_string(source)
