"""The pictures of a replay: quality period by period, against the age of the embeddings, and against what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from limaml.evaluate.figures import empty_figure
from limaml.evaluate.pictures import Panel, Picture
from limaml.evaluate.replay_policies import POLICIES
from limaml.evaluate.replay_results import AGES, REPLAYED, Point, Replayed
from limaml.evaluate.summary import LOWER_IS_BETTER
from limaml.evaluate.table import METRIC_NAMES

__all__ = ["replay_pictures"]

_COLOURS = {"base": "#767d87", "wide_and_deep": "#d98200", "limaml": "#0a9a70", "limaml_items": "#2f7fd0"}
_DASHES = {"stale": "dot", "finetune": "dashdot", "refresh": "solid", "stream": "longdash", "retrain": "dash"}
_MARKS = {
    "stale": "circle-open",
    "finetune": "square",
    "refresh": "diamond",
    "stream": "star",
    "retrain": "triangle-up",
}


def replay_pictures(replayed: Replayed) -> list[Picture]:
    """The pictures that the replayed policies allow."""
    pictures = [_period_picture(replayed), _age_picture(replayed), _cost_picture(replayed)]
    return [picture for picture in pictures if picture.panels]


def _period_picture(replayed: Replayed) -> Picture:
    points = replayed.by_period
    panels = [
        Panel(METRIC_NAMES[metric], _lines(points, dataset, metric, list(replayed.policies)), dataset)
        for dataset in dict.fromkeys(p.dataset for p in points)
        for metric in dict.fromkeys(p.metric for p in points if p.dataset == dataset)
    ]
    return Picture(
        "Period by period",
        "Each line is one policy: how well it served each period with what was known before it. All began with the same "
        "first training of their family; the bars are 95 % intervals over tasks.",
        tuple(panels),
        wide=True,
    )


def _lines(points: Sequence[Point], dataset: str, metric: str, policies: Sequence[str]) -> Any:
    figure = empty_figure()
    for policy in policies:
        own = [p for p in points if (p.dataset, p.metric, p.policy) == (dataset, metric, policy)]
        family, then = POLICIES[policy]
        figure.add_scatter(
            x=[p.at + 1 for p in own],
            y=[None if math.isnan(p.value) else p.value for p in own],
            mode="lines+markers",
            name=policy,
            line={"color": _COLOURS[family], "dash": _DASHES[then], "width": 1.8},
            marker={"color": _COLOURS[family], "symbol": _MARKS[then], "size": 7},
            text=[f"{p.value:.4f} ({p.low:.4f} to {p.high:.4f})" for p in own],
            hovertemplate="period %{x}: %{text}<extra>" + policy + "</extra>",
        )
    figure.update_xaxes(title_text="period", tickformat=",d")
    figure.update_yaxes(title_text=METRIC_NAMES[metric])
    return figure


def _age_picture(replayed: Replayed) -> Picture:
    points = replayed.by_age
    panels = []
    for protocol, meaning in AGES.items():
        for dataset, metric in dict.fromkeys((p.dataset, p.metric) for p in points if p.protocol == protocol):
            own = [p for p in points if (p.protocol, p.dataset, p.metric) == (protocol, dataset, metric)]
            lower = metric in LOWER_IS_BETTER
            panels.append(Panel(METRIC_NAMES[metric], _ages(own, metric, lower), f"{dataset}: {meaning}"))
    return Picture(
        "Quality against the age of the embeddings",
        "The same rows, served by the same model with the meta embeddings of 0, 1, 2, … periods ago: the difference to fresh "
        "ones, with its 95 % interval over tasks. Below the line is worse (axes on which less is better are flipped).",
        tuple(panels),
        wide=True,
    )


def _ages(points: Sequence[Point], metric: str, lower: bool) -> Any:
    figure = empty_figure()
    for policy in dict.fromkeys(p.policy for p in points):
        own = [p for p in points if p.policy == policy]
        colour = _COLOURS[POLICIES[policy][0]]
        figure.add_scatter(
            x=[p.at for p in own],
            y=[p.delta for p in own],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [_length(p.delta_high - p.delta) for p in own],
                "arrayminus": [_length(p.delta - p.delta_low) for p in own],
                "color": colour,
                "thickness": 1.4,
                "width": 3,
            },
            mode="lines+markers",
            name=policy,
            line={"color": colour, "width": 2},
            text=[f"{p.delta:+.4f} ({p.delta_low:+.4f} to {p.delta_high:+.4f})" for p in own],
            hovertemplate="%{x} periods old: %{text}<extra>" + policy + "</extra>",
        )
    figure.update_xaxes(title_text="age of the embeddings, in periods", tickformat=",d")
    figure.update_yaxes(
        title_text=f"Δ {METRIC_NAMES[metric]}" + (" (axis flipped)" if lower else ""),
        autorange="reversed" if lower else True,
        tickformat="+.3~f",
        rangemode="tozero",
    )
    return figure


def _cost_picture(replayed: Replayed) -> Picture:
    panels = []
    summary = replayed.summary
    for dataset in dict.fromkeys(run.dataset for run in summary.runs):
        for metric in summary.metrics(dataset)[:3]:
            figure = empty_figure()
            for policy in replayed.policies:
                found = summary.interval(dataset, REPLAYED, policy, "all", metric)
                family, then = POLICIES[policy]
                if found is not None and not math.isnan(found.value):
                    figure.add_scatter(
                        x=[replayed.seconds(policy)],
                        y=[found.value],
                        mode="markers",
                        name=policy,
                        marker={"color": _COLOURS[family], "symbol": _MARKS[then], "size": 11},
                        hovertemplate="%{x:.1f} s, %{y:.4f}<extra>" + policy + "</extra>",
                    )
            figure.update_xaxes(title_text="processor seconds after the first training")
            figure.update_yaxes(title_text=METRIC_NAMES[metric])
            panels.append(Panel(METRIC_NAMES[metric], figure, dataset))
    return Picture(
        "What it cost",
        "Each mark is one policy: the processor seconds it took to take all periods in, after the first training, and how well "
        "it served. Encoding the table and scoring are not counted; every policy has them alike.",
        tuple(panels),
        wide=True,
    )


def _length(value: float) -> float:
    return 0.0 if math.isnan(value) else max(value, 0.0)
