"""A bar chart as SVG, written by hand: groups of horizontal bars with a whisker from minimum to maximum. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

import msgspec

_WIDTH = 860
_NAME_WIDTH = 190
_VALUE_WIDTH = 120
_BAR = 16
_STEP = 22
_HEAD = 34
_COLOURS = (
    "#4c78a8",
    "#9ecae9",
    "#f58518",
    "#ffbf79",
    "#54a24b",
    "#88d27a",
    "#b79a20",
    "#e45756",
    "#79706e",
    "#72b7b2",
)


class Mark(msgspec.Struct, frozen=True):
    """One bar: a value, and what it varied between."""

    name: str
    value: float
    low: float
    high: float


class Group(msgspec.Struct, frozen=True):
    """Bars on one scale under a title."""

    title: str
    marks: tuple[Mark, ...]


def svg(title: str, unit: str, groups: Sequence[Group]) -> str:
    """The whole file. The same name has the same colour in every group."""
    names = list(dict.fromkeys(mark.name for group in groups for mark in group.marks))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    parts, at = [], _HEAD
    for group in groups:
        parts += _group(group, unit, colours, at)
        at += _HEAD + len(group.marks) * _STEP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{at + 10}" '
        f'viewBox="0 0 {_WIDTH} {at + 10}" font-family="sans-serif" font-size="12">'
    )
    background = f'<rect width="{_WIDTH}" height="{at + 10}" fill="#ffffff"/>'
    heading = f'<text x="10" y="22" font-size="15" font-weight="bold">{escape(title)}</text>'
    return "\n".join([head, background, heading, *parts, "</svg>"]) + "\n"


def _group(group: Group, unit: str, colours: dict[str, str], top: int) -> list[str]:
    most = max(mark.high for mark in group.marks)
    scale = (_WIDTH - _NAME_WIDTH - _VALUE_WIDTH) / most if most > 0 else 0.0
    parts = [f'<text x="10" y="{top + 22}" font-weight="bold">{escape(group.title)}</text>']
    for index, mark in enumerate(group.marks):
        y = top + _HEAD + index * _STEP
        middle = y + _BAR / 2
        end, low, high = (_NAME_WIDTH + value * scale for value in (mark.value, mark.low, mark.high))
        parts += [
            f'<text x="{_NAME_WIDTH - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(mark.name)}</text>',
            f'<rect x="{_NAME_WIDTH}" y="{y}" width="{end - _NAME_WIDTH:.1f}" height="{_BAR}" '
            f'fill="{colours[mark.name]}"/>',
            f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="#333333"/>',
            f'<text x="{high + 6:.1f}" y="{middle + 4:.1f}">{mark.value:,.0f} {escape(unit)}</text>',
        ]
    return parts
