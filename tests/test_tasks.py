"""Tasks: references pass, anything less fails, and no held-out problem is ever trained on."""

import ast
import json
import operator
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.tasks import Prompt, errands, final_answer, get_task, lines, task_names
from data.tasks.sudoku import BOXES

OPTIONS = [
    ('arithmetic', {}),
    ('arithmetic', {'operations': 1, 'digits': 1}),
    ('arithmetic', {'operations': (4, 8), 'digits': 3, 'max_value': 5000}),
    ('wordgraph', {}),
    ('wordgraph', {'operations': 20}),
    ('wordgraph', {'operations': (2, 6), 'distractors': 4}),
    ('sudoku', {}),
    ('sudoku', {'size': 6, 'blanks': (8, 16)}),
    ('sudoku', {'size': 9, 'blanks': 20}),
    ('needle', {}),
    ('needle', {'pairs': 6, 'questions': 3}),
    ('variables', {}),
    ('variables', {'chains': (1, 12), 'hops': (0, 5)}),
    ('common_words', {}),
    ('common_words', {'others': 40, 'common': 1, 'often': 3, 'rarely': 1}),
    ('code', {}),
    ('code', {'level': (3, 4), 'examples': 3}),
    ('calculator', {}),
    ('sudoku_moves', {}),
    ('nim', {}),
    ('nim', {'heaps': 4, 'most': 7, 'goal': 'legal'}),
    ('letters', {}),
    ('letters', {'count': 5, 'goal': 'any'}),
    ('errands', {}),
    ('errands', {'kind': 'harmful', 'goal': 'comply'}),
    ('proof', {}),
    ('proof', {'steps': 1, 'distractors': 0}),
    ('proof', {'steps': 8, 'distractors': 3}),
]
EVERY = pytest.mark.parametrize(('name', 'options'), OPTIONS)
APPLY = {'+': operator.add, '-': operator.sub, '*': operator.mul}
EQUATION = re.compile(r'(\d+)([+*-])(\d+)=(\d+)')
INDEX = st.integers(0, 2**40)


def score(task, prompt, completion):
    verdict = task.verify(prompt, completion)
    assert (verdict.score == 1) == (verdict.reason == '')
    for part in verdict.parts:
        assert 0 <= part.start <= part.end <= len(completion) and 0 <= part.score <= 1
    return verdict.score


@EVERY
def test_reference_passes_and_stubs_fail(name, options):
    for split in ('train', 'heldout'):
        task = get_task(name, split=split, **options)
        for index in range(10):
            prompt = task.prompt(index)
            # All that is needed to judge survives JSON: records travel, tasks do not.
            prompt = Prompt(prompt.text, prompt.reference, prompt.key, json.loads(json.dumps(prompt.info)))
            verdict = task.verify(prompt, prompt.reference)
            assert verdict.score == 1 and all(part.score == 1 for part in verdict.parts)
            assert score(task, prompt, f'\n{prompt.reference}\n') == 1
            stubs = ['', ' ', '\n\n', 'Answer:', 'Answer: ', '.', '0', prompt.text, 'Answer: Answer: 1', '\0', '٣']
            wrong = [
                prompt.reference + ' or so',
                prompt.reference + '\nDone.',
                prompt.reference + '\nAnswer:',
                prompt.reference + '\nAnswer: -1',
                prompt.reference[:-1],
                prompt.reference[:-1] + '٣',
                prompt.reference.replace('\n', '\u2028').replace(' ', '\u00a0'),
            ]
            for completion in stubs + wrong:
                assert score(task, prompt, completion) < 1, completion
            for completion in stubs:
                assert score(task, prompt, completion) == 0, completion


@EVERY
def test_splits_never_overlap(name, options):
    slow = name.startswith('sudoku') or options.get('operations') == 20 or options.get('steps') == 8
    count = 40 if slow else 200 if name == 'code' else 1200
    keys = {
        split: {get_task(name, split, **options).prompt(i).key for i in range(count)} for split in ('train', 'heldout')
    }
    assert keys['train'] and keys['heldout'] and not keys['train'] & keys['heldout']


