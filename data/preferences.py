"""Records that say which of two answers is better, or whether one is good, in the forms they come in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.chat import check_messages, render_chat
from data.errors import InputError
from data.packing import Segment
from data.tokenizer import Tokenizer

Messages = list[dict[str, str]]

# Anthropic's HH-RLHF writes whole dialogues in one string.
_TURN = re.compile(r'\n\n(Human|Assistant): ?')
_SPEAKERS = {'Human': 'user', 'Assistant': 'assistant'}
_ROLES = {'human': 'user', 'gpt': 'assistant', 'system': 'system', 'observation': 'tool', 'function_call': 'assistant'}


class Pair(NamedTuple):
    """Two answers to one conversation. `probability` that the first is better, and the `margin` between them."""

    messages: Messages
    chosen: str
    rejected: str
    probability: float = 1.0
    margin: float = 0.0


class Judged(NamedTuple):
    """An answer to a conversation, and whether it is good."""

    messages: Messages
    answer: str
    good: bool


class Steps(NamedTuple):
    """An answer in steps, each with its score in [0, 1]."""

    messages: Messages
    steps: list[str]
    scores: list[float]


def conversation(record: Mapping[str, Any]) -> Messages:
    """What comes before the answers of a record: `messages`, `conversations` (from, value), `prompt` (text or messages)
    or `instruction` and `input`. Raises InputError where there is none of them."""
    for field in ('messages', 'prompt'):
        value = record.get(field)
        if isinstance(value, Sequence) and not isinstance(value, str):
            check_messages(value)
            return [dict(message) for message in value]
    if isinstance(record.get('prompt'), str):
        return [{'role': 'user', 'content': record['prompt']}]
    if isinstance(told := record.get('conversations'), Sequence) and not isinstance(told, str):
        if not all(isinstance(turn, Mapping) for turn in told):
            raise InputError('conversations: expected turns with from and value')
        turns = [{'role': _ROLES.get(str(turn.get('from')), ''), 'content': turn.get('value')} for turn in told]
        check_messages(turns)
        return turns
    if isinstance(record.get('instruction'), str):
        parts = [record['instruction'], record.get('input') or '']
        if not isinstance(parts[1], str):
            raise InputError(f'input: expected a string, got {type(parts[1]).__name__}')
        return [{'role': 'user', 'content': '\n\n'.join(part for part in parts if part)}]
    raise InputError(f'record has {sorted(record)}: expected prompt, messages, conversations or instruction')


def as_pair(record: Mapping[str, Any]) -> Pair:
    """A record with `chosen` and `rejected`, behind a conversation or, as whole dialogues, without one; optional are
    `probability` and `margin`.

    Raises:
        InputError: what is missing, or two dialogues that differ before the last answer.
    """
    for field in ('chosen', 'rejected'):
        if field not in record:
            raise InputError(f'record has {sorted(record)}: expected chosen and rejected')
    extra = (_number(record, 'probability', 1.0, 0.0, 1.0), _number(record, 'margin', 0.0, -1e9, 1e9))
    chosen, rejected = record['chosen'], record['rejected']
    if (
        isinstance(chosen, str)
        and isinstance(rejected, str)
        and not {'prompt', 'messages', 'conversations', 'instruction'} & record.keys()
    ):
        (messages, first), (other, second) = _dialogue(chosen), _dialogue(rejected)
        if messages != other:
            raise InputError('chosen and rejected: expected dialogues that differ in the last answer alone')
        return Pair(messages, first, second, *extra)
    return Pair(conversation(record), _answer(chosen, 'chosen'), _answer(rejected, 'rejected'), *extra)


def as_judged(record: Mapping[str, Any]) -> Judged:
    """A record with `label` (true or false), and `completion` or the answer as last message. Raises InputError."""
    if not isinstance(record.get('label'), bool):
        raise InputError(f'label: expected true or false, got {record.get("label")!r}')
    if 'completion' in record:
        return Judged(conversation(record), _answer(record['completion'], 'completion'), record['label'])
    messages = conversation(record)
    if len(messages) < 2 or messages[-1]['role'] != 'assistant':
        raise InputError("messages: expected the assistant's answer last")
    return Judged(messages[:-1], messages[-1]['content'], record['label'])


def as_steps(record: Mapping[str, Any]) -> Steps:
    """A record with `steps`, texts, and `scores`, as many numbers in [0, 1], and a conversation. Raises InputError."""
    steps, scores = record.get('steps'), record.get('scores')
    if not isinstance(steps, list) or not isinstance(scores, list) or not 0 < len(steps) == len(scores):
        raise InputError('steps and scores: expected two lists of equal length')
    texts = all(isinstance(step, str) and step for step in steps)
    if not texts or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in scores):
        raise InputError('steps and scores: expected texts and numbers in [0, 1]')
    return Steps(conversation(record), steps, [float(x) for x in scores])


def pair_segments(record: Mapping[str, Any], tokenizer: Tokenizer) -> list[Segment]:
    """The better answer, then the other; `target` and `margin` stand on the first one's last token."""
    pair = as_pair(record)
    chosen, rejected = (_segment(pair.messages, answer, tokenizer) for answer in (pair.chosen, pair.rejected))
    return [chosen.stamped(target=pair.probability, margin=pair.margin), rejected]


