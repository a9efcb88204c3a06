"""The sandbox: hostile programs fail, right ones pass, and neither costs more than its time."""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.tasks import get_task, sandbox
from data.tasks.sandbox import grade, run, wire

NOBODY = 65534
DATA = Path(os.environ.get('TORSO_RECORDS', '')) / 'code'  # with the published sets
BATTERY = Path(hostile.__file__)


def battery(command: list[str], **options) -> dict:
    """What the hostile programs did in a process of their own."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd='/', **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_hostile_programs_fail(root):
    report = battery([sys.executable, str(BATTERY), str(root)])
    assert report['programs'] >= 90 and not report['wrong'], '\n'.join(report['wrong'])
    assert report['user'] == os.geteuid()


def test_hostile_programs_fail_for_an_ordinary_user(root):
    """The other half where tests run as root: another user has nothing to drop, and less is done for it."""
    if os.geteuid() != 0:
        pytest.skip('this is an ordinary user already, and cannot become root for the other half')
    user = {'user': NOBODY, 'group': NOBODY, 'extra_groups': []}
    check = 'import sys; sys.exit(sys.version_info < (3, 11))'
    for python in (sys.executable, *filter(None, map(shutil.which, ('python3', 'python3.11', '/usr/bin/python3')))):
        try:
            if subprocess.run([python, '-c', check], cwd='/', capture_output=True, **user).returncode == 0:
                break
        except PermissionError:
            continue
    else:
        pytest.skip('no Python 3.11 that another user may start')
    with_code = (
        Path(os.path.realpath('/var/tmp')) / f'torso-{os.getpid()}'
    )  # pytest's folders are for their owner alone
    try:
        shutil.copytree(root / 'data', with_code / 'data', ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(BATTERY, with_code)
        subprocess.run(['chmod', '-R', 'a+rX', with_code], check=True)
        report = battery([python, str(with_code / BATTERY.name), str(with_code)], **user)
    finally:
        shutil.rmtree(with_code, ignore_errors=True)
    assert report['user'] == NOBODY and report['programs'] >= 90
    assert not report['wrong'], '\n'.join(report['wrong'])


def children(process: int) -> list[int]:
    return list(map(int, Path(f'/proc/{process}/task/{process}/children').read_text().split()))


def confined(count: int) -> list[int]:
    """The launcher's children, once they are so many; the killed are reaped a moment later."""
    launcher = sandbox._launcher().process
    process = launcher.pid
    if launcher.args[0].endswith('bwrap'):  # which starts another, which starts the launcher
        process = children(children(process)[0])[0]
    deadline = time.monotonic() + 10
    while len(found := children(process)) != count and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_programs_leave_no_process_behind():
    grade(hostile.PASS, hostile.TESTS)
    assert confined(0) == []


RIGHT = [
    ('def f(x): return x + x', hostile.TESTS),
    ('f = lambda x: x * 2', hostile.TESTS),
    ('class F:\n  def __call__(self, x): return x + x\nf = F()', hostile.TESTS),
    ('import math\ndef f(x):\n  return math.sqrt(x)', ['assert f(4) == 2.0', 'assert math.isclose(f(2), 2 ** 0.5)']),
    ('def f(n): return n if n < 2 else f(n - 1) + f(n - 2)', ['assert [f(n) for n in range(10)][-1] == 34']),
    ('def f(n):\n  yield from range(n)', ['assert list(f(3)) == [0, 1, 2]', 'assert 5 not in f(5)', 'next(f(1))']),
    ('def f(*a, **k): return a, k', ['assert f(1, b={2}) == ((1,), {"b": {2}})']),
    ('def f(x): print("a" * 10 ** 6); return 1', ['assert f(1) == 1', 'assert f(2) == 1']),
    ('def f(x): raise KeyError(x)', ['try:\n  f(1)\n  assert False\nexcept KeyError: pass']),
    ('def f(x): return type(x)', ['assert f(1) is int']),
    ('def f(n): return 3 ** n', ['assert f(100_000) == 3 ** 100_000']),
    ('def f(x): return [x] * 3', ['assert f(None) == [None] * 3', 'assert f("\\ud800é\\0") == ["\\ud800é\\0"] * 3']),
    ('def f(n): return n if n == 0 else f(n - 1)\nimport sys; sys.setrecursionlimit(5000)', ['assert f(3000) == 0']),
    ('if __name__ == "__main__": raise SystemExit\ndef f(): return 1', ['assert f() == 1']),
    (
        'from dataclasses import dataclass\n@dataclass\nclass P:\n  x: int\n  def twice(self): return P(2 * self.x)',
        ['p = P(3)', 'assert p.twice().x == 6', 'p.x = 5', 'assert p.twice().x == 10'],
    ),
    (
        'from collections import *\nimport re, heapq, itertools, functools, random, datetime, string, bisect\n'
        'def f(s): return Counter(s), defaultdict(int, a=1), datetime.datetime.strptime("2020", "%Y").year',
        ['assert f("aab") == ({"a": 2, "b": 1}, {"a": 1}, 2020)'],
    ),
    ('def sum(x): return 7', ['assert sum([1]) == 1']),  # built-in names are the tests' own, unless named
]


