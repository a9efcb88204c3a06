"""The rules of the house that a program can check, so that nobody has to remember them."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.stages import KINDS

ROOT = Path(__file__).resolve().parent.parent

# What each wing may import of the project, itself included.
MAY_IMPORT = {
    'configs': {'configs', 'train', 'data', 'model'},
    'train': {'train', 'data', 'model'},
    'data': {'data'},
    'model': {'model'},
}
LONGEST_FILE = 450  # lines
LARGEST_PRODUCT = 18_000  # lines of code, without comments and docstrings
STAGE_KINDS = tuple(KINDS)


def product_files(*wings: str) -> list[Path]:
    return sorted(path for wing in wings or MAY_IMPORT for path in (ROOT / wing).rglob('*.py'))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in a file, those inside functions included."""
    package = path.relative_to(ROOT).with_suffix('').parts[:-1]
    for node in ast.walk(ast.parse(path.read_text('utf-8'), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found = [node.module] if node.module else [name.name for name in node.names]
            yield from ((node.lineno, '.'.join((*base, name))) for name in found)


def where(path: Path, line: int) -> str:
    return f'{path.relative_to(ROOT)}:{line}'


@pytest.mark.parametrize('wing', MAY_IMPORT)
def test_imports_run_downwards(wing: str) -> None:
    wrong = [
        f'{where(path, line)} imports {name}'
        for path in product_files(wing)
        for line, name in imports(path)
        if name.split('.')[0] in {*MAY_IMPORT, 'tests'} - MAY_IMPORT[wing]
    ]
    assert not wrong, '\n'.join(wrong)


def test_flax_stays_in_model() -> None:
    wrong = [
        where(path, line)
        for path in product_files('configs', 'train', 'data')
        for line, name in imports(path)
        if name.split('.')[0] == 'flax'
    ]
    assert not wrong, '\n'.join(wrong)


def test_the_loop_does_not_know_its_stages() -> None:
    path = ROOT / 'train' / 'loop.py'
    text = path.read_text('utf-8') if path.exists() else ''
    found = [
        f'{where(path, number)} {line.strip()}'
        for number, line in enumerate(text.splitlines(), start=1)
        if re.search(rf'(?<![a-z])({"|".join(STAGE_KINDS)})(?![a-z])', line, re.IGNORECASE)
    ]
    assert not found, '\n'.join(found)


def lines_of_code(path: Path) -> int:
    """Lines with something to run on them: no blank ones, comments or docstrings."""
    text = path.read_text('utf-8')
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            first = node.body[0]
            documented.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    coded: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            coded.update(range(token.start[0], token.end[0] + 1) if token.string else ())
    return len(coded - documented)


def test_files_and_product_stay_readable() -> None:
    lengths = {path: len(path.read_text('utf-8').splitlines()) for path in product_files()}
    long = [f'{path.relative_to(ROOT)}: {count}' for path, count in lengths.items() if count > LONGEST_FILE]
    assert not long, f'longer than {LONGEST_FILE} lines: {", ".join(long)}'
    assert sum(map(lines_of_code, lengths)) < LARGEST_PRODUCT


def test_lines_of_code_are_counted(tmp_path: Path) -> None:
    path = tmp_path / 'module.py'
    path.write_text(
        '"""Says\n\nwhat."""\n\n# Why.\nx = [  # here\n    1,\n]\n\ndef f():\n    """No."""\n    return """a\nb"""\n'
    )
    assert lines_of_code(path) == 6


def test_no_unfinished_business() -> None:
    found = [
        where(path, number)
        for path in product_files()
        for number, line in enumerate(path.read_text('utf-8').splitlines(), start=1)
        if re.search(r'\b(TODO|FIXME)\b', line)
    ]
    assert not found, '\n'.join(found)


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker itself: an upward import must not slip through in relative form or inside a function."""
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    (tmp_path / 'data' / 'tasks').mkdir(parents=True)
    path = tmp_path / 'data' / 'tasks' / 'a.py'
    path.write_text('from ... import train\nfrom ..chat import x\ndef f():\n    import train.loop as l\n')
    assert list(imports(path)) == [(1, 'train'), (2, 'data.chat'), (4, 'train.loop')]
