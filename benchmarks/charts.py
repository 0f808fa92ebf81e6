"""Charts of a report as inline SVG that needs no script: horizontal places are percentages, so text keeps its size
however narrow the screen is. Marks differ by shape, lines by dashes and bars by pattern, never by colour alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

NUM_COLOURS = 8
"""Colours of the page's style: classes ``s0`` to ``s7``."""
_TITLE_LEN = 28  # characters of a row's title that fit a phone
_PHONE_PX = 330  # width of a plot on a narrow phone
_SHAPES = (
    "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0Z",
    "M-5 -5h10v10h-10Z",
    "M0 -7L7 5H-7Z",
    "M0 -7L7 0L0 7L-7 0Z",
    "M0 7L7 -5H-7Z",
    "M-2 -6h4v4h4v4h-4v4h-4v-4h-4v-4h4Z",
    "M-6 -4L-4 -6L0 -2L4 -6L6 -4L2 0L6 4L4 6L0 2L-4 6L-6 4L-2 0Z",
    "M-3 -6h6l3 6l-3 6h-6l-3 -6Z",
)
_DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2", "1 4", "12 4", "6 2 1 2 1 2")
_TEXTURES = ("M0 8L8 0M-2 2L2 -2M6 10L10 6", "", "M4 0V8", "M0 4H8", "M0 4H8M4 0V8", "M0 0L8 8M-2 6L2 10M6 -2L10 2")


