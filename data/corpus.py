"""The corpus every machine already has: the source of Python's own standard library.

A run needs no download to learn something real. Whole top-level modules are held out by a hash of their name, so that
the loss on them is a loss on files never seen; train files that share much of their text with a held-out one are
dropped. Instruction data come from the same files, by the same split: docstrings answer questions, short functions
answer requests.
"""

import ast
import functools
import hashlib
import os
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data.errors import InputError

Record = dict[str, Any]

LICENCE = 'PSF-2.0'
SPLITS = ('train', 'heldout')

# Tests (they repeat the modules they test), tables of data, and what does not belong to the standard library.
_SKIPPED_FOLDERS = {'test', 'tests', 'idle_test', 'site-packages', '__pycache__', 'encodings', 'pydoc_data'}
_HELD_OUT_ONE_IN = 16  # top-level modules, by the hash of the bare name: some 3% of the bytes
_TRIVIAL_LINE = 20  # shorter lines (`return None`, `else:`) are everybody's
_MOST_SHARED = 0.3
_LONGEST_SOURCE = 600
_LONGEST_ANSWER = 400

_EXPLAIN = (
    'What does `{name}` do?',
    'Explain `{name}`.',
    'What is `{name}` for?',
    'Describe `{name}` in Python.',
    'Tell me about `{name}`.',
)
_WRITE = (
    'Write the function `{function}` of module `{module}`: {about}',
    'Implement `{function}` as in `{module}`. {about}',
    'Write Python code for `{module}.{function}`: {about}',
)


def standard_library(split: str, piece: int = 0) -> list[Record]:
    """Files of the standard library as records {text, path, module, licence}, in the order of their paths.

    Args:
        split: 'train' or 'heldout'.
        piece: if not 0, files are cut at line ends into records of some `piece` characters. A row of a batch reads a
            record to its end before it takes the next: whole files would keep it on one subject for many steps.

    Raises:
        InputError: another split; a negative `piece`.
    """
    files = _files()[_checked(split)]
    if type(piece) is not int or piece < 0:
        raise InputError(f'stdlib: piece {piece!r}: expected a number of characters, or 0 for whole files')
    return [{**file, 'text': text} for file in files for text in _pieces(file['text'], piece)] if piece else files


def instructions(split: str) -> list[Record]:
    """Chats {messages: [user, assistant], path, module} made from the files of `split`: explain this, write that."""
    return _instructions(_checked(split))


def shared_line_share(train: Iterable[Mapping[str, Any]], heldout: Iterable[Mapping[str, Any]]) -> float:
    """Share of the held-out records' lines (trivial ones aside) that occur word for word in a train record."""
    seen = {line for record in train for line in _lines(record['text'])}
    lines = [line for record in heldout for line in _lines(record['text'])]
    return sum(line in seen for line in lines) / max(len(lines), 1)


def _checked(split: str) -> str:
    if split not in SPLITS:
        raise InputError(f'split {split!r}: expected one of {", ".join(SPLITS)}')
    return split


def _pieces(text: str, size: int) -> Iterator[str]:
    """Cuts a text behind the first line end after each `size` characters."""
    start = 0
    while start < len(text):
        end = text.find('\n', start + size - 1) + 1 or len(text)
        yield text[start:end]
        start = end


def _hash(text: str) -> int:
    """A hash that is the same in every process and on every platform, as `hash` is not."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big')


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= _TRIVIAL_LINE]


@functools.cache
def _files() -> dict[str, list[Record]]:
    folder = Path(os.__file__).parent
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    texts: set[str] = set()
    for path in sorted(folder.rglob('*.py')):
        relative = path.relative_to(folder)
        # Build settings differ from machine to machine.
        if _SKIPPED_FOLDERS.intersection(relative.parts) or path.name.startswith('_sysconfigdata'):
            continue
        try:
            with tokenize.open(path) as file:  # heeds a coding line
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if not text.strip() or text in texts:
            continue
        texts.add(text)
        parts = relative.with_suffix('').parts
        module = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
        split = SPLITS[_hash(parts[0]) % _HELD_OUT_ONE_IN == 0]
        splits[split].append({'text': text, 'path': relative.as_posix(), 'module': module, 'licence': LICENCE})
    owners = _owners(splits['heldout'])
    splits['train'] = [record for record in splits['train'] if not _resembles(record, owners)]
    return splits


def _owners(records: list[Record]) -> dict[str, set[str]]:
    """Which records each line occurs in."""
    owners: dict[str, set[str]] = {}
    for record in records:
        for line in _lines(record['text']):
            owners.setdefault(line, set()).add(record['path'])
    return owners


def _resembles(record: Record, owners: Mapping[str, set[str]]) -> bool:
    """Whether a record has more than a tolerable share of its lines in common with one of the owners."""
    lines = _lines(record['text'])
    shared = Counter(path for line in lines for path in owners.get(line, ()))
    return any(count > _MOST_SHARED * len(lines) for count in shared.values())


@functools.cache
def _instructions(split: str) -> list[Record]:
    records: list[Record] = []
    asked: set[str] = set()
    for file in standard_library(split):
        for question, answer in _questions(file):
            if question not in asked:
                asked.add(question)
                messages = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
                records.append({'messages': messages, 'path': file['path'], 'module': file['module']})
    return records


def _questions(file: Record) -> Iterator[tuple[str, str]]:
    """Questions and answers about the public functions, classes and methods of a file."""
    module = file['module']
    if any(part.startswith('_') for part in module.split('.')):
        return
    lines = file['text'].splitlines(keepends=True)
    for name, node in _definitions(ast.parse(file['text']), module):
        about = _summary(ast.get_docstring(node))
        if about is None:
            continue
        yield _phrase(_EXPLAIN, name).format(name=name), about
        if isinstance(node, ast.FunctionDef) and name == f'{module}.{node.name}':
            source = _source_without_docstring(node, lines)
            if len(source) <= _LONGEST_SOURCE:
                yield _phrase(_WRITE, name).format(function=node.name, module=module, about=about), source


def _definitions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions and classes under their dotted names, methods included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            name = f'{prefix}.{node.name}'
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, name)


def _summary(docstring: str | None) -> str | None:
    """First paragraph of a docstring on one line; None if that is too short or too long to be an answer."""
    paragraph = (docstring or '').strip().split('\n\n')[0]
    text = re.sub(r'\s+', ' ', paragraph).strip()
    return text if 10 <= len(text) <= _LONGEST_ANSWER else None


def _source_without_docstring(node: ast.FunctionDef, lines: list[str]) -> str:
    """Source of a function that has a docstring, less the docstring: the request already says it."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    docstring = node.body[0]
    kept = lines[first - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return ''.join(kept).rstrip()


def _phrase(choices: tuple[str, ...], name: str) -> str:
    return choices[_hash(name) % len(choices)]
