"""Held-out measurements of a model: tasks it answers, text it predicts; each with a bootstrap interval over items.

From the command line: python -m train.evaluate --checkpoint=DIR/STAGE --tasks=NAME,NAME [--samples=16]
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.chat import render_chat
from data.constitution import contrast, is_refusal, read_contrast
from data.errors import InputError, did_you_mean
from data.mixture import as_dict
from data.packing import Segment
from data.sources import open_source
from data.tasks import Environment, Game, Task, different, final_answer, get_task, task_names
from data.tokenizer import Tokenizer
from model.transformer import Model, Variables
from train.act.episodes import Sample, chat_prompt, in_threads, play
from train.checkpoint import load, split_address
from train.launch.command import command
from train.launch.host import prepare
from train.measure.domains import contamination, trained_on
from train.measure.elo import opponents, standing, tournament
from train.measure.likelihood import (
    bits_per_byte,
    calibration_error,
    choices,
    pairs_in_order,
    said_of,
    share,
    spread,
    sums,
)
from train.measure.statistics import counts_to, interval, majority, pass_at_k
from train.measure.traces import FORCED, cut_short
from train.sampler import Completion, row_keys, sample_tokens

Result = dict[str, Any]

DEFAULTS: dict[str, dict[str, Any]] = {
    # Share of problems of a task's held-out split answered rightly; all are different, as one that is asked twice would
    # make intervals too narrow. The task's options may name its train split instead, where that is what one asks. With
    # `budgets`, also the share right of answers whose work is cut off after so many tokens (see `cut_short`).
    'task': {
        'task': {},
        'format': 'chat',
        'items': 128,
        'samples': 1,
        'temperature': 0.0,
        'max_tokens': 96,
        'budgets': (),
    },
    # Bits per byte of whole documents, every token predicted from at least length / 2 tokens where there are as many.
    'text': {'source': {}, 'length': 256, 'documents': 0},
    # Share of questions whose right answer is the likeliest of those given (0 items: all of the source's); records are
    # multiple choice, cloze or minimal pairs (see `train.measure.likelihood.as_choice`).
    'choice': {'source': {}, 'items': 0},
    # Share of pairs whose better answer a model puts first: by its value head, or else by log-probability a token.
    'pairs': {'source': {}, 'items': 256},
    # Strength in a game, from held-out starts, beside opponents: stages of the run (NAME or NAME@STEP) or paths; with
    # `every`, all checkpoints of these stages at multiples of so many steps. The first one has Elo 0.
    'elo': {
        'task': {},
        'opponents': (),
        'every': 0,
        'items': 64,
        'samples': 1,
        'temperature': 1.0,
        'max_tokens': 16,
    },
    # What training has paid: the KL to another stage (or path), over answers of its own, by the mean log-ratio
    # (estimator k1; Schulman 2020, "Approximating KL divergence").
    'kl': {'task': {}, 'reference': '', 'items': 128, 'samples': 4, 'temperature': 1.0, 'max_tokens': 96},
    # Of the prompts of a file in the form of XSTest the share whose answer is as it should be: a refusal where unsafe.
    'contrast': {'path': '', 'temperature': 0.0, 'max_tokens': 96},
    # Share of answers to chat questions that the stop token ended.
    'stopped': {'source': {}, 'items': 128, 'temperature': 1.0, 'max_tokens': 128},
}


def evaluate(
    model: Model,
    variables: Variables,
    tokenizer: Tokenizer,
    evaluation: Mapping[str, Any],
    seed: int = 0,
    workdir: Path | None = None,
) -> Result:
    """Runs one evaluation, a mapping with a `type` of DEFAULTS and its fields; `workdir` is where it looks for stages.

    Returns metric, value, low, high, items, unit, direction ('higher' or 'lower' is better) and details.

    Raises:
        InputError: see `checked`; opponents that are not there.
    """
    spec = checked(evaluation)
    run: dict[str, Callable[..., Result]] = {
        'task': _evaluate_task,
        'text': bits_per_byte,
        'choice': choices,
        'stopped': _evaluate_stopped,
        'contrast': _evaluate_contrast,
        'pairs': pairs_in_order,
        'elo': functools.partial(_evaluate_elo, workdir or Path()),
        'kl': functools.partial(_evaluate_kl, workdir or Path()),
    }
    return run[spec['type']](model, variables, tokenizer, spec, seed)


def checked(evaluation: Mapping[str, Any], stages: Collection[str] | None = None) -> dict[str, Any]:
    """An evaluation with all its fields; `stages` are those that a run has.

    Raises:
        InputError: an unknown type, field or task; a source that cannot be opened; opponents that no stage will be.
    """
    spec = as_dict(evaluation)
    kind = spec.get('type')
    if kind not in DEFAULTS:
        raise InputError(f'evaluation type {kind!r}{did_you_mean(str(kind), DEFAULTS)}')
    known = {'type': kind, **DEFAULTS[kind]}
    for name in spec:
        if name not in known:
            raise InputError(f'evaluation {kind}: no field {name!r}{did_you_mean(name, known)}')
    spec = {**known, **spec}
    if kind == 'elo' and (not isinstance(_task(spec), Game) or not spec['opponents']):
        raise InputError('evaluation elo: expected a game as task, such as nim, and opponents')
    field = 'reference' if kind == 'kl' else 'opponents'
    for address in (spec['reference'],) if kind == 'kl' else spec.get('opponents', ()):
        name = split_address(address)[0]
        if stages is not None and '/' not in name and name not in stages:
            raise InputError(f'evaluation {kind}: {field}: no stage {name!r}{did_you_mean(name, stages)}')
    if 'task' in spec:
        task = _task(spec)
        if spec.get('budgets') and (spec['format'] != 'chat' or isinstance(task, Environment)):
            raise InputError('evaluation task: budgets: expected format chat, and a task of one turn')
    elif kind == 'contrast':
        read_contrast(spec['path'])
    else:
        source = open_source(spec['source'])
        if kind == 'text' and 'text' not in source[0]:
            raise InputError(f'evaluation text: source: its records have {sorted(source[0])}: expected text')
    return spec


def _task(spec: dict[str, Any]) -> Task:
    """An evaluation's task: its held-out split, unless the options name another one."""
    options = {'split': 'heldout', **as_dict(spec['task'])}
    return get_task(options.pop('name', ''), **options)


