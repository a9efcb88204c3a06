"""What the report says of the stages of a run beside each other: their graph, what each cost and what that bought."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.mixture import weights_at
from data.stream import CONSUMED
from train.checkpoint import read_json
from train.measure.figures import COMPUTE, Mark, marks
from train.measure.page import duration, rounded, safe
from train.measure.statistics import interval, scored

Stage = Mapping[str, Any]
PARTS = 'evaluations.jsonl'  # in a stage's folder: evaluations on the way
BOX, GAP, ROW = 132, 36, 52  # of the graph, pixels
MOVED = 3  # stages that a reading names


def parent_of(stage: Stage) -> str:
    """The name of the stage that a stage's weights come from; '' where there is none."""
    return str(stage.get('parent') or '').partition('@')[0]


def origins(stage: Stage) -> list[str]:
    """The stages that a stage needs, by name, its parent first."""
    named = [stage.get('parent'), *(stage.get('models') or {}).values(), *(stage.get('records') or ())]
    return [*dict.fromkeys(str(name).partition('@')[0] for name in named if name)]


def drawn(stages: Sequence[Stage], colours: Mapping[str, str]) -> str:
    """The stage graph as an `<svg>` element: from left to right, dashed where a stage only reads another."""
    column: dict[str, int] = {}
    places: dict[str, tuple[int, int]] = {}
    lines, boxes = [], []
    for stage in stages:
        name, known = stage['name'], [origin for origin in origins(stage) if origin in places]
        column[name] = max((column[origin] + 1 for origin in known), default=0)
        # Beside its parent where there is room.
        taken = {y for x, y in places.values() if x == column[name]}
        row = next(y for y in itertools.count(places[known[0]][1] if known else 0) if y not in taken)
        places[name] = column[name], row
        x, y = column[name] * (BOX + GAP), row * ROW
        for origin in known:
            x0, y0 = places[origin][0] * (BOX + GAP) + BOX, places[origin][1] * ROW + 20
            dash = '' if origin == parent_of(stage) else ' stroke-dasharray="4 3"'
            bend = f'M{x0} {y0}C{x0 + GAP // 2} {y0} {x - GAP // 2} {y + 20} {x} {y + 20}'
            lines.append(f'<path d="{bend}" fill="none" stroke="currentColor" stroke-opacity=".45"{dash}/>')
        short = name if len(name) <= 17 else name[:16] + '…'
        boxes.append(
            f'<rect x="{x}" y="{y}" width="{BOX}" height="40" rx="6" fill="none" stroke="{colours[name]}" '
            f'stroke-width="2"/><text x="{x + 9}" y="{y + 17}" font-weight="600">{safe(short)}</text>'
            f'<text x="{x + 9}" y="{y + 32}" opacity=".65">{safe(stage.get("kind") or "")}</text>'
        )
    if len(places) < 2:
        return ''
    wide, high = (max(p[axis] for p in places.values()) + 1 for axis in (0, 1))
    size = (wide * (BOX + GAP) - GAP + 2, high * ROW - 10)
    head = f'<svg role="img" width="{size[0]}" height="{size[1]}" viewBox="-1 -1 {size[0]} {size[1] + 2}"'
    text = 'font-family="sans-serif" font-size="12" fill="currentColor"'
    return f'<div class="wide graph">{head} {text}>{"".join(lines + boxes)}</svg></div>'


def cost(workdir: Path, stage: Stage, price: float) -> list[str]:
    """What a stage took, in words: steps, records, tokens, FLOPs, time, money (by a price for a device-hour), bytes."""
    seconds = stage.get('seconds') or 0
    hours = seconds * (stage.get('devices') or 0) / 3600
    stored = sum(path.stat().st_size for path in (workdir / stage['name']).rglob('*') if path.is_file())
    facts = [
        f'{stage["steps"]:,} steps' if stage.get('steps') else '',
        f'{stage["report"]["records"]:,} records' if stage.get('report') else '',
        f'{rounded(stage["tokens"])} tokens' if stage.get('tokens') else '',
        f'{rounded(stage["flops"])} FLOPs' if stage.get('flops') else '',
        duration(seconds),
        f'{hours:.3g} device-hours' if hours else '',
        f'${hours * price:.2f}' if hours and price else '',
        f'{rounded(stored)}B stored' if stored else '',
    ]
    return [fact for fact in facts if fact]


