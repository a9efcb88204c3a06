"""Proof: derive a formula of propositional logic from premises, a rule a line."""

import functools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, permutations, product
from typing import NamedTuple, TypeAlias, TypeVar

from data.metamath import Database
from data.tasks import Part, ProceduralTask, Prompt, Verdict, lines, register, uniform

ATOMS = 'pqrstu'
# Modus ponens and tollens, hypothetical and disjunctive syllogism, conjunction, its two simplifications, addition, and
# proof by cases. The premises of a rule are cited in this order.
LOGIC = """
$c ( ) > & | ~ wff |- $.  $v p q r s t u $.
wp $f wff p $.  wq $f wff q $.  wr $f wff r $.  ws $f wff s $.  wt $f wff t $.  wu $f wff u $.
not $a wff ~ p $.  imp $a wff ( p > q ) $.  and $a wff ( p & q ) $.  or $a wff ( p | q ) $.
${ mp.1 $e |- p $.  mp.2 $e |- ( p > q ) $.  mp $a |- q $. $}
${ mt.1 $e |- ( p > q ) $.  mt.2 $e |- ~ q $.  mt $a |- ~ p $. $}
${ hs.1 $e |- ( p > q ) $.  hs.2 $e |- ( q > r ) $.  hs $a |- ( p > r ) $. $}
${ ds.1 $e |- ( p | q ) $.  ds.2 $e |- ~ p $.  ds $a |- q $. $}
${ join.1 $e |- p $.  join.2 $e |- q $.  join $a |- ( p & q ) $. $}
${ left.1 $e |- ( p & q ) $.  left $a |- p $. $}
${ right.1 $e |- ( p & q ) $.  right $a |- q $. $}
${ add.1 $e |- p $.  add $a |- ( p | q ) $. $}
${ cases.1 $e |- ( p | q ) $.  cases.2 $e |- ( p > r ) $.  cases.3 $e |- ( q > r ) $.  cases $a |- r $. $}
"""
# What each symbol's statement there is called.
SYNTAX = {'~': 'not', '>': 'imp', '&': 'and', '|': 'or'} | {atom: f'w{atom}' for atom in ATOMS}
LINE = re.compile(r'([1-9][0-9]?) (\S{1,40}) ([a-z]{1,5})((?: [1-9][0-9]?){1,3})')
LONGEST = 15  # symbols of a formula in a problem
MAX_LINES = 32  # of a completion


T = TypeVar('T')


class Rule(NamedTuple):
    variables: list[str]
    premises: list[str]
    conclusion: str


# How a problem's formulas are proved: by a rule, from formulas. Formulas are kept in the symbols of LOGIC, with all
# their parentheses, and written without the outermost.
Steps: TypeAlias = dict[str, tuple[str, list[str]]]


@register('proof')
@dataclass(kw_only=True)
class Proof(ProceduralTask):
    """Prove a formula in `steps` applications of a rule, from numbered premises, `distractors` of which are not needed.

    A line of a completion is its number (they go on from the premises), a formula, a rule and the numbers of the lines
    the rule takes, as in `4 q mp 1 2`; the last line is the goal. Any proof will do. Each line is translated to a
    Metamath theorem with the premises as hypotheses, and that checker judges; parts are lines, 1 if proved from lines
    that are. The split is by goal and needed premises, whatever the names of atoms.
    """

    steps: tuple[int, int] = (1, 3)
    distractors: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps = self._interval('steps', 1, 12)
        self._integer('distractors', 0, 6)

    def draw(self, rng: random.Random) -> tuple[str, tuple[str, Steps]]:
        count = uniform(rng, *self.steps)
        while (drawn := _derive(rng, count)) is None:
            pass
        return _canonical(drawn[0], _premises(drawn[1])), drawn

    def pose(self, key: str, problem: tuple[str, Steps], rng: random.Random) -> Prompt:
        goal, steps = problem
        premises = _premises(steps)
        seen = set(ATOMS).intersection(''.join([goal, *premises]))
        atoms = ''.join(sorted(ATOMS, key=lambda atom: (atom not in seen, atom)))[: max(4, len(seen))]
        count = len(premises) + self.distractors
        while len(premises) < count:
            formula = _random_formula(rng, atoms, 0.9)
            if formula not in steps and formula not in premises and not _gives_away(goal, formula):
                premises.append(formula)
        rng.shuffle(premises)
        numbers = {formula: number for number, formula in enumerate(premises, 1)}
        proof = []
        for formula in _in_order(goal, steps):
            numbers[formula] = len(numbers) + 1
            rule, needed = steps[formula]
            proof.append(' '.join(map(str, [numbers[formula], _write(formula), rule, *(numbers[n] for n in needed)])))
        given = [f'{number} {_write(premise)}' for number, premise in enumerate(premises, 1)]
        info = {'premises': premises, 'goal': goal}
        return Prompt('\n'.join([f'Prove {_write(goal)}.', *given]), '\n'.join(proof), key, info)

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        found = lines(completion, MAX_LINES)
        proved = _prove(prompt.info['premises'], [line.text for line in found[:MAX_LINES]])
        parts = [Part('line', float(bool(f)), x.start, x.end) for f, x in zip(proved, found, strict=False)]
        reason = ''
        if not proved or proved[-1] != prompt.info['goal']:
            parts.append(Part('goal', 0.0, len(completion), len(completion)))
            reason = 'the last line does not prove the goal'
        elif not all(proved):
            reason = 'a line is not proved'
        if len(found) > MAX_LINES:
            reason = f'more than {MAX_LINES} lines'
        return Verdict(float(not reason), tuple(parts), reason)