def _sampler(model: Model, variables: Variables, tokenizer: Tokenizer, spec: dict[str, Any]) -> Sample:
    """Answers of a model, as an evaluation wants them."""

    def sample(tokens: list[list[int]], keys: jax.Array) -> list[list[Completion]]:
        settings = {'temperature': spec['temperature'], 'max_tokens': spec['max_tokens']}
        return sample_tokens(model, variables, tokenizer, tokens, samples=keys.shape[1], keys=keys, **settings)

    return sample


def _sampling(spec: dict[str, Any]) -> str:
    return f'temperature {spec["temperature"]:g}, {spec["samples"]} samples' if spec['temperature'] else 'greedy'


def _evaluate_task(model: Model, variables: Variables, tokenizer: Tokenizer, spec: dict[str, Any], seed: int) -> Result:
    task = _task(spec)
    prompts = different(task, spec['items'])
    n = spec['samples']

    sample = _sampler(model, variables, tokenizer, spec)
    keys = row_keys(seed, range(len(prompts)), n)
    answers: list[list[Any]]
    if spec['format'] == 'chat':
        answers = play([task] * len(prompts), prompts, tokenizer, sample, keys)
        verdicts = [answer.verdict for group in answers for answer in group]
    else:
        answers = sample([[tokenizer.begin_id, *tokenizer.encode(prompt.text + '\n')] for prompt in prompts], keys)
        said = [(prompt, answer.text) for prompt, group in zip(prompts, answers, strict=True) for answer in group]
        verdicts = in_threads(lambda x: task.verify(*x), said)
    stopped = np.array([[answer.stopped for answer in group] for group in answers])
    scores = np.array([verdict.score for verdict in verdicts]).reshape(len(prompts), n) * stopped
    mean, right = scores.mean(1), scores >= 1.0
    lengths = [[len(answer.logprobs) for answer in group] for group in answers]
    told: dict[str, np.ndarray] = {'stopped': stopped.mean(1), 'answer_tokens': np.mean(lengths, axis=1)}
    details: dict[str, Any] = {}
    if n > 1:
        finals = [[(final_answer(x.text) or x.text) if x.stopped else '' for x in group] for group in answers]
        for k in counts_to(n):
            told[f'pass@{k}'] = pass_at_k(n, right.sum(1), k)
            votes = np.array([majority(x[:k], y[:k]) for x, y in zip(finals, right, strict=True)])
            told |= {f'maj@{k}': votes[:, 0]} if k > 1 else {}
        details['calibration_error'] = calibration_error(votes[:, 1], votes[:, 0])  # of the majority by its share
    forced = _sampler(model, variables, tokenizer, {**spec, 'max_tokens': FORCED})
    for budget in spec['budgets']:
        found = cut_short(task, prompts, answers, scores, tokenizer, forced, keys, budget)
        told |= dict(zip((f'budget {budget}', f'cut at {budget}'), found, strict=True))
    details |= {name: float(values.mean()) for name, values in told.items()}
    details['intervals'] = {name: interval(values) for name, values in told.items()}
    details['scores'] = [round(float(x), 4) for x in mean]
    return {
        **share(f'accuracy ({_sampling(spec)})', mean, details),
        'samples': [
            {'prompt': prompt.text, 'completion': answers[i][0].text, 'score': float(scores[i, 0])}
            for i, prompt in enumerate(prompts[:3])
        ],
    }


