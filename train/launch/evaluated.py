"""The evaluations of a stage of a run: at its end, and on the way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from data.tokenizer import Tokenizer
from model.transformer import Model, Variables
from train.checkpoint import read_json, write_json
from train.evaluate import evaluate
from train.launch.goodput import Clock
from train.launch.host import is_primary, say
from train.measure.domains import contamination, trained_on
from train.measure.lineage import PARTS


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A stage `name` of a run's `config` in `workdir`, ready to be evaluated."""

    config: Mapping[str, Any]
    name: str
    workdir: Path
    model: Model
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    clock: Clock

    def __call__(self, variables: Variables) -> dict[str, Any]:
        """The evaluations; each is kept as soon as it is there, so that a kill costs one at most."""
        folder = self.workdir / self.name
        path = folder / 'evaluations.json'
        results = read_json(path) if path.exists() else {}
        for evaluation in self._names:
            if evaluation in results:
                continue
            result = self._run(evaluation, variables)
            samples = result.pop('samples', [])
            if is_primary():
                step = self.config['stages'][self.name].get('steps', 0)
                with (folder / 'samples.jsonl').open('a') as lines:
                    lines.writelines(json.dumps({'step': step, **s}) + '\n' for s in samples)
                spec = self.config['evaluations'][evaluation]
                result['contamination'] = contamination(spec, evaluation, trained_on(folder))
            results[evaluation] = result
            write_json(path, results)
            say(
                f'{self.name}: {evaluation} {result["value"]:.4f} [{result["low"]:.4f}, {result["high"]:.4f}] '
                f'{result["metric"]} ({result.get("contamination", "")})'
            )
        return results

    def on_the_way(self, step: int, flops: float, variables: Variables) -> None:
        """Keeps what the evaluations say after a step in a line of PARTS, unless that is there already."""
        path = self.workdir / self.name / PARTS
        lines = path.read_text().splitlines() if path.exists() else []
        if any(json.loads(line)['step'] == step for line in lines):
            return
        results = {name: self._run(name, variables) for name in self._names}
        for result in results.values():
            result.pop('samples', None)
        if is_primary():
            with path.open('a') as file:
                file.write(json.dumps({'step': step, 'flops': flops, 'evaluations': results}) + '\n')

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(self.config['stages'][self.name].get('evaluations', ()))

    def _run(self, evaluation: str, variables: Variables) -> dict[str, Any]:
        spec = self.config['evaluations'][evaluation]
        with jax.set_mesh(self.mesh), self.clock.spend('evaluation'):
            return evaluate(self.model, variables, self.tokenizer, spec, workdir=self.workdir)
