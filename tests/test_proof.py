"""The task 'proof': what it takes follows from the premises, and a problem keeps its key under other names."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tasks import Prompt, get_task
from data.tasks.proof import ATOMS, _canonical, _read, _rules, _write

FORMULAS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        inner.map('~{}'.format), st.tuples(inner, st.sampled_from('>&|'), inner).map(lambda f: f'({"".join(f)})')
    ),
    max_leaves=5,
)
PROMPT = Prompt('', '', '', {'premises': ['p', '(p>q)', '(q>(r&s))', '(t|~p)'], 'goal': 's'})
PROOF = ['5 q mp 1 2', '6 r&s mp 5 3', '7 s right 6']


class Worlds(int):
    """The set of those of the 64 worlds in which a formula is true, computed by Python's own parser."""

    def __invert__(self):
        return Worlds(2**64 - 1 - self)

    def __and__(self, other):
        return Worlds(int(self) & int(other))

    def __or__(self, other):
        return Worlds(int(self) | int(other))

    def __gt__(self, other):
        return ~self | other


TRUE = {atom: Worlds(sum(1 << world for world in range(64) if world >> n & 1)) for n, atom in enumerate(ATOMS)}


def follows(premises, formula):
    return int(eval('&'.join([*premises, f'~{formula}']), {}, TRUE)) == 0


def judge(prompt, completion):
    verdict = get_task('proof').verify(prompt, completion)
    assert (verdict.score == 1) == (verdict.reason == '')
    return verdict.score, [part.score for part in verdict.parts]


def test_every_rule_is_sound():
    assert len(_rules()) == 9
    assert all(follows(rule.premises, rule.conclusion) for rule in _rules().values())


@given(FORMULAS)
def test_formulas_are_read_as_written(formula):
    assert _read(_write(formula)) == formula
    if formula[0] == '(':
        assert _read(formula) == ''


@pytest.mark.parametrize(
    'text', ['', '(p)', '(p>q)', 'p>', '>p', 'p>q>r', '~', 'x', '(p>q', 'p>q)', '~(p)', 'p q', '((p>q)>r)']
)
def test_nothing_else_is_read(text):
    assert _read(text) == ''


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_what_is_taken_follows(index, steps, seed, changes):
    """Whatever is done to a right proof: no line is taken that does not follow from the premises."""
    task, rng = get_task('proof', steps=steps), random.Random(seed)
    prompt = task.prompt(index)
    premises = prompt.info['premises']
    tokens = re.findall(r'[0-9]+|[a-z]+|.|\n', prompt.reference)
    for _ in range(changes):
        at = rng.randrange(len(tokens))
        tokens[at : at + rng.randrange(2)] = rng.choice([[rng.choice(tokens)], [rng.choice(tokens)], []])
    completion = ''.join(tokens)
    verdict = task.verify(prompt, completion)
    right = [completion[part.start : part.end] for part in verdict.parts if part.score]
    assert all(follows(premises, _read(line.split(' ')[1])) for line in right)
    if verdict.score:
        assert _read(right[-1].split(' ')[1]) == prompt.info['goal']


def test_any_proof_will_do_and_its_lines_are_judged_one_by_one():
    def after(*proof):
        return judge(PROMPT, '\n'.join(proof))

    assert after(*PROOF) == (1, [1, 1, 1])
    assert after('5 p>(r&s) hs 2 3', '6 r&s mp 1 5', '7 s right 6') == (1, [1, 1, 1])
    assert after('5 q mp 1 2', '6 q|(t>t) add 5', '7 r&s mp 5 3', '8 s right 7') == (1, [1, 1, 1, 1])
    assert after(*PROOF[:2]) == (0, [1, 1, 0])  # the goal is missing
    assert after('5 q mp 2 1', *PROOF[1:]) == (0, [0, 0, 0, 0])
    assert after('5 r mp 1 2', '6 q mp 1 2', '7 r&s mp 6 3', '8 s right 7') == (0, [0, 1, 1, 1])
    assert after(*PROOF, '8 r left 6') == (0, [1, 1, 1, 1, 0])
    assert after(*PROOF[1:]) == (0, [0, 0, 0])
    for line in ('5 q mp 1', '5 q mp 1 2 3', '5 q mp 1 9', '5 q mp 5 2', '5 q mp  1 2', '6 q mp 1 2', '5 q MP 1 2',
                 '5 (q) mp 1 2', '05 q mp 1 2', '5 q mp 01 2', '5 q foo 1 2', '5 q 1 2', 'q mp 1 2', '5 ~~p mp 1 2',
                 '5 q wp 1 2', '5 q imp 1 2', '5 q mp 1 2 $.', '5 $= mp 1 2', '5 q mp 1 ٢', '5 q ? 1 2'):  # fmt: skip
        assert after(line, *PROOF[1:])[0] == 0 and after(line)[1] == [0, 0], line


@given(st.permutations(ATOMS), st.integers(0, 10**6), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_names_and_order_are_neither_in_the_key_nor_in_the_verdict(names, index, steps, rng):
    task, table = get_task('proof', steps=steps, distractors=0), str.maketrans(dict(zip(ATOMS, names, strict=True)))
    prompt = task.prompt(index)
    premises, goal = ([p.translate(table) for p in prompt.info['premises']], prompt.info['goal'].translate(table))
    renamed = Prompt('', '', '', {'premises': premises, 'goal': goal})
    proof = [line.split(' ') for line in prompt.reference.split('\n')]
    proof = [' '.join([number, formula.translate(table), *rest]) for number, formula, *rest in proof]
    assert judge(renamed, '\n'.join(proof))[0] == 1 and judge(renamed, '\n'.join(proof[:-1]))[0] == 0
    assert _canonical(goal, rng.sample(premises, len(premises))) == prompt.key
    assert _canonical(goal, [*premises[1:], f'~{premises[0]}']) != prompt.key


def test_problems_are_as_long_as_asked_for():
    for steps, distractors in [(1, 0), (1, 6), (3, 1), (12, 6)]:
        for split in ('train', 'heldout'):
            task = get_task('proof', split, steps=steps, distractors=distractors)
            for index in range(20):
                prompt = task.prompt(index)
                given = prompt.text.split('\n')[1:]
                assert prompt.reference.count('\n') + 1 == steps and 1 <= len(given) - distractors <= steps + 1 + (
                    steps == 1
                )
                assert prompt.info['goal'] not in prompt.info['premises'] and len(set(given)) == len(given)
                needed = {int(n) for line in prompt.reference.split('\n') for n in re.findall(r'(?<= )\d+', line)}
                assert len(needed & set(range(1, len(given) + 1))) == len(given) - distractors
