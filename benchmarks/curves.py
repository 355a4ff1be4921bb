"""A line chart as SVG, written by hand: panels side by side, both axes logarithmic, one legend. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

import msgspec

_PANEL_WIDTH = 430
_PANEL_HEIGHT = 270
_LEFT = 62
_RIGHT = 14
_TOP = 30
_BOTTOM = 44
_HEAD = 34
_LEGEND_STEP = 20
_LEGEND_COLUMN = 150
_COLOURS = (
    "#333333",
    "#e45756",
    "#4c78a8",
    "#54a24b",
    "#f58518",
    "#b279a2",
    "#9d755d",
    "#72b7b2",
    "#eeca3b",
    "#ff9da6",
    "#79706e",
    "#9ecae9",
)


class Line(msgspec.Struct, frozen=True):
    """Points (x, y), all positive, from left to right."""

    name: str
    points: tuple[tuple[float, float], ...]


class Panel(msgspec.Struct, frozen=True):
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


def svg(title: str, rows: Sequence[Sequence[Panel]]) -> str:
    """The whole file: panels in rows. The same name has the same colour everywhere."""
    names = list(dict.fromkeys(line.name for row in rows for panel in row for line in panel.lines))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    width = max((len(row) for row in rows), default=1) * _PANEL_WIDTH
    legend, legend_height = _legend(names, colours, width)
    height = _HEAD + legend_height + len(rows) * _PANEL_HEIGHT + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
        *legend,
    ]
    for down, row in enumerate(rows):
        for across, panel in enumerate(row):
            at = across * _PANEL_WIDTH, _HEAD + legend_height + down * _PANEL_HEIGHT
            parts += _panel(panel, colours, at)
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axis(msgspec.Struct, frozen=True):
    """A logarithmic scale over whole decades, on so many pixels from a start."""

    low: int
    high: int
    start: float
    length: float

    def place(self, value: float) -> float:
        return self.start + (math.log10(value) - self.low) / (self.high - self.low) * self.length

    def ticks(self) -> list[float]:
        return [10.0**power for power in range(self.low, self.high + 1)]


def _axis(values: Sequence[float], start: float, length: float) -> _Axis:
    low = math.floor(math.log10(min(values)))
    return _Axis(low, max(math.ceil(math.log10(max(values))), low + 1), start, length)


def _panel(panel: Panel, colours: dict[str, str], at: tuple[float, float]) -> list[str]:
    left, top = at[0] + _LEFT, at[1] + _TOP
    width, height = _PANEL_WIDTH - _LEFT - _RIGHT, _PANEL_HEIGHT - _TOP - _BOTTOM
    points = [point for line in panel.lines for point in line.points]
    parts = [f'<text x="{left}" y="{top - 10}" font-weight="bold">{escape(panel.title)}</text>']
    if not points:
        return parts
    across = _axis([x for x, _ in points], left, width)
    up = _axis([y for _, y in points], top + height, -height)
    for x in across.ticks():
        parts += [
            f'<path d="M{across.place(x):.1f} {top}V{top + height}" stroke="#dddddd"/>',
            f'<text x="{across.place(x):.1f}" y="{top + height + 14}" text-anchor="middle">{_tick(x)}</text>',
        ]
    for y in up.ticks():
        parts += [
            f'<path d="M{left} {up.place(y):.1f}H{left + width}" stroke="#dddddd"/>',
            f'<text x="{left - 5}" y="{up.place(y) + 4:.1f}" text-anchor="end">{_tick(y)}</text>',
        ]
    middle = left + width / 2, top + height / 2
    parts += [
        f'<text x="{middle[0]}" y="{top + height + 30}" text-anchor="middle">{escape(panel.x_label)}</text>',
        f'<text transform="translate({at[0] + 14} {middle[1]}) rotate(-90)" text-anchor="middle">'
        f"{escape(panel.y_label)}</text>",
    ]
    for line in panel.lines:
        places = [(across.place(x), up.place(y)) for x, y in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colours[line.name]}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colours[line.name]}"/>' for x, y in places]
    return parts


def _legend(names: Sequence[str], colours: dict[str, str], width: int) -> tuple[list[str], int]:
    columns = max((width - 20) // _LEGEND_COLUMN, 1)
    parts = []
    for index, name in enumerate(names):
        x, y = 14 + index % columns * _LEGEND_COLUMN, _HEAD + index // columns * _LEGEND_STEP + 6
        parts += [
            f'<path d="M{x} {y}h22" stroke="{colours[name]}" stroke-width="3"/>',
            f'<text x="{x + 28}" y="{y + 4}">{escape(name)}</text>',
        ]
    return parts, -(-len(names) // columns) * _LEGEND_STEP + 6


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