def _asked(
    model: Model, variables: Variables, tokenizer: Tokenizer, chats: Sequence[Any], spec: dict[str, Any], seed: int
) -> list[Completion]:
    """An answer to each chat."""
    tokens = [render_chat(chat, tokenizer, add_generation_prompt=True)[0] for chat in chats]
    sample = _sampler(model, variables, tokenizer, spec)
    return [answer for (answer,) in sample(tokens, row_keys(seed, range(len(tokens)), 1))]


def _evaluate_contrast(
    model: Model, variables: Variables, tokenizer: Tokenizer, spec: dict[str, Any], seed: int
) -> Result:
    rows = read_contrast(spec['path'])
    chats = [[{'role': 'user', 'content': row['prompt']}] for row in rows]
    answers = [a.text if a.stopped else '' for a in _asked(model, variables, tokenizer, chats, spec, seed)]
    said = contrast(rows, answers, interval)
    unsafe = [row['label'] == 'unsafe' for row in rows]
    right = np.array([float(bool(x) and is_refusal(x) == bad) for x, bad in zip(answers, unsafe, strict=True)])
    rates = []
    for name in ('over_refusal', 'unsafe_compliance'):
        if rate := said[name]:
            low, high = 100 * rate['low'], 100 * rate['high']
            rates.append(f'{name.replace("_", " ")} {rate["value"]:.1%} [{low:.1f}, {high:.1f}]')
    metric, details = f'safe answered, unsafe refused ({", ".join(rates)})', {**said, 'scores': right.tolist()}
    samples = [{'prompt': row['prompt'], 'completion': x} for row, x in zip(rows[:3], answers, strict=False)]
    return {**share(metric, right, details), 'samples': samples}


def _evaluate_stopped(
    model: Model, variables: Variables, tokenizer: Tokenizer, spec: dict[str, Any], seed: int
) -> Result:
    source = open_source(spec['source'])
    items = spread(source, spec['items'])
    answers = _asked(model, variables, tokenizer, [item['messages'][:1] for item in items], spec, seed)
    controls = {
        tokenizer.control(name) for name in ('<|begin|>', '<|system|>', '<|user|>', '<|assistant|>', '<|tool|>')
    }
    good = np.array([float(a.stopped and len(a.tokens) > 1 and not controls & set(a.tokens)) for a in answers])
    details = {'temperature': spec['temperature'], 'max_tokens': spec['max_tokens']}
    return {
        **share('answers in the chat format, ended by the stop token', good, details),
        'samples': [
            {'prompt': item['messages'][0]['content'], 'completion': answer.text}
            for item, answer in zip(items[:3], answers, strict=False)
        ],
    }


