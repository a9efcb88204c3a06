"""Problems of reasoning-gym: references pass, anything less fails, in every chosen data set."""

import json
import subprocess
import sys
import time

import pytest

from data.errors import InputError
from data.tasks import Prompt, get_task
from data.tasks.reasoning_gym import DATASETS


def test_bad_options_and_a_missing_package_say_so(root):
    with pytest.raises(InputError, match="dataset 'chain_sums'.*did you mean 'chain_sum'"):
        get_task('reasoning_gym', dataset='chain_sums')
    code = (
        'import sys\nsys.modules["reasoning_gym"] = None\nfrom data.tasks import get_task, task_names\n'
        'assert "reasoning_gym" in task_names()\nget_task("reasoning_gym")'
    )
    error = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True).stderr
    assert 'InputError: task reasoning_gym: the package is not here: pip install' in error.splitlines()[-1]


@pytest.mark.parametrize('dataset', DATASETS)
def test_references_pass_and_anything_less_fails(dataset):
    pytest.importorskip('reasoning_gym', reason='requirements-reasoning.txt is not installed')
    keys = {}
    for split in ('train', 'heldout'):
        task = get_task('reasoning_gym', split, dataset=dataset)
        prompts = [task.prompt(index) for index in range(5)]
        keys[split] = {prompt.key for prompt in prompts}
        for prompt, other in zip(prompts, [*prompts[1:], prompts[0]], strict=True):
            prompt = Prompt(prompt.text, prompt.reference, prompt.key, json.loads(json.dumps(prompt.info)))
            assert task.verify(prompt, f'So:\n{prompt.reference}').score == 1 and '\n' not in prompt.reference
            wrong = ['', 'Answer:', 'Answer: .', 'Answer: xyzzy', prompt.text, f'{prompt.reference}\nDone']
            wrong += [prompt.reference + tail for tail in (' or so', '1')] + [prompt.reference[:-1]]
            wrong += [f'{prompt.reference} {other.reference.removeprefix("Answer: ")}', prompt.reference[8:]]
            for completion in wrong:
                verdict = task.verify(prompt, completion)
                assert verdict.score == 0 and verdict.reason, completion
    assert not keys['train'] & keys['heldout']
    start = time.perf_counter()
    for piece in ('9', '(', '[', ' 1', '\\', 'a '):
        task.verify(prompts[0], 'Answer: ' + piece * (1999 // len(piece)))
        task.verify(prompts[0], 'Answer: ' + piece * 1_000_000)
    assert time.perf_counter() - start < 5
