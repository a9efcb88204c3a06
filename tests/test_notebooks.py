"""Notebooks run from top to bottom, at a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / 'notebooks').glob('*.ipynb'))


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, root: Path, one_device: dict[str, str], tmp_path: Path) -> None:
    """Its cells one after the other, in a process of their own that begins in its folder."""
    cells = [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == 'code']
    script = tmp_path / 'cells.py'
    script.write_text('\n'.join(''.join(cell['source']) for cell in cells))
    environment = {**os.environ, **one_device, 'MPLBACKEND': 'Agg', 'TORSO_STEPS': '3', 'TORSO_WORKDIR': str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script], cwd=path.parent, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'numbers a token in the cache' in done.stdout


def test_notebooks_hold_no_outputs() -> None:
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())['cells']:
            assert not cell.get('outputs') and cell.get('execution_count') is None, path.name
    assert NOTEBOOKS