def _prove(premises: list[str], proof: list[str]) -> list[str]:
    """The formula of each line that is proved, '' for the others.

    Premises become hypotheses of one block, lines theorems in it. A theorem takes, each time it is cited, the variables
    of the premises and its own, and all premises.
    """
    formulas = dict(enumerate(premises, 1))
    block = [f'l{number} $e |- {" ".join(premise)} $.' for number, premise in formulas.items()]

    def translate(number: int, line: str) -> str:
        """The labels that prove the line, '' if it is not of the form, or does not fit its rule."""
        form = LINE.fullmatch(line)
        formula = _read(form[2]) if form and form[1] == str(number) and form[3] in _rules() else ''
        if form is None or not formula:
            return ''
        rule, cited, values = _rules()[form[3]], [int(n) for n in form[4].split()], dict[str, str]()
        claims = [*(formulas.get(n, '') for n in cited), formula]
        fits = zip([*rule.premises, rule.conclusion], claims, strict=False)
        if len(cited) != len(rule.premises) or not all(
            claim and _match(pattern, claim, values) for pattern, claim in fits
        ):
            return ''
        formulas[number] = formula
        labels = [SYNTAX[symbol] for name in rule.variables for symbol in _postfix(values[name])]
        for n in cited:
            if n > len(premises):
                used = set(formulas[n]).union(*premises)
                labels += [SYNTAX[atom] for atom in ATOMS if atom in used]
                labels += [f'l{i + 1}' for i in range(len(premises))]
            labels.append(f'l{n}')
        return ' '.join([*labels, form[3]])

    numbers = range(len(premises) + 1, len(premises) + len(proof) + 1)
    for number, line in zip(numbers, proof, strict=True):
        if labels := translate(number, line):
            block.append(f'l{number} $p |- {" ".join(formulas[number])} $= {labels} $.')
    database = Database.parse('\n'.join(['${', *block, '$}']), base=_logic())
    proved = {label for label in database.theorems if not database.check(label)}
    return [formulas[number] if f'l{number}' in proved else '' for number in numbers]


@functools.cache
def _logic() -> Database:
    return Database.parse(LOGIC)


@functools.cache
def _rules() -> dict[str, Rule]:
    """The rules of LOGIC by name."""
    rules, statements = {}, _logic().statements
    for label, rule in statements.items():
        if rule.kind == '$a' and rule.symbols[0] == '|-':
            taken = [statements[name].symbols for name in rule.hypotheses]
            premises = [''.join(symbols[1:]) for symbols in taken if symbols[0] == '|-']
            rules[label] = Rule([s[1] for s in taken if s[0] == 'wff'], premises, ''.join(rule.symbols[1:]))
    return rules


# Formulas


def _write(formula: str) -> str:
    return formula[1:-1] if formula[0] == '(' else formula


def _read(text: str) -> str:
    """The formula that is written so, '' if there is none."""
    for formula in (text, f'({text})'):
        try:
            if _end(formula, 0) == len(formula) and _write(formula) == text:
                return formula
        except (IndexError, ValueError):
            pass
    return ''


