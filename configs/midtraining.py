"""What mid-training buys: experiments on one trunk, a small model at a constant learning rate on prose and code.

python -m train --config=configs/midtraining.py --workdir=runs/trunk
python -m train.sweep --config=configs/midtraining.py:decay --workdir=runs/decay
python -m train.sweep --config=configs/midtraining.py:value --workdir=runs/value
python -m train --config=configs/midtraining.py:merge --workdir=runs/merge
python -m train.sweep --config=configs/midtraining.py:placement --workdir=runs/placement

  decay      the last 2.5, 5, 10 or 20% of the trunk's steps taken with the learning rate going to zero instead
  value      a source valued by a short anneal on 30% of it (Blakeney et al. 2024; OLMo 2, section 4.4, "microanneal"):
             word problems of which 0, 25, 50 or 75% of the words are spoilt, and the usual mixture as control
  merge      three anneals that differ in the order of the data, and their average; three times
  placement  a tenth of a run on word problems, or on random letters: first, all along, or last
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs.base import SEEDS, add_stage, small

STEPS = 1000  # of the trunk
TRUNK = 'runs/trunk/trunk'
DECAYS = (0.025, 0.05, 0.1, 0.2)
SPOILT = (0.0, 0.25, 0.5, 0.75)
VARIANTS = ('', 'decay', 'value', 'merge', 'placement')
SHORT = 600  # steps of a run of `placement`
PLACES: dict[str, Callable[[str], tuple[Any, ...]]] = {
    'first': lambda source: ((0.0, {source: 1.0}), (0.1, {'text': 1.0})),
    'throughout': lambda source: ((0.0, {'text': 0.9, source: 0.1}),),
    'last': lambda source: ((0.0, {'text': 1.0}), (0.9, {source: 1.0})),
}


def get_config(variant: str = '') -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f'configs/midtraining.py:{variant}: expected one of {", ".join(VARIANTS[1:])}, or none')
    config = small('midtraining', 128)
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
    anneal = {**common, 'keep_optimizer': True}
    if variant == '':
        constant = {**common, 'optimizer': {'learning_rate': 0.01, 'schedule': 'constant'}}
        add_stage(config, 'trunk', 'pretrain', steps=STEPS, save_every=25, keep=STEPS, **constant)
    elif variant == 'decay':
        add_stage(config, 'anneal', 'midtrain', parent=f'{TRUNK}@900', steps=100, **anneal)
    elif variant == 'value':
        add_stage(config, 'anneal', 'midtrain', parent=f'{TRUNK}@950', steps=50, **anneal)
    elif variant == 'merge':
        for group in SEEDS:
            names = [f'anneal_{group}{i}' for i in range(3)]
            for i, name in enumerate(names):
                add_stage(config, name, 'midtrain', parent=f'{TRUNK}@900', steps=100, seed=3 * group + i, **anneal)
            add_stage(config, f'merged_{group}', 'merge', parents=names, evaluations=common['evaluations'])
    else:
        add_stage(config, 'run', 'pretrain', steps=SHORT, save_every=SHORT, **common)
    return config


def sweep(add: Callable[[dict[str, Any], str], None], variant: str = '') -> None:
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
        elif variant == 'placement':
            add({'stages.run.mixture': ((0.0, {'text': 1.0}),), 'seed': seed}, 'control')
            for source in ('stories', 'letters'):
                for place, mixed in PLACES.items():
                    add({'stages.run.mixture': mixed(source), 'seed': seed}, f'{source} {place}')
