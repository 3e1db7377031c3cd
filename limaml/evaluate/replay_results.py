"""From what was served to what is reported: quality by policy, slice, period and age of the embeddings, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from limaml.evaluate.bootstrap import ALL, Interval, bootstrap
from limaml.evaluate.predictions import Ints, Predictions
from limaml.evaluate.replay_past import Timeline
from limaml.evaluate.replay_periods import Periods
from limaml.evaluate.summary import COMPARED, Summary, strict, summarise
from limaml.types import LossKind

__all__ = ["AGES", "REPLAYED", "SLICES", "Cost", "Point", "Replayed", "Rows", "predictions_of"]

Mask = NDArray[np.bool_]

REPLAYED = "replay"
"""The protocol of all served rows."""

SLICES: Mapping[str, str] = {
    REPLAYED: "all rows that were served",
    "replay_new_tasks": "rows of tasks without a training row",
    "replay_known_tasks": "rows of tasks with training rows",
    "replay_new_rows": "rows of items without a training row",
    "replay_least_active": "in each period, rows of the half of its tasks with the fewest rows before it",
}
"""Protocol → which rows it judges."""

AGES: Mapping[str, str] = {
    "replay_ages": "rows of the later half of the periods",
    "replay_ages_known": "of these, rows of tasks that the oldest embeddings know",
}
"""Protocol → which rows are served with embeddings of every age."""

PERIOD = "replay_period"
"""`replay_period:3` is the protocol of the rows of one period."""

BASELINES = ("base_stale", "wide_and_deep_retrained", "limaml_never", "limaml_refreshed")
"""What policies are compared with, where they are there."""

DEAR = "wide_and_deep_retrained"
"""The policy whose cost the others are measured against."""

_POINT_REPLICATES = 200
_UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True, eq=False)
class Rows:
    """What is known of each served row, all `[rows]`."""

    period: Ints
    moment: Ints  # number of the stretch without a refresh that the row was served in
    task: Ints  # entry of the first task type
    support: Ints  # training rows of the row's task
    new_task: Mask
    new_row: Mask | None  # None where the schema does not name what is scored
    least_active: Mask

    def slices(self) -> dict[str, Mask]:
        """Protocol → its rows; only slices that have some."""
        found = {
            REPLAYED: np.ones(len(self.task), np.bool_),
            "replay_new_tasks": self.new_task,
            "replay_known_tasks": ~self.new_task,
            "replay_least_active": self.least_active,
        }
        if self.new_row is not None:
            found["replay_new_rows"] = self.new_row
        return {name: found[name] for name in SLICES if name in found and found[name].any()}


@dataclass(frozen=True)
class Cost:
    """Processor seconds of one policy and seed: of the first training, which a family's policies share, and of taking in
    each period."""

    policy: str
    seed: int
    first: float
    periods: tuple[float, ...]

    @property
    def total(self) -> float:
        """Seconds after the first training."""
        return sum(self.periods)


@dataclass(frozen=True)
class Point:
    """A metric of one policy in one period or at one age, and its difference to `baseline` on the same rows, with the
    bounds of their intervals. Unknown numbers are NaN."""

    dataset: str
    protocol: str
    policy: str
    at: int  # number of the period, or age in periods
    metric: str
    value: float
    low: float
    high: float
    baseline: str
    delta: float
    delta_low: float
    delta_high: float


@dataclass(frozen=True, eq=False)
class Replayed:
    """All that a replay found."""

    dataset: str
    task: str
    method: str
    periods: Periods
    refreshes: int
    rows: Rows
    policies: tuple[str, ...]
    predictions: tuple[Predictions, ...]
    costs: tuple[Cost, ...]
    epochs: Mapping[str, tuple[int, int]]  # family → epochs, passes of fine-tuning
    notes: tuple[str, ...]
    replicates: int  # of the bootstrap of the slices

    @cached_property
    def summary(self) -> Summary:
        """Metrics, differences and intervals of every slice."""
        judged = [p for p in self.predictions if p.protocol in SLICES]
        baselines = [name for name in BASELINES if name in self.policies]
        return summarise(judged, baselines=baselines, replicates=self.replicates)

    @cached_property
    def by_period(self) -> tuple[Point, ...]:
        """Every policy in every period, all rows; beside `limaml_never` where it is there."""
        return tuple(
            point
            for number in range(len(self.periods))
            for point in _points([p for p in self.predictions if p.protocol == f"{PERIOD}:{number}"], "limaml_never")
        )

    @cached_property
    def by_age(self) -> tuple[Point, ...]:
        """The policies that refresh, served with embeddings of every age, beside those of age 0."""
        return tuple(
            point
            for policy in self.policies
            for protocol in AGES
            for point in _points([p for p in self.predictions if p.protocol == f"{protocol}:{policy}"], "age 0")
        )

    def seconds(self, policy: str) -> float:
        """Processor seconds after the first training, the mean over seeds."""
        return float(np.mean([cost.total for cost in self.costs if cost.policy == policy]))

    def ratio(self, policy: str) -> float:
        """Its cost over that of wide-and-deep trained again each period; NaN where that was not replayed."""
        return self.seconds(policy) / self.seconds(DEAR) if DEAR in self.policies else math.nan

    def as_json(self) -> dict[str, object]:
        """The content of `replay.json`: strict JSON, so what is not a number is null."""
        periods = self.periods
        content = {
            "dataset": self.dataset,
            "task": self.task,
            "method": self.method,
            "policies": list(self.policies),
            "train_rows": periods.train_rows,
            "period_length": periods.length,
            "refreshes_per_period_when_streamed": self.refreshes,
            "periods": [
                {
                    **asdict(period),
                    "rows": len(period),
                    "tasks": len(np.unique(self.rows.task[self.rows.period == number])),
                    "rows_of_new_tasks": int(self.rows.new_task[self.rows.period == number].sum()),
                    "rows_of_new_items": None
                    if self.rows.new_row is None
                    else int(self.rows.new_row[self.rows.period == number].sum()),
                }
                for number, period in enumerate(periods.periods)
            ],
            "epochs": {family: {"epochs": e, "passes": p} for family, (e, p) in self.epochs.items()},
            "costs": [{**asdict(cost), "total": cost.total} for cost in self.costs],
            "cost_ratio": {name: self.ratio(name) for name in self.policies},
            "slices": dict(SLICES),
            "by_period": [asdict(point) for point in self.by_period],
            "by_age": [asdict(point) for point in self.by_age],
            "notes": list(self.notes),
        }
        found = strict(content)
        assert isinstance(found, dict)
        return {**found, "summary": self.summary.as_json()}


def predictions_of(
    timeline: Timeline,
    periods: Periods,
    rows: Rows,
    dataset: str,
    policy: str,
    seed: int,
    answer: Mapping[str, Tensor],
) -> list[Predictions]:
    """What one policy served, as predictions of every slice and period; and by age, where the answer has ages."""
    wanted: list[tuple[str, str, str, Mask]] = []  # protocol, method, which outputs, which rows
    wanted += [(protocol, policy, "outputs", inside) for protocol, inside in rows.slices().items()]
    wanted += [(f"{PERIOD}:{n}", policy, "outputs", rows.period == n) for n in range(len(periods))]
    oldest = len(answer) - 2  # beside "outputs", ages 0 … oldest
    late = rows.period >= oldest
    for age in range(oldest + 1):
        wanted.append((f"replay_ages:{policy}", f"age {age}", f"age {age}", late))
        if bool((late & ~rows.new_task).any()):
            wanted.append((f"replay_ages_known:{policy}", f"age {age}", f"age {age}", late & ~rows.new_task))
    found = []
    for head, label in enumerate(timeline.schema.labels):
        name = dataset if len(timeline.schema.labels) == 1 else f"{dataset}/{label.name}"
        labels = timeline.plain.labels[periods.train_rows :, head].double().numpy()
        weights = timeline.plain.weights[periods.train_rows :].double().numpy()
        weighted = bool((weights != 1).any())
        for protocol, method, which, inside in wanted:
            kept = np.flatnonzero(inside & np.isfinite(labels))
            outputs = answer[which][:, head].double().numpy()
            found.append(
                Predictions(
                    name,
                    protocol,
                    seed,
                    method,
                    rows.task[kept],
                    rows.support[kept],
                    labels[kept],
                    outputs[kept - (len(labels) - len(outputs))],  # ages begin with a later period
                    weights[kept] if weighted else None,
                    LossKind(label.loss),
                    rows.moment[kept],
                )
            )
    return found


def _points(items: Sequence[Predictions], baseline: str) -> list[Point]:
    """The metrics of each (dataset, method), and their differences to `baseline`, all of one protocol."""
    found: list[Point] = []
    for dataset in dict.fromkeys(item.dataset for item in items):
        own = [item for item in items if item.dataset == dataset]
        metrics = COMPARED[own[0].loss][:3]
        draws = bootstrap(own, replicates=_POINT_REPLICATES, buckets=(), metrics=metrics)
        protocol, _, rest = own[0].protocol.partition(":")
        for method in draws.methods:
            aged = method.startswith("age ")
            at, policy = (int(method.removeprefix("age ")), rest) if aged else (int(rest), method)
            for metric in metrics:
                value = draws.interval(method, ALL, metric)
                known = baseline in draws.methods
                delta = draws.difference(method, baseline, ALL, metric) if known else _UNKNOWN
                found.append(
                    Point(
                        dataset,
                        protocol,
                        policy,
                        at,
                        metric,
                        value.value,
                        value.low,
                        value.high,
                        baseline,
                        delta.value,
                        delta.low,
                        delta.high,
                    )
                )
    return found
