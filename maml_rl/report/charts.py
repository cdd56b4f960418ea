"""Charts as inline SVG: pure functions from numbers to text, no files, no simulator.

An SVG holds what is seen; `readings` holds the same points as plain values, for the page's script
to show under a pointer or by the arrow keys. Colours are names: the page's style sheet knows what
each is in a light or a dark scheme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

FAR = 1e4
"""Lengths of an axis beyond its ends that something is drawn at, at most."""


@dataclass(frozen=True)
class Point:
    """One value of a chart, with the interval that goes with it if there is one."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    label: str = ""
    """Where it is in words, in place of x and its unit."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points that belong together, told from others by colour, marker and line style."""

    name: str
    points: Sequence[Point]
    colour: str
    marker: str = ""
    """One of MARKS, "" for a line alone."""
    style: str = ""
    """One of DASHES, "" for points alone."""
    hollow: bool = False
    aside: float = 0.0
    """How far to the right of their places points are drawn, in the units of the picture."""


class Line(NamedTuple):
    """A thin line behind the series, which nobody reads numbers from."""

    points: Sequence[tuple[float, float]]
    colour: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What one direction of a chart means, and the part of it that is shown."""

    name: str
    unit: str = ""
    low: float
    high: float
    ticks: Sequence[tuple[float, str]] | None = None
    """Where and what; by default round numbers."""
    digits: int = 1
    """Decimals of a value that is read from it."""
    log: bool = False
    """Whether equal distances are equal ratios; `low` is above 0 then."""

    def share(self, value: float, *, downwards: bool = False) -> float:
        """Return how far along the axis a value is: 0 at `low` and 1 at `high`, or downwards.

        As far beyond an end as can be drawn, if it is farther.
        """
        first, last = (self.high, self.low) if downwards else (self.low, self.high)
        if math.isnan(value):
            return value
        if not self.log:
            part = (value - first) / (last - first)
        elif value > 0:
            part = (math.log(value) - math.log(first)) / (math.log(last) - math.log(first))
        else:
            part = math.inf if downwards else -math.inf
        return min(max(part, -FAR), FAR)

    @property
    def title(self) -> str:
        """The name with its unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn."""

    name: str
    """Its identifier on the page."""
    title: str
    summary: str
    """What it shows, in a sentence, for those who do not see it."""
    x: Axis
    y: Axis
    series: Sequence[Series]
    behind: Sequence[Line] = ()


class Frame(NamedTuple):
    """Size of a picture and of the margins around what is drawn, in its own units."""

    name: str
    width: float
    height: float
    left: float = 58.0
    right: float = 14.0
    top: float = 12.0
    bottom: float = 46.0

    def place(self, chart: Chart, x: float, y: float) -> tuple[float, float]:
        """Return where a point of a chart is in the picture, from the upper left corner."""
        return (
            self.left + chart.x.share(x) * (self.width - self.left - self.right),
            self.top + chart.y.share(y, downwards=True) * (self.height - self.top - self.bottom),
        )


WIDE = Frame("wide", 760.0, 380.0)
NARROW = Frame("narrow", 360.0, 320.0, right=10.0)
"""The same for a phone: letters keep their size, the drawing shrinks."""
SMALL = Frame("small", 340.0, 270.0, right=10.0)
"""One of several side by side."""

DASHES: Mapping[str, str] = {"-": "", "--": "8 5", "-.": "9 4 2 4", ":": "2 4"}
"""Stroke patterns of matplotlib's line styles."""
MARKS: Mapping[str, str] = {
    "o": "m-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0z",
    "s": "m-3.9 -3.9h7.8v7.8h-7.8z",
    "D": "m0 -5.2l5.2 5.2l-5.2 5.2l-5.2 -5.2z",
    "^": "m0 -4.8l4.8 8.6h-9.6z",
    "v": "m0 4.8l4.8 -8.6h-9.6z",
    "x": "m-4 -4l8 8m-8 0l8 -8",
}
"""Outlines of matplotlib's markers, drawn from their middle."""
ROWS, COLUMN = 7, 55.0
"""Most distances between ticks of the upright axis, and the least of the level one."""


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Return the round numbers in a range: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: lower end.
        high: upper end, above it.
        most: into how many parts they may divide the range.
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return powers of ten in a range, with 2 and 5 times each where they are few, and text."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    ticks = [f * 10.0**power for power in powers for f in factors]
    return [(tick, f"{tick:g}") for tick in ticks if low <= tick <= high]