def mixtures(workdir: Path, stages: Sequence[Stage], metrics: Mapping[str, list[dict[str, Any]]]) -> str:
    """A table of the tokens that each source was to give a stage, and gave, in percent."""
    rows = []
    for stage in stages:
        name = stage['name']
        last, path = (metrics[name] or [{}])[-1], workdir / name / 'config.json'
        taken = {key.removeprefix(CONSUMED): x for key, x in last.items() if key.startswith(CONSUMED)}
        if not taken or not path.is_file():
            continue
        mixture = read_json(path)['stage']['mixture']
        starts = [*(start for start, _ in mixture), 1.0]
        wanted: dict[str, float] = {}
        for start, end in zip(starts, starts[1:], strict=False):
            for source, weight in weights_at(mixture, start).items():
                wanted[source] = wanted.get(source, 0.0) + weight * (end - start)
        for source, share in wanted.items():
            rows.append(
                f'<tr><th>{safe(name)}</th><td>{safe(source)}</td><td>{100 * share:.1f}</td>'
                f'<td>{100 * taken.get(source, 0.0):.1f}</td></tr>'
            )
    head = '<thead><tr><th></th><th>source</th><th>configured, %</th><th>consumed, %</th></tr></thead>'
    return f'<div class="wide"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>' if rows else ''


class Taken(NamedTuple):
    """Evaluations at one point of a stage: after a step, or at its end (step None), and the FLOPs behind that point."""

    stage: str
    step: int | None
    flops: float
    results: Mapping[str, Any]


def points(stages: Sequence[Stage], parts: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[Taken]]:
    """Of each stage where it was evaluated, in order. FLOPs are its own and those of stages its weights come from."""
    total: dict[str, float] = {}
    found = {}
    for stage in stages:
        name = stage['name']
        total[name] = total.get(parent_of(stage), 0.0) + (stage.get('flops') or 0.0)
        within = [Taken(name, line['step'], line['flops'], line['evaluations']) for line in parts.get(name, ())]
        found[name] = [*within, Taken(name, None, total[name], stage.get('evaluations') or {})]
    return found