def judged_segments(record: Mapping[str, Any], tokenizer: Tokenizer) -> list[Segment]:
    """The answer, with `target` 1 (good) or -1 on its last token."""
    judged = as_judged(record)
    return [_segment(judged.messages, judged.answer, tokenizer).stamped(target=1.0 if judged.good else -1.0)]


def step_segments(record: Mapping[str, Any], tokenizer: Tokenizer) -> list[Segment]:
    """The steps, joined, with loss weight 1 and `target`, its score, on the last token of each.

    Steps are encoded one by one, so that each ends with a token.
    """
    judged = as_steps(record)
    tokens, _ = render_chat(judged.messages, tokenizer, add_generation_prompt=True)
    weight, target = [0.0] * len(tokens), [0.0] * len(tokens)
    for step, score in zip(judged.steps, judged.scores, strict=True):
        ids = tokenizer.encode(step)
        tokens += ids
        weight += [0.0] * (len(ids) - 1) + [1.0]
        target += [0.0] * (len(ids) - 1) + [score]
    return [Segment(tokens, np.array(weight, np.float32), {'target': np.array(target, np.float32)})]


def _segment(messages: Messages, answer: str, tokenizer: Tokenizer) -> Segment:
    """A conversation and its last answer, which alone is learnt, with its stop token."""
    tokens, mask = render_chat([*messages, {'role': 'assistant', 'content': answer}], tokenizer)
    before, _ = render_chat(messages, tokenizer, add_generation_prompt=True)
    weight = np.array(mask, np.float32)
    weight[: len(before)] = 0
    return Segment(tokens, weight)


def _dialogue(text: str) -> tuple[Messages, str]:
    """Messages and the last answer of a dialogue in the form of HH-RLHF."""
    _, *pieces = _TURN.split(text)
    turns = [
        {'role': _SPEAKERS[speaker], 'content': words.strip()}
        for speaker, words in zip(pieces[0::2], pieces[1::2], strict=True)
    ]
    if len(turns) < 2 or turns[-1]['role'] != 'assistant':
        raise InputError(
            'expected a dialogue of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." that ends with the latter'
        )
    return turns[:-1], turns[-1]['content']


def _answer(value: Any, field: str) -> str:
    """An answer as text, a message ({content} or {value}), or a list that ends with one."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        value = value.get('content', value.get('value'))
    if not isinstance(value, str):
        raise InputError(f'{field}: expected a text or a message, got {str(value)[:60]!r}')
    return value


def _number(record: Mapping[str, Any], field: str, default: float, low: float, high: float) -> float:
    value = record.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f'{field}: expected a number from {low:g} to {high:g}, got {value!r}')
    return float(value)