@pytest.mark.parametrize(('program', 'tests'), RIGHT)
def test_right_programs_pass(program, tests):
    verdict = grade(program, tests, 20)
    assert verdict.score == 1 and verdict.reason == '' and [part.score for part in verdict.parts] == [1] * len(tests)


def test_parts_and_reasons_tell_which_test_failed():
    verdict = grade('def f(x): return x * x', ['assert f(2) == 4', 'assert f(3) == 6', 'assert f(0) == 0', 'g()'])
    assert verdict.score == 0 and [part.score for part in verdict.parts] == [1, 0, 1, 0]
    assert verdict.reason == 'test 2: AssertionError'
    assert grade('def f(x): 1 / 0', ['f(1)']).reason == 'test 1: ZeroDivisionError: division by zero'
    assert 'NameError: the program defines no g' in grade('', ['g()']).reason
    late = grade('def f(x):\n  while x: pass\n  return x', ['assert f(0) == 0', 'f(1)', 'f(0)'], 1.0)
    assert [part.score for part in late.parts] == [1, 0, 0] and late.reason == 'test 2: took longer than 1 s'


def test_names_and_setup():
    program = 'def sum(x): return 7\ndef helper(x): return "mine"'
    assert grade(program, ['assert sum([1]) == 7'], names=['sum']).score == 1
    assert grade(program, ['assert helper(1) == "theirs"'], setup='def helper(x): return "theirs"').score == 1
    setup = 'def helper(x): return "theirs"'
    assert grade(program, ['assert helper(1) == "mine"'], setup=setup, names=['helper']).score == 1
    assert grade(program, ['pass'], names=['absent']).reason == 'test 1: NameError: the program defines no absent'


def test_bad_requests_are_refused():
    for tests in ([], 'assert True', [''], [1]):
        with pytest.raises(InputError, match='tests: expected'):
            grade('', tests)
    for timeout in (0, -1, '5', math.nan, True, 10**6):
        with pytest.raises(InputError, match='timeout: expected'):
            grade('', ['pass'], timeout)


def test_run_returns_values_and_output():
    program = 'print("hello")\ndef f(x): return {x: (1.5, {2})}\ndef g(): raise ValueError("no")\ndef h(): print("bye")'
    done = run(program, [('f', ['a']), ('g', []), ('h', []), ('i', [])], 20)
    assert [result.value for result in done.results] == [{'a': (1.5, {2})}, None, None, None]
    assert [result.error for result in done.results] == [
        '',
        'ValueError: no',
        '',
        'NameError: the program defines no i',
    ]
    assert done.output == 'hello\nbye\n' and done.error == ''
    broken = run('print(1)\n1 / 0', [('f', [])])
    assert broken.error == broken.results[0].error == 'ZeroDivisionError: division by zero' and broken.output == '1\n'
    strange = run(
        'def f(): return object()\ndef g(): raise ValueError("\\ud800\\x1b[1m\\nand more")', [('f', []), ('g', [])]
    )
    assert strange.results[1].error == 'ValueError: ??[1m'
    with pytest.raises(wire.ProgramError, match='no longer answers'):  # its descriptor may be another file's by now
        list(strange.results[0].value)
    large = run('def f(): return "a" * 2 ** 17', [('f', []), ('f', [])], 20)
    assert ['at most 65536' in result.error for result in large.results] == [True, False]
    assert large.results[1].error == 'ProgramError: the program no longer answers'
    assert run('while True: pass', timeout=0.5).error
    endless = run('def f():\n  while True: pass', [('f', [])], timeout=0.5)
    assert endless.error == 'took longer than 0.5 s' and endless.results[0].error


