"""Playing strength: players of a game meet each other on both sides, and all get their place on one scale."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError
from data.tasks import Game, Prompt
from data.tokenizer import Tokenizer
from train.act.episodes import Sample
from train.act.games import play_games
from train.checkpoint import Checkpoints, Loaded, load, split_address, stage_folder
from train.sampler import row_keys

DRAWS = 1.0  # games between each two players that are taken to have been drawn
RESAMPLES = 1000


def elo(wins: np.ndarray) -> np.ndarray:
    """Ratings [..., n] from wins [..., n, n] of the row's player over the column's, a draw half a win of each.

    Bradley-Terry, P(i beats j) = g_i / (g_i + g_j), and 400 log10 g, with a mean of 0: the most likely ones, found by
    minorization-maximization (Hunter 2004, equation 3). Each two are taken to have drawn DRAWS games more, so that one
    who wins all has a rating too (as in Coulom's BayesElo).
    """
    n = wins.shape[-1]
    wins = (wins + DRAWS / 2) * (1 - np.eye(n))
    games, won = wins + np.swapaxes(wins, -1, -2), wins.sum(-1)
    strength, change = np.ones(wins.shape[:-1]), np.inf
    while change > 1e-9:
        new = won / (games / (strength[..., :, None] + strength[..., None, :])).sum(-1)
        new = new / np.exp(np.log(new).mean(-1, keepdims=True))
        change, strength = np.abs(np.log(new / strength)).max(), new
    return 400 * np.log10(strength)


def opponents(
    addresses: Sequence[str], every: int, workdir: Path, mesh: Any, tokenizer: Tokenizer
) -> dict[str, Loaded]:
    """Checkpoints by their addresses: NAME or NAME@STEP of a stage in `workdir`, or a path. With `every` an address
    without a step is that of all its checkpoints at multiples of so many steps.

    Raises:
        InputError: one that is not there, or speaks in other tokens.
    """
    found = {}
    for address in addresses:
        name, step = split_address(address)
        path = name if '/' in name else str(workdir / name)
        steps = [step]
        if every and step is None:
            checkpoints = Checkpoints(stage_folder(path) / 'checkpoints', read_only=True)
            steps = [s for s in checkpoints.steps() if s % every == 0]
            checkpoints.close()
            if not steps:
                raise InputError(f'opponents: {path} has no checkpoint at a multiple of every={every} steps')
        for s in steps:
            at = '' if s is None else f'@{s}'
            found[name + at] = load(path + at, mesh)
            if found[name + at].tokenizer.fingerprint != tokenizer.fingerprint:
                raise InputError(f'opponents: {path} was trained with another tokenizer')
    return found


def tournament(
    players: Sequence[Sample], game: Game, starts: Sequence[Prompt], samples: int, tokenizer: Tokenizer, seed: int
) -> np.ndarray:
    """Every player against every other, `samples` times on each side from each start.

    Returns the wins of one over the other by start: float [starts, players, players], draws halved.
    """
    pairs = list(itertools.combinations(range(len(players)), 2))
    seats = [(pair, start) for pair in pairs for start in starts for _ in range(samples)]
    sides = play_games(
        [(game, start) for _, start in seats for _ in range(2)],
        [(players[a], players[b]) for pair, _ in seats for a, b in (pair, pair[::-1])],
        tokenizer,
        row_keys(seed, range(len(pairs) * len(starts)), 2 * samples).reshape(-1),
    )
    score = np.array([first.verdict.score for first, _ in sides if first is not None])
    score = score.reshape(len(pairs), len(starts), samples, 2)
    wins = np.zeros((len(starts), len(players), len(players)))
    for (a, b), mine in zip(pairs, score, strict=True):
        wins[:, a, b] = (mine[..., 0] + 1 - mine[..., 1]).sum(1)
        wins[:, b, a] = 2 * samples - wins[:, a, b]
    return wins


def standing(names: Sequence[str], wins: np.ndarray) -> dict[str, Any]:
    """The last player's rating above the first one's, all ratings above it and the last one's share of wins against
    each other one, with 95% percentile bootstrap intervals over starts. `wins` as of `tournament`."""
    picks = np.random.default_rng(0).integers(0, len(wins), (RESAMPLES, len(wins)))
    sums = np.concatenate([wins.sum(0)[None], wins[picks].sum(1)])
    rated = elo(sums)
    rated = rated - rated[:, :1]
    games = wins[0, 0, 1] + wins[0, 1, 0]
    shares = sums[:, -1, :-1] / (games * len(wins))

    def stated(x: np.ndarray) -> list[float]:
        return [round(float(v), 4) for v in (x[0], *np.percentile(x[1:], [2.5, 97.5]))]

    value, low, high = stated(rated[:, -1])
    return {
        'value': value,
        'low': low,
        'high': high,
        'details': {
            'elo': {name: stated(x) for name, x in zip(names, rated.T, strict=True)},
            'win_rate': stated(shares.mean(1)),
            'win_rates': {name: stated(x) for name, x in zip(names, shares.T, strict=False)},
            'games': int(games * len(wins)) * len(names) * (len(names) - 1) // 2,
        },
    }