def mark(index: int) -> str:
    """The shape of series ``index`` around the origin; hollow from the ninth on."""
    paint = "currentColor" if (index // len(_SHAPES)) % 2 == 0 else "var(--page)"
    path = _SHAPES[index % len(_SHAPES)]
    return f'<path d="{path}" fill="{paint}" stroke="currentColor" stroke-width="1.5"/>'


def legend(labels: Sequence[str], *, bars: bool = False) -> str:
    """Which mark, or with ``bars`` which pattern, stands for which label."""
    items = []
    for index, label in enumerate(labels):
        sample = f'<svg x="9" y="9" overflow="visible">{mark(index)}</svg>'
        if bars:
            sample = f'<rect y="2" width="18" height="14" fill="url(#texture-{index})"/>'
        items.append(
            f'<li><svg class="s{index % NUM_COLOURS}" width="18" height="18" aria-hidden="true">{sample}</svg>'
            f"<span>{escape(label)}</span></li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At least two round numbers, about ``most``, from ``low`` or just below it to ``high`` or just above it."""
    if not low < high:
        raise ValueError(f"ticks need low < high, got {low} and {high}")
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def interval_chart(
    name: str, title: str, rows: Sequence[tuple[str, Mapping[str, Mapping[str, float] | None]]], labels: Sequence[str]
) -> str:
    """Medians and intervals of ratios, a row per category and a line within it per label, and a line at 1.

    Args:
        name: id of the chart, unique on the page.
        title: what a screen reader says first.
        rows: a row's title, and by label an interval (``median``, ``low``, ``high``), or None where there is none.
        labels: the series, in the legend's order.
    """
    found = [interval for _, row in rows for interval in row.values() if interval]
    axis = ticks(*_spread([1.0, *(i["low"] for i in found), *(i["high"] for i in found)]), 9)
    said, drawn, y = [], [], 0
    for row_title, row in rows:
        drawn.append(f'<line class="grid" x1="0" x2="100%" y1="{y + 0.5}" y2="{y + 0.5}"/>')
        drawn.append(_row_title(row_title, y + 18))
        y += 26
        for index, label in enumerate(labels):
            interval = row.get(label)
            if interval:
                text = f"{label} {interval['median']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"
                said.append(f"{row_title}: {text}.")
                low, middle, high = (_at(interval[end], axis) for end in ("low", "median", "high"))
                drawn.append(
                    f'<g class="s{index % NUM_COLOURS}"><title>{escape(f"{row_title}: {text}")}</title>'
                    f'<line x1="{low}" x2="{high}" y1="{y + 8}" y2="{y + 8}" stroke="currentColor" stroke-width="2"/>'
                    f"{_cap(low, y + 8)}{_cap(high, y + 8)}{_placed(mark(index), middle, y + 8)}</g>"
                )
            y += 18
        y += 6
    scale = _scale(axis, y, axis.index(1.0) if 1.0 in axis else 0) + _vertical(_at(1.0, axis), y, "", "reference")
    return _svg(name, title, " ".join(said), scale + "".join(drawn), y + 26)


def line_chart(
    name: str,
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_labels: Sequence[tuple[float, str]],
    y_most: float,
    percent: bool = False,
    height: int = 220,
) -> str:
    """Lines with a mark at every point, from 0 upwards.

    Args:
        name: id of the chart, unique on the page.
        title: what a screen reader says first.
        series: by label points (x, y), x from 0 to 1 across the chart.
        x_labels: what to write below the axis, and at which x.
        y_most: the largest y to make room for.
        percent: whether y is a share of 1, to be written in percent.
        height: of the plot in pixels.
    """
    axis = ticks(0.0, y_most if y_most > 0 else 1.0, 5)

    def level(value: float) -> float:
        return round(height - height * value / axis[-1] + 8, 1)

    drawn = []
    for value in axis:
        text = f"{100 * value:g}%" if percent else f"{value:g}"
        drawn.append(f'<line class="grid" x1="0" x2="100%" y1="{level(value)}" y2="{level(value)}"/>')
        drawn.append(f'<text x="-14" y="{level(value) + 5}" text-anchor="end">{text}</text>')
    for x, text in x_labels:
        drawn.append(f'<text x="{100 * x:.2f}%" y="{height + 30}" text-anchor="middle">{escape(text)}</text>')
    said = []
    for index, (label, points) in enumerate(series.items()):
        parts, dash = [], _DASHES[index % len(_DASHES)]
        for (x1, y1), (x2, y2) in pairwise(points):
            parts.append(
                f'<line x1="{100 * x1:.2f}%" y1="{level(y1)}" x2="{100 * x2:.2f}%" y2="{level(y2)}" '
                f'stroke="currentColor" stroke-width="2" stroke-dasharray="{dash}"/>'
            )
        parts += [_placed(mark(index), f"{100 * x:.2f}%", level(y)) for x, y in points]
        drawn.append(f'<g class="s{index % NUM_COLOURS}"><title>{escape(label)}</title>{"".join(parts)}</g>')
        said.append(f"{label}: " + ", ".join(f"{100 * y:.0f}%" if percent else f"{y:.3g}" for _, y in points) + ".")
    return _svg(name, title, " ".join(said), "".join(drawn), height + 38)


def bar_chart(
    name: str, title: str, bars: Mapping[str, Mapping[str, float]], parts: Sequence[str], unit: str = "ms"
) -> str:
    """Stacked bars, one per label, all on one scale from 0; the total stands above each.

    Args:
        name: id of the chart, unique on the page.
        title: what a screen reader says first.
        bars: by label the size of each part; a part that is missing has none.
        parts: the order of the parts; ``legend(parts, bars=True)`` explains them.
        unit: of the sizes.
    """
    axis = ticks(0.0, max((sum(bar.values()) for bar in bars.values()), default=0.0) or 1.0)
    drawn, said, y = [_textures(len(parts))], [], 0
    for label, bar in bars.items():
        drawn.append(_row_title(label, y + 16, f" {sum(bar.values()):.1f} {unit}"))
        start = 0.0
        for index, part in enumerate(parts):
            size = bar.get(part, 0.0)
            drawn.append(
                f'<rect class="s{index % NUM_COLOURS}" x="{_at(start, axis)}" y="{y + 24}" height="20" '
                f'width="{_at(size, axis)}" fill="url(#texture-{index})">'
                f"<title>{escape(f'{label}: {part} {size:.2f} {unit}')}</title></rect>"
            )
            start += size
        said.append(f"{label}: " + ", ".join(f"{part} {bar.get(part, 0.0):.2f} {unit}" for part in parts) + ".")
        y += 54
    return _svg(name, title, " ".join(said), _scale(axis, y) + "".join(drawn), y + 26)


def _svg(name: str, title: str, description: str, content: str, height: int) -> str:
    return (
        f'<div class="plot"><svg role="img" aria-labelledby="{name}-title {name}-desc" width="100%" height="{height}" '
        f'overflow="visible"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description) or "Nothing was measured."}</desc>{content}</svg></div>'
    )


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Least and largest with a little room, so that no mark lies on the border; never equal."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.1
    return max(0.0, low - room), high + room


def _at(value: float, axis: Sequence[float]) -> str:
    return f"{100 * (value - axis[0]) / (axis[-1] - axis[0]):.2f}%"


def _placed(drawing: str, x: str, y: float) -> str:
    """A drawing around the origin, moved: only a nested ``svg`` takes a percentage."""
    return f'<svg x="{x}" y="{y}" overflow="visible">{drawing}</svg>'


def _cap(x: str, y: float) -> str:
    return f'<line x1="{x}" x2="{x}" y1="{y - 4}" y2="{y + 4}" stroke="currentColor" stroke-width="2"/>'


def _scale(axis: Sequence[float], height: int, kept: int = 0) -> str:
    """Vertical lines, each with its number as far as they fit a phone; the number at index ``kept`` stays."""
    texts = [f"{value:g}" for value in axis]
    every = math.ceil(len(texts) * (9 * max(map(len, texts)) + 6) / _PHONE_PX)
    return "".join(
        _vertical(_at(value, axis), height, text if (index - kept) % every == 0 else "", "grid")
        for index, (value, text) in enumerate(zip(axis, texts, strict=True))
    )


def _vertical(x: str, height: int, text: str, kind: str) -> str:
    line = f'<line class="{kind}" x1="{x}" x2="{x}" y1="0" y2="{height}"/>'
    return line + (f'<text x="{x}" y="{height + 18}" text-anchor="middle">{text}</text>' if text else "")


def _row_title(text: str, y: int, suffix: str = "") -> str:
    short = text if len(text) <= _TITLE_LEN else text[: _TITLE_LEN - 1] + "…"
    return f'<text class="row" x="0" y="{y}">{escape(short)}<tspan class="quiet">{escape(suffix)}</tspan></text>'


def _textures(count: int) -> str:
    """Patterns ``texture-0`` and on, each in the colour of its number; one bar chart per page defines them."""
    found: list[Any] = []
    for index in range(count):
        lines = _TEXTURES[index % len(_TEXTURES)]
        overlay = f'<path d="{lines}" stroke="var(--page)" stroke-width="1.5"/>' if lines else ""
        found.append(
            f'<pattern id="texture-{index}" class="s{index % NUM_COLOURS}" width="8" height="8" '
            f'patternUnits="userSpaceOnUse"><rect width="8" height="8" fill="currentColor"/>{overlay}</pattern>'
        )
    return f"<defs>{''.join(found)}</defs>"
