"""The stream of preferences: so many records a step, whole, with what a reference model says of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError
from data.mixture import Mixture, validate_mixture, weights_at
from data.packing import Batch, Segment, empty_batch, pack
from data.preferences import judged_segments, pair_segments, step_segments
from data.rows import Order, broken_metrics, untold
from data.sources import Source
from data.stream import State
from data.tokenizer import Tokenizer
from train.launch.host import is_primary
from train.measure.scoring import Other, Scorer

MOST_SKIPPED = 1000  # records on end, before sources are said to fit nowhere
Segments = Callable[[Mapping[str, Any], Tokenizer], list[Segment]]
FORMS: dict[str, tuple[Segments, tuple[str, ...]]] = {  # of records: how they are cut, and what their batches hold
    'pair': (pair_segments, ('target', 'margin')),
    'judged': (judged_segments, ('target',)),
    'steps': (step_segments, ('target',)),
}


class RecordStream:
    """Batches of `records` whole records each, in the proportions of a mixture.

    Which records make step N depends on the config alone. A record's sequence log-probabilities under the reference
    model are computed once and kept in a file, one line a record.
    """

    def __init__(
        self,
        form: str,
        sources: Mapping[str, Source],
        mixture: Mixture,
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        seed: int,
        policy: Other,
        reference: Other | None = None,
        cache: Path | None = None,
    ):
        """
        Args:
            form: of FORMS.
            config: of the stage: `records` a step, `batch_size`, `sequence_length`, `microbatches`, `steps`.
            policy: the model in training, for the scalar `baseline` of single judged answers.
            reference: its log-probabilities become `reference_logprob`, the sum over an answer on its last token.
            cache: the file that keeps them.

        Raises:
            InputError: a mixture that does not match the sources.
        """
        validate_mixture(mixture, sources)
        self._segments, self._arrays = FORMS[form]
        self._mixture, self._tokenizer, self._config = mixture, tokenizer, config
        self._orders = {name: Order(name, source, seed) for name, source in sources.items()}
        self._taken = dict.fromkeys(sources, 0)
        self._skipped = 0  # records too long for a row
        self._reference, self._scorer = reference, None
        self._needs_baseline = form == 'judged'
        if reference is not None:
            self._scorer = Scorer(reference.model, tokenizer.pad_id, config)
            self.work = 'scoring'
        self._policy_scorer = Scorer(policy.model, tokenizer.pad_id, config)
        self._cache = cache
        self.rows = range(config['batch_size'])

    def next(self, step: int, variables: Any = None) -> tuple[Batch, State]:
        """The batch of `step`, and the state after it."""
        c = self._config
        weights = weights_at(self._mixture, step / c['steps'])
        taken = [self._fitting(weights) for _ in range(c['records'])]
        named, units = [key for key, _ in taken], [unit for _, unit in taken]
        batch = empty_batch(c['batch_size'], c['sequence_length'], self._tokenizer.pad_id)
        extra = (*self._arrays, *(('reference_logprob',) if self._reference else ()))
        batch |= {name: np.zeros_like(batch['loss_weight']) for name in extra}
        metrics = {'records/skipped': float(self._skipped)} if self._skipped else {}
        if self._reference is not None:
            known = self._reference_of(named, units)
            units = [
                [s.stamped(reference_logprob=x) for s, x in zip(unit, known[key], strict=True)]
                for key, unit in zip(named, units, strict=True)
            ]
        pack(units, batch)
        if self._reference is not None and self._needs_baseline:
            batch['baseline'] = self._mismatched(units, variables)
            metrics['preference/baseline'] = float(batch['baseline'])
        metrics |= broken_metrics(self._orders)
        broken = {name: sorted(order.broken) for name, order in self._orders.items() if order.broken}
        state = {'step': step + 1, 'taken': dict(self._taken), 'skipped': self._skipped, 'metrics': metrics}
        return batch, {**state, 'broken': broken}

    def restore(self, state: State) -> None:
        """Goes on after the batch that `state` came with."""
        self._taken, self._skipped = dict(state['taken']), state['skipped']
        for name, indices in state.get('broken', {}).items():
            self._orders[name].broken.update(indices)

    @property
    def events(self) -> list[tuple[str, str]]:
        """Of broken records."""
        return untold(self._orders)

    def close(self) -> None:
        """Nothing is held."""

    def _fitting(self, weights: Mapping[str, float]) -> tuple[tuple[str, int], list[Segment]]:
        """The next record that fits into a row, as source and number, and its segments; others are passed over."""
        length = self._config['sequence_length']
        for _ in range(MOST_SKIPPED):
            key = self._take(weights)
            if (unit := self._cut(*key)) is not None and sum(len(segment.tokens) for segment in unit) <= length:
                return key, unit
            self._skipped += unit is not None
        raise InputError(f'{MOST_SKIPPED} records on end are longer than sequence_length={length}')

    def _take(self, weights: Mapping[str, float]) -> tuple[str, int]:
        """The next record, as source and number: of the source that is furthest behind its share."""
        total = sum(self._taken.values()) + 1
        name = max(weights, key=lambda name: (weights[name] * total - self._taken[name], name))
        self._taken[name] += 1
        return name, self._orders[name].index(self._taken[name] - 1)

    def _cut(self, name: str, index: int) -> list[Segment] | None:
        """The segments of a record; None of one that cannot be read and is passed over."""
        try:
            return self._segments(self._orders[name].source[index], self._tokenizer)
        except InputError as error:
            self._orders[name].pass_over(index, error)
            return None

    @functools.cached_property
    def _known(self) -> dict[tuple[str, int], list[float]]:
        """What the file holds: of each record the reference's log-probability of each of its segments."""
        if self._cache is None or not self._cache.exists():
            return {}
        text = self._cache.read_text()
        whole = text[: text.rfind('\n') + 1]  # a kill may have cut the last line off
        if whole != text and is_primary():
            self._cache.write_text(whole)
        return {(name, index): values for name, index, values in map(json.loads, whole.splitlines())}

    def _reference_of(
        self, named: list[tuple[str, int]], units: list[list[Segment]]
    ) -> dict[tuple[str, int], list[float]]:
        """The reference's log-probabilities of the records; new ones are added to the file."""
        assert self._reference is not None and self._scorer is not None
        new = {key: unit for key, unit in zip(named, units, strict=True) if key not in self._known}
        if new:
            flat = [segment for unit in new.values() for segment in unit]
            sums = iter(_sums(flat, self._scorer(self._reference.variables, flat, ('logprob',))))
            found = {key: [next(sums) for _ in unit] for key, unit in new.items()}
            self._known.update(found)
            if self._cache is not None and is_primary():
                self._cache.parent.mkdir(parents=True, exist_ok=True)
                with self._cache.open('a') as file:
                    file.writelines(json.dumps([*key, values]) + '\n' for key, values in found.items())
        return self._known

    def _mismatched(self, units: list[list[Segment]], variables: Any) -> np.ndarray:
        """KTO's estimate of the KL to the reference: the mean log-ratio, at least 0, of answers behind the prompts of
        their neighbours in the batch (Ethayarajh et al. 2024, section 4.1)."""
        assert self._reference is not None and self._scorer is not None
        singles = [unit[0] for unit in units]
        crossed = []
        for one, other in zip(singles, [*singles[1:], singles[0]], strict=True):
            prompt, answer = int(one.loss_weight.argmax()), int(other.loss_weight.argmax())
            tokens = [*one.tokens[:prompt], *other.tokens[answer:]][: self._config['sequence_length']]
            weight = np.concatenate([one.loss_weight[:prompt], other.loss_weight[answer:]])[: len(tokens)]
            crossed.append(Segment(tokens, weight))
        policy = _sums(crossed, self._policy_scorer(variables, crossed, ('logprob',)))
        reference = _sums(crossed, self._scorer(self._reference.variables, crossed, ('logprob',)))
        return np.asarray(max(float(np.mean(np.subtract(policy, reference))), 0.0), np.float32)


def _sums(segments: list[Segment], said: list[dict[str, np.ndarray]]) -> list[float]:
    """Of each segment the log-probability of what is learnt of it."""
    return [float((x['logprob'] * s.loss_weight).sum()) for s, x in zip(segments, said, strict=True)]
