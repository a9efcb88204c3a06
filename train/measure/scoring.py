"""Passes without gradient: what a model says of tokens that are there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from data.packing import Batch, Segment, empty_batch, pack
from data.stream import State, Stream
from model.transformer import Model, Variables
from train.launch.host import fetch
from train.learn.step import Layout


class Other(NamedTuple):
    """A model beside the one in training."""

    model: Model
    variables: Variables


class Scorer:
    """Reads segments in batches of a stage's shape, and says of each token what is asked for."""

    def __init__(self, model: Model, pad_id: int, config: Mapping[str, Any]):
        """`config` has batch_size, sequence_length, microbatches (read one after the other) and temperature (1 where
        there is none)."""
        self._pad, self._config = pad_id, config

        def score(variables: Variables, batch: Mapping[str, jax.Array], names: tuple[str, ...]) -> dict[str, jax.Array]:
            def one(part: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
                temperature = config.get('temperature', 1.0)
                output = model.apply(variables, part['tokens'], part['positions'], part['segments'], temperature)
                return {name: getattr(output, name) for name in names}

            def some(part: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
                nothing = lambda part: jax.tree.map(  # noqa: E731
                    lambda x: jax.numpy.zeros(x.shape, x.dtype), jax.eval_shape(one, part)
                )
                return jax.lax.cond((part['segments'] > 0).any(), one, nothing, part)

            return jax.lax.map(some, batch)

        self._score = jax.jit(score, static_argnums=2)

    def __call__(
        self, variables: Variables, segments: Sequence[Segment], names: tuple[str, ...]
    ) -> list[dict[str, np.ndarray]]:
        """Of each segment the fields `names` of `model.heads.Output`, [tokens] each."""
        c, rows = self._config, self._config['batch_size']
        results: list[dict[str, np.ndarray]] = []
        for first in range(0, len(segments), rows):  # as many segments as rows always fit
            some = segments[first : first + rows]
            batch = empty_batch(rows, c['sequence_length'], self._pad)
            batch['number'] = np.zeros_like(batch['tokens'])
            numbers = [{'number': np.full(len(s.tokens), i + 1, np.int32)} for i, s in enumerate(some)]
            pack([[Segment(s.tokens, s.loss_weight, n)] for s, n in zip(some, numbers, strict=True)], batch)
            order = np.argsort(batch['number'].ravel(), kind='stable')
            order = order[-sum(len(s.tokens) for s in some) :]
            ends = np.cumsum([len(s.tokens) for s in some])[:-1]
            shape = (c['microbatches'], rows // c['microbatches'], c['sequence_length'])
            parts = {name: batch[name].reshape(shape) for name in ('tokens', 'positions', 'segments')}
            said = {name: x.ravel()[order] for name, x in fetch(self._score(variables, parts, names)).items()}
            split = {name: np.split(x, ends) for name, x in said.items()}
            results += [{name: split[name][i] for name in names} for i in range(len(some))]
        return results


class TeacherStream:
    """A stream whose batches say what a teacher thinks of each token: its `top` most likely tokens at that place,
    `teacher_ids` int32 [B, T, top], and their log-probabilities, `teacher_logprob`."""

    work = 'scoring'

    def __init__(self, stream: Stream, teacher: Other, config: Mapping[str, Any], layout: Layout | None):
        self.rows = stream.rows
        self._stream, self._variables, self._layout = stream, teacher.variables, layout

        def top(variables: Variables, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            def one(part: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
                output = teacher.model.apply(variables, part['tokens'], part['positions'], part['segments'])
                return output.top(config['top'])

            return jax.lax.map(one, batch)

        self._top = jax.jit(top)

    def next(self, step: int, variables: Any = None) -> tuple[Batch, State]:
        """The inner stream's batch, with the teacher's arrays."""
        assert self._layout is not None
        batch, state = self._stream.next(step)
        placed = self._layout.place({name: batch[name] for name in ('tokens', 'positions', 'segments')}, self.rows)
        ids, logprobs = fetch(self._top(self._variables, placed))
        here = lambda x: x.reshape(-1, *x.shape[2:])[np.asarray(self.rows)]  # noqa: E731
        return {**batch, 'teacher_ids': here(ids), 'teacher_logprob': here(logprobs)}, state

    @property
    def events(self) -> list[tuple[str, str]]:
        """The inner stream's."""
        return getattr(self._stream, 'events', [])

    def restore(self, state: State) -> None:
        self._stream.restore(state)

    def close(self) -> None:
        self._stream.close()