def measured(
    stages: Sequence[Stage], parts: Mapping[str, list[dict[str, Any]]], colours: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """Of each evaluation that was taken twice or more: its name, a reading, and a plot of its values with intervals
    over the FLOPs behind them, each tied to the one before it in the stage or at the end of the parent."""
    taken, found = points(stages, parts), []
    names = dict.fromkeys(name for at in taken.values() for point in at for name in point.results)
    for number, evaluation in enumerate(names):
        shown: list[Mark] = []
        links: list[tuple[int, int]] = []
        last: dict[str, int] = {}
        moved: list[tuple[float, str]] = []
        said: Mapping[str, Any] = {}
        for stage in stages:
            name, before = stage['name'], last.get(parent_of(stage))
            for point in taken[name]:
                result = point.results.get(evaluation) or {}
                if None in (result.get('value'), result.get('low'), result.get('high')):
                    continue
                links += [(before, len(shown))] if before is not None else []
                before, said = len(shown), result
                label = name if point.step is None else ''
                shown.append(Mark(label, result['value'], result['low'], result['high'], point.flops, colours[name]))
                last |= {name: before} if point.step is None else {}
            # A stage from scratch is compared with what it was when it was first evaluated.
            gain = _gain(taken.get(parent_of(stage), taken[name][:1])[-1:], taken[name][-1], evaluation)
            if len(gain) == 3 and not gain[1] <= 0 <= gain[2]:
                moved.append((gain[0], f'{name} made it {"better" if gain[0] > 0 else "worse"}'))
        if len(shown) < 2:
            continue
        told = [words for _, words in sorted(moved, key=lambda one: -abs(one[0]))[:MOVED]]
        unit, better = str(said.get('unit') or ''), said.get('direction') or 'higher'
        reading = f'{"; ".join(told) or "No stage moved it for certain"} ({better} is better).'
        label = f'{evaluation}, {unit}' if unit else evaluation
        found.append((evaluation, reading, marks(shown, label, COMPUTE, f'result{number}', links)))
    return found


def returns(stages: Sequence[Stage], parts: Mapping[str, list[dict[str, Any]]]) -> str:
    """A row for each stage that trained and was evaluated as its parent was, and below it one for each part of it where
    it was evaluated on the way: gains by FLOPs, in one unit for all."""
    taken = points(stages, parts)
    rows: list[tuple[str, float, dict[str, tuple[float, ...]]]] = []
    for stage in stages:
        before, here = taken.get(parent_of(stage), [])[-1:], taken[stage['name']]
        spans = [(stage['name'], before, here[-1], stage.get('flops') or 0.0)]
        for point in here if len(here) > 1 else ():
            start = before[0].flops if before else 0.0
            end = 'the end' if point.step is None else f'step {point.step:,}'
            spans.append((f'{stage["name"]} to {end}', before, point, point.flops - start))
            before = [point]
        for label, start_point, point, flops in spans:
            gains = {name: gain for name in point.results if (gain := _gain(start_point, point, name)) and flops > 0}
            rows += [(label, flops, gains)] if gains else []
    if not rows:
        return ''
    unit = 10.0 ** math.floor(math.log10(max(flops for _, flops, _ in rows)))
    columns = list(dict.fromkeys(name for _, _, gains in rows for name in gains))
    body = ''
    for label, flops, gains in rows:
        cells = ''.join(_return(gains.get(column, ()), unit / flops) for column in columns)
        body += f'<tr><th>{safe(label)}</th><td>{rounded(flops)}</td>{cells}</tr>'
    head = ''.join(f'<th>{safe(c)}<br><span class="soft">gain per {unit:.0e} FLOPs</span></th>' for c in columns)
    head = f'<thead><tr><th></th><th>FLOPs</th>{head}</tr></thead>'
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _gain(before: Sequence[Taken], after: Taken, name: str) -> tuple[float, ...]:
    """How much better a result got, and the bounds of that where they are known; nothing where it cannot be told."""
    old, new = before[0].results.get(name) if before else None, after.results.get(name)
    if not old or not new or None in (old.get('value'), new.get('value')):
        return ()
    sign = -1 if new.get('direction') == 'lower' else 1
    bounds = sorted(sign * bound for bound in paired(new, old) or ())
    return (sign * (new['value'] - old['value']), *bounds)


def _return(gain: Sequence[float], scale: float) -> str:
    """A cell: the gain, and its bounds where they are known, by compute."""
    if not gain:
        return '<td class="soft">–</td>'
    value, *bounds = (x * scale for x in gain)
    certain = bool(bounds) and (bounds[0] > 0 or bounds[1] < 0)
    kind = ('gain' if value > 0 else 'loss') if certain else 'soft'
    note = f'<br><span class="soft">{bounds[0]:+.3g} to {bounds[1]:+.3g}</span>' if bounds else ''
    return f'<td><span class="{kind}">{value:+.3g}</span>{note}</td>'


def paired(result: Mapping[str, Any], parent: Mapping[str, Any]) -> tuple[float, float] | None:
    """Interval of the change by a paired bootstrap, where both keep the scores of the same items."""
    (mine, weights), (theirs, same) = (scored(x.get('details', {})) for x in (result, parent))
    return interval(mine - theirs, weights) if len(weights) and np.array_equal(weights, same) else None