def tick_words(ticks: Sequence[float]) -> list[str]:
    """Return round numbers as text, with as many decimals as the distance between them needs."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:.{digits}f}" for tick in ticks]


def draw(chart: Chart, frame: Frame) -> str:
    """Return a chart as SVG."""
    clip = f"{chart.name}-{frame.name}"
    right, bottom = frame.width - frame.right, frame.height - frame.bottom
    box = (
        f'x="{frame.left:g}" y="{frame.top:g}" width="{right - frame.left:g}" '
        f'height="{bottom - frame.top:g}"'
    )
    parts = [
        # No <title>: browsers show it over the points.
        f'<svg class="{frame.name}" role="img" viewBox="0 0 {frame.width:g} {frame.height:g}" '
        f'aria-label="{html.escape(chart.summary)}" '
        f'data-box="{frame.left:g} {frame.top:g} {right:g} {bottom:g}">',
        f'<clipPath id="{clip}"><rect {box}/></clipPath>',
        *axes(chart, frame),
        f'<g clip-path="url(#{clip})">',
        *(background(line, chart, frame) for line in chart.behind),
        *(curve(one, chart, frame) for one in chart.series if one.style),
        *(intervals(one, chart, frame) for one in chart.series),
        "</g>",
        *(markers(one, chart, frame) for one in chart.series if one.marker),
        '<circle class="ring" r="9"/>',
        "</svg>",
    ]
    return "".join(parts)


def axes(chart: Chart, frame: Frame) -> list[str]:
    """Return grid lines, numbers and names of both axes."""
    right, bottom = frame.width - frame.right, frame.height - frame.bottom
    parts = []
    for tick, text in ticks_of(chart.y, ROWS):
        _, y = frame.place(chart, chart.x.low, tick)
        parts.append(f'<path class="grid" d="M{frame.left:g} {y:.1f}H{right:g}"/>')
        parts.append(
            f'<text class="tick" x="{frame.left - 7:g}" y="{y + 4:.1f}" '
            f'text-anchor="end">{html.escape(text)}</text>'
        )
    for tick, text in ticks_of(chart.x, int((right - frame.left) / COLUMN)):
        x, _ = frame.place(chart, tick, chart.y.low)
        parts.append(f'<path class="grid" d="M{x:.1f} {bottom:g}v5"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 18:g}" '
            f'text-anchor="middle">{html.escape(text)}</text>'
        )
    middle = (frame.left + right) / 2
    parts += [
        f'<path class="axis" d="M{frame.left:g} {frame.top:g}V{bottom:g}H{right:g}"/>',
        f'<text class="name" x="{middle:g}" y="{frame.height - 8:g}" '
        f'text-anchor="middle">{html.escape(chart.x.title)}</text>',
        f'<text class="name" transform="translate(13 {(frame.top + bottom) / 2:g})rotate(-90)" '
        f'text-anchor="middle">{html.escape(chart.y.title)}</text>',
    ]
    return parts


def ticks_of(axis: Axis, most: int) -> list[tuple[float, str]]:
    """Return an axis's own ticks, or else round numbers."""
    if axis.ticks is not None:
        return list(axis.ticks)
    if axis.log:
        return log_ticks(axis.low, axis.high)
    ticks = nice_ticks(axis.low, axis.high, most)
    return list(zip(ticks, tick_words(ticks), strict=True))


def background(line: Line, chart: Chart, frame: Frame) -> str:
    """Return a thin line."""
    where = [frame.place(chart, x, y) for x, y in line.points]
    return f'<path class="behind c-{line.colour}" d="{path_of(where)}"/>'


def curve(one: Series, chart: Chart, frame: Frame) -> str:
    """Return the line through a series' points."""
    places = [frame.place(chart, p.x, p.y) for p in one.points]
    path = path_of([(x + one.aside, y) for x, y in places])
    return stroke(one, path)


def stroke(one: Series, path: str) -> str:
    """Return a path in a series' colour and line style."""
    dash = f' stroke-dasharray="{DASHES[one.style]}"' if DASHES[one.style] else ""
    return f'<path class="curve c-{one.colour}"{dash} d="{path}"/>'


def outline(one: Series, path: str) -> str:
    """Return markers in a series' colour, hollow or full."""
    fill = "hollow" if one.hollow else "full"
    return f'<path class="mark {fill} c-{one.colour}" d="{path}"/>'


def path_of(where: Sequence[tuple[float, float]]) -> str:
    """Return the data of a path through points, begun anew after each that is unknown."""
    parts, pen = [], "M"
    for x, y in where:
        if math.isnan(x) or math.isnan(y):
            pen = "M"
            continue
        parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(parts)


def intervals(one: Series, chart: Chart, frame: Frame) -> str:
    """Return a bar from the lower to the upper end of each interval that is known."""
    parts = []
    for p in one.points:
        if not math.isnan(p.low):
            x, low = frame.place(chart, p.x, p.low)
            _, high = frame.place(chart, p.x, p.high)
            parts.append(f"M{x + one.aside:.1f} {low:.1f}V{high:.1f}")
    return f'<path class="interval c-{one.colour}" d="{"".join(parts)}"/>' if parts else ""


def markers(one: Series, chart: Chart, frame: Frame) -> str:
    """Return a series' markers; at the edge, an arrow for what lies below or above the range."""
    parts = []
    for p in one.points:
        if math.isnan(p.y):
            continue
        x, y = frame.place(chart, p.x, min(max(p.y, chart.y.low), chart.y.high))
        shape = "v" if p.y < chart.y.low else "^" if p.y > chart.y.high else one.marker
        parts.append(mark(shape, x + one.aside, y))
    return outline(one, "".join(parts))


def mark(shape: str, x: float, y: float) -> str:
    """Return the data of a path that draws a marker at a place."""
    return f"M{x:.1f} {y:.1f}{MARKS[shape]}"


def swatch(one: Series) -> str:
    """Return a small picture of a series' line and marker, for a legend."""
    parts = ['<svg class="swatch" viewBox="0 0 40 14" aria-hidden="true">']
    if one.style:
        parts.append(stroke(one, "M1 7H39"))
    if one.marker:
        parts.append(outline(one, mark(one.marker, 20, 7)))
    return "".join([*parts, "</svg>"])


def readings(chart: Chart) -> dict[str, object]:
    """Return the points that are shown under a pointer, as plain values for the page's script.

    A point is [x, y], and then its interval's ends and its label where it has them; numbers to six
    digits.
    """

    def axis(one: Axis) -> dict[str, object]:
        return {
            **{"name": one.name, "unit": one.unit, "digits": one.digits},
            **{"low": rounded(one.low), "high": rounded(one.high)},
            **({"log": True} if one.log else {}),
        }

    def point(p: Point) -> list[float | str | None]:
        values: list[float | str | None] = [rounded(v) for v in (p.x, p.y, p.low, p.high)]
        values.append(p.label or None)
        while values[-1] is None:
            values.pop()
        return values

    return {
        "x": axis(chart.x),
        "y": axis(chart.y),
        "series": [
            {
                "name": one.name,
                "aside": one.aside,
                "points": [point(p) for p in one.points if math.isfinite(p.y)],
            }
            for one in chart.series
        ],
    }


def rounded(value: float) -> float | None:
    """Return a number to six digits, None where there is none."""
    return None if math.isnan(value) else float(f"{value:.6g}")
