"""Metamath: databases of axioms, theorems and formal proofs, and a small checker of them.

Written from the language's specification: Norman Megill and David A. Wheeler, "Metamath: A Computer Language for
Mathematical Proofs", 2019, section 4.1 and appendix B (compressed proofs).
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from data.errors import InputError

Symbols: TypeAlias = tuple[str, ...]
Pair: TypeAlias = tuple[str, str]  # variables that must stay disjoint, in alphabetical order

BLANK = ' \t\r\n\f'
FOREIGN = re.compile(rf'[^!-~{BLANK}]')
TOKEN = re.compile(rf'[{BLANK}]*([!-~]+)')
COMMENT_END = re.compile(r'\$[()]\S*')
LABEL = re.compile(r'[A-Za-z0-9._-]+')
SAVE = -1  # the step of a compressed proof that keeps the last result for later
# Bounds on hostile input, in symbols read or written. The proofs of set.mm (2021), by far the largest database, take
# 234,912 at most, and its statements 0.1 a character.
WORK_OF_PROOF = 5_000_000
WORK_PER_CHARACTER = 2
WORK_OF_DATABASE = 1_000_000


class Reject(Exception):
    """Why a proof, or a statement, does not hold."""


@dataclass(slots=True)
class Statement:
    """A statement with a label. Hypotheses are active from their number on until `end`; the rest is for $a and $p."""

    kind: str
    symbols: Symbols
    number: int
    end: float = float('inf')
    hypotheses: tuple[str, ...] = ()  # mandatory, as are these pairs
    disjoint: tuple[Pair, ...] = ()
    in_force: frozenset[Pair] = frozenset()  # all pairs that are active here
    proof: Symbols = ()


class Database:
    """The statements of a database by label. `Database.parse` makes one; its proofs are not checked until asked."""

    def __init__(self) -> None:
        self.statements: dict[str, Statement] = {}
        self._constants: set[str] = set()
        self._types: dict[str, str] = {}  # of all variables: they are global, unlike the variables; '' if not yet known
        # What is active, in order of declaration, so that a block ends by taking the last ones back.
        self._active: dict[str, str] = {}  # variable -> label of its $f, '' before there is one
        self._hypotheses: list[Statement] = []
        self._essential: list[str] = []
        self._pairs: dict[Pair, None] = {}
        self._blocks: list[tuple[int, int, int, int]] = []
        self._in_force: frozenset[Pair] = frozenset()  # the last copy of the pairs
        self._work = _Work(WORK_OF_DATABASE)

    @classmethod
    def parse(
        cls, text: str, name: str = 'database', files: Mapping[str, str] | None = None, base: 'Database | None' = None
    ) -> 'Database':
        """The database `text`, which may include `files` by name and goes on from `base`.

        Raises InputError naming the file, the line and the statement at fault. Work is linear in the texts' length.
        """
        database, reading = cls(), [_File(name, text)]
        if base is not None:
            vars(database).update({key: copy.copy(value) for key, value in vars(base).items()})
        database._work.room += WORK_PER_CHARACTER * (len(text) + sum(map(len, (files or {}).values())))
        try:
            database._read(reading, {**(files or {}), name: ''})
        except Reject as reject:
            raise InputError(f'{reading[-1].place()}: {reject}') from None
        return database

    @property
    def theorems(self) -> list[str]:
        """Labels of the $p statements."""
        return [label for label, statement in self.statements.items() if statement.kind == '$p']

    def check(self, label: str, proof: Sequence[str] | None = None) -> str:
        """Why `proof`, normal or compressed, does not prove the theorem; '' if it does. Without one, its own is judged.

        Raises InputError if `label` is no $p statement. Work is bounded, whatever the proof.
        """
        theorem = self.statements.get(label)
        if theorem is None or theorem.kind != '$p':
            raise InputError(f'{label!r} is no $p statement of the database')
        try:
            self._check(theorem, theorem.proof if proof is None else proof)
        except Reject as reject:
            return str(reject)
        return ''

    # Reading

    def _read(self, reading: 'list[_File]', files: dict[str, str]) -> None:
        while reading:
            file = reading[-1]
            file.statement = ''
            token = next(file, None)
            if token is None:
                if len(reading) == 1 and self._blocks:
                    raise Reject('${ without $}')
                reading.pop()
            elif token == '$[':
                name = ' '.join(file.until('$]'))
                if self._blocks or name not in files:
                    raise Reject('$[ within a block' if self._blocks else f'no file {name!r} to include')
                if text := files[name]:
                    files[name] = ''  # the second time, it is left out
                    reading.append(_File(name, text))
            elif token == '${':
                self._blocks.append((len(self._active), len(self._hypotheses), len(self._essential), len(self._pairs)))
            elif token == '$}':
                self._end_block()
            elif token in ('$c', '$v', '$d'):
                self._declare(token, file.until('$.'))
            elif '$' in token:
                raise Reject(f'{token} where a statement was expected')
            else:
                file.statement = token
                self._state(token, file)

    def _end_block(self) -> None:
        if not self._blocks:
            raise Reject('$} without ${')
        active, hypotheses, essential, pairs = self._blocks.pop()
        for hypothesis in self._hypotheses[hypotheses:]:
            hypothesis.end = len(self.statements)
            if hypothesis.kind == '$f':
                self._active[hypothesis.symbols[1]] = ''
        del self._hypotheses[hypotheses:], self._essential[essential:]
        for entries, keep in ((self._active, active), (self._pairs, pairs)):
            while len(entries) > keep:
                entries.popitem()

    def _declare(self, kind: str, symbols: Symbols) -> None:
        if kind == '$d':
            self._work.spend(len(symbols) ** 2)
            if len(symbols) < 2 or len(set(symbols)) < len(symbols) or not all(s in self._active for s in symbols):
                raise Reject('$d takes two or more distinct active variables')
            ordered = sorted(symbols)
            self._pairs.update({(x, y): None for i, x in enumerate(ordered) for y in ordered[i + 1 :]})
        elif not symbols or (kind == '$c' and self._blocks):
            raise Reject(f'{kind} within a block' if symbols else f'{kind} declares nothing')
        for symbol in symbols if kind != '$d' else ():
            if symbol in self._constants or symbol in (self._types if kind == '$c' else self._active):
                raise Reject(f'{symbol!r} is taken already')
            if symbol in self.statements:
                raise Reject(f'{symbol!r} is taken already, by a label')
            if kind == '$c':
                self._constants.add(symbol)
            else:
                self._types.setdefault(symbol, '')
                self._active[symbol] = ''

    def _state(self, label: str, file: '_File') -> None:
        """Read the statement that `label` begins."""
        kind = next(file, 'the end')
        if kind not in ('$f', '$e', '$a', '$p'):
            raise Reject(f'{kind} where $f, $e, $a or $p was expected')
        symbols = file.until('$=' if kind == '$p' else '$.')
        if not LABEL.fullmatch(label):
            raise Reject('a label is of letters, digits, "-", "_" and "."')
        if label in self.statements or label in self._constants or label in self._types:
            raise Reject('the label is taken already')
        if not symbols or symbols[0] not in self._constants:
            raise Reject(f'{kind} begins with a constant')
        statement = Statement(kind, symbols, len(self.statements))
        if kind == '$f':
            variable = symbols[-1]
            if len(symbols) != 2 or self._active.get(variable) != '':
                raise Reject('$f takes a constant and an active variable that has no active $f')
            if self._types[variable] not in ('', symbols[0]):
                raise Reject(f'{variable!r} is of type {self._types[variable]!r} elsewhere')
            self._types[variable], self._active[variable] = symbols[0], label
        elif unknown := [s for s in symbols if s not in self._constants and not self._active.get(s)]:
            raise Reject(f'{unknown[0]!r} is neither a constant nor a variable with an active $f')
        if kind in ('$f', '$e'):
            self._hypotheses.append(statement)
            self._essential += [label] if kind == '$e' else []
        else:
            self._frame(statement)
            statement.proof = file.until('$.') if kind == '$p' else ()
        self.statements[label] = statement

    def _frame(self, assertion: Statement) -> None:
        """Give the assertion its hypotheses and pairs."""
        expressions = [assertion.symbols, *(self.statements[label].symbols for label in self._essential)]
        self._work.spend(sum(map(len, expressions)) + len(self._pairs))
        used = set().union(*expressions)
        labels = [*self._essential, *(self._active[symbol] for symbol in used if symbol in self._active)]
        if self._in_force != self._pairs.keys():
            self._in_force = frozenset(self._pairs)
        assertion.hypotheses = tuple(sorted(labels, key=lambda label: self.statements[label].number))
        assertion.disjoint = tuple((x, y) for x, y in self._pairs if x in used and y in used)
        assertion.in_force = self._in_force

    # Checking

    def _check(self, theorem: Statement, proof: Sequence[str]) -> None:
        stack: list[Symbols] = []
        saved: list[Symbols] = []
        work = _Work(WORK_OF_PROOF)
        for step in self._decompress(theorem, proof) if proof and proof[0] == '(' else proof:
            if isinstance(step, str):
                self._step(step, theorem, stack, work)
            elif step == SAVE:
                saved.append(stack[-1])
            elif step < len(saved):
                stack.append(saved[step])
            else:
                raise Reject('it refers to a step that was not saved')
        if len(stack) != 1:
            raise Reject(f'it leaves {len(stack)} expressions on the stack, not 1')
        if stack[0] != theorem.symbols:
            raise Reject(f'it proves {" ".join(stack[0][:50])}')

    def _usable(self, label: str, theorem: Statement) -> Statement:
        """The statement that the theorem's proof names."""
        statement = self.statements.get(label)
        if label == '?':
            raise Reject('it is incomplete: it has a ?')
        if statement is None or statement.number >= theorem.number:
            raise Reject(f'{label[:50]!r} is no earlier statement')
        if statement.end <= theorem.number:
            raise Reject(f'{label!r} is a hypothesis of another block')
        return statement

    def _step(self, label: str, theorem: Statement, stack: list[Symbols], work: '_Work') -> None:
        """Put a hypothesis on the stack, or what an assertion yields from the entries for its hypotheses."""
        statement = self._usable(label, theorem)
        if statement.kind in ('$f', '$e'):
            stack.append(statement.symbols)
            return
        start = len(stack) - len(statement.hypotheses)
        if start < 0:
            raise Reject(f'{label} takes {len(statement.hypotheses)} entries of a stack of {len(stack)}')
        work.spend(len(statement.hypotheses) + 1)
        values: dict[str, Symbols] = {}
        for name, entry in zip(statement.hypotheses, stack[start:], strict=True):
            hypothesis = self.statements[name]
            if hypothesis.kind == '$e':
                if work.substitute(hypothesis.symbols, values) != entry:
                    raise Reject(f'{label} does not fit: {" ".join(entry[:50])} is not {name}')
            elif entry[0] != hypothesis.symbols[0]:
                raise Reject(f'{label} wants a {hypothesis.symbols[0]} for {name}, not a {entry[0]}')
            else:
                values[hypothesis.symbols[1]] = entry[1:]
        for x, y in statement.disjoint:
            work.spend(len(values[x]) + len(values[y]))
            left, right = self._types.keys() & values[x], self._types.keys() & values[y]
            work.spend(len(left) * len(right))
            if not all((min(a, b), max(a, b)) in theorem.in_force for a in left for b in right):
                raise Reject(f'{label} wants {x} and {y} to be disjoint')
        stack[start:] = [work.substitute(statement.symbols, values)]

    def _decompress(self, theorem: Statement, proof: Sequence[str]) -> Iterator[str | int]:
        """The steps of a compressed proof: labels, numbers of saved results, and SAVE."""
        if ')' not in proof:
            raise Reject('it has a "(" but no ")"')
        close = proof.index(')')
        labels = [*theorem.hypotheses, *proof[1:close]]
        if not set(theorem.hypotheses).isdisjoint(proof[1:close]):
            raise Reject('it lists a mandatory hypothesis')
        kinds = [self._usable(label, theorem).kind for label in labels]
        number, savable = 0, False
        for letter in ''.join(proof[close + 1 :]):
            if 'A' <= letter <= 'T':
                number = 20 * number + ord(letter) - ord('A')
                yield labels[number] if number < len(labels) else number - len(labels)
                savable = number < len(labels) and kinds[number] in ('$a', '$p')  # others have a short name already
                number = 0
            elif 'U' <= letter <= 'Y' and number < 10**9:
                number, savable = 5 * number + ord(letter) - ord('U') + 1, False
            elif letter in ('Z', '?') and (savable or letter == '?'):
                yield SAVE if letter == 'Z' else letter
                savable = False
            else:
                raise Reject(f'{letter!r} is out of place')
        if number:
            raise Reject('it ends within a number')


