"""Mathematics: problems from records with a final answer, which may be written in any equivalent way."""

import re
from dataclasses import dataclass
from fractions import Fraction

from data.equivalence import Checker
from data.errors import InputError
from data.files import Record
from data.tasks import Prompt, Verdict, final_answer, register
from data.tasks.records import RecordTask, canonical, string

MAX_ANSWER = 300  # characters: the longest of MATH's 5,000 test answers has 81
BOXED = '\\boxed{'
CALCULATOR = re.compile(r'<<[^<>\n]*>>')
NUMBER = re.compile(r'([+-]?)(\d{1,40}|\d{1,3}(?:,\d{3}){1,12})?(\.\d{1,40})?')
# What is still to be worked out. A sign is none, an operator stands behind something.
WORK = re.compile(r'[\w)\]}!]\s*[+*!-]|\^|\\(?:cdot|times|binom|sum|prod|int|lim|gcd|det|log|ln)(?![a-z])')
DIVISION = re.compile(r'[/÷]|\\[dt]?frac|\\div')
SUBSCRIPT = re.compile(r'_\s*\{?\s*(\w+)')  # of a number: its base, which the library does not read
DEGREES = re.compile(r'\^\s*(?:\\circ|\{\s*\\circ\s*\})|°')
# Signs that surround an answer or punctuate it and say nothing about it.
DECORATION = re.compile(r'\\[()\[\]](?![a-z])|\\?\$|\\[,;:!]|\\(?:left|right)(?![a-z])')

_checker = Checker()


@register('mathematics')
@dataclass(kw_only=True)
class Mathematics(RecordTask):
    """Records as published, of three forms, told apart by their fields.

    - GSM8K (Cobbe et al. 2021): `question`, and `answer` that ends in a line `#### N`. Marks of the calculator
      (`<<48/2=24>>`) are left out of the reference.
    - MATH (Hendrycks et al. 2021): `problem`, `solution` and its final `answer`.
    - MATH as a task in context: `context`, `chain_of_thought`, `answer`.

    The final answer is the X of a last line `Answer: X`, and references end in such a line. Where a record's own
    solution boxes its answer, as MATH's do, the last `\\boxed{X}` counts if there is no such line. Numbers compare
    exactly, other answers by math-verify (`data.equivalence`). An answer that leaves work to be done where the
    reference leaves none (`3+3` for `6`) is wrong, as otherwise saying the question again could be right. Units,
    percent signs and the base of a number may be left out.
    """

    def pose(self, record: Record) -> Prompt:
        if 'question' in record:
            question = string(record, 'question')
            solution, mark, answer = CALCULATOR.sub('', string(record, 'answer')).rpartition('####')
            if not mark:
                raise InputError("answer: expected a last line '#### N'")
        elif 'problem' in record:
            question, solution, answer = (string(record, field) for field in ('problem', 'solution', 'answer'))
        elif 'context' in record:
            question, solution, answer = (string(record, field) for field in ('context', 'chain_of_thought', 'answer'))
        else:
            raise InputError(f'expected question, problem or context among the fields {", ".join(record) or "(none)"}')
        answer = ' '.join(answer.split())
        if not 0 < len(answer) <= MAX_ANSWER:
            raise InputError(f'answer: expected 1 to {MAX_ANSWER} characters, got {len(answer)}')
        return Prompt(
            text=question.strip(),
            reference=f'{solution.strip()}\nAnswer: {answer}',
            key=canonical(question),
            info={'answer': answer, 'boxed': BOXED in solution},
        )

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        answer = final_answer(completion)
        if answer is None and prompt.info['boxed']:
            answer = boxed(completion)
        reason = 'no final answer' if answer is None else wrong(prompt.info['answer'], answer)
        return Verdict(float(not reason), (), reason)


def wrong(reference: str, answer: str) -> str:
    """Why `answer` is not the same as `reference`, or '' if it is."""
    if not 0 < len(answer) <= MAX_ANSWER:
        return 'no answer' if not answer else f'an answer of more than {MAX_ANSWER} characters'
    expected, given = bare(reference), bare(answer)
    if expected == given:
        return ''
    number = plain_number(expected)
    if number is not None and (other := plain_number(given)) is not None:
        return '' if number == other else 'wrong answer'
    whole = number is not None and number.denominator == 1
    bases = sorted(SUBSCRIPT.findall(given))
    if bases and bases != sorted(SUBSCRIPT.findall(expected)):
        return 'wrong answer'
    if (WORK.search(given) and not WORK.search(expected.replace('\\pm', '+'))) or (whole and DIVISION.search(given)):
        return 'the answer is not worked out'
    same = _checker.equivalent(expected, given)
    return '' if same else 'wrong answer' if same is False else 'the answer takes too long to check'


def bare(answer: str) -> str:
    """An answer without the signs that surround it."""
    if answer.startswith(BOXED):
        answer = answer[len(BOXED) :].removesuffix('}')
    answer = DEGREES.sub('', DECORATION.sub('', answer)).strip()
    return ' '.join(answer.removesuffix('.').split())


def plain_number(text: str) -> Fraction | None:
    """The value of digits with a sign, commas between thousands and a decimal point; None for anything else."""
    match = NUMBER.fullmatch(text)
    if not match or not (match[2] or match[3]) or not text.isascii():
        return None
    return Fraction(f'{match[1]}{(match[2] or "0").replace(",", "")}{match[3] or ""}')


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}`, if it is closed and not too long."""
    start = text.rfind(BOXED) + len(BOXED)
    depth = 1
    for end in range(start, min(len(text), start + MAX_ANSWER + 1)) if start >= len(BOXED) else ():
        depth += {'{': 1, '}': -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return None
