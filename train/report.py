"""`python -m train.report DIR`: one self-contained HTML page about everything that was trained in DIR.

Every text that a model, a data set or a config wrote is escaped; figures are inline SVG; the page asks the network for
nothing, and its content policy forbids it to.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError, did_you_mean
from train.launch.command import command
from train.launch.goodput import summary
from train.measure.browser import screenshot
from train.measure.figures import PALETTE, Curve, chart, draw, metric_curves
from train.measure.lineage import PARTS, cost, drawn, measured, mixtures, origins, paired, returns
from train.measure.page import brief, document, duration, rounded, safe, signed, with_unit

# What a newcomer needs to know about a kind of stage; a stage of another kind brings its own `description`.
KINDS = {
    'pretrain': 'Learns language from raw text: predict every next token. Nearly all knowledge comes from here.',
    'midtrain': 'Anneals on better data: the learning rate falls to zero on a mixture with worked reasoning, in some '
    'runs at a longer context.',
    'sft': 'Supervised fine-tuning: learns the form of a conversation from examples; only what the assistant says is '
    'trained.',
    'grpo': 'Reinforcement learning with verifiable rewards: the model attempts problems, a program checks the '
    'attempts, and those that beat the average of their group become more likely.',
    'attempts': 'Writes records: answers to problems, of which judges accept some. Nothing is trained.',
    'revise': 'Writes records: answers that a model criticised and revised by written principles.',
    'label': 'Writes records: pairs of answers, and how probably the one is better than the other.',
    'merge': 'Averages the parameters of several checkpoints; nothing is trained.',
}
BAND = 'Bands: 95% intervals of the running mean, as if steps were independent.'
SAMPLES = 6  # shown per stage
EVENTS_SHOWN = 100  # per stage
GREY = '#777'  # readable on white and on near-black, where no page gives a colour
READ = 4  # curves that a reading names
FIGURES = {  # metric: (title, unit, note)
    'loss': (
        'Loss',
        'nats a token',
        'Nats per predicted token on the training data of each stage. Stages train on different data, so a jump where '
        'one begins is a change of data rather than of the model. Stages that learn from rewards are left out: their '
        'loss is no measure of progress.',
    ),
    'experts/max_violation': (
        'Load of the experts',
        'of the mean load',
        'MaxVio: how far the busiest expert is above the average load. 0 is perfect balance; 1 means twice its share.',
    ),
    'experts/router_entropy': (
        'Router entropy',
        'nats',
        'How undecided the router is between experts. Near 0 it always asks the same ones.',
    ),
}


def write_report(workdir: Path) -> Path:
    """Writes `workdir`/report.html and returns its path.

    It reads lineage.json and the stages' config.json, metrics.jsonl, samples.jsonl, events.jsonl and evaluations.jsonl.
    A stage may lack them, and lines that a killed run left half-written are passed over.

    Raises:
        InputError: lineage.json is missing, or is not the record of a run.
    """
    workdir = Path(workdir)
    lineage = _read_lineage(workdir / 'lineage.json')
    stages: list[dict[str, Any]] = lineage['stages']
    metrics = {stage['name']: _read_metrics(workdir / stage['name'] / 'metrics.jsonl') for stage in stages}
    samples = {stage['name']: _read_lines(workdir / stage['name'] / 'samples.jsonl') for stage in stages}
    events = {stage['name']: _read_lines(workdir / stage['name'] / 'events.jsonl') for stage in stages}
    parts = {stage['name']: _read_lines(workdir / stage['name'] / PARTS) for stage in stages}
    page = _page(workdir, lineage.get('run') or {}, stages, metrics, samples, events, parts)
    path = workdir / 'report.html'
    partial = path.with_suffix('.html.partial')
    partial.write_bytes(page.encode('utf-8', 'replace'))
    os.replace(partial, path)
    return path


# Reading.


def _read_lineage(path: Path) -> dict[str, Any]:
    try:
        lineage = json.loads(path.read_text('utf-8'))
    except FileNotFoundError:
        raise InputError(f'{path} does not exist: expected the folder of a run (its --workdir)') from None
    except (OSError, ValueError) as error:
        raise InputError(f'{path} cannot be read: {error}') from None
    stages = lineage.get('stages') if isinstance(lineage, dict) else None
    if not isinstance(stages, list) or not all(isinstance(s, dict) and isinstance(s.get('name'), str) for s in stages):
        raise InputError(f'{path}: expected an object with a list of named "stages"')
    return lineage


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; [] if there is none. A line cut short by a kill is no reason to show nothing."""
    records = []
    if path.is_file():
        for line in path.read_text('utf-8', 'replace').split('\n'):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Metrics by step. A resumed run repeats the steps since its checkpoint: the later line of a step counts."""
    by_step = {line['step']: line for line in _read_lines(path) if isinstance(line.get('step'), int)}
    return [by_step[step] for step in sorted(by_step)]


# Writing.


def _page(
    workdir: Path,
    run: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, list[dict[str, Any]]],
    samples: Mapping[str, list[dict[str, Any]]],
    events: Mapping[str, list[dict[str, Any]]],
    parts: Mapping[str, list[dict[str, Any]]],
) -> str:
    name, colours = workdir.resolve().name, {s['name']: PALETTE[i % len(PALETTE)] for i, s in enumerate(stages)}
    facts = [run.get('created'), run.get('device'), f'{len(stages)} stages', *_totals(stages)]
    shown = ' · '.join(safe(fact) for fact in facts if fact)
    sections = [
        f'<header><h1>{safe(name)}</h1><p class="soft">{shown}</p></header>',
        _section(
            'The life of this model',
            drawn(stages, colours) + _cards(workdir, run, stages, colours),
            'Each stage starts from the model of its parent; dashed lines lead to stages that only read another.',
        ),
        _section(
            'Held-out results',
            _results(stages) + _more(stages),
            'Below each name: what keeps its items out of the training data of the last stage. Below each value: its '
            '95% confidence interval where known, and the change from the parent stage, with an interval of its own '
            'where both answered the same items; in colour where that leaves out 0, or, without one, where the two '
            'intervals do not overlap.',
        ),
        _section(
            'What a FLOP bought',
            returns(stages, parts),
            'Marginal return: how much better a stage made a result than its parent, by the FLOPs of that stage alone, '
            'with its 95% interval where both answered the same items; in colour where that leaves out 0. Below it the '
            'parts of the stage, where it was evaluated on the way.',
        ),
        *(
            _section(f'{title}, stage by stage', f'<div class="plot">{plot}</div>', f'{reading} Bars: 95% intervals.')
            for title, reading, plot in measured(stages, parts, colours)
        ),
        *_figures(metrics, colours),
        _section('What it was fed', mixtures(workdir, stages, metrics), 'Shares of the tokens taken from each source.'),
        _section('What the model says', _samples(stages, samples), 'Drawn at the end of each stage, not chosen.'),
        _section('Where the time went', _goodput(workdir), 'Goodput: the share of steps that counted in all time.'),
        _section('What happened on the way', _events(events), 'Interruptions, alarms and what was done about them.'),
        _section('What each stage changed', _changes(stages), 'Config fields that differ from the parent stage.'),
    ]
    if run.get('command'):
        sections.append(_section('Do it again', f'<pre>{safe(run["command"])}</pre>', ''))
    return document(f'{name} · Torso report', '\n'.join(section for section in sections if section))


def _section(title: str, body: str, note: str) -> str:
    below = f'<p class="soft">{safe(note)}</p>' if note else ''
    return f'<section><h2>{safe(title)}</h2>{below}{body}</section>' if body else ''


def _totals(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The run's size: the largest model, the tokens and the time of all stages."""
    parameters = [stage['parameters'] for stage in stages if stage.get('parameters')]
    largest: Mapping[str, Any] = max(parameters, key=lambda p: p.get('total') or 0, default={})
    seconds = sum(stage.get('seconds') or 0 for stage in stages)
    return [
        _parameters(largest),
        f'{rounded(sum(stage.get("tokens") or 0 for stage in stages))} tokens',
        duration(seconds),
    ]