def test_a_hanging_program_holds_up_no_other():
    slow = 'def f(x):\n  while True: pass  # {}'
    with ThreadPoolExecutor(12) as pool:
        start = time.monotonic()
        hanging = [pool.submit(grade, slow.format(i), ['f(1)'], 4.0) for i in range(4)]
        time.sleep(0.2)
        right = [pool.submit(grade, f'def f(x): return x + {i}', [f'assert f(1) == {i + 1}']) for i in range(12)]
        assert all(future.result().score == 1 for future in right)
        assert not any(future.done() for future in hanging)
        assert all(future.result().reason == 'test 1: took longer than 4 s' for future in hanging)
        assert time.monotonic() - start < 12


def test_verdicts_are_kept(monkeypatch):
    program, tests = 'import random\nvalue = random.random()\ndef f(): return value', ['assert f() > 2']
    first = grade(program, tests)
    monkeypatch.setattr(sandbox, '_process', None)  # nothing is started any more
    assert grade(program, tests) == first
    for other in ((program + ' ', tests, 5.0), (program, tests * 2, 5.0), (program, tests, 4.0)):
        with pytest.raises(TypeError):
            grade(*other)


def test_a_killed_launcher_is_replaced():
    grade(hostile.PASS, ['assert f(2) == 4', 'assert f(3) == 6'])
    process = sandbox._launcher().process
    process.kill()
    process.wait()
    assert grade(hostile.PASS, ['assert f(3) == 6', 'assert f(2) == 4']).score == 1


def test_a_launcher_killed_at_work_is_no_verdict():
    """A program is not to blame, nor to be remembered as wrong, when the machine runs out of memory."""
    program = 'import time\ndef f(x): time.sleep(1.0); return x + x'
    with ThreadPoolExecutor(1) as pool:
        grading = pool.submit(grade, program, ['assert f(2) == 4'], 20.0)
        time.sleep(0.5)
        sandbox._launcher().process.kill()
        with pytest.raises(ChildProcessError, match='was killed'):
            grading.result()
    assert grade(program, ['assert f(2) == 4'], 20.0).score == 1


def test_every_layer_is_there():
    """While a program runs: another user, no new rights, a filter, and nothing that can start others."""
    assert confined(0) == []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(grade, 'import time\ntime.sleep(1.5)', ['pass'], 20.0)
        processes = confined(2)
        time.sleep(0.3)
        states = [Path(f'/proc/{process}/status').read_text() for process in processes]
        limits = [Path(f'/proc/{process}/limits').read_text() for process in processes]
        files = [len(os.listdir(f'/proc/{process}/fd')) for process in processes] if os.geteuid() == 0 else [4, 5]
        assert running.result().score == 1
    user = NOBODY if os.geteuid() == 0 else os.geteuid()
    wrapped = sandbox._launcher().process.args[0].endswith('bwrap')
    for state, limit in zip(states, limits, strict=True):
        fields = dict(line.split(':\t', 1) for line in state.splitlines() if ':\t' in line)
        assert fields['NoNewPrivs'] == '1' and fields['Seccomp'] == '2' and set(fields['CapEff']) == {'0'}
        assert wrapped or fields['Uid'].split() == [str(user)] * 4
        assert 'Max processes             0 ' in limit and f'Max address space         {2**29} ' in limit
    assert sorted(files) == [4, 5]  # /dev/null three times and a socket; the tests have one more


def test_verdicts_do_not_depend_on_the_order_of_a_set():
    found = {str(run(f'def f(): return list({{"a", "b", "c", "d"}})  # {i}', [('f', [])]).results) for i in range(3)}
    assert len(found) == 1


