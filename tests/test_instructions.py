"""Instructions: every kind is followed by what follows it and by nothing near it."""
# ruff: noqa: E501

import json
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_records import write

from data.errors import InputError
from data.tasks import Prompt, get_task
from data.tasks.instructions import DRAWN, KINDS, follows, judge, sentences

# kind, arguments, responses that follow it, responses that do not
CASES = [
    ('keywords:existence', {'keywords': ['Fox', 'hen']}, ['A fox. A HEN.', 'foxes and hens'], ['a fox', 'fo x hen']),
    ('keywords:frequency', {'keyword': 'fox', 'frequency': 2, 'relation': 'at least'}, ['fox Fox'], ['fox']),
    ('keywords:frequency', {'keyword': 'fox', 'frequency': 2, 'relation': 'less than'}, ['fox', 'hen'], ['fox fox']),
    ('keywords:forbidden_words', {'forbidden_words': ['rock', 'a.b']}, ['rocky axb'], ['On Rock.', 'say a.b now']),
    ('keywords:letter_frequency', {'letter': 'O', 'let_frequency': 2, 'let_relation': 'at least'}, ['Oo'], ['0o']),
    ('keywords:letter_frequency', {'letter': '#', 'let_frequency': 1, 'let_relation': 'less than'}, ['x'], ['x #']),
    ('length_constraints:number_words', {'num_words': 3, 'relation': 'at least'}, ['a b, c'], ['a b', 'a - - b']),
    ('length_constraints:number_words', {'num_words': 3, 'relation': 'less than'}, ['a b'], ['a b c']),
    ('length_constraints:number_sentences', {'num_sentences': 2, 'relation': 'at least'}, ['Oh. B'], ['Mr. Fox is 3.5.']),
    ('length_constraints:number_paragraphs', {'num_paragraphs': 2}, ['a\n***\nb', '***\na\n***b'], ['a', 'a***b***c', 'a\n\nb']),
    (
        'length_constraints:nth_paragraph_first_word',
        {'num_paragraphs': 2, 'nth_paragraph': 2, 'first_word': 'Fox'},
        ['a\n\n"fox, b', 'a\n\n\n\nFox'],
        ['fox\n\na', 'a\n\nfoxes', 'a\n\nfox\n\nb', 'a\nfox'],
    ),
    ('detectable_content:number_placeholders', {'num_placeholders': 2}, ['[a] [b c]'], ['[a]', '[] []', '[[a']),
    ('detectable_content:postscript', {'postscript_marker': 'P.S.'}, ['a\nP.S. b', 'a\np. s. b'], ['a', 'a P.S. b', 'PS']),
    ('detectable_content:postscript', {'postscript_marker': 'P.P.S'}, ['a\nP.P.S. b', 'P.P.S b'], ['a\nP.S. b']),
    ('detectable_format:number_bullet_lists', {'num_bullets': 2}, ['* a\n* b', 'x\n - a\n- b'], ['* a', '*a*\n*b*', '* a\n* b\n* c']),
    ('detectable_format:number_highlighted_sections', {'num_highlights': 2}, ['*a* **b c**'], ['*a*', '* a\n* b', '** ** *x*']),
    ('detectable_format:multiple_sections', {'section_spliter': 'Day', 'num_sections': 2}, ['Day 1 a\nDay 2 b'], ['Day 1', 'day 1 day 2']),
    ('detectable_format:constrained_response', {}, ['Well: My answer is no.'], ['My answer is', 'no']),
    ('detectable_format:json_format', {}, ['{"a": 1}', '```json\n[1]\n```'], ['{a: 1}', '{"a": 1} so', '3', '```']),
    ('detectable_format:title', {}, ['<<a b>>\nc'], ['<<>> a', '<a>', '<< >> a', '<<a\nb>>']),
    ('combination:two_responses', {}, ['a\n******\nb'], ['a', 'a******a', 'a******b******c', 'a***b', '******a']),
    ('combination:repeat_prompt', {'prompt_to_repeat': 'Say it. '}, ['say it. Yes.'], ['Yes. Say it.']),
    ('startend:end_checker', {'end_phrase': 'Peace!'}, ['a peace!', '"a Peace!"\n'], ['Peace! b', 'Peace']),
    ('startend:quotation', {}, ['"a"', ' "a\nb" \n'], ['a', '"a', '""', '“a”']),
    ('change_case:capital_word_frequency', {'capital_frequency': 2, 'capital_relation': 'at least'}, ['A BC d'], ['A bC']),
    ('change_case:capital_word_frequency', {'capital_frequency': 1, 'capital_relation': 'less than'}, ['a Bc'], ['A']),
    ('change_case:english_capital', {}, ['A 1!'], ['Aa']),
    ('change_case:english_lowercase', {}, ['a 1!'], ['Aa']),
    ('punctuation:no_comma', {}, ['a; b'], ['a, b']),
]  # fmt: skip


def test_every_kind_is_tried():
    assert {case[0] for case in CASES} == set(KINDS) and set(DRAWN) < set(KINDS)


