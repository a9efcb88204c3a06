"""Mathematics: records of three forms, answers in any form, and nothing that costs more than its time."""

import os
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_records import write

from data.equivalence import Checker
from data.errors import InputError
from data.tasks import get_task
from data.tasks.mathematics import MAX_ANSWER, boxed, plain_number, wrong

GSM8K = {'question': 'What do 2 dozen eggs  cost?', 'answer': 'They are 2*12=<<2*12=24>>24.\n#### 1,024'}
MATH = {'problem': 'Halve 1.', 'solution': 'It is $\\boxed{\\frac{1}{2}}$.', 'answer': '\\frac{1}{2}'}
IN_CONTEXT = {'context': 'Name her.', 'chain_of_thought': 'She is Evelyn.', 'answer': '\\text{Evelyn}'}


@pytest.fixture
def prompts(tmp_path):
    path = write(tmp_path / 'a.jsonl', [GSM8K, MATH, IN_CONTEXT])
    task = get_task('mathematics', 'heldout', path=path, evaluation=True)
    found = {prompt.text.split()[0]: prompt for prompt in map(task.prompt, range(3))}
    return task, found['What'], found['Halve'], found['Name']


def test_records_of_three_forms(prompts):
    task, gsm8k, math, in_context = prompts
    assert gsm8k.reference == 'They are 2*12=24.\nAnswer: 1,024'
    assert gsm8k.key == 'what do 2 dozen eggs cost?'
    assert math.reference == 'It is $\\boxed{\\frac{1}{2}}$.\nAnswer: \\frac{1}{2}'
    assert in_context.reference == 'She is Evelyn.\nAnswer: \\text{Evelyn}'
    for prompt in (gsm8k, math, in_context):
        assert task.verify(prompt, prompt.reference).score == 1
        for stub in (
            '',
            'Answer:',
            'Answer: .',
            prompt.text,
            'Answer: 1024\nDone',
            f'{prompt.reference}\nAnswer: 0',
        ):
            verdict = task.verify(prompt, stub)
            assert verdict.score == 0 and verdict.reason
    for answer, score in [('1024', 1), ('1024.0', 1), ('$1024', 1), ('1025', 0), ('1,0240', 0), ('1024 or 1025', 0)]:
        assert task.verify(gsm8k, f'So.\nAnswer: {answer}').score == score
    # A box counts where the record's own solution has one, and the last box alone.
    assert task.verify(math, 'Thus $\\boxed{0.5}$.').score == 1
    assert task.verify(math, '$\\boxed{0.5}$ or $\\boxed{1}$').score == 0
    assert task.verify(math, '$\\boxed{0.5}$\nAnswer: 1').score == 0
    assert task.verify(gsm8k, '$\\boxed{1024}$').score == 0


def test_bad_records_say_what_was_expected(tmp_path):
    for message, record in [
        ("a.jsonl:1: answer: expected a last line '#### N'", {'question': 'x', 'answer': '3'}),
        ('answer: expected 1 to 300 characters, got 0', {'question': 'x', 'answer': '3\n#### '}),
        ('expected question, problem or context among the fields text', {'text': 'x'}),
        ('solution: expected a string, got no such field', {'problem': 'x', 'answer': '3'}),
    ]:
        with pytest.raises(InputError, match=message):
            get_task('mathematics', path=write(tmp_path / 'a.jsonl', [record]))


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_numbers_are_compared_exactly(a, b):
    assert plain_number(f'{a:,}') == plain_number(str(a)) == plain_number(f'{a}.00') == a
    assert (not wrong(str(a), f'${b:,}$')) == (a == b)
    assert wrong(str(a), f'{a}.000000001')


@settings(max_examples=30)
@given(st.text('19,.+- ٣e_', max_size=12))
def test_only_plain_numbers_are_numbers(text):
    value = plain_number(text)
    assert value is None or (text.isascii() and float(text.replace(',', '')) == pytest.approx(float(value)))


