"""What mid-training buys: experiments on one trunk, a small model at a constant learning rate on prose and code.

python -m train --config=configs/midtraining.py --workdir=runs/trunk
python -m train.sweep --config=configs/midtraining.py:decay --workdir=runs/decay
python -m train.sweep --config=configs/midtraining.py:value --workdir=runs/value
python -m train --config=configs/midtraining.py:merge --workdir=runs/merge
python -m train.sweep --config=configs/midtraining.py:extend --workdir=runs/extend
python -m train.sweep --config=configs/midtraining.py:few --workdir=runs/few
python -m train.sweep --config=configs/midtraining.py:placement --workdir=runs/placement
python -m train.sweep --config=configs/midtraining.py:mixture --workdir=runs/mixture
python -m train.mixtures runs/mixture --stage=anneal --evaluations=prose,problems,sums
python -m train --config=configs/midtraining.py:handover --workdir=runs/handover
python -m train.handover runs/handover/control_0,... runs/handover/mid_0,...

  decay      the last 2.5, 5, 10 or 20% of the trunk's steps taken with the learning rate going to zero instead
  value      a source valued by a short anneal on 30% of it (Blakeney et al. 2024; OLMo 2, section 4.4, "microanneal"):
             word problems of which 0, 25, 50 or 75% of the words are spoilt, and the usual mixture as control
  merge      three anneals that differ in the order of the data, and their average; three times
  extend     four times the context in 12 steps of 4,096 tokens, 4.8% of the trunk's: positions as they were, with a
             larger base (bloc97 2023, "NTK-aware"), or YaRN (Peng et al. 2023)
  few        50 steps on 32 worked problems, on 960 of which a quarter of the words are spoilt, or on 960 good ones
  placement  a tenth of a run on word problems, or on random letters: first, all along, or last
  mixture    24 short anneals on mixtures of prose, word problems, sums and random letters: which would be best?
  handover   mid-training on prose and short sums, or with longer sums among them: what else changes, and from which
             does the same short reinforcement learning gain more?
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs.base import ADAM, SEEDS, add_stage, longer_base, small
from train.mixtures import swarm

STEPS = 1000  # of the trunk
TRUNK = 'runs/trunk/trunk'
DECAYS = (0.025, 0.05, 0.1, 0.2)
SPOILT = (0.0, 0.25, 0.5, 0.75)
VARIANTS = ('', 'decay', 'value', 'merge', 'extend', 'few', 'placement', 'mixture', 'handover')
CONTEXT, LONG = 128, 512
BASE = 500.0  # of the rotary embedding


EXTENSIONS: dict[str, dict[str, float]] = {
    'unchanged': {},
    'larger base': {'rope_theta': longer_base(BASE, LONG / CONTEXT, rotated=16)},
    'YaRN': {'rope_factor': LONG / CONTEXT},
}
MIXTURE, ARMS = {'text': 0.55, 'stories': 0.15, 'sums': 0.15, 'letters': 0.15}, 24
FEW, MANY = 32, 960
GIVEN: dict[str, tuple[int, float]] = {'few good': (FEW, 0.0), 'many spoilt': (MANY, 0.25), 'many good': (MANY, 0.0)}
SHORT = 600  # steps of a run of `placement`
PLACES: dict[str, Callable[[str], tuple[Any, ...]]] = {
    'first': lambda source: ((0.0, {source: 1.0}), (0.1, {'text': 1.0})),
    'throughout': lambda source: ((0.0, {'text': 0.9, source: 0.1}),),
    'last': lambda source: ((0.0, {'text': 1.0}), (0.9, {source: 1.0})),
}


def get_config(variant: str = '') -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f'configs/midtraining.py:{variant}: expected one of {", ".join(VARIANTS[1:])}, or none')
    config = small('midtraining', CONTEXT)
    config.tokenizer.update(sources=('text', 'stories'), vocab_size=1024)
    config.model.update(hidden_size=64, num_hidden_layers=2, n_routed_experts=4)
    text = {'type': 'stdlib', 'piece': 2000}
    stories = {'type': 'task', 'name': 'wordgraph', 'operations': (1, 2), 'max_value': 10, 'format': 'text'}
    config.sources.update(
        text=text,
        stories=stories,
        candidate={'type': 'noisy', 'source': stories, 'kind': 'random', 'share': 0.0},
        letters={'type': 'noisy', 'source': text, 'kind': 'random'},
    )
    config.evaluations.update(
        prose={'type': 'text', 'source': {'type': 'stdlib', 'split': 'heldout'}, 'length': 128},
        problems={'type': 'text', 'source': {**stories, 'split': 'heldout'}, 'documents': 256, 'length': 128},
    )
    common: dict[str, Any] = {
        'batch_size': 8,
        'sequence_length': 128,
        'evaluations': ('prose', 'problems'),
        'mixture': ((0.0, {'text': 1.0}),),
        'optimizer': {'learning_rate': 0.01},
    }
    if variant == '':
        constant = {**common, 'optimizer': {'learning_rate': 0.01, 'schedule': 'constant'}}
        add_stage(config, 'trunk', 'pretrain', steps=STEPS, save_every=25, keep=STEPS, **constant)
    elif variant == 'decay':
        add_stage(config, 'anneal', 'midtrain', parent=f'{TRUNK}@900', steps=100, **common)
    elif variant == 'value':
        add_stage(config, 'anneal', 'midtrain', parent=f'{TRUNK}@950', steps=50, **common)
    elif variant == 'merge':
        for group in SEEDS:
            names = [f'anneal_{group}{i}' for i in range(3)]
            for i, name in enumerate(names):
                add_stage(config, name, 'midtrain', parent=f'{TRUNK}@900', steps=100, seed=3 * group + i, **common)
            add_stage(config, f'merged_{group}', 'merge', parents=names, evaluations=common['evaluations'])
    elif variant == 'extend':
        model: dict[str, Any] = {'max_position_embeddings': LONG, 'rope_theta': BASE, 'rope_factor': 1.0}
        longer: dict[str, Any] = {'sequence_length': LONG, 'evaluations': ('prose', 'long'), 'model': model}
        config.evaluations.long = {**config.evaluations.prose, 'length': LONG}
        add_stage(config, 'extend', 'midtrain', parent=TRUNK, steps=12, **{**common, **longer})
    elif variant == 'mixture':
        sums = {'type': 'task', 'name': 'arithmetic', 'operations': (1, 2), 'max_value': 10, 'format': 'text'}
        config.sources.sums = sums
        config.evaluations.sums = {**config.evaluations.problems, 'source': {**sums, 'split': 'heldout'}}
        judged = {**common, 'evaluations': tuple(config.evaluations)}
        add_stage(config, 'anneal', 'midtrain', parent=f'{TRUNK}@950', steps=50, **judged)
    elif variant == 'handover':
        _handover(config, common)
    elif variant == 'few':
        config.sources.candidate.source = {**stories, 'records': MANY}
        mixture = ((0.0, {'candidate': 1.0}),)
        add_stage(config, 'tune', 'midtrain', parent=TRUNK, steps=50, **{**common, 'mixture': mixture})
    else:
        add_stage(config, 'run', 'pretrain', steps=SHORT, save_every=SHORT, **common)
    return config


def _handover(config: ConfigDict, common: dict[str, Any]) -> None:
    sums: dict[str, Any] = {'name': 'arithmetic', 'operations': 3, 'digits': 1, 'max_value': 10, 'worked': True}
    judged: dict[str, Any] = {'type': 'task', 'items': 256, 'samples': 4, 'temperature': 1.0, 'max_tokens': 32}
    asked: dict[str, Any] = {'type': 'task', 'format': 'chat', **sums}
    config.sources.update(asked={**asked, 'operations': (1, 2)}, longer=asked)
    config.evaluations.update(short={**judged, 'task': {**sums, 'operations': 2}}, long={**judged, 'task': sums})
    arm: dict[str, Any] = {**common, 'parent': f'{TRUNK}@800', 'steps': 400, 'batch_size': 16}
    arm |= {'evaluations': tuple(config.evaluations)}
    probe: dict[str, Any] = {'task': sums, 'prompts': 16, 'samples': 8, 'temperature': 1.2, 'max_tokens': 32}
    probe |= {'batch_size': 128, 'microbatches': 4, 'sequence_length': 128, 'evaluations': ('short', 'long')}
    probe |= {'steps': 80, 'optimizer': {**ADAM, 'learning_rate': 0.0006}}
    mixtures = {'control': {'text': 0.4, 'asked': 0.6}, 'mid': {'text': 0.4, 'asked': 0.3, 'longer': 0.3}}
    for seed in SEEDS:
        for name, mixture in mixtures.items():
            add_stage(config, f'{name}_{seed}', 'midtrain', seed=seed, **{**arm, 'mixture': ((0.0, mixture),)})
            add_stage(config, f'probe_{name}_{seed}', 'grpo', parent=f'{name}_{seed}', seed=seed, **probe)


def sweep(add: Callable[[dict[str, Any], str], None], variant: str = '') -> None:
    for number, weights in enumerate(swarm(MIXTURE, ARMS) if variant == 'mixture' else ()):
        add({'stages.anneal.mixture': ((0.0, weights),)}, f'{number:02}')
    for seed in SEEDS:
        if variant == 'decay':
            for share in DECAYS:
                steps = round(share * STEPS)
                start = {'stages.anneal.parent': f'{TRUNK}@{STEPS - steps}', 'stages.anneal.steps': steps}
                add({**start, 'seed': seed}, f'last {100 * share:g}%')
        elif variant == 'value':
            add({'stages.anneal.mixture': ((0.0, {'text': 1.0}),), 'seed': seed}, 'control')
            for share in SPOILT:
                mixture = ((0.0, {'text': 0.7, 'candidate': 0.3}),)
                changes = {'sources.candidate.share': share, 'stages.anneal.mixture': mixture}
                add({**changes, 'seed': seed}, f'{100 * share:g}% spoilt')
        elif variant == 'extend':
            for name, fields in EXTENSIONS.items():
                add({**{f'stages.extend.model.{field}': value for field, value in fields.items()}, 'seed': seed}, name)
        elif variant == 'few':
            for name, (count, share) in GIVEN.items():
                add({'sources.candidate.source.records': count, 'sources.candidate.share': share, 'seed': seed}, name)
        elif variant == 'placement':
            add({'stages.run.mixture': ((0.0, {'text': 1.0}),), 'seed': seed}, 'control')
            for source in ('stories', 'letters'):
                for place, mixed in PLACES.items():
                    add({'stages.run.mixture': mixed(source), 'seed': seed}, f'{source} {place}')
