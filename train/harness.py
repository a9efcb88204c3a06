"""EleutherAI's evaluation harness (lm-eval, requirements-lm-eval.txt) on a checkpoint.

    python -m train.harness RUN/STAGE --tasks=NAME[,NAME...] [--include_path=DIR] [--num_fewshot=N] [--limit=N] [--chat]

--include_path is a folder with tasks of one's own (YAML); --chat puts questions as chats. Results go to standard output
as JSON, one task a line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.chat import render_chat
from data.errors import InputError
from data.packing import Segment
from model.sharding import batch_ways
from train.checkpoint import Loaded
from train.launch.command import command
from train.measure.likelihood import ROWS, continuation
from train.measure.scoring import Scorer
from train.sampler import prompt_width, row_keys, sample_tokens

CHAT = '\0chat'  # begins a context that is a chat, in JSON; no text of a task does
ANSWER = 256  # tokens of an answer, where a task does not say


def harness_model(loaded: Loaded) -> Any:
    """The checkpoint as an `lm_eval.api.model.LM`. Raises InputError where lm-eval is not installed."""
    if importlib.util.find_spec('lm_eval') is None:
        raise InputError('lm-eval is not installed: pip install -r requirements-lm-eval.txt')
    from lm_eval import utils
    from lm_eval.api.model import LM

    model, tokenizer = loaded.model, loaded.tokenizer
    longest = model.config.max_position_embeddings

    def opened(context: str) -> list[int]:
        """A context as the tokens a model goes on from."""
        if not context.startswith(CHAT):
            return [tokenizer.begin_id, *tokenizer.encode(context)]
        return render_chat(json.loads(context.removeprefix(CHAT)), tokenizer, add_generation_prompt=True)[0]

    def score(segments: Sequence[Segment]) -> list[tuple[float, bool]]:
        """Of each segment the log-probability of what is weighted, and whether it is what the model would have said.
        What is too long for the model loses its beginning."""
        short = [
            s if len(s.tokens) <= longest else Segment(s.tokens[-longest:], s.loss_weight[-longest:]) for s in segments
        ]
        widths: dict[int, list[int]] = defaultdict(list)
        for i, segment in enumerate(short):
            widths[prompt_width(len(segment.tokens))].append(i)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(short)
        for width, chosen in sorted(widths.items()):
            shape = {'batch_size': ROWS * batch_ways(), 'microbatches': 1, 'sequence_length': width}
            some = [short[i] for i in chosen]
            said = Scorer(model, tokenizer.pad_id, shape)(loaded.variables, some, ('logprob', 'likeliest'))
            for i, segment, x in zip(chosen, some, said, strict=True):
                asked = segment.loss_weight > 0
                same = np.asarray(segment.tokens)[asked] == x['likeliest'][asked]
                found[i] = float(x['logprob'][asked].sum(dtype=np.float64)), bool(same.all())
        return found

    def weighted(before: Sequence[int], after: Sequence[int]) -> Segment:
        return Segment([*before, *after], np.array([0.0] * len(before) + [1.0] * len(after), np.float32))

    class CheckpointLM(LM):
        tokenizer_name = 'torso'

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return score(
                [
                    weighted(opened(context), tokenizer.encode(text))
                    if context.startswith(CHAT)
                    else continuation(tokenizer, context, text)
                    for context, text in (request.args for request in requests)
                ]
            )

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            segments, owners = [], []
            for i, request in enumerate(requests):
                tokens = tokenizer.encode(request.args[0])
                windows = utils.get_rolling_token_windows(tokens, tokenizer.begin_id, longest - 1, 1)
                for before, after in map(utils.make_disjoint_window, windows):
                    segments.append(weighted(before, after))
                    owners.append(i)
            said = [value for value, _ in score(segments)]
            return np.bincount(owners, weights=said, minlength=len(requests)).tolist()

        def generate_until(self, requests: list[Any]) -> list[str]:
            kinds: dict[tuple[int, float], list[int]] = defaultdict(list)
            for i, request in enumerate(requests):
                settings = request.args[1]
                drawn = float(settings.get('temperature', 0.0)) if settings.get('do_sample') else 0.0
                kinds[int(settings.get('max_gen_toks', ANSWER)), drawn].append(i)
            found = [''] * len(requests)
            for (most, temperature), chosen in kinds.items():
                room = longest - most
                if room < 1:
                    raise InputError(f'max_gen_toks is {most}: expected less than the context of {longest} tokens')
                prompts = [opened(requests[i].args[0])[-room:] for i in chosen]
                settings = {'samples': 1, 'temperature': temperature, 'max_tokens': most}
                keys = row_keys(0, chosen, 1)
                answers = sample_tokens(model, loaded.variables, tokenizer, prompts, keys=keys, **settings)
                for i, (answer,) in zip(chosen, answers, strict=True):
                    found[i] = _cut(answer.text, requests[i].args[1].get('until', ()))
            return found

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return CHAT + json.dumps(chat_history)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return tokenizer.chat_template or 'torso'

    return CheckpointLM()


def _cut(text: str, until: str | Sequence[str]) -> str:
    """A text up to the first of the strings that end it."""
    ends = [until] if isinstance(until, str) else until
    return text[: min([len(text), *(text.find(end) for end in ends if end and end in text)])]


@command('train.harness')
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    from train.checkpoint import load
    from train.launch.host import prepare

    parser = argparse.ArgumentParser(prog='python -m train.harness', description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='RUN/STAGE, RUN/STAGE@STEP or the folder of an imported model')
    parser.add_argument('--tasks', required=True, help='names of the harness, with commas between them')
    parser.add_argument('--include_path', default=None, help='a folder with further tasks')
    parser.add_argument('--num_fewshot', type=int, default=None, help='examples before a question (the task says)')
    parser.add_argument('--limit', type=int, default=None, help='questions of a task (all)')
    parser.add_argument('--chat', action='store_true', help='put questions as chats')
    options = parser.parse_args(arguments)
    prepare()
    model = harness_model(load(options.checkpoint))
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=options.include_path)
    names = options.tasks.split(',')
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise InputError(f'--tasks: the harness knows no task {unknown[0]!r}, nor is it in --include_path')
    found = evaluator.simple_evaluate(
        model,
        tasks=names,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.chat,
        task_manager=manager,
        bootstrap_iters=1000,
    )
    for name, values in (found or {'results': {}})['results'].items():
        print(json.dumps({'task': name, **{key: x for key, x in values.items() if isinstance(x, int | float)}}))
    return 0


if __name__ == '__main__':
    sys.exit(main())