@dataclass(slots=True)
class _Work:
    """What hostile input may still cost, in symbols."""

    room: int

    def spend(self, symbols: int) -> None:
        self.room -= symbols
        if self.room < 0:
            raise Reject('it takes more work than any real one')

    def substitute(self, symbols: Symbols, values: dict[str, Symbols]) -> Symbols:
        """The expression with variables replaced by their values."""
        result: list[str] = []
        self.spend(len(symbols))
        for symbol in symbols:
            value = values.get(symbol)
            if value is None:
                result.append(symbol)
            else:
                self.spend(len(value))
                result += value
        return tuple(result)


class _File:
    """The tokens of a file, comments left out, and the place of the last one."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.statement, self._text, self._at = name, '', text, 0
        if found := FOREIGN.search(text):
            self._at = found.start()
            raise InputError(f'{self.place()}: {found[0]!r} is no character of Metamath')

    def place(self) -> str:
        line = f'{self.name}:{self._text.count(chr(10), 0, self._at) + 1}'
        return f'{line}: {self.statement[:50]}' if self.statement else line

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while found := TOKEN.match(self._text, self._at):
            self._at = found.end()
            if found[1] != '$(':
                return found[1]
            end = COMMENT_END.search(self._text, self._at)
            if end is None or end[0] != '$)' or self._text[end.start() - 1] not in BLANK:
                raise Reject('$( without $), or with a mark within the comment')
            self._at = end.end()
        raise StopIteration

    def until(self, end: str) -> Symbols:
        """The tokens before `end`."""
        found: list[str] = []
        for token in self:
            if token == end:
                return tuple(found)
            if '$' in token:
                raise Reject(f'{token[:50]} where {end} was expected')
            found.append(token)
        raise Reject(f'the text ends where {end} was expected')