EQUAL = [
    ('6', '$6$ \\boxed{6} 6. \\$6 x=6 06 6\\%'.split() + ['6 \\text{ cm}', '6^\\circ', '6 apples']),
    ('\\frac{1}{2}', ['1/2', '\\frac12', '0.5', '.5', '\\dfrac{2}{4}']),
    ('2\\sqrt{2}', ['\\sqrt{8}', '2\\sqrt2', '$2\\sqrt{2}$']),
    ('p - q', ['-q+p', 'p-q']),
    ('x^2+2x+1', ['1+2x+x^2', '(x+1)^2']),
    ('\\text{Evelyn}', ['Evelyn', '\\text{Evelyn}.']),
    ('\\left( 3, \\frac{\\pi}{2} \\right)', ['(3,\\pi/2)', '(3, \\frac{\\pi}2)']),
    ('1,2', ['2, 1', '1 and 2', '\\{1,2\\}']),
    ('1 \\pm \\sqrt{2}', ['1+\\sqrt2, 1-\\sqrt2']),
    ('x \\in [-2,7]', ['[-2,7]']),
    ('4210_{5}', ['4210_5', '4210']),
]
UNEQUAL = [
    (
        '6',
        [
            '3+3',
            '12/2',
            '3!',
            '2\\cdot3',
            '\\int_0^6 1 dx',
            '6 or 7',
            '6, 7',
            '6x',
            '-6',
            'six',
            '²6',
            '٦',
            '6}',
            '6_7',
        ],
    ),
    ('6', ['6 7', '\\boxed{6}, \\boxed{5}', '5 answer: 6', '\\text{not }6', '5.9999999', '1' * 400, '6' + '$' * 300]),
    ('\\frac{1}{2}', ['0.50001', '1', '2', '1-\\frac12', '\\frac{1}{2}, \\frac{1}{3}']),
    ('2\\sqrt{2}', ['2.83', '\\sqrt{2}+\\sqrt{2}', '\\sqrt{7}']),
    ('p - q', ['q - p', 'p', 'p - q = 0 \\text{ or } 1']),
    ('\\text{Evelyn}', ['Evelin', 'Evelyn or Briana', '']),
    ('(3,4)', ['(4,3)', '(3,4,5)']),
    ('[0,1]', ['(0,1)', '[0,2]']),
    ('4210_{5}', ['4210_6', '4211_5']),
]


@pytest.mark.parametrize(('reference', 'answers'), EQUAL)
def test_equivalent_answers_pass(reference, answers):
    assert {answer: wrong(reference, answer) for answer in [reference, *answers]} == dict.fromkeys(
        [reference, *answers], ''
    )


@pytest.mark.parametrize(('reference', 'answers'), UNEQUAL)
def test_near_misses_fail(reference, answers):
    assert [answer for answer in answers if not wrong(reference, answer)] == []


def test_hanging_expressions_cost_their_time_in_any_thread():
    checker = Checker(seconds=0.4)
    assert checker.equivalent('1/2', '0.5')
    replies = {}
    asked = ['0.5', '9^{9^{9^9}}', '\\frac12', '(' * 140 + '1' + ')' * 140, '\\prod_{k=1}^{99999999}k', '1/3']

    def ask(answer):
        replies[answer] = checker.equivalent('\\frac{1}{2}', answer)

    threads = [threading.Thread(target=ask, args=(answer,)) for answer in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [replies[answer] for answer in asked] == [True, None, True, None, None, False]
    # One that was ended by others is replaced too.
    checker._child.kill()
    assert checker.equivalent('2', '2') is None and checker.equivalent('2', '2')


def test_a_library_that_does_not_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr('data.equivalence.sys.executable', '/bin/false')
    with pytest.raises(RuntimeError, match='math-verify does not start'):
        Checker().equivalent('1', '2')


def test_hostile_completions_cost_little(prompts):
    task, *found = prompts
    start = time.perf_counter()
    for piece in ('9', '\n', '\\boxed{', '{', '}', '\\boxed{1}', 'Answer: ', '\nAnswer: 1', '$', '\0'):
        for prompt in found:
            task.verify(prompt, piece * (1_000_000 // len(piece)))
            task.verify(prompt, 'Answer: ' + piece * (1_000_000 // len(piece)))
    assert time.perf_counter() - start < 10
    assert boxed('\\boxed{' + '{' * MAX_ANSWER) is None and boxed('x') is None and boxed('\\boxed{a{b}}c') == 'a{b}'


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'count'), [('midtrain/gsm8k_train', 7473), ('eval/gsm8k_test', 1319), ('eval/math500', 500)]
)
def test_published_references_pass(name, count):
    folder = os.environ.get('TORSO_RECORDS', '')
    path = os.path.join(folder, f'{name}.jsonl.gz')
    if not folder or not os.path.isfile(path):
        pytest.skip('TORSO_RECORDS does not name a folder with the published records')
    task = get_task('mathematics', 'heldout', path=path, evaluation=True)
    found = [task.prompt(index) for index in range(len(task))]
    assert len(found) == count and all(task.verify(prompt, prompt.reference).score == 1 for prompt in found)
    for prompt, other in zip(found[:300], found[1:301], strict=True):
        if prompt.info['answer'] != other.info['answer']:
            assert task.verify(prompt, other.reference).score == 0