def _end(text: str, at: int) -> int:
    """Where the formula ends that begins there. Raises IndexError or ValueError if none does."""
    if text[at] == '~':
        return _end(text, at + 1)
    if text[at] == '(':
        middle = _end(text, at + 1)
        end = _end(text, middle + 1)
        if text[middle] in '>&|' and text[end] == ')':
            return end + 1
    elif text[at] in ATOMS:
        return at + 1
    raise ValueError


def _postfix(formula: str) -> str:
    """The formula with its operators behind their operands and no parentheses."""
    if formula[0] == '~':
        return f'{_postfix(formula[1:])}~'
    if formula[0] == '(':
        middle = _end(formula, 1)
        return _postfix(formula[1:middle]) + _postfix(formula[middle + 1 : -1]) + formula[middle]
    return formula


def _match(pattern: str, formula: str, values: dict[str, str]) -> bool:
    """Whether the formula is the pattern with values for its atoms, which are entered."""
    at = 0
    for symbol in pattern:
        end = _end(formula, at) if symbol in ATOMS else at + 1
        if formula[at:end] != (values.setdefault(symbol, formula[at:end]) if symbol in ATOMS else symbol):
            return False
        at = end
    return True


# Making problems


def _derive(rng: random.Random, count: int) -> tuple[str, Steps] | None:
    """A goal and `count` steps to it, found backwards from it; None if the way was blocked.

    No formula is there twice, and a step adds a premise on average at most, so that problems stay short.
    """
    goal = _random_formula(rng, ATOMS, 0.5)
    steps: Steps = {}
    unproved, rules = [goal], list(_rules().items())
    for _ in range(40 * count):
        formula, (name, rule) = _pick(rng, unproved), _pick(rng, rules)
        values: dict[str, str] = {}
        if len(unproved) + len(rule.premises) > count + 2 or not _match(rule.conclusion, formula, values):
            continue
        for variable in rule.variables:
            if variable not in values:
                values[variable] = _random_formula(rng, ATOMS, 0.25)
        premises = [''.join([values.get(symbol, symbol) for symbol in premise]) for premise in rule.premises]
        known = {*steps, *unproved, *premises}
        if len(known) < len(steps) + len(unproved) + len(premises) or max(map(len, premises)) > LONGEST:
            continue
        steps[formula] = name, premises
        unproved.remove(formula)
        unproved += premises
        if len(steps) == count:
            # A conjunction with the goal among the premises would make the other steps idle.
            idle = count > 1 and any(_gives_away(goal, premise) for premise in _premises(steps))
            return None if idle else (goal, steps)
    return None


def _gives_away(goal: str, premise: str) -> bool:
    return premise.startswith(f'({goal}&') or premise.endswith(f'&{goal})')


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[uniform(rng, 0, len(items) - 1)]


def _random_formula(rng: random.Random, atoms: str, compound: float) -> str:
    """An atom or, with that chance, something of one or two atoms."""
    left = _pick(rng, atoms)
    if rng.random() >= compound:
        return left
    operator = _pick(rng, '~~>&|')
    return f'~{left}' if operator == '~' else f'({left}{operator}{_pick(rng, atoms.replace(left, ""))})'


def _premises(steps: Steps) -> list[str]:
    """What the steps take and none of them proves."""
    return [premise for _, premises in steps.values() for premise in premises if premise not in steps]


def _in_order(formula: str, steps: Steps) -> Iterator[str]:
    """The formulas that steps prove, each after what it takes."""
    if formula in steps:
        for premise in steps[formula][1]:
            yield from _in_order(premise, steps)
        yield formula


def _canonical(goal: str, premises: list[str]) -> str:
    """Equal for problems that differ in the names of atoms and the order of premises only."""

    def pattern(atom: str) -> str:
        """How the atom stands among the others, which may well tell it from all of them."""
        table = str.maketrans(ATOMS, ''.join('x' if other == atom else '.' for other in ATOMS))
        return '; '.join([*sorted(premise.translate(table) for premise in premises), goal.translate(table)])

    alike: dict[str, list[str]] = {}
    for atom in ATOMS:
        if atom in ''.join([goal, *premises]):
            alike.setdefault(pattern(atom), []).append(atom)
    forms = []
    for order in product(*(permutations(alike[key]) for key in sorted(alike))):
        table = str.maketrans(dict(zip(chain.from_iterable(order), ATOMS, strict=False)))
        given = sorted(premise.translate(table) for premise in premises)
        forms.append(f'{"; ".join(map(_write, given))} so {_write(goal.translate(table))}')
    return min(forms)