def test_without_confinement_nothing_runs(root, tmp_path):
    """Where the kernel has no filter, as is pretended here, no program is run."""
    code = (
        f'import sys; sys.path.insert(0, {str(root)!r})\n'
        'from data.tasks.sandbox import confine\n'
        'confine._prctl = lambda *a: None\n'
        'from data.tasks.sandbox import launcher; launcher.main()'
    )
    script = f'import data.tasks.sandbox as s\ns.START = {code!r}\ns.grade({hostile.PASS!r}, {hostile.TESTS!r})'
    done = subprocess.run([sys.executable, '-c', script], cwd=root, capture_output=True, text=True, timeout=100)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and 'programs cannot be confined here' in last and 'use Linux on' in last


@pytest.mark.skipif(not shutil.which('bwrap'), reason='bubblewrap is not installed')
def test_bubblewrap_is_used_where_it_works():
    works = (
        subprocess.run(['bwrap', '--unshare-all', '--ro-bind', '/', '/', 'true'], capture_output=True).returncode == 0
    )
    grade(hostile.PASS, hostile.TESTS)
    assert sandbox._launcher().process.args[0].endswith('bwrap') == works


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='numbers of x86-64')
def test_calls_have_the_numbers_of_the_kernel_headers():
    from data.tasks.sandbox import confine

    for machine, header in (('x86_64', 'x86_64-linux-gnu/asm/unistd_64.h'), ('aarch64', 'asm-generic/unistd.h')):
        path = Path('/usr/include') / header
        numbers = confine.MACHINES[machine][1].split()
        assert len(numbers) == len(set(numbers)) == len(confine.CALLS.split())
        if not path.exists():
            continue
        text = path.read_text().replace('NR3264_', 'NR_')
        for name, number in zip(confine.CALLS.split(), numbers, strict=True):
            known = {'poll': 'ppoll', 'select': 'pselect6'}.get(name, name) if machine == 'aarch64' else name
            assert f'__NR_{known} {number}\n' in text


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | st.sampled_from(
        [range(3), int, deque([1]), Counter('aab'), OrderedDict(b=1, a=2), {3}, frozenset([1]), 10**99, -(2**63)]
    ),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(VALUES)
@settings(max_examples=60, deadline=None)
def test_values_survive_the_wire(value):
    back = wire.decode(json.loads(json.dumps(wire.encode(value, len))), len)
    assert repr(back) == repr(value) and type(back) is type(value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=8))
@settings(max_examples=60, deadline=None)
def test_whatever_is_sent_becomes_plain_values_or_an_error(data):
    kinds = {*wire.SEQUENCES.values(), *wire.MAPPINGS.values(), *wire.BYTES.values()}
    try:
        value = wire.decode(data, lambda number: None)
    except (ValueError, TypeError, KeyError, OverflowError, AttributeError):
        return
    assert value is None or type(value) in kinds | {bool, int, str, float, complex, range, type}


# Records


def records(tmp_path, name, lines):
    path = tmp_path / name
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return str(path)


HUMANEVAL = {
    'task_id': 'Test/0',
    'prompt': 'def half(x):\n    return x / 2\n\n\ndef twice(x):\n    """Twice x: half(twice(x)) == x."""\n    ',
    'entry_point': 'twice',
    'canonical_solution': '    return 2 * x\n',
    'test': 'def check(candidate):\n    for n in range(5):\n        assert half(candidate(n)) == n\n',
}
MBPP = {
    'task_id': 1,
    'text': 'Write a function to add up a list.',
    'code': 'def sum(x):\r\n  return 0 if not x else x[0] + sum(x[1:])',
    'test_setup_code': '',
    'test_list': ['assert sum([1, 2]) == 3', 'assert sum([]) == 0', 'assert sum([5]) == 5'],
    'challenge_test_list': [],
}


