"""Instructions that a program can check (IFEval; Zhou et al. 2023, arXiv 2311.07911): of records, and drawn ones."""

import inspect
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from data.errors import InputError, did_you_mean
from data.files import Record
from data.tasks import BLANK, Part, ProceduralTask, Prompt, Verdict, register, uniform
from data.tasks.records import RecordTask, canonical, string
from data.words import WORDS

WORD = re.compile(r'\w+')
# A full stop, and no part of a number, an initial or a common title; each run of marks is looked at once.
SENTENCE_END = re.compile(r'(?<![.!?])(?:[!?]|(?<!\b[A-Za-z])(?<!\b[DMS][rst])(?<!\bMrs)\.)[.!?]*+["\')\]]*+(?=\s|$)')
BULLET = re.compile(r'^[ \t]*[*-][ \t]+\S', re.MULTILINE)
HIGHLIGHT = re.compile(r'\*\*[^\n*]++\*\*|\*[^\n*]++\*')
PLACEHOLDER = re.compile(r'\[[^\[\]\n]+\]')
TITLE = re.compile(r'<<[^\n<>]+>>')
CHOICES = ('My answer is yes.', 'My answer is no.', 'My answer is maybe.')


def related(count: int, relation: str, bound: int) -> bool:
    if relation not in ('at least', 'less than'):
        raise InputError(f"kwargs: relation {relation!r}: expected 'at least' or 'less than'")
    return count >= bound if relation == 'at least' else count < bound


def sentences(text: str) -> int:
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return len(ends) + bool(WORD.search(text, ends[-1] if ends else 0))


def divided(text: str, divider: str) -> list[str]:
    """The parts of a text between dividers, stripped; one that stands at either end divides nothing."""
    parts = [part.strip() for part in text.strip().removeprefix(divider).removesuffix(divider).split(divider)]
    return parts if all(parts) else []


def starts_paragraph(text: str, word: str, number: int, nth: int) -> bool:
    paragraphs = [part for part in text.split('\n\n') if part.strip()]
    if not len(paragraphs) == number >= nth > 0:
        return False
    found = WORD.search(paragraphs[nth - 1])
    return found is not None and found[0].lower() == word.lower()


def is_json(text: str) -> bool:
    body = text.strip().removeprefix('```json').removeprefix('```').removesuffix('```')
    try:
        return isinstance(json.loads(body), dict | list)
    except (ValueError, RecursionError):
        return False


def postscript(text: str, marker: str) -> bool:
    spaced = r'\.\s?'.join(map(re.escape, marker.rstrip('.').split('.')))
    return bool(re.search(rf'^[ \t"]*{spaced}\b', text, re.MULTILINE | re.IGNORECASE))