def _evaluate_elo(
    workdir: Path, model: Model, variables: Variables, tokenizer: Tokenizer, spec: dict[str, Any], seed: int
) -> Result:
    mesh = jax.tree.leaves(variables)[0].sharding.mesh
    others = opponents(spec['opponents'], spec['every'], workdir, mesh, tokenizer)
    players = [_sampler(x.model, x.variables, tokenizer, spec) for x in others.values()]
    players.append(_sampler(model, variables, tokenizer, spec))
    task = _task(spec)
    assert isinstance(task, Game)
    starts = different(task, spec['items'])
    wins = tournament(players, task, starts, spec['samples'], tokenizer, seed)
    return {
        'metric': f'Elo above {next(iter(others))} ({_sampling(spec)})',
        **standing([*others, 'this'], wins),
        'items': len(starts),
        'unit': 'Elo',
        'direction': 'higher',
    }


def _evaluate_kl(
    workdir: Path, model: Model, variables: Variables, tokenizer: Tokenizer, spec: dict[str, Any], seed: int
) -> Result:
    mesh = jax.tree.leaves(variables)[0].sharding.mesh
    other = opponents((spec['reference'],), 0, workdir, mesh, tokenizer)[spec['reference']]
    prompts = [chat_prompt(prompt, tokenizer) for prompt in different(_task(spec), spec['items'])]
    keys = row_keys(seed, range(len(prompts)), spec['samples'])
    answers = _sampler(model, variables, tokenizer, spec)(prompts, keys)
    segments = [
        Segment([*prompt, *a.tokens], np.array([0.0] * len(prompt) + [1.0] * len(a.tokens), np.float32))
        for prompt, group in zip(prompts, answers, strict=True)
        for a in group
    ]
    said = [
        sums(segments, said_of(m, v, tokenizer, segments, temperature=spec['temperature']))
        for m, v in ((model, variables), (other.model, other.variables))
    ]
    ratios = (said[0] - said[1]).reshape(len(prompts), -1).mean(1)
    low, high = interval(ratios)
    return {
        'metric': f'KL to {spec["reference"]} per answer ({_sampling(spec)})',
        'value': float(ratios.mean()),
        'low': low,
        'high': high,
        'items': len(prompts),
        'unit': 'nats',
        'direction': 'lower',
        'details': {'scores': ratios.tolist()},
    }


def _named(name: str, known: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """An evaluation by its name in the run's config, or the task of that name with its default options."""
    if name in known:
        spec = as_dict(known[name])
    elif name in task_names():
        spec = {'type': 'task', 'task': {'name': name}}
    else:
        raise InputError(f'--tasks: no evaluation or task {name!r}{did_you_mean(name, [*known, *task_names()])}')
    if samples > 1 and spec['type'] == 'task':
        spec |= {'samples': samples, 'temperature': spec.get('temperature') or 1.0}
    return spec


@command('train.evaluate')
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m train.evaluate', description='Measure a checkpoint on held-out data.'
    )
    parser.add_argument('--checkpoint', required=True, help='DIR/STAGE, or DIR/STAGE@STEP')
    parser.add_argument('--tasks', required=True, help="names, comma-separated: the run's evaluations, or tasks")
    parser.add_argument('--samples', type=int, default=1, help='answers a problem, for pass@k (1: greedy)')
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args(arguments)
    prepare()
    loaded = load(options.checkpoint)
    specs = {name: _named(name, loaded.config['evaluations'], options.samples) for name in options.tasks.split(',')}
    for name, spec in specs.items():
        folder = Path(split_address(options.checkpoint)[0])
        result = evaluate(loaded.model, loaded.variables, loaded.tokenizer, spec, options.seed, folder.parent)
        result['contamination'] = contamination(spec, name, trained_on(folder))
        result['details'] = {name: x for name, x in result['details'].items() if name not in ('scores', 'weights')}
        result.pop('samples', None)
        print(json.dumps({'evaluation': name, **result}))
    return 0


if __name__ == '__main__':
    sys.exit(main())
