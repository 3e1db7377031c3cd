"""Two kinds of plot as SVG text, the same bytes on every machine: intervals side by side, and lines with bands."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Mark", "Series", "intervals", "lines"]

COLOURS = ("#0a9a70", "#2f7fd0", "#d98200", "#767d87", "#c0568f", "#8a63c9", "#b5523b", "#4aa3b5")
_STYLE = "font-family='sans-serif' font-size='11' fill='#808080'"
_ROW, _LEFT, _WIDTH = 17, 190, 720
_LEGEND = 300  # beside curves: the longest name is that of a policy and whom it is judged on


@dataclass(frozen=True)
class Mark:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """A line: `[points]` values over `[points]` places."""

    name: str
    x: Sequence[float]
    y: Sequence[Mark]


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from about `low` to about `high`."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {_STYLE} {extra}>{html.escape(text)}</text>"


def _frame(width: float, height: float, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:.0f}' height='{height:.0f}' viewBox='0 0 {width:.0f} {height:.0f}'>\n{body}\n</svg>\n"


def intervals(title: str, groups: Mapping[str, Mapping[str, Mark]], axis: str) -> str:
    """One row per entry of each group, zero marked; filled where the interval excludes zero."""
    marks = [mark for group in groups.values() for mark in group.values()]
    low, high = min([0.0, *(m.low for m in marks)]), max([0.0, *(m.high for m in marks)])
    pad = 0.04 * max(high - low, 1e-6)
    low, high = low - pad, high + pad
    right = _WIDTH - 20

    def place(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (right - _LEFT)

    parts = [_text(8, 16, title, extra="font-weight='bold'")]
    y, top = 34.0, 24.0
    for number, (group, entries) in enumerate(groups.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(_text(8, y + 4, group, extra="font-weight='bold'"))
        for name, mark in entries.items():
            parts.append(_text(_LEFT - 8, y + 4, name, "end"))
            parts.append(
                f"<line x1='{place(mark.low):.1f}' x2='{place(mark.high):.1f}' y1='{y:.1f}' y2='{y:.1f}' stroke='{colour}' stroke-width='2'/>"
            )
            fill = colour if mark.low > 0 or mark.high < 0 else "none"
            parts.append(
                f"<circle cx='{place(mark.value):.1f}' cy='{y:.1f}' r='4' fill='{fill}' stroke='{colour}' stroke-width='1.5'/>"
            )
            y += _ROW
        y += 5
    grid = [
        f"<line x1='{place(t):.1f}' x2='{place(t):.1f}' y1='{top}' y2='{y:.1f}' stroke='#808080' stroke-opacity='{0.8 if t == 0 else 0.2}'/>"
        for t in _ticks(low, high)
    ]
    labels = [_text(place(t), y + 14, f"{t:+g}" if t else "0", "middle") for t in _ticks(low, high)]
    return _frame(_WIDTH, y + 38, [*grid, *parts, *labels, _text((_LEFT + right) / 2, y + 30, axis, "middle")])


def lines(title: str, series: Sequence[Series], x_axis: str, y_axis: str) -> str:
    """Lines with bands of their intervals, and a legend."""
    marks = [mark for one in series for mark in one.y]
    xs = [x for one in series for x in one.x]
    low, high = min(m.low for m in marks), max(m.high for m in marks)
    first, last = min(xs), max(xs)
    left, right, top, bottom = 64, 520, 48, 288

    def at(x: float, y: float) -> str:
        across = left + (x - first) / max(last - first, 1e-9) * (right - left)
        return f"{across:.1f},{bottom - (y - low) / max(high - low, 1e-9) * (bottom - top):.1f}"

    parts = [_text(8, 16, title, extra="font-weight='bold'")]
    for tick in _ticks(low, high):
        y = float(at(first, tick).split(",")[1])
        parts.append(
            f"<line x1='{left}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' stroke='#808080' stroke-opacity='0.2'/>"
        )
        parts.append(_text(left - 6, y + 4, f"{tick:g}", "end"))
    for tick in _ticks(first, last):
        x = float(at(tick, low).split(",")[0])
        parts.append(_text(x, bottom + 16, f"{tick:g}", "middle"))
    for number, one in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        band = [at(x, m.high) for x, m in zip(one.x, one.y, strict=True)]
        band += [at(x, m.low) for x, m in zip(reversed(one.x), reversed(one.y), strict=True)]
        parts.append(f"<polygon points='{' '.join(band)}' fill='{colour}' fill-opacity='0.12'/>")
        path = " ".join(at(x, m.value) for x, m in zip(one.x, one.y, strict=True))
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        parts.append(f"<rect x='{right + 14}' y='{top + number * _ROW}' width='12' height='3' fill='{colour}'/>")
        parts.append(_text(right + 32, top + 6 + number * _ROW, one.name))
    parts.append(_text((left + right) / 2, bottom + 34, x_axis, "middle"))
    parts.append(_text(8, top - 14, y_axis))
    return _frame(right + _LEGEND, bottom + 44, parts)
