"""What the report shows: each picture with the sentence that explains it, its panels and its legend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limaml.evaluate.activity import ActivityCurve, activity_curve
from limaml.evaluate.embedding_map import EmbeddingMap, project
from limaml.evaluate.figures import (
    Curve,
    activity_figure,
    calibration_figure,
    embedding_figure,
    gains_figure,
    learning_figure,
    method_name,
)
from limaml.evaluate.predictions import Predictions
from limaml.evaluate.summary import Summary, groups
from limaml.evaluate.table import METRIC_NAMES

__all__ = ["PROTOCOLS", "Panel", "Picture", "comparison_pictures", "group_name", "short_name"]

PROTOCOLS = {
    "warm": "tasks seen in training; their latest rows are the test",
    "new_tasks": "tasks never trained on; adapted from the first half of their rows, tested on the rest",
}
"""What the protocols mean, in words."""

_ACTIVITY_REPLICATES = 200
_MAP_LIMIT = 5000


@dataclass(frozen=True)
class Panel:
    """One plot: a plotly figure, its heading, the group it stands in, and a line beneath it."""

    title: str
    figure: Any
    group: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """One thing to see: a heading, a sentence for someone who has never seen such a plot, and its panels."""

    title: str
    sentence: str
    panels: tuple[Panel, ...]
    methods: tuple[str, ...] = ()  # for the legend
    wide: bool = False


def comparison_pictures(
    summary: Summary,
    predictions: Sequence[Predictions] = (),
    *,
    curves: Sequence[Curve] = (),
    embedding_map: EmbeddingMap | None = None,
) -> list[Picture]:
    """The pictures of a comparison that its parts allow, in the order of the report."""
    pictures = [_gains_picture(summary)]
    if predictions:
        activity = [
            activity_curve(items, replicates=min(summary.replicates, _ACTIVITY_REPLICATES), level=summary.level)
            for items in groups(predictions).values()
        ]
        pictures.append(_activity_picture(activity))
    if curves:
        pictures.append(_learning_picture(curves))
    pictures.append(_calibration_picture(summary))
    if embedding_map is not None:
        pictures.append(_map_picture(embedding_map))
    return [picture for picture in pictures if picture.panels]


def _gains_picture(summary: Summary) -> Picture:
    panels = []
    left_out: dict[str, None] = {}
    for dataset, protocol in summary.groups():
        where = group_name(summary, dataset, protocol)
        for baseline in dict.fromkeys(b for _, b in summary.pairs(dataset, protocol)):
            for metric in summary.metrics(dataset)[:3]:
                if not _any_delta(summary, dataset, protocol, baseline, metric):
                    left_out[f"{METRIC_NAMES[metric]} ({where})"] = None
                    continue
                figure = gains_figure(summary, dataset, protocol, baseline, metric)
                group = f"{where}: difference to {method_name(baseline)}"
                panels.append(Panel(METRIC_NAMES[metric], figure, group))
    return Picture(
        "Who gains",
        "Each mark is how much better (above the line) or worse (below it) a method ranks or predicts than the baseline, "
        "for all tasks and for each quarter of them from the least active (q1) to the most active (q4); the bar is the "
        f"{summary.level:.0%} interval, and a filled mark is one whose interval excludes zero. Axes on which less is better "
        "are flipped, so up is always better." + _undefined(left_out),
        tuple(panels),
        _compared(summary),
    )


def _any_delta(summary: Summary, dataset: str, protocol: str, baseline: str, metric: str) -> bool:
    key = (dataset, protocol, baseline, metric)
    return any(not math.isnan(d.delta) for d in summary.deltas if (d.dataset, d.protocol, d.baseline, d.metric) == key)


def _undefined(names: Mapping[str, None]) -> str:
    return f" Not shown, because these rows leave it undefined: {', '.join(names)}." if names else ""


def _activity_picture(curves: Sequence[ActivityCurve]) -> Picture:
    name = METRIC_NAMES[curves[0].metric] if len({c.metric for c in curves}) == 1 else "Quality"
    meaning = (
        "the chance that a row that turned out positive was scored above one that did not (0.5 is guessing, 1 is perfect)"
        if name == "AUC"
        else "the typical size of an error, less is better"
    )
    several = len({c.dataset for c in curves}) > 1
    panels = []
    left_out: dict[str, None] = {}
    for curve in curves:
        where = f"{curve.dataset}, {curve.protocol}" if several else curve.protocol
        if all(math.isnan(point.value) for points in curve.values.values() for point in points):
            left_out[where] = None
            continue
        panels.append(Panel(where, activity_figure(curve), caption=PROTOCOLS.get(curve.protocol, "")))
    methods = tuple(dict.fromkeys(m for c in curves for m in c.values))
    return Picture(
        f"{name} against the number of interactions",
        f"Tasks are dealt into groups of about equal size by how many support rows they have; the line shows the group's "
        f"{name}: {meaning}. The band is the interval over tasks." + _undefined(left_out),
        tuple(panels),
        methods,
        wide=True,
    )


def _learning_picture(curves: Sequence[Curve]) -> Picture:
    panels = []
    several = len({c.dataset for c in curves}) > 1
    for dataset, protocol in dict.fromkeys((c.dataset, c.protocol) for c in curves):
        own = [c for c in curves if (c.dataset, c.protocol) == (dataset, protocol)]
        group = f"{dataset}, {protocol}" if several else protocol
        panels.append(Panel("on the training rows", learning_figure(own, "train"), group))
        if any(c.valid_metric is not None for c in own):
            panels.append(Panel("on the validation rows", learning_figure(own, "valid"), group))
    return Picture(
        "Learning curves",
        "Each line is one training, one line per seed: how its loss moved from pass to pass over the training rows. A "
        "training loss that keeps falling while the validation curve turns is overfitting; a dot marks the epoch that was kept.",
        tuple(panels),
        tuple(dict.fromkeys(c.method for c in curves)),
        wide=True,
    )


def _calibration_picture(summary: Summary) -> Picture:
    panels = []
    for dataset, protocol in summary.groups():
        errors = [
            f"{short_name(c.method)} {c.ece:.4f}"
            for method in summary.methods(dataset, protocol)
            for c in summary.calibration
            if (c.dataset, c.protocol, c.method) == (dataset, protocol, method) and c.share
        ]
        if errors:
            caption = f"Mean distance from the diagonal (ECE): {', '.join(errors)}."
            figure = calibration_figure(summary, dataset, protocol)
            panels.append(Panel(group_name(summary, dataset, protocol), figure, caption=caption))
    return Picture(
        "Calibration",
        "Rows are sorted by their prediction and cut into groups of equal size; each point compares what a group was "
        "promised (across) with what came true (up). On the grey diagonal, promises are kept.",
        tuple(panels),
        tuple(dict.fromkeys(r.method for r in summary.runs)),
        wide=True,
    )


def _map_picture(source: EmbeddingMap) -> Picture:
    points = project(source, limit=_MAP_LIMIT)
    shown, total = len(points.rows), len(source.vectors)
    if not shown:
        return Picture("Map of the meta embeddings", "", ())
    sample = f"A random {shown:,} of {total:,} tasks are" if shown < total else f"All {total:,} tasks are"
    return Picture(
        "Map of the meta embeddings",
        f"Each dot is one task, placed so that tasks which the model treats alike lie close together: the two directions in "
        f"which the {source.vectors.shape[1]}-dimensional meta embeddings of {method_name(source.method)} ({source.protocol}) "
        f"differ most. {sample} shown; point at a dot to see whose it is.",
        (
            Panel("coloured by activity", embedding_figure(points, "activity")),
            Panel("coloured by mean label", embedding_figure(points, "label")),
        ),
        wide=True,
    )


def _compared(summary: Summary) -> tuple[str, ...]:
    found = dict.fromkeys(delta.method for delta in summary.deltas)
    return tuple(m for m in dict.fromkeys(r.method for r in summary.runs) if m in found)


def group_name(summary: Summary, dataset: str, protocol: str) -> str:
    """The protocol, with the dataset where there are several."""
    return f"{dataset}, {protocol}" if len(summary.losses) > 1 else protocol


def short_name(method: str) -> str:
    """The name of a method for people, without its explanation in brackets."""
    return method_name(method).partition(" (")[0]
