"""Notebooks run from top to bottom, at a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SAID = {  # by each, the last of these near its end
    '1_life_of_a_small_model': ('report.html',),
    # Published by DeepSeek of V3 and V2-Lite: 512 + 64 numbers a token and layer, 61 and 27 layers.
    '2_attention_and_experts': ('35,136 numbers', '15,552 numbers', 'the busiest expert of each layer'),
    '3_what_rl_buys': ('solved by the base alone', "tuned {'unique'"),
    '4_an_ablation': (', best',),
    '5_post_train_a_checkpoint': ('model.safetensors',),
}
NOTEBOOKS = sorted((Path(__file__).parent.parent / 'notebooks').glob('*.ipynb'))


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, root: Path, one_device: dict[str, str], tmp_path: Path) -> None:
    """Its cells one after the other, in a process of their own that begins in its folder."""
    cells = [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == 'code']
    script = tmp_path / 'cells.py'
    script.write_text('\n'.join(''.join(cell['source']) for cell in cells))
    small = {'MPLBACKEND': 'Agg', 'TORSO_SHARE': '0.002', 'TORSO_WORKDIR': str(tmp_path)}
    environment = {**os.environ, **one_device, **small}
    done = subprocess.run(
        [sys.executable, script], cwd=path.parent, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(text in done.stdout for text in SAID[path.stem])


def test_notebooks_hold_no_outputs() -> None:
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())['cells']:
            assert not cell.get('outputs') and cell.get('execution_count') is None, path.name
    assert NOTEBOOKS
