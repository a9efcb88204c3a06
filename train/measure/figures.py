"""Curves for the report, as SVG text that takes its colours for ink and ground from the page around it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Readable on white and on near-black alike; stages take them in order.
PALETTE = ('#3b82f6', '#f59e0b', '#10b981', '#ef4444', '#8b5cf6', '#0ea5b7', '#db2777', '#8a6d1d')
INK = '#123456'  # a colour nothing else has: it becomes currentColor
COMPUTE = 'FLOPs, ancestors included'  # the common axis of curves
MOST_POINTS, ALL_POINTS = 300, 3000  # of a curve, and of those of a plot together
MOST_LABELS = 16  # a longer legend would leave no room for the curves
CHART_COLOURS = {'blue': '#3b82f6', 'orange': '#f59e0b', 'green': '#10b981', 'red': '#ef4444', 'violet': '#8b5cf6'}
CHART_PARTS = 12


@dataclass(frozen=True)
class Curve:
    """One line of a plot: `y` over `x`, drawn as a smooth line over its faint raw values."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Mark:
    """A value with its interval; `x` is where it stands, None for a row of its own; '' is the next colour."""

    label: str
    value: float
    low: float
    high: float
    x: float | None = None
    colour: str = ''


def metric_curves(
    records: Mapping[str, Sequence[Mapping[str, float]]], metric: str, colours: Mapping[str, str]
) -> list[Curve]:
    """A curve for every stage that logged `metric`, over the FLOPs behind its model, its ancestors' included."""
    curves = []
    for stage, lines in records.items():
        points = [
            (line['flops'], line[metric]) for line in lines if _finite(line.get('flops')) and _finite(line.get(metric))
        ]
        if points:
            x, y = zip(*points, strict=True)
            curves.append(Curve(stage, colours[stage], x, y))
    return curves


def draw(curves: Sequence[Curve], y_label: str, name: str) -> str:
    """An `<svg>` element of the curves; `name` keeps its identifiers unique on the page."""
    with _canvas(name, 3.1) as (axes, out):
        from matplotlib.ticker import EngFormatter

        for curve in curves:
            x, y = _thin(np.asarray(curve.x, float), np.asarray(curve.y, float), ALL_POINTS // len(curves))
            smooth, half = _smooth(y)
            marker = 'o' if len(x) == 1 else ''
            axes.plot(x, y, color=curve.colour, alpha=0.25, linewidth=0.8)
            axes.fill_between(x, smooth - half, smooth + half, color=curve.colour, alpha=0.2, linewidth=0)
            # A leading underscore would hide the stage from the legend.
            axes.plot(x, smooth, color=curve.colour, linewidth=1.6, marker=marker, label=curve.label.lstrip('_'))
        axes.set_xlabel(COMPUTE)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
        if len(curves) <= MOST_LABELS:
            axes.legend(frameon=False, fontsize=9)
    return _svg(out.getvalue(), name)


def marks(values: Sequence[Mark], label: str, x_label: str, name: str, links: Sequence[tuple[int, int]] = ()) -> str:
    """An `<svg>` element of values with intervals: a row each, or, where they have places, over those, with lines
    between those that `links` names by their numbers."""
    with _canvas(name, 3.1 if x_label else 0.9 + 0.28 * len(values)) as (axes, out):
        from matplotlib.ticker import EngFormatter

        for ends in links:
            pair = [values[end] for end in ends]
            axes.plot([x.x for x in pair], [x.value for x in pair], color=INK, alpha=0.3, linewidth=0.8, zorder=0)
        for row, mark in enumerate(values):
            colour = mark.colour or PALETTE[row % len(PALETTE)]
            spread = [[max(mark.value - mark.low, 0.0)], [max(mark.high - mark.value, 0.0)]]
            if x_label:
                axes.errorbar([mark.x], [mark.value], yerr=spread, fmt='o', color=colour, capsize=3)
                shown = mark.label if len(values) <= MOST_LABELS else ''
                axes.annotate(shown, (mark.x, mark.value), (6, 4), textcoords='offset points', fontsize=9)
            else:
                axes.errorbar([mark.value], [-row], xerr=spread, fmt='o', color=colour, capsize=3)
        axes.set_xlabel(x_label or label)
        if x_label:
            axes.set_ylabel(label)
            axes.margins(x=0.15, y=0.15)
            axes.xaxis.set_major_formatter(EngFormatter(sep=''))
        else:
            axes.set_yticks([-row for row in range(len(values))], [mark.label for mark in values])
            axes.margins(y=0.5 / max(len(values), 1))
    return _svg(out.getvalue(), name)


@contextlib.contextmanager
def _canvas(name: str, height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """The axes of a figure, and where that is written once it is drawn."""
    import matplotlib  # here, because it is slow to import and most commands draw nothing

    style: dict[Any, Any] = {
        'text.parse_math': False,
        'svg.fonttype': 'none',
        'svg.hashsalt': name,
        'font.family': 'sans-serif',
        'font.size': 10,
        'text.color': INK,
        'axes.edgecolor': INK,
        'axes.labelcolor': INK,
        'xtick.color': INK,
        'ytick.color': INK,
        'grid.color': INK,
    }
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure  # not pyplot: no window system, no global state

        figure, out = Figure(figsize=(7.2, height), layout='constrained'), io.StringIO()
        axes = figure.add_subplot()
        yield axes, out
        axes.grid(alpha=0.15)
        axes.spines[['top', 'right']].set_visible(False)
        metadata: dict[str, Any] = {'Date': None, 'Creator': None, 'Format': None, 'Type': None}
        figure.savefig(out, format='svg', transparent=True, metadata=metadata)


def _svg(text: str, name: str) -> str:
    """The element alone, in the page's colours."""
    svg = text[text.index('<svg') :].replace(INK, 'currentColor')
    # Identifiers share one name space on the page, and only some of matplotlib's are salted.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf'\1{name}-', svg)
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1).replace(
        'xlink:href', 'href'
    )


def chart(curves: Sequence[Curve], y_label: str) -> str:
    """The curves as a Mermaid chart, which Markdown pages show: means over CHART_PARTS parts of each stage."""
    lines = [[f'{part.mean():.4g}' for part in np.array_split(np.asarray(c.y, float), CHART_PARTS)] for c in curves]
    labels = ', '.join(f'{curve.label} {colour}' for curve, colour in zip(curves, CHART_COLOURS, strict=False))
    theme = {'themeVariables': {'xyChart': {'plotColorPalette': ', '.join(CHART_COLOURS.values())}}}
    return '\n'.join(
        [
            '```mermaid',
            f'%%{{init: {json.dumps(theme)}}}%%',
            'xychart-beta',
            f'    title "{labels}"',
            '    x-axis "percent of the stage" 0 --> 100',
            f'    y-axis "{y_label}"',
            *(f'    line [{", ".join(line)}]' for line in lines),
            '```',
            '',
        ]
    )


def _thin(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points, and MOST_POINTS, each the mean of its neighbourhood."""
    parts = max(1, min(len(x), MOST_POINTS, most))
    return tuple(np.array([part.mean() for part in np.array_split(values, parts)]) for values in (x, y))  # type: ignore[return-value]


def _smooth(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over about a twentieth of the curve, one-sided at the ends, and half the width of its 95% interval
    as if points were independent."""
    reach = len(y) // 40
    parts = [y[max(i - reach, 0) : i + reach + 1] for i in range(len(y))]
    errors = [part.std(ddof=1) / math.sqrt(len(part)) if len(part) > 1 else 0.0 for part in parts]
    return np.array([part.mean() for part in parts]), 1.96 * np.array(errors)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