def _parameters(parameters: Mapping[str, Any]) -> str:
    if not parameters.get('total'):
        return ''
    text = f'{rounded(parameters["total"])} parameters'
    active = parameters.get('active')
    return f'{text}, {rounded(active)} active per token' if active and active != parameters['total'] else text


def _cards(
    workdir: Path, run: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], colours: Mapping[str, str]
) -> str:
    cards = []
    for stage in stages:
        kind = str(stage.get('kind') or '')
        origin, facts = ', '.join(origins(stage)), cost(workdir, stage, float(run.get('price') or 0))
        cards.append(
            f'<div class="card" style="border-top-color:{colours[stage["name"]]}"><h3>{safe(stage["name"])}</h3>'
            f'<p class="soft">{safe(kind)}{f" from {safe(origin)}" if origin else ""}</p>'
            f'<p>{safe(stage.get("description") or KINDS.get(kind, ""))}</p>'
            f'<p class="soft">{" · ".join(map(safe, facts))}</p></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ''


def _results(stages: Sequence[Mapping[str, Any]]) -> str:
    by_name = {stage['name']: stage.get('evaluations') or {} for stage in stages}
    columns = list(dict.fromkeys(name for evaluations in by_name.values() for name in evaluations))
    head = ''.join(f'<th>{safe(column)}{_column_note(column, by_name.values())}</th>' for column in columns)
    rows = []
    for stage in stages:
        parent = by_name.get(stage.get('parent') or '', {})
        cells = ''.join(_result(by_name[stage['name']].get(column), parent.get(column)) for column in columns)
        rows.append(f'<tr><th>{safe(stage["name"])}</th>{cells}</tr>')
    if not columns:
        return ''
    return (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _more(stages: Sequence[Mapping[str, Any]]) -> str:
    """What evaluations say beside their value (pass@k, lengths, budgets of thinking), with intervals."""
    tables = []
    for name in dict.fromkeys(name for stage in stages for name in stage.get('evaluations') or {}):
        told = {s['name']: ((s.get('evaluations') or {}).get(name) or {}).get('details', {}) for s in stages}
        columns = list(dict.fromkeys(key for details in told.values() for key in details.get('intervals', ())))
        head = ''.join(f'<th>{safe(column)}</th>' for column in columns)
        rows = ''
        for stage, details in told.items():
            bounds = {column: details.get('intervals', {}).get(column) for column in columns}
            cells = (
                f'<td>{details[c]:.4g}<br><span class="soft">{x[0]:.4g} to {x[1]:.4g}</span></td>' if x else '<td></td>'
                for c, x in bounds.items()
            )
            rows += f'<tr><th>{safe(stage)}</th>{"".join(cells)}</tr>' if any(bounds.values()) else ''
        table = f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        tables += [f'<details><summary>more of {safe(name)}</summary>{table}</details>'] if columns else []
    return ''.join(tables)


def _column_note(column: str, all_evaluations: Any) -> str:
    result = [evaluations[column] for evaluations in all_evaluations if column in evaluations][-1]
    direction = {'higher': 'higher is better', 'lower': 'lower is better'}.get(result.get('direction'), '')
    items = f'{result["items"]:,} items' if result.get('items') else ''
    kept = str(result.get('contamination') or '')
    parts = ' · '.join(part for part in (str(result.get('metric') or ''), items, direction, kept) if part)
    return f'<br><span class="soft">{safe(parts)}</span>'


def _result(result: Mapping[str, Any] | None, parent: Mapping[str, Any] | None) -> str:
    """A cell: the value, its interval, and the change from the parent's value."""
    if not result or result.get('value') is None:
        return '<td class="soft">–</td>'
    unit = str(result.get('unit') or '')
    short = unit if unit in ('share', '%') else ''  # a longer one is said once
    low, high = result.get('low'), result.get('high')
    cell = f'<b>{safe(with_unit(result["value"], unit))}</b>'
    if low is not None and high is not None:
        cell += f'<br><span class="soft">{safe(with_unit(low, short))} to {safe(with_unit(high, short))}</span>'
    if parent and parent.get('value') is not None:
        change = result['value'] - parent['value']
        bounds = paired(result, parent)
        if bounds:
            certain = bounds[0] > 0 or bounds[1] < 0
            note = f' <span class="soft">({" to ".join(safe(signed(bound, short)) for bound in bounds)})</span>'
        else:
            certain, note = _apart(result, parent), ''
        better = (change > 0) == (result.get('direction') != 'lower')
        kind = ('gain' if better else 'loss') if certain else 'soft'
        points = ' points' if unit == 'share' else ''
        cell += f'<br><span class="{kind}">{safe(signed(change, short))}{points}</span>{note}'
    return f'<td>{cell}</td>'


def _apart(result: Mapping[str, Any], parent: Mapping[str, Any]) -> bool:
    """Whether both intervals are known and do not overlap."""
    bounds: list[Any] = [x.get(side) for x in (result, parent) for side in ('low', 'high')]
    return None not in bounds and (bounds[0] > bounds[3] or bounds[1] < bounds[2])


def _figures(metrics: Mapping[str, list[dict[str, Any]]], colours: Mapping[str, str]) -> list[str]:
    rewards = sorted({key for lines in metrics.values() for line in lines for key in line if key.startswith('reward/')})
    learning_from_reward = {
        stage for stage, lines in metrics.items() if any(set(rewards) & set(line) for line in lines)
    }
    wanted = {'loss': FIGURES['loss']}
    wanted |= {
        key: ('Reward: ' + key.removeprefix('reward/'), 'a rollout', 'Of the attempts made while training.')
        for key in rewards
    }
    wanted |= FIGURES
    sections = []
    for number, (metric, (title, unit, note)) in enumerate(wanted.items()):
        shown = {s: lines for s, lines in metrics.items() if metric != 'loss' or s not in learning_from_reward}
        curves = metric_curves(shown, metric, colours)
        if curves:
            plot = f'<div class="plot">{draw(curves, f"{metric}, {unit}", f"figure{number}")}</div>'
            sections.append(_section(title, plot, f'{_reading(curves)} {note} {BAND}'))
    return sections


def _reading(curves: Sequence[Curve]) -> str:
    """Where the curves begin and end, by the means of a tenth of each."""
    ends = []
    for curve in curves[:READ]:
        tenth = max(1, len(curve.y) // 10)
        ends.append(f'{curve.label} {np.mean(curve.y[:tenth]):.3g} → {np.mean(curve.y[-tenth:]):.3g}')
    more = f', and {len(curves) - READ} more' if len(curves) > READ else ''
    return f'{", ".join(ends)}{more}.'


def _samples(stages: Sequence[Mapping[str, Any]], samples: Mapping[str, list[dict[str, Any]]]) -> str:
    blocks = []
    for stage in stages:
        lines = samples[stage['name']]
        last = max((line.get('step') or 0 for line in lines), default=0)
        shown = [line for line in lines if (line.get('step') or 0) == last][:SAMPLES]
        if not shown:
            continue
        items = ''.join(
            f'<div class="sample"><pre class="prompt">{safe(line.get("prompt", ""))}</pre>'
            f'<pre>{safe(line.get("completion", ""))}</pre>{_score(line.get("score"))}</div>'
            for line in shown
        )
        blocks.append(f'<details open><summary>after {safe(stage["name"])}</summary>{items}</details>')
    return ''.join(blocks)


def _events(events: Mapping[str, list[dict[str, Any]]]) -> str:
    blocks = []
    for stage, lines in events.items():
        rows = ''.join(
            f'<tr><td>{safe(line.get("step", ""))}</td><td>{safe(line.get("kind", ""))}</td>'
            f'<td class="soft">{safe(brief(line.get("detail", "")))}</td></tr>'
            for line in lines[:EVENTS_SHOWN]
        )
        more = f'<p class="soft">and {len(lines) - EVENTS_SHOWN:,} more</p>' if len(lines) > EVENTS_SHOWN else ''
        head = '<thead><tr><th>step</th><th>event</th><th></th></tr></thead>'
        table = f'<div class="wide"><table>{head}<tbody>{rows}</tbody></table></div>{more}'
        blocks += [f'<details><summary>{safe(stage)}: {len(lines):,}</summary>{table}</details>'] if lines else []
    return ''.join(blocks)


def _goodput(workdir: Path) -> str:
    rows = ''.join(
        f'<tr><td>{share:.1%}</td><td>{duration(seconds)}</td><td class="soft">{safe(words)}</td></tr>'
        for words, seconds, share in summary(workdir)
    )
    return rows and f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'


def _score(score: Any) -> str:
    return (
        f'<p class="{"gain" if score >= 1 else "soft"}">score {score:.3g}</p>'
        if isinstance(score, (int, float))
        else ''
    )


def _changes(stages: Sequence[Mapping[str, Any]]) -> str:
    blocks = []
    for stage in stages:
        rows = ''.join(
            f'<tr><td>{safe(field)}</td><td class="soft">{safe(brief(before))}</td><td>{safe(brief(after))}</td></tr>'
            for field, before, after in stage.get('changed') or []
        )
        if rows:
            blocks.append(
                f'<details><summary>{safe(stage["name"])}</summary><div class="wide"><table><thead><tr><th>field</th>'
                f'<th>{safe(stage.get("parent") or "before")}</th><th>{safe(stage["name"])}</th></tr></thead>'
                f'<tbody>{rows}</tbody></table></div></details>'
            )
    return ''.join(blocks)


def write_figure(workdir: Path, metric: str, path: Path, stages: Sequence[str] = ()) -> None:
    """Writes the curves of one metric, of the stages named or all that logged it, as an SVG file of its own; or, where
    the path ends in .md, as a chart for a Markdown page.

    Raises:
        InputError: see `write_report`; no stage has the metric.
    """
    names = [stage['name'] for stage in _read_lineage(workdir / 'lineage.json')['stages']]
    for name in stages:
        if name not in names:
            raise InputError(f'{workdir}: no stage {name!r}{did_you_mean(name, names)}')
    names = list(stages or names)
    metrics = {name: _read_metrics(workdir / name / 'metrics.jsonl') for name in names}
    shown = [name for name in names if any(metric in line for line in metrics[name])]
    known = sorted({key for lines in metrics.values() for line in lines for key in line})
    if not shown:
        raise InputError(f'{workdir}: no stage has the metric {metric!r}{did_you_mean(metric, known)}')
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(shown)}
    curves = metric_curves({name: metrics[name] for name in shown}, metric, colours)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.md':
        path.write_text(chart(curves, metric), 'utf-8')
        return
    svg = draw(curves, metric, 'figure')
    path.write_text(svg.replace('<svg ', f'<svg xmlns="http://www.w3.org/2000/svg" color="{GREY}" ', 1), 'utf-8')


@command('train.report')
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m train.report', description='Write DIR/report.html, or the curves of one metric, of a run.'
    )
    parser.add_argument('workdir', metavar='DIR', type=Path, help="the run's --workdir")
    parser.add_argument('--figure', default='', metavar='METRIC', help='one metric, such as reward/mean, as SVG')
    parser.add_argument('--stages', default='', help='of the figure, with commas between them (all)')
    parser.add_argument('--screenshot', type=Path, help='also a picture of the page, as PNG, by an installed browser')
    parser.add_argument('--height', type=int, default=2000, help='of that, in pixels')
    parser.add_argument('--output', type=Path, default=Path('figure.svg'), help='figure.svg, or a chart in an .md file')
    options = parser.parse_args(arguments)
    if options.figure:
        stages = [name for name in options.stages.split(',') if name]
        write_figure(options.workdir, options.figure, options.output, stages)
        print(options.output)
        return 0
    page = write_report(options.workdir)
    print(page)
    if options.screenshot:
        screenshot(page, options.screenshot, options.height)
        print(options.screenshot)
    return 0


if __name__ == '__main__':
    sys.exit(main())