def test_records_of_humaneval(tmp_path):
    path = records(tmp_path, 'a.jsonl', [HUMANEVAL])
    task = get_task('code_records', path=path, whole=True)
    prompt = task.prompt(3)
    assert prompt.text == HUMANEVAL['prompt'] and 'check' not in prompt.text
    right = [
        prompt.reference,
        '\n    return x + x',
        'def twice(x): return x + x',
        'Sure:\n```python\ndef twice(x):\n  return 2 * x\n```\nDone.',
    ]
    for completion in right:
        assert task.verify(prompt, completion).score == 1
    # The tests' own half() is what the prompt says, whatever the program makes of it.
    wrong = [
        '',
        '    return x',
        '    pass',
        'def twice(x): return 0\ndef half(x): return x',
        'twice',
        '```',
        'x' * 10**6,
    ]
    for completion in wrong:
        assert task.verify(prompt, completion).score == 0


def test_records_of_mbpp(tmp_path):
    path = records(tmp_path, 'a.jsonl', [MBPP])
    task = get_task('code_records', path=path, form='mbpp', whole=True)
    prompt = task.prompt(0)
    assert MBPP['test_list'][0] in prompt.text and not any(test in prompt.text for test in MBPP['test_list'][1:])
    assert task.verify(prompt, prompt.reference).score == 1
    for completion in ('', 'def total(x): return 3', 'def sum(x): return 3', 'def sum(x): return len(x) and x[0] * 3'):
        assert task.verify(prompt, completion).score == 0


def test_records_are_split_and_checked(tmp_path):
    path = records(tmp_path, 'a.jsonl', [{**MBPP, 'text': f'Problem {i}.'} for i in range(100)])
    texts = {
        split: {task.prompt(i).text for i in range(100)}
        for split in ('train', 'heldout')
        for task in [get_task('code_records', split, path=path, form='mbpp')]
    }
    assert len(texts['train'] | texts['heldout']) == 100 and not texts['train'] & texts['heldout']
    assert 1 <= len(texts['heldout']) <= 25
    for message, lines, options in [
        ('path: expected', None, {}),
        ('did you mean', [MBPP], {'form': 'mbp'}),
        ("no field 'prompt'", [MBPP], {}),
        ('record 1: not of the form mbpp: test_list: expected', [MBPP, {'text': 'a', 'code': ''}], {'form': 'mbpp'}),
        ('record 0: not of the form mbpp: invalid syntax', [{**MBPP, 'code': 'def'}], {'form': 'mbpp'}),
        ('record 0: not of the form humaneval', [{**HUMANEVAL, 'entry_point': None, 'test': ['x']}], {}),
    ]:
        with pytest.raises(InputError, match=message):
            get_task('code_records', path=records(tmp_path, 'b.jsonl', lines) if lines else '', **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('form', 'file', 'count'), [('humaneval', 'humaneval_164.jsonl.gz', 164), ('mbpp', 'mbpp_974.jsonl.gz', 974)]
)
def test_references_of_published_sets_pass(form, file, count):
    """All of them; one of MBPP (123) takes ten seconds."""
    if not (DATA / file).exists():
        pytest.skip(f'no {DATA / file}; the environment variable TORSO_RECORDS names the folder above')
    task = get_task('code_records', 'heldout', path=str(DATA / file), form=form, whole=True, timeout=120.0)
    prompts = [task.prompt(i) for i in range(count)]
    stub = {'humaneval': lambda p: '    return None', 'mbpp': lambda p: f'def {p.info["names"][0]}(*a): return None'}
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda p: task.verify(p, p.reference), prompts))
        stubs = list(pool.map(lambda p: task.verify(p, stub[form](p)), prompts))
    assert not [(p.text, v.reason) for p, v in zip(prompts, verdicts, strict=True) if v.score < 1]
    assert not [p.text for p, v in zip(prompts, stubs, strict=True) if v.score > 0]


@pytest.mark.slow
def test_rate():
    """Prints verdicts a second for trivial programs; nothing is asserted of it, as machines differ."""
    for threads in (1, 2, 4):
        programs = [f'{hostile.PASS}  # {threads} {i}' for i in range(300)]
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            verdicts = list(pool.map(lambda program: grade(program, hostile.TESTS), programs))
        print(f'{threads} threads: {len(programs) / (time.perf_counter() - start):.0f} verdicts a second')
        assert all(verdict.score == 1 for verdict in verdicts)
