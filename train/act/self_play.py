"""Self-play: a game's sides are played by the model in training, or one of them by an opponent that does not learn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data.errors import InputError
from data.packing import Batch
from data.stream import State
from data.tasks import ILLEGAL, Game
from model.transformer import Variables
from train.act.episodes import Sample
from train.act.games import play_games
from train.act.rollout import Drawn, RolloutStream
from train.checkpoint import Checkpoints
from train.sampler import row_keys

OPPONENT = 'opponent'  # how the roles of other models begin that are opponents


class SelfPlayStream(RolloutStream):
    """Each start is played `samples` times, and a side's games from one start are a group: the advantage of its moves
    is its return less the mean of that group (role-conditioned advantage estimation; Liu et al. 2025, "SPIRAL", which
    takes a running mean over starts). One baseline for both sides would reward whoever moves first for doing so.

    A share `opponent_share` of the starts is played against an opponent, on either side by turns: one of `models` whose
    role begins with 'opponent', or one of the last `pool` saved states of this very stage. That pool takes in a state
    when the loop saves it, every `save_every` steps, so that what the pool holds is on disk: a resumed stage reads it
    from there, bit for bit. Retention has to leave it there, one state more for a broken last one: pool < keep.
    """

    def __init__(self, *given: Any, **named: Any):
        """Arguments as of `RolloutStream`.

        Raises:
            InputError: a task that is no game; a pool that retention does not keep; opponents that are nowhere; and as
                `RolloutStream`.
        """
        super().__init__(*given, **named)
        c = self._config
        for task in self._levels.tasks:
            if not isinstance(task, Game):
                raise InputError(f'task.name is {task.name!r}: expected a game of two sides, such as nim')
        if c['refills']:
            raise InputError(f'refills is {c["refills"]}: expected 0, as games are not drawn again')
        if not 0 <= c['pool'] < c['keep']:
            raise InputError(f'pool is {c["pool"]}: expected 0 or more and less than keep, which is {c["keep"]}')
        self._named = {role: other for role, other in self._others.items() if role.startswith(OPPONENT)}
        if c['opponent_share'] and not c['pool'] and not self._named:
            raise InputError(
                f'opponent_share is {c["opponent_share"]}: expected 0, as pool is 0 and models.{OPPONENT} is empty'
            )
        self._pool: dict[int, Variables | None] = {}  # by step; None: still on disk

    @staticmethod
    def most(c: Mapping[str, Any]) -> int:
        """Those of both sides."""
        return 2 * RolloutStream.most(c)

    def next(self, step: int, variables: Any = None) -> tuple[Batch, State]:
        """See `RolloutStream`."""
        c = self._config
        for past in [past for past, held in self._pool.items() if held is None]:
            self._pool[past] = self._read(past, variables)
        if c['pool'] and step and step % c['save_every'] == 0:
            self._pool[step] = jax.tree.map(lambda x: x.copy(), variables)  # the step will overwrite its own
            self._pool = {past: self._pool[past] for past in sorted(self._pool)[-c['pool'] :]}
        batch, state = super().next(step, variables)
        return batch, {**state, 'pool': list(self._pool)}

    def restore(self, state: State) -> None:
        """See `RolloutStream`."""
        super().restore(state)
        self._pool = dict.fromkeys(state['pool'])

    def _read(self, step: int, variables: Variables) -> Variables:
        """What this stage had saved at a step."""
        assert self._folder is not None
        checkpoints = Checkpoints(self._folder / 'checkpoints', read_only=True)
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), variables)
        restored = checkpoints.restore(wanted, step)
        checkpoints.close()
        assert restored is not None
        return restored.arrays

    def _draw(self, variables: Any) -> Drawn:
        """Games from the next `prompts` starts; a group of trajectories for each side that this model played."""
        problems, samples = self._pose(), self._config['samples']
        own = self._sampler(self._model, variables)
        others = [self._sampler(other.model, other.variables) for _, other in sorted(self._named.items())]
        others += [self._sampler(self._model, past) for past in self._pool.values()]
        seats = [self._seats(p.number, own, others) for p in problems]
        keys = row_keys(self._seed, [p.number for p in problems], samples).reshape(-1)
        games = [(task, p.prompt) for p in problems if isinstance(task := p.task, Game) for _ in range(samples)]
        sides = play_games(games, [pair for pair in seats for _ in range(samples)], self._tokenizer, keys)
        posed, episodes = [], []
        alone: list[float] = []  # scores of the first side, where both are this model
        against: list[float] = []  # of this model, where one is an opponent
        for i, (problem, pair) in enumerate(zip(problems, seats, strict=True)):
            played = sides[i * samples : (i + 1) * samples]
            for side in (side for side in (0, 1) if pair[side] is own):
                if group := [e for both in played if (e := both[side]) is not None]:
                    posed.append(problem)
                    episodes.append(group)
            scores = [both[0].verdict.score for both in played if both[0] is not None]
            if pair == (own, own):
                alone += scores
            else:
                against += scores if pair[0] is own else [1 - score for score in scores]
        drawn = self._judged(posed, episodes)
        spoken = [e for both in sides for e in both if e is not None]
        drawn.read = sum(len(e.prompt) + len(e.tokens) for e in spoken)
        drawn.metrics |= {
            'play/moves': sum(e.turns for e in spoken) / len(sides),
            'play/illegal': sum(e.verdict.reason == ILLEGAL for e in spoken) / len(sides),
            **{f'play/{name}': float(np.mean(x)) for name, x in (('first', alone), ('opponent', against)) if x},
        }
        return drawn

    def _seats(self, number: int, own: Sample, others: Sequence[Sample]) -> tuple[Sample, Sample]:
        """Who plays the first and who the second side from start `number`; against opponents this model takes turns."""
        rng = random.Random(f'{self._seed} opponent {number}')
        if not others or rng.random() >= self._config['opponent_share']:
            return own, own
        other = rng.choice(others)
        return (own, other) if number % 2 == 0 else (other, own)