@pytest.mark.parametrize(('kind', 'arguments', 'good', 'bad'), CASES)
def test_what_follows_and_what_does_not(kind, arguments, good, bad):
    assert [text for text in good if not follows(text, kind, arguments)] == []
    assert [text for text in [*bad, '', ' \n', '...'] if follows(text, kind, arguments)] == []


@pytest.mark.parametrize(('kind', 'arguments', 'good', 'bad'), CASES)
def test_hostile_responses_cost_little(kind, arguments, good, bad):
    start = time.perf_counter()
    for piece in [
        '.',
        '*',
        '* ',
        '<',
        '<<a',
        '[',
        '[a',
        '"',
        '\n',
        '.\n',
        ' ',
        'a.',
        '.a',
        '{',
        '\n\n',
        'P.',
        '******',
        *good,
    ]:
        follows('x' + piece * (300_000 // len(piece)), kind, arguments)
    assert time.perf_counter() - start < 6


def test_sentences():
    for text, count in [
        ('', 0),
        ('a', 1),
        ('A! B? "See." Do...', 4),
        ('Dr. No has 2.5 e.g. J. Bond.', 1),
        ('So do I. ', 1),
    ]:
        assert sentences(text) == count, text


def record(*instructions, prompt='Do it.'):
    return {'key': 1, 'prompt': prompt, 'instruction_id_list': [i[0] for i in instructions], 'kwargs': [i[1] for i in instructions]}  # fmt: skip


def test_records_are_judged_by_part(tmp_path):
    path = write(
        tmp_path / 'a.jsonl',
        [
            record(('punctuation:no_comma', {'keywords': None}), ('change_case:english_lowercase', {})),
            record(('language:response_language', {'language': 'kn'}), prompt='other'),
        ],
    )
    strict, loose = (get_task('instructions', 'heldout', path=path, evaluation=True, loose=x) for x in (False, True))
    prompt = strict.prompt(0)
    prompt = Prompt(prompt.text, prompt.reference, prompt.key, json.loads(json.dumps(prompt.info)))
    assert len(strict) == 1 and strict.skipped == {'language:response_language': 1}
    verdict = strict.verify(prompt, 'Yes; or no')
    assert verdict.score == 0 and verdict.reason == 'not followed: change_case:english_lowercase'
    assert [(part.name, part.score) for part in verdict.parts] == [
        ('punctuation:no_comma', 1),
        ('change_case:english_lowercase', 0),
    ]
    assert strict.verify(prompt, 'yes; or no').score == 1
    for text in ('Sure, here you are:\nyes', 'Sure,\nyes\nBye, Fox', 'yes\nBye,'):
        assert strict.verify(prompt, text).score == 0 and loose.verify(prompt, text).score == 1


def test_bad_records_say_what_was_expected(tmp_path):
    for message, bad in [
        ("did you mean 'punctuation:no_comma'", record(('punctuation:no_commas', {}))),
        ('kwargs of detectable_format:number_bullet_lists: expected num_bullets, got', record(('detectable_format:number_bullet_lists', {}))),
        ("relation 'most': expected 'at least'", record(('length_constraints:number_words', {'num_words': 3, 'relation': 'most'}))),
        ('kwargs of length_constraints:number_words', record(('length_constraints:number_words', {'num_words': 'x', 'relation': 'at least'}))),
        ('expected lists instruction_id_list and kwargs', record()),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=f'a.jsonl:1: .*{message}'):
            get_task('instructions', path=write(tmp_path / 'a.jsonl', [bad]))


@given(st.integers(0, 2**40), st.sampled_from(['train', 'heldout']), st.text())
@settings(deadline=None, max_examples=60)
def test_drawn_constraints_go_together(index, split, noise):
    task = get_task('constraints', split)
    prompt = task.prompt(index)
    assert prompt == get_task('constraints', split).prompt(index)
    instructions = json.loads(json.dumps(prompt.info))['instructions']
    assert 2 <= len(instructions) <= 4 and task.verify(prompt, prompt.reference).score == 1
    for stub in ('', noise, prompt.text, 'Answer: 1', prompt.reference[:20]):
        assert task.verify(prompt, stub).score == 0
    # Nothing is asked for that any text does, but for what a text is to refrain from.
    verdict = judge('Oh, "a" and\n* b\n', instructions, ['Oh, "a" and\n* b\n'])
    spared = {'keywords:forbidden_words', 'length_constraints:number_sentences'}
    assert all(part.score == 0 for part in verdict.parts if part.name not in spared)


def test_every_drawn_kind_occurs():
    task = get_task('constraints', constraints=3)
    names = [name for index in range(200) for name, _ in task.prompt(index).info['instructions']]
    assert set(names) == {*DRAWN, 'length_constraints:number_words'}


def test_published_records_are_read():
    path = os.path.join(os.environ.get('TORSO_RECORDS', ''), 'eval/ifeval_541.jsonl.gz')
    if not os.path.isfile(path):
        pytest.skip('TORSO_RECORDS does not name a folder with the published records')
    task = get_task('instructions', 'heldout', path=path, evaluation=True)
    assert len(task) == 541 - 31 and task.skipped == {'language:response_language': 31}
    assert sum(task.verify(task.prompt(index), 'Hm, hm.').score for index in range(len(task))) < 50
