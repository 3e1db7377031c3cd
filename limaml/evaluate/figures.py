"""The pictures of a comparison, one function each, as plotly figures that also work in a notebook.

Every method has the same colour, marker and dash in every picture; colours are told apart by colour-blind readers, and
marker and dash repeat what the colour says. Backgrounds are transparent, so a page may be light or dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from limaml.errors import DataError, require
from limaml.evaluate.activity import ActivityCurve
from limaml.evaluate.bootstrap import ALL
from limaml.evaluate.embedding_map import MapPoints
from limaml.evaluate.predictions import QUARTILES
from limaml.evaluate.summary import LOWER_IS_BETTER, Summary
from limaml.evaluate.table import METRIC_NAMES
from limaml.types import LossKind

__all__ = [
    "Curve",
    "Style",
    "activity_figure",
    "calibration_figure",
    "embedding_figure",
    "empty_figure",
    "gains_figure",
    "learning_figure",
    "method_name",
    "method_styles",
]

Figure = Any
"""A `plotly.graph_objects.Figure`; plotly is an optional dependency without types."""

_GREY = "rgba(128,128,128,0.28)"
_NAMES = {
    "base": "base (no personalisation)",
    "wide_and_deep": "wide and deep IDs",
    "limaml_gradient": "LiMAML, gradient",
    "limaml_newton": "LiMAML, Newton",
}
_LOOKS = {
    "base": ("#767d87", "circle", "dot"),
    "wide_and_deep": ("#d98200", "square", "dash"),
    "limaml_gradient": ("#2f7fd0", "triangle-up", "dashdot"),
    "limaml_newton": ("#0a9a70", "diamond", "solid"),
}
_SPARE = (
    ("#c0568f", "cross", "longdash"),
    ("#8a63c9", "x", "longdashdot"),
    ("#b5523b", "star", "solid"),
    ("#4aa3b5", "hexagon", "dot"),
)


@dataclass(frozen=True)
class Curve:
    """The course of one training: all lists `[epochs]`."""

    dataset: str
    protocol: str
    seed: int
    method: str
    epochs: Sequence[float]
    train_loss: Sequence[float]
    valid_metric: Sequence[float] | None = None
    valid_name: str = "log loss on validation rows"
    best_epoch: float | None = None  # whose weights were kept

    def __post_init__(self) -> None:
        lengths = {"epochs": len(self.epochs), "train_loss": len(self.train_loss)}
        if self.valid_metric is not None:
            lengths["valid_metric"] = len(self.valid_metric)
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"The learning curve of '{self.method}' (protocol '{self.protocol}', seed {self.seed}) has lists of "
                f"different lengths: {lengths}."
            )


@dataclass(frozen=True)
class Style:
    """How one method looks in every picture."""

    name: str
    colour: str
    symbol: str
    dash: str


def method_name(method: str) -> str:
    """The name of a method for people."""
    return _NAMES.get(method, method.replace("_", " "))


def method_styles(methods: Sequence[str]) -> dict[str, Style]:
    """A look for each method: fixed for the known ones, the next spare one for others."""
    unknown = [m for m in dict.fromkeys(methods) if m not in _LOOKS]
    looks = {**_LOOKS, **{m: _SPARE[i % len(_SPARE)] for i, m in enumerate(unknown)}}
    return {m: Style(method_name(m), *looks[m]) for m in dict.fromkeys(methods)}


def gains_figure(summary: Summary, dataset: str, protocol: str, baseline: str, metric: str) -> Figure:
    """Difference to `baseline` for all tasks and for each activity bucket, with intervals. Up is always better.

    A filled marker means that the interval excludes zero, a hollow one that it does not.
    """
    styles = method_styles(summary.methods(dataset, protocol))
    methods = [m for m, b in summary.pairs(dataset, protocol) if b == baseline]
    buckets = (ALL, *QUARTILES)
    name = METRIC_NAMES[metric]
    figure = empty_figure()
    for k, method in enumerate(methods):
        deltas = [summary.delta(dataset, protocol, method, baseline, bucket, metric) for bucket in buckets]
        shown = [(i, d) for i, d in enumerate(deltas) if d is not None and not math.isnan(d.delta)]
        style = styles[method]
        offset = (k - (len(methods) - 1) / 2) * 0.2
        figure.add_scatter(
            x=[i + offset for i, _ in shown],
            y=[d.delta for _, d in shown],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [_or_zero(d.high - d.delta) for _, d in shown],
                "arrayminus": [_or_zero(d.delta - d.low) for _, d in shown],
                "width": 3,
                "thickness": 1.6,
                "color": style.colour,
            },
            mode="markers",
            name=style.name,
            marker={
                "color": style.colour,
                "size": 9,
                "symbol": [style.symbol + ("-open" if d.verdict == "unclear" else "") for _, d in shown],
                "line": {"width": 1.6, "color": style.colour},
            },
            text=[f"{_signed(d.delta)} ({_signed(d.low)} to {_signed(d.high)}): {d.verdict}" for _, d in shown],
            hovertemplate="%{text}<extra>" + html.escape(style.name) + "</extra>",
        )
    lower = metric in LOWER_IS_BETTER
    ticks = [_bucket_label(summary, dataset, protocol, bucket) for bucket in buckets]
    figure.update_xaxes(tickvals=list(range(len(buckets))), ticktext=ticks, range=[-0.5, len(buckets) - 0.5])
    figure.update_xaxes(title_text="tasks by number of support rows", showgrid=False)
    figure.update_yaxes(
        title_text=f"Δ {name}" + (" (axis flipped)" if lower else ""),
        rangemode="tozero",
        zeroline=True,
        zerolinecolor="rgba(128,128,128,0.9)",
        zerolinewidth=1.5,
        tickformat="+.3~f",
        autorange="reversed" if lower else True,
    )
    figure.add_vline(x=0.5, line={"color": _GREY, "width": 1, "dash": "dot"})
    return figure


def activity_figure(curve: ActivityCurve) -> Figure:
    """A metric against the number of support rows of a task, every method with its band."""
    figure = empty_figure()
    positions = np.log1p(curve.mean)
    for method, style in method_styles(list(curve.values)).items():
        points = curve.values[method]
        band = [i for i, p in enumerate(points) if not math.isnan(p.low)]
        for run in _consecutive(band):
            figure.add_scatter(
                x=[*positions[run], *positions[run][::-1]],
                y=[*(points[i].high for i in run), *(points[i].low for i in reversed(run))],
                fill="toself",
                fillcolor=_translucent(style.colour, 0.13),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                name=style.name,
            )
        figure.add_scatter(
            x=positions,
            y=[p.value for p in points],
            mode="lines+markers",
            name=style.name,
            line={"color": style.colour, "dash": style.dash, "width": 2},
            marker={"symbol": style.symbol, "size": 8, "color": style.colour},
            text=[
                f"{_range(low, high)} support rows ({count:,} tasks): {p.value:.4f} ({p.low:.4f} to {p.high:.4f})"
                for low, high, count, p in zip(curve.low, curve.high, curve.tasks, points, strict=True)
            ],
            hovertemplate="%{text}<extra>" + html.escape(style.name) + "</extra>",
        )
    ticks = _round_numbers(max(curve.mean, default=0.0))
    figure.update_xaxes(
        title_text="support rows of a task (logarithmic)", tickvals=np.log1p(ticks), ticktext=[f"{t:,}" for t in ticks]
    )
    figure.update_yaxes(title_text=METRIC_NAMES[curve.metric])
    return figure


def learning_figure(curves: Sequence[Curve], which: Literal["train", "valid"]) -> Figure:
    """Training loss, or the validation metric, after each epoch: one line per seed; the kept epoch is marked."""
    figure = empty_figure()
    styles = method_styles([c.method for c in curves])
    named: set[str] = set()
    titles = []
    for curve in curves:
        values = curve.train_loss if which == "train" else curve.valid_metric
        if values is None:
            continue
        titles.append("training loss" if which == "train" else curve.valid_name)
        style = styles[curve.method]
        figure.add_scatter(
            x=list(curve.epochs),
            y=list(values),
            mode="lines" if len(values) > 1 else "markers",
            name=style.name,
            legendgroup=curve.method,
            showlegend=curve.method not in named,
            line={"color": style.colour, "dash": style.dash, "width": 1.6},
            marker={"color": style.colour, "symbol": style.symbol, "size": 8},
            opacity=0.85,
            hovertemplate="epoch %{x}: %{y:.4f}<extra>" + html.escape(f"{style.name}, seed {curve.seed}") + "</extra>",
        )
        named.add(curve.method)
        kept = [i for i, epoch in enumerate(curve.epochs) if epoch == curve.best_epoch]
        if kept:
            figure.add_scatter(
                x=[curve.epochs[i] for i in kept],
                y=[values[i] for i in kept],
                mode="markers",
                showlegend=False,
                legendgroup=curve.method,
                marker={"color": style.colour, "symbol": style.symbol, "size": 10},
                hovertemplate="kept: epoch %{x}, %{y:.4f}<extra>" + html.escape(style.name) + "</extra>",
            )
    figure.update_xaxes(title_text="epoch", tickformat=",d")
    figure.update_yaxes(title_text=" / ".join(dict.fromkeys(titles)))
    return figure


def calibration_figure(summary: Summary, dataset: str, protocol: str) -> Figure:
    """Mean prediction against mean label in bins of equal size; right predictions lie on the diagonal."""
    figure = empty_figure()
    curves = [c for c in summary.calibration if (c.dataset, c.protocol) == (dataset, protocol)]
    styles = method_styles(summary.methods(dataset, protocol))
    numbers = [v for c in curves for v in (*c.predicted, *c.label)]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    pad = 0.04 * (high - low) or 0.1
    figure.add_scatter(
        x=[low - pad, high + pad],
        y=[low - pad, high + pad],
        mode="lines",
        line={"color": "rgba(128,128,128,0.8)", "width": 1.2},
        hoverinfo="skip",
        showlegend=False,
        name="right",
    )
    for method, style in styles.items():
        for curve in (c for c in curves if c.method == method):
            figure.add_scatter(
                x=curve.predicted,
                y=curve.label,
                mode="lines+markers",
                name=style.name,
                line={"color": style.colour, "dash": style.dash, "width": 1.6},
                marker={"symbol": style.symbol, "size": 7, "color": style.colour},
                hovertemplate="predicted %{x:.3f}, really %{y:.3f}<extra>" + html.escape(style.name) + "</extra>",
            )
    binary = summary.losses[dataset] is LossKind.BINARY
    figure.update_xaxes(title_text="mean predicted " + ("probability" if binary else "value"))
    figure.update_yaxes(title_text="share that were positive" if binary else "mean label")
    figure.update_xaxes(range=[low - pad, high + pad])
    figure.update_yaxes(range=[low - pad, high + pad])
    return figure


def embedding_figure(points: MapPoints, colour: Literal["activity", "label"]) -> Figure:
    """The map of meta embeddings, one dot per task, coloured by support rows (logarithmic) or by mean label."""
    figure = empty_figure()
    support = points.source.support[points.rows]
    label = points.source.mean_label[points.rows]
    ids = [html.escape(str(points.source.ids[row])) for row in points.rows]
    text = [
        f"task {name}<br>{count:,} support rows<br>mean label {'unknown' if math.isnan(mean) else f'{mean:.2f}'}"
        for name, count, mean in zip(ids, support.tolist(), label.tolist(), strict=True)
    ]
    value = np.log1p(support) if colour == "activity" else label
    known = ~np.isnan(value)
    ticks = _round_numbers(float(support.max()) if len(support) else 0.0)
    bar: dict[str, Any] = {"thickness": 10, "outlinewidth": 0, "title": {"side": "right"}}
    if colour == "activity":
        bar |= {"tickvals": np.log1p(ticks), "ticktext": [f"{t:,}" for t in ticks]}
        bar["title"]["text"] = "support rows"
    else:
        bar["title"]["text"] = "mean label"
    size = 7 if len(ids) < 800 else 5 if len(ids) < 2500 else 4
    marker = {"size": size, "opacity": 0.8, "line": {"width": 0}}
    for inside, look in (
        (~known, {**marker, "color": "rgba(128,128,128,0.5)"}),
        (known, {**marker, "color": value[known], "colorscale": "Viridis", "showscale": True, "colorbar": bar}),
    ):
        if inside.any():
            figure.add_scatter(
                x=points.x[inside],
                y=points.y[inside],
                mode="markers",
                marker=look,
                text=[text[i] for i in np.flatnonzero(inside)],
                hovertemplate="%{text}<extra></extra>",
                showlegend=False,
            )
    for update, share, which in (
        (figure.update_xaxes, points.explained[0], "1st"),
        (figure.update_yaxes, points.explained[1], "2nd"),
    ):
        update(title_text=f"{which} component ({share:.0%} of variance)", zeroline=False)
    figure.update_layout(hovermode="closest")
    return figure


def empty_figure() -> Figure:
    """A figure with the look of all pictures and nothing in it."""
    graph_objects = require("plotly.graph_objects", "report")
    figure = graph_objects.Figure()
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 64, "r": 14, "t": 14, "b": 56},
        height=320,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
        font={"size": 12, "family": "system-ui, sans-serif"},
        colorway=[look[0] for look in (*_LOOKS.values(), *_SPARE)],
    )
    figure.update_xaxes(gridcolor=_GREY, zeroline=False, automargin=True, title_standoff=10)
    figure.update_yaxes(gridcolor=_GREY, zeroline=False, automargin=True, title_standoff=10)
    return figure


def _bucket_label(summary: Summary, dataset: str, protocol: str, bucket: str) -> str:
    size = next((s for s in summary.buckets if (s.dataset, s.protocol, s.bucket) == (dataset, protocol, bucket)), None)
    if size is None or size.support_low is None or size.support_high is None:
        return f"{bucket}<br>empty"
    return f"{bucket}<br>{_range(size.support_low, size.support_high)}"


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _signed(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:+.4f}"


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else max(value, 0.0)


def _translucent(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _round_numbers(largest: float) -> list[int]:
    """0, 1, 3, 10, 30, … up to `largest`."""
    ticks = [0, 1]
    while ticks[-1] < largest:
        ticks.append(ticks[-1] * 3 if str(ticks[-1])[0] == "1" else ticks[-1] // 3 * 10)
    return [t for t in ticks if t <= largest] or [0]


def _consecutive(positions: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][-1] == position - 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs
