"""What the arms of a sweep came to, beside each other: a table, and a page with a plot of each measure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.errors import InputError
from model.config import ModelConfig
from train.checkpoint import read_json
from train.compare import compare
from train.launch.log import at_the_end
from train.measure.figures import Mark, marks
from train.measure.page import document, safe
from train.measure.statistics import interval, scored

LOGGED = {'loss': 'loss', 'MaxVio': 'experts/max_violation'}  # metrics at the end of training that count as measures
CACHE, TOTAL, ACTIVE = 'cache elements a token', 'parameters', 'active parameters'
FACTS = (CACHE, TOTAL, ACTIVE)  # what an arm is, not what it came to


class Row(NamedTuple):
    """What a group of arms that differ in their seed came to, in one measure.

    `low` and `high` are a 95% bootstrap interval over items where the measure scores items, else the range of the
    seeds. `verdict` says how the best one is ahead of this one.
    """

    stage: str
    measure: str
    arm: str
    seeds: int
    value: float
    low: float
    high: float
    verdict: str


def table(groups: Mapping[str, Sequence[Path]], stages: Sequence[str]) -> list[Row]:
    """What the arms came to, in each measure of each of the stages; arms that have not got there are left out.

    groups: by the name of what differs in a seed alone, the workdirs.
    """
    rows = []
    for stage in stages:
        folders = {name: [workdir / stage for workdir in some] for name, some in groups.items()}
        done = {name: some for name, some in folders.items() if all((f / 'finished.json').exists() for f in some)}
        measured = {name: [_measures(f) for f in some] for name, some in done.items()}
        for measure in dict.fromkeys(m for seeds in measured.values() for said in seeds for m in said):
            held = {name: seeds for name, seeds in measured.items() if all(measure in said for said in seeds)}
            ranked = _ranked(stage, measure, {n: [s[measure] for s in seeds] for n, seeds in held.items()}, done)
            if measure not in FACTS or len({row.value for row in ranked}) > 1:
                rows += ranked
    return rows


def _measures(folder: Path) -> dict[str, dict[str, Any]]:
    """Evaluations of a stage, what its steps were like at the end, and the size of its model."""
    finished = read_json(folder / 'finished.json')
    found: dict[str, dict[str, Any]] = dict(finished['evaluations'])
    values = {name: at_the_end(folder, metric) for name, metric in LOGGED.items()}
    if (config := folder / 'config.json').exists() and finished.get('parameters'):
        model = ModelConfig.from_dict(read_json(config)['model'])
        values[CACHE] = model.cache_elements_per_token
        values |= {TOTAL: finished['parameters']['total'], ACTIVE: finished['parameters']['active']}
    lower = {'direction': 'lower', 'details': {}}
    return found | {name: {'value': value, **lower} for name, value in values.items() if value is not None}


def _ranked(
    stage: str, measure: str, said: Mapping[str, list[dict[str, Any]]], folders: Mapping[str, list[Path]]
) -> list[Row]:
    """A row for each group, the best first."""
    values = {name: [float(x['value']) for x in seeds] for name, seeds in said.items()}
    sign = -1 if next(iter(said.values()))[0]['direction'] == 'lower' else 1
    ranked = sorted(values, key=lambda name: -sign * float(np.mean(values[name])))
    best = ranked[0]
    items = {name: [scored(x['details']) for x in said[name]] for name in ranked}
    weights = items[best][0][1]
    paired = len(weights) > 0 and all(np.array_equal(w, weights) for seeds in items.values() for _, w in seeds)
    paired &= len({len(seeds) for seeds in items.values()}) == 1
    rows = []
    for name in ranked:
        means = np.mean([scores for scores, _ in items[name]], axis=0)
        low, high = interval(means, weights) if paired else (min(values[name]), max(values[name]))
        if measure in FACTS:
            verdict = ''
        elif name == best:
            verdict = 'best'
        elif paired:
            ahead = compare([str(f) for f in folders[name]], [str(f) for f in folders[best]], measure)[measure]
            # Items say nothing of the noise of training, which may be larger: seeds have to agree as well.
            apart = (ahead['low'] > 0 or ahead['high'] < 0) and len(set(np.sign(ahead['seeds']))) == 1
            gap = f'{ahead["difference"]:+.4f} [{ahead["low"]:+.4f}, {ahead["high"]:+.4f}]'
            verdict = f'best differs by {gap}' + ('' if apart else ': not separated')
        else:
            gaps = [sign * (a - b) for a in values[best] for b in values[name]]
            apart = len(gaps) > 1 and min(gaps) > 0
            verdict = 'every seed behind every one of the best' if apart else 'not separated'
        rows.append(Row(stage, measure, name, len(values[name]), float(np.mean(values[name])), low, high, verdict))
    return rows


def write_table(folder: Path, rows: Sequence[Row]) -> str:
    """Writes sweep.csv and sweep.md; gives the latter."""
    with (folder / 'sweep.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    head = ['| stage | measure | arm | seeds | value | |', '|---|---|---|---|---|---|']
    body = [
        f'| {r.stage} | {r.measure} | {r.arm} | {r.seeds} | {r.value:.4f} [{r.low:.4f}, {r.high:.4f}] | {r.verdict} |'
        for r in rows
    ]
    text = '\n'.join([*head, *body]) + '\n'
    (folder / 'sweep.md').write_text(text)
    return text


def write_page(folder: Path, rows: Sequence[Row], over: str = '') -> Path:
    """Writes sweep.html: of each measure a plot and its reading; over the measure `over` where that is named.

    Raises:
        InputError: no such measure.
    """
    measures = list(dict.fromkeys((row.stage, row.measure) for row in rows if row.measure not in FACTS))
    known = [*dict.fromkeys(row.measure for row in rows)]
    if over and over not in known:
        raise InputError(f'--over is {over!r}: expected one of {", ".join(known)}')
    sections = []
    for number, (stage, measure) in enumerate(measures):
        if measure == over:
            continue
        mine = [row for row in rows if (row.stage, row.measure) == (stage, measure)]
        places = {row.arm: row.value for row in rows if (row.stage, row.measure) == (stage, over)}
        shown = [Mark(r.arm, r.value, r.low, r.high, places.get(r.arm)) for r in mine if not over or r.arm in places]
        plot = marks(shown, measure, over, f'figure{number}')
        lines = ''.join(
            f'<tr><th>{safe(r.arm)}</th><td>{r.value:.4g}</td><td class="soft">{r.low:.4g} to {r.high:.4g}</td>'
            f'<td>{r.seeds}</td><td>{safe(r.verdict)}</td></tr>'
            for r in mine
        )
        head = '<thead><tr><th></th><th>mean</th><th></th><th>seeds</th><th></th></tr></thead>'
        sections.append(
            f'<section><h2>{safe(stage)}: {safe(measure)}</h2><p class="soft">{safe(reading(mine))}</p>'
            f'<div class="plot">{plot}</div>'
            f'<div class="wide"><table>{head}<tbody>{lines}</tbody></table></div></section>'
        )
    note = 'Bars: 95% intervals over items of the mean over seeds where items are scored, else the range of the seeds.'
    title = f'{folder.resolve().name} · Torso sweep'
    path = folder / 'sweep.html'
    body = f'<header><h1>{safe(title)}</h1><p class="soft">{note}</p></header>{"".join(sections)}'
    path.write_text(document(title, body), 'utf-8')
    return path


def reading(rows: Sequence[Row]) -> str:
    """One line on a measure: which arm is best, and which are behind it."""
    best, others = rows[0].arm, [row for row in rows[1:]]
    level = [row.arm for row in others if row.verdict.endswith('not separated')]
    behind = [row.arm for row in others if row.arm not in level]
    words = [f'{best} is best' if behind or not others else f'{best} is first']
    words += [f'behind it: {", ".join(behind)}'] if behind else []
    words += [f'not separated from it: {", ".join(level)}'] if level else []
    return '; '.join(words) + '.'
