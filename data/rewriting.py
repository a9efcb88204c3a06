"""Texts made into other texts by a model: templates, and what becomes of its reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from data.committee import Item, Messages, transcript
from data.errors import InputError
from data.files import Record
from data.preferences import conversation

# Each has {text} in it, and asks for nothing but the result.
TEMPLATES = {
    # Maini et al. 2024 (arXiv 2401.16380), which mixes such texts with those they were made of.
    'rephrase': 'Say the following text anew in clear, plain English, leaving out nothing that it states.\n\n{text}',
    'questions': 'Write questions that the following text answers, each with the answer from the text.\n\n{text}',
    # In the manner of Gunasekar et al. 2023 (arXiv 2306.11644).
    'textbook': 'Write a section of a textbook that teaches what the following text is about, with examples.\n\n{text}',
    # Instruction back-translation: Li et al. 2023 (arXiv 2308.06259), section 2.
    'instruction': 'Write the request to which the following text would be a perfect answer.\n\n{text}',
    'variation': 'Write another problem of this kind and difficulty, with other facts and numbers.\n\n{text}',
    'steps': 'Write the following solution anew, step by step, so that each step can be checked by itself.\n\n{text}',
}
for _name, _template in TEMPLATES.items():
    TEMPLATES[_name] = f'{_template}\n\nReply with the result and nothing else.'

# What becomes of a reply: of (the question put to the model, the text, its reply), what judges are shown; and the form
# of the record, of the same conversation.
INTO: dict[str, tuple[Callable[[Messages, str, str], Item], Callable[[Messages], Record]]] = {
    'text': (lambda asked, _, reply: Item(asked, reply), lambda m: {'text': m[-1]['content']}),
    'question': (lambda _, text, reply: Item([{'role': 'user', 'content': reply}], text), lambda m: {'messages': m}),
    'prompt': (
        lambda asked, _, reply: Item(asked, reply),
        lambda m: {'messages': [{'role': 'user', 'content': m[-1]['content']}]},
    ),
}


def text_of(record: Mapping[str, Any]) -> str:
    """What is rewritten of a record: its text, the completion of a prompt, or a whole conversation as text."""
    for field in ('text', 'completion'):
        if isinstance(record.get(field), str):
            return str(record[field])
    return transcript(conversation(record))


def template_of(given: str) -> str:
    """One of TEMPLATES by its name, or the text itself. Raises InputError where it has no {text}."""
    template = TEMPLATES.get(given, given)
    if '{text}' not in template:
        raise InputError(
            f'template is {given!r}: expected one of {", ".join(TEMPLATES)}, or a text with {{text}} in it'
        )
    return template
