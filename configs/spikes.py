"""What the guard against spikes buys: bad batches in a run on text, met with the guard and without it.

python -m train.sweep --config=configs/spikes.py --workdir=runs/spikes

They come in three bursts: words in a random order, one word over and over, random letters. In the clean arm there is
text in their place, so that all other batches are the same in all arms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs.base import SEEDS, add_stage, small

STEPS, BURST = 800, 8
BURSTS = {'shuffled': 0.6, 'repeated': 0.8, 'random': 0.95}  # where in the run each begins
ARMS = {'clean': (0.0, 6.0), 'guarded': (1.0, 6.0), 'bare': (1.0, 0.0)}  # share of bad words in bursts; sigma


def get_config() -> ConfigDict:
    config = small('spikes', 128)
    config.tokenizer.update(sources=('text',), vocab_size=1024)
    config.model.update(hidden_size=64, num_hidden_layers=2, n_routed_experts=4)
    text = {'type': 'stdlib', 'piece': 2000}
    config.sources.text = ConfigDict(text)
    mixture: list[tuple[float, dict[str, float]]] = [(0.0, {'text': 1.0})]
    for kind, start in BURSTS.items():
        config.sources[kind] = ConfigDict({'type': 'noisy', 'source': text, 'kind': kind, 'share': 0.0})
        mixture += [(start, {kind: 1.0}), (start + BURST / STEPS, {'text': 1.0})]
    config.evaluations.bits_per_byte = ConfigDict(
        {'type': 'text', 'source': {'type': 'stdlib', 'split': 'heldout'}, 'length': 128}
    )
    add_stage(
        config,
        'pretrain',
        'pretrain',
        steps=STEPS,
        batch_size=8,
        sequence_length=128,
        save_every=STEPS,
        mixture=mixture,
        evaluations=('bits_per_byte',),
        optimizer={'learning_rate': 0.015},
        guard={'sigma': 6.0},
    )
    return config


def sweep(add: Callable[[dict[str, Any], str], None]) -> None:
    for name, (share, sigma) in ARMS.items():
        for seed in SEEDS:
            shares = {f'sources.{kind}.share': share for kind in BURSTS}
            add({**shares, 'stages.pretrain.guard.sigma': sigma, 'seed': seed}, name)