# Each takes a response with something in it, and the arguments by their published names. Where the paper leaves it
# open: keywords count inside longer words, forbidden words are whole ones, case matters nowhere but in `change_case`.
KINDS: dict[str, Callable[..., bool]] = {
    'keywords:existence': lambda text, keywords: all(word.lower() in text.lower() for word in keywords),
    'keywords:frequency': lambda text, keyword, frequency, relation: related(
        text.lower().count(keyword.lower()), relation, frequency
    ),
    'keywords:forbidden_words': lambda text, forbidden_words: (
        not any(re.search(rf'(?<!\w){re.escape(word)}(?!\w)', text, re.IGNORECASE) for word in forbidden_words)
    ),
    'keywords:letter_frequency': lambda text, letter, let_frequency, let_relation: related(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    'length_constraints:number_words': lambda text, num_words, relation: related(
        len(WORD.findall(text)), relation, num_words
    ),
    'length_constraints:number_sentences': lambda text, num_sentences, relation: related(
        sentences(text), relation, num_sentences
    ),
    'length_constraints:number_paragraphs': lambda text, num_paragraphs: len(divided(text, '***')) == num_paragraphs,
    'length_constraints:nth_paragraph_first_word': lambda text, num_paragraphs, nth_paragraph, first_word: (
        starts_paragraph(text, first_word, num_paragraphs, nth_paragraph)
    ),
    'detectable_content:number_placeholders': lambda text, num_placeholders: (
        len(PLACEHOLDER.findall(text)) >= num_placeholders
    ),
    'detectable_content:postscript': lambda text, postscript_marker: postscript(text, postscript_marker),
    'detectable_format:number_bullet_lists': lambda text, num_bullets: len(BULLET.findall(text)) == num_bullets,
    'detectable_format:number_highlighted_sections': lambda text, num_highlights: (
        sum(bool(found.strip('* ')) for found in HIGHLIGHT.findall(text)) >= num_highlights
    ),
    'detectable_format:multiple_sections': lambda text, section_spliter, num_sections: (
        len(re.findall(rf'{re.escape(section_spliter)}\s?\d+', text)) >= num_sections
    ),
    'detectable_format:constrained_response': lambda text: any(choice in text for choice in CHOICES),
    'detectable_format:json_format': lambda text: is_json(text),
    'detectable_format:title': lambda text: any(title.strip('<> ') for title in TITLE.findall(text)),
    'combination:two_responses': lambda text: len(set(divided(text, '******'))) == len(divided(text, '******')) == 2,
    'combination:repeat_prompt': lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    'startend:end_checker': lambda text, end_phrase: (
        text.strip(BLANK + '"').lower().endswith(end_phrase.strip(BLANK + '"').lower())
    ),
    'startend:quotation': lambda text: len(text.strip()) > 2 and text.strip()[0] == text.strip()[-1] == '"',
    'change_case:capital_word_frequency': lambda text, capital_frequency, capital_relation: related(
        sum(word.isupper() for word in WORD.findall(text)), capital_relation, capital_frequency
    ),
    'change_case:english_capital': lambda text: text.isupper(),
    'change_case:english_lowercase': lambda text: text.islower(),
    'punctuation:no_comma': lambda text: ',' not in text,
}
# Nothing small and well kept tells languages apart.
LEFT_OUT = ('language:response_language',)


def follows(text: str, kind: str, arguments: dict[str, Any]) -> bool:
    """Whether a response follows one instruction. One without a word in it follows none."""
    return bool(WORD.search(text)) and KINDS[kind](text, **arguments)


def judge(text: str, instructions: list[tuple[str, dict[str, Any]]], responses: list[str]) -> Verdict:
    """One part per instruction, which is followed if one of the responses (`text`, or parts of it) follows it."""
    parts = tuple(
        Part(kind, float(any(follows(response, kind, arguments) for response in responses)), 0, len(text))
        for kind, arguments in instructions
    )
    failed = [part.name for part in parts if part.score < 1]
    return Verdict(float(not failed), parts, f'not followed: {", ".join(failed)}' if failed else '')


@register('instructions')
@dataclass(kw_only=True)
class Instructions(RecordTask):
    """Records in IFEval's form: `prompt`, `instruction_id_list` and a dict of arguments for each in `kwargs`.

    The score is 1 if all instructions are followed, parts say which. `loose` also takes a response whose first line,
    last line or asterisks are in the way, as the paper's loose accuracy does. Records that ask for a language are left
    out and counted in `skipped`. There are no references: nothing says what a good answer would be.
    """

    loose: bool = False

    def __post_init__(self) -> None:
        self._boolean('loose')
        super().__post_init__()

    def pose(self, record: Record) -> Prompt | str:
        text, kinds, arguments = string(record, 'prompt'), record.get('instruction_id_list'), record.get('kwargs')
        if not isinstance(kinds, list) or not isinstance(arguments, list) or not 0 < len(kinds) == len(arguments):
            raise InputError('expected lists instruction_id_list and kwargs of one length')
        instructions = []
        for kind, given in zip(kinds, arguments, strict=True):
            if kind in LEFT_OUT:
                return kind
            if kind not in KINDS:
                raise InputError(f'instruction_id_list: {kind!r}{did_you_mean(str(kind), KINDS)}')
            given = {name: value for name, value in dict(given).items() if value is not None}
            expected = list(inspect.signature(KINDS[kind]).parameters)[1:]
            if sorted(given) != sorted(expected):
                raise InputError(f'kwargs of {kind}: expected {", ".join(expected) or "none"}, got {", ".join(given)}')
            try:
                follows('x', kind, given)
            except (TypeError, AttributeError) as error:
                raise InputError(f'kwargs of {kind}: {given}: {error}') from error
            instructions.append((kind, given))
        return Prompt(text, '', canonical(text), {'instructions': instructions})

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        responses = list(_loosened(completion)) if self.loose else [completion]
        return judge(completion, prompt.info['instructions'], responses)


def _loosened(text: str) -> Iterator[str]:
    for response in (text, text.replace('*', '')):
        yield response
        yield response.partition('\n')[2]
        yield response.rpartition('\n')[0]
        yield response.partition('\n')[2].rpartition('\n')[0]


def _words(rng: random.Random, count: int) -> str:
    return ' '.join(rng.choices(WORDS, k=count))


def _quoted(words: list[str]) -> str:
    return ' and '.join(f'"{word}"' for word in words)


# Kind -> (arguments, how to ask for it, a response that follows it made of one that need not), in the order in which a
# response is made. The number is one of 2 to 4, the words are two.
Drawn = tuple[dict[str, Any], str, str]
DRAWN: dict[str, Callable[[str, int, list[str]], Drawn]] = {
    'keywords:existence': lambda text, n, words: (
        {'keywords': words},
        f'Include the words {_quoted(words)}.',
        f'{text} {" ".join(words)}.',
    ),
    'keywords:forbidden_words': lambda text, n, words: (
        {'forbidden_words': words},
        f'Do not use the words {_quoted(words)}.',
        text,
    ),
    'detectable_format:number_highlighted_sections': lambda text, n, words: (
        {'num_highlights': n},
        f'Highlight at least {n} parts, as in *highlighted part*.',
        f'{text}{f" *{words[0]}*" * n}',
    ),
    'detectable_content:number_placeholders': lambda text, n, words: (
        {'num_placeholders': n},
        f'Use at least {n} placeholders in square brackets, such as [name].',
        f'{text}{f" [{words[0]}]" * n}',
    ),
    'detectable_format:number_bullet_lists': lambda text, n, words: (
        {'num_bullets': n},
        f'Use exactly {n} bullet points that begin with "* ".',
        text + f'\n* {words[0]} {words[1]}' * n,
    ),
    'detectable_format:title': lambda text, n, words: (
        {},
        'Give it a title in double angular brackets, such as <<title>>.',
        f'<<{words[0]}>>\n{text}',
    ),
    'detectable_content:postscript': lambda text, n, words: (
        {'postscript_marker': 'P.S.'},
        'Add a postscript that starts with P.S.',
        f'{text}\nP.S. {words[0]} {words[1]}',
    ),
    'startend:end_checker': lambda text, n, words: (
        {'end_phrase': ' '.join(words)},
        f'Finish with this exact phrase: "{" ".join(words)}"',
        f'{text}\n{" ".join(words)}',
    ),
    'punctuation:no_comma': lambda text, n, words: ({}, 'Do not use any commas.', text),
    'length_constraints:number_sentences': lambda text, n, words: (
        {'num_sentences': n + 1, 'relation': 'less than'},
        f'Write fewer than {n + 1} sentences.',
        text,
    ),
    'change_case:english_lowercase': lambda text, n, words: ({}, 'Use no capital letters.', text.lower()),
    'change_case:english_capital': lambda text, n, words: ({}, 'Use capital letters only.', text.upper()),
    'startend:quotation': lambda text, n, words: ({}, 'Wrap it all in double quotation marks.', f'"{text}"'),
}


@register('constraints')
@dataclass(kw_only=True)
class Constraints(ProceduralTask):
    """Write some words under `constraints` (least, most) further ones of IFEval's instructions, drawn to go together.

    The reference is such a text of random words, and saying the prompt again is none.
    """

    constraints: tuple[int, int] = (1, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.constraints = self._interval('constraints', 1, 4)

    def draw(self, rng: random.Random) -> tuple[str, Any]:
        while True:
            kinds = rng.sample(sorted(DRAWN), uniform(rng, *self.constraints))
            length, about = uniform(rng, 8, 24), rng.sample(WORDS, 2)
            asked = [f'Write at least {length} words about {about[0]} and {about[1]}.']
            instructions = [('length_constraints:number_words', {'num_words': length, 'relation': 'at least'})]
            text = f'{_words(rng, length).capitalize()}.'
            for kind in filter(kinds.__contains__, DRAWN):
                arguments, phrase, text = DRAWN[kind](text, uniform(rng, 2, 4), rng.sample(WORDS, 2))
                instructions.append((kind, arguments))
                asked.append(phrase)
            question = ' '.join(asked)
            if not judge(text, instructions, [text]).reason and judge(question, instructions, [question]).reason:
                return question, (instructions, text)

    def pose(self, key: str, problem: Any, rng: random.Random) -> Prompt:
        return Prompt(key, problem[1], key, {'instructions': problem[0]})

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        return judge(completion, prompt.info['instructions'], [completion])
