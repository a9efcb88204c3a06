"""Code records: problems from a file, in the form of HumanEval or of MBPP, with the tests that came with them.

HumanEval (Chen et al. 2021, arXiv:2107.03374): `prompt` begins a program, `canonical_solution` ends it, `test` defines
`check(candidate)`. MBPP (Austin et al. 2021, arXiv:2108.07732): `text` describes, `code` solves, `test_list` asserts.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass

from data.errors import InputError, did_you_mean
from data.files import JsonLinesSource, Record
from data.tasks import ProceduralTask, Prompt, Verdict, register
from data.tasks.sandbox import grade

LONGEST = 100_000  # characters of a completion


@register('code_records')
@dataclass(kw_only=True)
class CodeRecords(ProceduralTask):
    """The problems of `path`, a JSON Lines file (or glob) of the `form` 'humaneval' or 'mbpp', in their order.

    A tenth is held out, unless `whole`: then all problems are in either split, as fits a set that is for evaluation
    alone. An answer is a program, or what follows the prompt of HumanEval; if it has a block between ``` marks, the
    first of them. Programs run in the sandbox and must pass all tests within `timeout` seconds. Of MBPP's tests the
    first is shown.
    """

    path: str = ''
    form: str = 'humaneval'
    whole: bool = False
    timeout: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise InputError(f'task {self.name!r}: form {self.form!r}{did_you_mean(self.form, FORMS)}')
        if not self.path:
            raise InputError(f'task {self.name!r}: path: expected a JSON Lines file')
        text, make = FORMS[self.form]
        source = JsonLinesSource(self.path, field=text)
        self._prompts: list[Prompt] = []
        for number in range(len(source)):
            try:
                prompt = make(source[number])
            except (TypeError, SyntaxError) as error:
                raise InputError(f'{self.path}: record {number}: not of the form {self.form}: {error}') from error
            if self.whole or self.in_split(prompt.key):
                self._prompts.append(prompt)
        if not self._prompts:
            raise InputError(f'{self.path}: no {self.split} problem in it; see option whole')

    def prompt(self, index: int) -> Prompt:
        return self._prompts[index % len(self._prompts)]

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        if len(completion) > LONGEST:
            return Verdict(0.0, reason='the program is too long')
        if not completion.strip():
            return Verdict(0.0, reason='no program')
        before, mark, block = completion.partition('```')
        program = block.partition('\n')[2].partition('```')[0] if mark else before
        info = prompt.info
        return grade(info['begin'] + program, info['tests'], self.timeout, setup=info['setup'], names=info['names'])


def _humaneval(record: Record) -> Prompt:
    """Tests may call what the prompt defines besides the function asked for: theirs, not the program's."""
    text, solution, test, name = _strings(record, 'text', 'canonical_solution', 'test', 'entry_point')
    begin = text.rstrip() + '\n'
    info = {'begin': begin, 'tests': [f'{test}\ncheck({name})\n'], 'setup': begin, 'names': [name]}
    return Prompt(text, solution, text, info)


def _mbpp(record: Record) -> Prompt:
    text, code, setup = _strings({'test_setup_code': '', **record}, 'text', 'code', 'test_setup_code')
    tests = [test for name in ('test_list', 'challenge_test_list') for test in record.get(name, ())]
    if not tests or not all(isinstance(test, str) for test in tests):
        raise TypeError('test_list: expected strings')
    defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used = {node.id for test in tests for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    info = {'begin': '', 'tests': tests, 'setup': setup, 'names': sorted(defined & used)}
    return Prompt(f'{text}\nFor example:\n{tests[0]}', code, text, info)


def _strings(record: Record, *names: str) -> list[str]:
    """The fields of these names, with plain line ends."""
    for name in names:
        if not isinstance(record.get(name), str):
            raise TypeError(f'{name}: expected a string')
    return [record[name].replace('\r\n', '\n') for name in names]


FORMS: dict[str, tuple[str, Callable[[Record], Prompt]]] = {
    'humaneval': ('prompt', _humaneval),
    'mbpp': ('text', _mbpp),
}