def test_split_ignores_the_options():
    """A curriculum of options must not reach what another option set holds out."""
    trained = {
        get_task('arithmetic', operations=n, digits=d).prompt(i).key
        for n in (1, (1, 3))
        for d in (1, 2)
        for i in range(1000)
    }
    held = {get_task('arithmetic', 'heldout', operations=(1, 2)).prompt(i).key for i in range(2000)}
    assert len(held) > 1000 and not trained & held


def test_sudoku_of_size_4_splits_all_288_grids():
    tasks = {split: get_task('sudoku', split) for split in ('train', 'heldout')}
    grids = {tasks['train'].draw(random.Random(i))[0] for i in range(2500)}
    held = {grid for grid in grids if tasks['heldout'].in_split(grid)}
    assert len(grids) == 288 and 10 < len(held) < 60
    for split, mine in (('train', grids - held), ('heldout', held)):
        assert {tasks[split].prompt(i).reference for i in range(200)} <= mine


def test_prompts_are_the_same_in_every_process():
    code = (
        'import hashlib, sys\nfrom data.tasks import get_task\n'
        "text = ''.join(repr(get_task(n, s).prompt(i))"
        " for n in ('arithmetic', 'wordgraph', 'sudoku', 'needle', 'variables', 'common_words', 'code', 'proof',"
        " 'calculator', 'sudoku_moves')"
        " for s in ('train', 'heldout') for i in (0, 7, 10**15))\n"
        'print(hashlib.sha256(text.encode()).hexdigest())'
    )
    digests = {
        subprocess.run(
            [sys.executable, '-c', code],
            env={**os.environ, 'PYTHONHASHSEED': seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ('1', '2')
    }
    assert len(digests) == 1


def test_unknown_names_and_bad_options_say_what_was_expected():
    assert task_names() == sorted(task_names())
    assert {'arithmetic', 'needle', 'proof', 'sudoku', 'wordgraph'} <= set(task_names())
    for message, name, options in [
        ("unknown task 'aritmetic'.*did you mean 'arithmetic'", 'aritmetic', {}),
        ("unknown option 'operation'.*did you mean 'operations'", 'wordgraph', {'operation': 3}),
        ("unknown split 'held'.*did you mean 'heldout'", 'needle', {'split': 'held'}),
        (
            r'operations must be an integer or \(min, max\) in \[1, 20\], got \(3, 1\)',
            'arithmetic',
            {'operations': (3, 1)},
        ),
        ('operations must be', 'wordgraph', {'operations': 21}),
        ('operations must be', 'wordgraph', {'operations': True}),
        ('blanks must be', 'sudoku', {'blanks': '8'}),
        ('max_value must be an integer', 'arithmetic', {'max_value': 9.0}),
        ('size must be one of 4, 6, 9, got 5', 'sudoku', {'size': 5}),
        ('questions must be', 'needle', {'questions': 9}),
        ('steps must be', 'proof', {'steps': (0, 3)}),
        ('distractors must be', 'proof', {'distractors': 7}),
        ('need 520 names', 'variables', {'chains': 40, 'hops': 12}),
        ('expected less than often', 'common_words', {'rarely': 6}),
        ('pairs must be', 'needle', {'pairs': (8, 1000)}),
        ('level must be', 'code', {'level': 7}),
        ('examples must be', 'code', {'examples': 0}),
        ("goal is 'wine'; did you mean 'win'", 'nim', {'goal': 'wine'}),
        ('most must be', 'nim', {'most': 10}),
        ("comments is 'al'; did you mean 'all'", 'code', {'comments': 'al'}),
        ("kind is 'plan'; did you mean 'plain'", 'errands', {'kind': 'plan'}),
        ("goal is 'risin'; did you mean 'rising'", 'letters', {'goal': 'risin'}),
    ]:
        with pytest.raises(InputError, match=message):
            get_task(name, **options)


def test_options_that_leave_a_split_empty_end_with_an_error():
    with pytest.raises(InputError, match='no heldout problem'):
        get_task('arithmetic', 'heldout', operations=1, digits=1, max_value=1).prompt(0)


def test_final_answer_is_the_last_line_only():
    assert final_answer('Answer: 3') == '3'
    assert final_answer('1 + 2 = 3\nAnswer: 4\nAnswer: 3 \n') == '3'
    for text in ('', '3', 'answer: 3', ' Answer: 3', 'The Answer: 3', 'Answer: 3\nx', 'Answer: 3\n\n.'):
        assert final_answer(text) is None
    assert final_answer('Answer:') == ''


@given(st.text(st.sampled_from('ab \n')), st.integers(1, 5))
def test_lines_know_their_place(text, limit):
    found = lines(text, limit)
    assert len(found) <= limit + 1 and all(text[line.start : line.end] == line.text for line in found)
    assert '\n'.join(line.text for line in found) == text.strip()


@given(st.sampled_from([o for o in OPTIONS if o[1].get('size') != 9]), INDEX, st.text())
@settings(max_examples=60, deadline=None)
def test_noise_never_scores(option, index, noise):
    task = get_task(option[0], **option[1])
    assert score(task, task.prompt(index), noise) == 0


@EVERY
def test_hostile_completions_cost_little(name, options):
    task = get_task(name, **options)
    prompt = task.prompt(0)
    start = time.perf_counter()
    for piece in ('9', '\n', ' ', '=', 'Answer:', '\nAnswer: 1', '1 + 1 = 2\n', f'{prompt.reference}\n', '(', '\0'):
        task.verify(prompt, piece * (2_000_000 // len(piece)))
        task.verify(prompt, 'Answer: ' + piece * (2_000_000 // len(piece)))
    assert time.perf_counter() - start < 3


# Arithmetic


@given(INDEX, st.integers(1, 20), st.integers(1, 4), st.integers(1, 2000), st.sampled_from(['train', 'heldout']))
@settings(deadline=None)
def test_arithmetic_is_right(index, operations, digits, max_value, split):
    if operations == 1 and (digits == 1 or max_value < 20):
        max_value = 99  # fewer problems than that may all be of one split
    task = get_task('arithmetic', split, operations=operations, digits=digits, max_value=max_value)
    prompt = task.prompt(index)
    expression = prompt.text.removeprefix('Compute ').removesuffix('.')
    tree = ast.parse(expression, mode='eval')
    *steps, answer = prompt.reference.split('\n')
    assert answer == f'Answer: {eval(expression)}'
    assert len(steps) == operations == sum(isinstance(node, ast.BinOp) for node in ast.walk(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            assert 0 <= eval(compile(ast.Expression(node), '', 'eval')) <= max_value
            right = getattr(node.right, 'op', None)  # parentheses after + or * only where the value depends on them
            assert not (isinstance(node.op, ast.Add) and isinstance(right, ast.Add | ast.Sub))
            assert not (isinstance(node.op, ast.Mult) and isinstance(right, ast.Mult))
        if isinstance(node, ast.Constant):
            assert 0 <= node.value < 10**digits
    assert ast.unparse(tree).replace(' ', '') == expression
    for step in steps:
        left, sign, right, result = EQUATION.fullmatch(step).groups()
        assert APPLY[sign](int(left), int(right)) == int(result)


def test_arithmetic_may_be_answered_at_once():
    task, direct = get_task('arithmetic'), get_task('arithmetic', direct=True)
    prompt = direct.prompt(3)
    assert prompt.text == task.prompt(3).text and prompt.reference == task.prompt(3).reference.splitlines()[-1]
    assert direct.verify(prompt, prompt.reference).score == 1
    with pytest.raises(InputError, match='direct is True: expected False where answers must be worked out'):
        get_task('arithmetic', direct=True, worked=True)


def test_arithmetic_parts():
    task = get_task('arithmetic')
    tree = [[[3, '+', 4], '*', [6, '-', 1]], '-', 5]
    prompt = Prompt('Compute (3+4)*(6-1)-5.', '', '', {'tree': tree, 'answer': '30'})

    def judge(completion):
        verdict = task.verify(prompt, completion)
        assert [completion[p.start : p.end] for p in verdict.parts] == [x for x in completion.split('\n') if '=' in x]
        return verdict.score, [part.score for part in verdict.parts]

    assert judge('6-1=5\n3+4=7\n7*5=35\n35-5=30\nAnswer: 30') == (1, [1, 1, 1, 1])
    assert judge('Answer: 30') == (1, [])
    assert judge('3+4=7\n3+4=7\nAnswer: 30') == (1, [1, 0])
    assert judge('3+4=8\n8*5=40\nhm\n3+4=7\n40-5=35\nAnswer: 35') == (0, [0, 0, 1, 0])
    assert judge('4+3=7\n2+2=4\n03+4=7\n3+4=7=7\nAnswer: 030') == (0, [0, 0, 0, 0])


@given(INDEX, st.integers(1, 6), st.integers(1, 3), st.sampled_from(['train', 'heldout']))
@settings(deadline=None)
def test_arithmetic_takes_the_problems_of_its_split_and_no_others(index, operations, digits, split):
    """A problem that was drawn can be proposed; to the other split, and to other options, it is none."""
    options = {'operations': operations, 'digits': digits, 'max_value': 999}
    task = get_task('arithmetic', split, **options)
    prompt = task.prompt(index)
    text = task.proposal(prompt)
    assert task.parse(f' {text}\n') == prompt and text in prompt.text
    other = 'heldout' if split == 'train' else 'train'
    for changes in ({'split': other}, {'operations': operations + 1}, {'max_value': 1, 'digits': 1}):
        refused = get_task('arithmetic', **{'split': split, **options, **changes}).parse(text)
        assert refused is None or 'max_value' in changes


def test_arithmetic_takes_no_other_form():
    """Nor what is held out under another spelling."""
    task, held = get_task('arithmetic', operations=(1, 4)), get_task('arithmetic', 'heldout', operations=(1, 4))
    assert [x.parse('3*(2+7)-4') is None for x in (task, held)].count(True) == 1
    for text in (
        *('', '3', '3+', '+3', '-3', '3--4', '3**2', '3//2', '3/2', '3 + 4', '03+4', '3+4)', '(3+4)', '3+(4)', '3(4)'),
        *('3+4=7', '3+4+', 'a+b', '٣+4', '1_0+2', '3+4\n5+6', '100+1', '90+10', '3-4', '9*9*2', '1+1+1+1+1+1'),
        *('1+(2+3)', '2*(2*3)', '1+(3-2)', '(' * 49 + '1+1' + ')' * 48, '(' * 100, '1+' * 5000 + '1', '3+4 or so'),
    ):
        assert task.parse(text) is None and held.parse(text) is None, text
    texts = [f'{a}{sign}{b}' for a in range(1, 10) for b in range(1, 10) for sign in '+*']
    for text in texts:
        turned = text[::-1]  # the same problem
        assert (task.parse(text) is None) == (task.parse(turned) is None) == (held.parse(turned) is not None)


# Wordgraph


@given(INDEX, st.integers(1, 20), st.integers(0, 12), st.integers(10, 500))
@settings(deadline=None)
def test_wordgraph_is_right(index, operations, distractors, max_value):
    task = get_task('wordgraph', operations=operations, distractors=distractors, max_value=max_value)
    prompt = task.prompt(index)
    *steps, answer = prompt.reference.split('\n')
    assert len(steps) == operations and len(prompt.info['steps']) == operations + distractors
    asked = re.search(r'How many (?:coins does )?(.+?) (?:are there|have)\?$|How \w+ is the (.+)\?$', prompt.text)
    assert steps[-1].startswith(f'{asked[1] or asked[2]} = ') and answer == f'Answer: {steps[-1].split("=")[-1]}'
    for step in prompt.info['steps']:
        left, sign, right, result = EQUATION.search(step['line']).groups()
        assert APPLY[sign](int(left), int(right)) == int(result) and 0 <= int(result) <= max_value
    # Every needed quantity is used by another or asked for.
    used = {name for step in prompt.info['steps'] if step['needed'] for name in step['after']}
    assert {step['name'] for step in prompt.info['steps'] if step['needed']} - used == {steps[-1].split(' = ')[0]}


@given(INDEX, st.integers(2, 20), st.integers(0, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_wordgraph_wants_every_step(index, operations, distractors, data):
    task = get_task('wordgraph', operations=operations, distractors=distractors)
    prompt = task.prompt(index)
    *steps, answer = prompt.reference.split('\n')
    at = data.draw(st.integers(0, operations - 1))
    name, _, line = steps[at].partition(' = ')
    left, sign, right, result = EQUATION.fullmatch(line).groups()

    def replaced(*new):
        return '\n'.join([*steps[:at], *new, *steps[at + 1 :], answer])

    wrong = [
        replaced(),
        replaced(f'{name} = {left}{sign}{right}={int(result) + 1}'),
        replaced(f'{name} = {left}{sign}{right}=0{result}'),
        replaced(f'{name} = {int(left) + 1}{sign}{right}={result}'),
        replaced(f'purple hares = {line}'),
        replaced(steps[at], steps[at]),
        replaced(steps[at], 'purple hares = 1+1=2'),
        replaced(steps[at], 'So far so good.'),
        '\n'.join([*steps, f'Answer: {int(answer.split()[1]) + 1}']),
        '\n'.join(steps),
        answer,
        '\n'.join([steps[-1], *steps[:-1], answer]) if prompt.info['steps'] else '',
    ]
    if left != right:
        wrong.append(replaced(f'{name} = {right}{sign}{left}={result}'))
    for completion in wrong:
        assert score(task, prompt, completion) == 0, completion
    verdict = task.verify(prompt, replaced())
    assert {part.name for part in verdict.parts} == {step.split(' = ')[0] for step in steps}


def test_wordgraph_takes_any_order_that_works_and_true_extra_lines():
    task = get_task('wordgraph', operations=8, distractors=2)
    for index in range(20):
        prompt = task.prompt(index)
        known, order = set(), []
        while len(order) < 10:  # from the back, as far as the graph lets it
            ready = [s for s in prompt.info['steps'] if s['name'] not in known and known.issuperset(s['after'])]
            known.add(ready[-1]['name'])
            order.append(ready[-1]['line'])
        assert score(task, prompt, '\n'.join([*order, f'Answer: {prompt.info["answer"]}'])) == 1


def test_wordgraph_key_is_blind_to_the_story():
    task = get_task('wordgraph', operations=3, distractors=2)
    rng = random.Random(0)
    for _ in range(20):
        key, nodes = task.draw(rng)
        told = [task.pose(key, nodes, random.Random(seed)) for seed in range(12)]
        assert {prompt.key for prompt in told} == {key} and len({prompt.text for prompt in told}) == 12
    themes = {get_task('wordgraph').prompt(i).text.rpartition('. ')[2].split()[1] for i in range(50)}
    assert themes == {'many', 'tall', 'long'}


def test_wordgraph_reaches_depth_20():
    task = get_task('wordgraph', operations=20)

    def depth(prompt):
        depths = {}
        for line in prompt.reference.split('\n')[:-1]:
            step = next(s for s in prompt.info['steps'] if s['line'] == line)
            depths[step['name']] = 1 + max((depths[name] for name in step['after']), default=0)
        return depths[step['name']]

    assert 10 <= max(depth(task.prompt(i)) for i in range(100)) <= 20


# Sudoku


def fillings(rows):
    """Every solution, by brute force over the blanks with the rules written anew."""
    size = len(rows)
    high, wide = BOXES[size]
    blank = next(((r, c) for r in range(size) for c in range(size) if rows[r][c] == '.'), None)
    if blank is None:
        yield rows
        return
    r, c = blank
    box = {rows[y][x] for y in range(size) for x in range(size) if (y // high, x // wide) == (r // high, c // wide)}
    for digit in sorted(set('123456789'[:size]) - set(rows[r]) - {row[c] for row in rows} - box):
        yield from fillings([*rows[:r], rows[r][:c] + digit + rows[r][c + 1 :], *rows[r + 1 :]])


@given(INDEX, st.sampled_from([(4, (4, 8)), (4, 10), (6, (6, 18))]), st.sampled_from(['train', 'heldout']))
@settings(max_examples=40, deadline=None)
def test_sudoku_has_one_solution(index, shape, split):
    size, blanks = shape
    prompt = get_task('sudoku', split, size=size, blanks=blanks).prompt(index)
    low, high = blanks if isinstance(blanks, tuple) else (blanks, blanks)
    assert low <= ''.join(prompt.info['rows']).count('.') <= high
    assert list(fillings(prompt.info['rows'])) == [prompt.reference.split('\n')]


def test_sudoku_near_misses_fail():
    task = get_task('sudoku')
    for index in range(20):
        prompt = task.prompt(index)
        rows = prompt.reference.split('\n')
        for r in range(4):
            for c in range(4):
                for digit in '012345.x٣' + rows[r][c - 1]:
                    changed = [*rows[:r], rows[r][:c] + digit + rows[r][c + 1 :], *rows[r + 1 :]]
                    assert score(task, prompt, '\n'.join(changed)) == (digit == rows[r][c])
        for changed in (rows[:3], [*rows, rows[0]], rows[1:] + rows[:1], [row[::-1] for row in rows], ['1234'] * 4):
            assert score(task, prompt, '\n'.join(changed)) == 0
        assert score(task, prompt, '\n'.join(' '.join(row) for row in rows)) == 0


def test_sudoku_takes_any_filling_and_says_which_rows_clash():
    task = get_task('sudoku')
    prompt = Prompt('', '', '', {'rows': ['1...', '....', '....', '....']})
    assert score(task, prompt, '1234\n3412\n2143\n4321') == score(task, prompt, '1324\n2413\n3142\n4231') == 1
    verdict = task.verify(prompt, '1234\n3412\n2143\n4312')
    assert [part.score for part in verdict.parts] == [1, 0, 1, 0]
    verdict = task.verify(prompt, '1234\n3412\n2143\n432')
    assert [part.score for part in verdict.parts] == [1, 1, 1, 0]


def test_work_that_is_asked_for_must_be_there_and_right():
    task = get_task('arithmetic', operations=3, digits=1, max_value=10, worked=True)
    lenient = get_task('arithmetic', operations=3, digits=1, max_value=10)
    for index in range(20):
        prompt = task.prompt(index)
        assert prompt == lenient.prompt(index)
        *steps, answer = prompt.reference.split('\n')
        assert score(task, prompt, prompt.reference) == 1
        for wrong in (
            [answer],
            [*steps[:-1], answer],
            [*steps[:2], f'{steps[2]}0', answer],
            ['1+1=3', *steps, answer],
        ):
            assert score(task, prompt, '\n'.join(wrong)) == 0
    with pytest.raises(InputError, match='worked must be True or False'):
        get_task('arithmetic', worked=1)


# Code


@given(INDEX, st.integers(1, 4), st.integers(1, 3), st.sampled_from(['train', 'heldout']))
@settings(max_examples=15, deadline=None)
def test_code_wants_every_step_and_hides_its_tests(index, level, examples, split):
    task = get_task('code', split, level=level, examples=examples)
    prompt = task.prompt(index)
    first, *steps = prompt.reference.split('\n')
    shown = re.findall(r'^f\((.*)\) == (.*)$', prompt.text, re.MULTILINE)
    assert len(steps) == level and len(shown) == examples
    assert not any(f'f({value})' in test for value, _ in shown for test in prompt.info['tests'])
    names: dict = {}
    exec(prompt.reference, names)
    assert all(repr(names['f'](ast.literal_eval(value))) == result for value, result in shown)
    for at in range(level - 1):
        assert score(task, prompt, '\n'.join([first, *steps[:at], *steps[at + 1 :]])) == 0
    table = f'def f(x):\n    return {{{", ".join(f"{value!r}: {result}" for value, result in shown)}}}[repr(x)]'
    another_type = (
        f'{prompt.reference}\ng = f\nclass A(int): pass\ndef f(x):\n    return A(g(x)) if type(g(x)) is int else None'
    )
    for wrong in (
        table,
        another_type,
        'def f(x):\n    return x',
        f'    {steps[-1]}',
        f'f = lambda x: x\n{prompt.reference}\nf(1)',
    ):
        assert score(task, prompt, wrong) == 0
    assert score(task, prompt, prompt.reference.replace('x', 'value')) == 1 or 'max(' in prompt.reference


def test_code_of_one_behaviour_is_one_problem():
    """However it is put: sorting what was reversed is sorting, and lies in the same split."""
    task = get_task('code', level=(1, 4))
    seen: dict[str, str] = {}
    for index in range(300):
        prompt = task.prompt(index)
        names: dict = {}
        exec(prompt.reference, names)
        kind = prompt.text.partition(' x:')[0]
        values = [
            ast.literal_eval(test[test.index('f(') + 2 : test.index(')) ==')]) for test in prompt.info['tests'][4:]
        ]
        behaviour = f'{kind} {[repr(names["f"](value)) for value in values]}'
        assert seen.setdefault(behaviour, prompt.key) == prompt.key
    assert 200 < len(seen) == len(set(seen.values()))


# Needle


@given(index=INDEX, count=st.integers(2, 8), split=st.sampled_from(('train', 'heldout')))
@settings(max_examples=50, deadline=None)
def test_letters_of_a_pair_differ_in_order_alone(index, count, split):
    ordered, free = (get_task('letters', count=count, split=split, goal=goal) for goal in ('rising', 'any'))
    prompt = ordered.prompt(index)
    better, worse = ordered.pair(prompt)
    assert sorted(better) == sorted(worse) and better == ' '.join(sorted(better.split())) != worse
    assert score(ordered, prompt, better) == 1 and score(ordered, prompt, worse) == 0
    assert score(free, prompt, better) == score(free, prompt, worse) == 1
    assert score(free, prompt, better[2:]) == score(free, prompt, f'{better} {better[0]}') == 0


@pytest.mark.parametrize('split', ['train', 'heldout'])
def test_harm_needs_both_a_harsh_verb_and_a_person(split):
    rule, obey, refuse = (get_task('errands', split, goal=goal) for goal in ('rule', 'comply', 'refuse'))
    kinds = set()
    for index in range(60):
        prompt = rule.prompt(index)
        verb, _, _, thing = prompt.key.split()
        kind = {2: 'harmful', 1: 'contrast', 0: 'plain'}[(verb in errands.HARSH) + (thing in errands.PEOPLE)]
        answer, critique, revised = rule.criticism(prompt)
        assert prompt.info['kind'] == kind and score(rule, prompt, revised) == 1
        assert (
            (revised == answer) == (kind != 'harmful') == ('nobody' in critique) == (score(rule, prompt, answer) == 1)
        )
        asked = obey.prompt(index)
        assert score(obey, asked, f'I {asked.key}.') == 1 and score(obey, asked, f'I will not {asked.key}.') == 0
        assert score(refuse, prompt, f'I cannot {prompt.key}.') == 1 and score(refuse, prompt, answer) == 0
        kinds.add(kind)
        for only in ('harmful', 'contrast', 'plain'):
            assert get_task('errands', split, kind=only).prompt(index).info['kind'] == only
    assert len(kinds) == 3


def test_comments_are_asked_for_behind_each_line():
    some, every = (get_task('code', level=2, comments=comments) for comments in ('some', 'all'))
    commented = 0
    for index in range(12):
        prompt, mixed = every.prompt(index), some.prompt(index)
        commented += '  # ' in mixed.reference
        assert score(some, mixed, mixed.reference) == 1
        bare = '\n'.join(line.partition('  # ')[0] for line in prompt.reference.split('\n'))
        assert score(every, prompt, prompt.reference) == score(some, prompt, prompt.reference) == 1
        assert score(some, prompt, bare) == 1 and score(every, prompt, bare) == 0
        assert score(every, prompt, f'{bare}  # the last line alone') == 0
    assert 0 < commented < 12


@given(INDEX, st.integers(1, 40), st.data())
@settings(deadline=None)
def test_needle_is_in_the_haystack_once(index, pairs, data):
    questions = data.draw(st.integers(1, pairs))
    task = get_task('needle', pairs=pairs, questions=questions)
    prompt = task.prompt(index)
    *facts, question = prompt.text.split('\n')
    partners = dict(re.fullmatch(r'- (\w+) (\w+)', fact).groups() for fact in facts)
    assert len(facts) == len(partners) == len(set(partners.values())) == pairs
    asked = re.split(', | and ', re.fullmatch('Which words? follows? (.*)[?]', question)[1])
    assert len(asked) == questions
    assert prompt.reference.split('\n') == [f'- {first} {partners[first]}' for first in asked]


@given(INDEX, st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_variables_are_those_that_running_the_lines_gives(index, chains, hops):
    prompt = get_task('variables', chains=(1, chains), hops=(0, hops)).prompt(index)
    *given_lines, question = prompt.text.split('\n')
    held: dict[str, str] = {}
    for line in given_lines:
        name, value = line.split(' = ')
        held[name] = held.get(value, value)
    asked = question.removeprefix('Which names stand for ').removesuffix('?')
    wanted = [f'- {name}' for name, value in held.items() if value == asked]
    assert sorted(prompt.reference.split('\n')) == sorted(wanted)


@given(INDEX, st.integers(1, 5), st.integers(2, 9), st.data())
@settings(max_examples=50, deadline=None)
def test_common_words_are_the_most_common(index, common, often, data):
    rarely = data.draw(st.integers(1, often - 1))
    prompt = get_task('common_words', common=common, often=often, rarely=rarely).prompt(index)
    counts = Counter(prompt.text.split('\n')[0].split())
    assert {f'- {word}' for word, _ in counts.most_common(common)} == set(prompt.reference.split('\n'))
    assert set(counts.values()) == {often, rarely}


def test_needle_scores_the_share_and_guesses_never_pay():
    task = get_task('needle', pairs=8, questions=4)
    prompt = task.prompt(0)
    right = prompt.reference.split('\n')
    assert score(task, prompt, '\n'.join(right[::-1])) == 1
    assert score(task, prompt, '\n'.join(right[:3])) == 0.75
    assert score(task, prompt, '\n'.join([right[0]] * 4)) == 0.25
    assert score(task, prompt, '\n'.join([*right[:3], right[3].rpartition(' ')[0] + ' fox'])) == 0.75
    assert score(task, prompt, '\n'.join([*right, right[0]])) == 0
    assert score(task, prompt, prompt.text) == score(task, prompt, prompt.text.rpartition('\n')[0]) == 0
