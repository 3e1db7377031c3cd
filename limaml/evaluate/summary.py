"""From predictions to the numbers that are reported: `metrics.json`.

A *delta* is always method − baseline. For AUC, GAUC and R² a positive delta is an improvement; for log loss,
normalised entropy, RMSE and MAE a negative one is. `verdict` says which it is, so that nobody has to remember.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np

from limaml.errors import ConfigError, DataError
from limaml.evaluate.bootstrap import ALL, Interval, Replicates, bootstrap
from limaml.evaluate.metrics import reliability
from limaml.evaluate.predictions import QUARTILES, Predictions, check_comparable, quartiles, task_supports
from limaml.evaluate.ranking import RANKING_METRICS
from limaml.types import LossKind

__all__ = [
    "BASELINES",
    "COMPARED",
    "LOWER_IS_BETTER",
    "BucketSize",
    "CalibrationCurve",
    "Delta",
    "MetricInterval",
    "Run",
    "Summary",
    "Verdict",
    "deltas_of",
    "groups",
    "intervals_of",
    "pairs_of",
    "strict",
    "summarise",
    "write_metrics",
]

Verdict = Literal["better", "worse", "unclear"]

BASELINES = ("base", "wide_and_deep")
"""What methods are compared with by default, the weakest first."""

COMPARED: dict[str, tuple[str, ...]] = {
    LossKind.BINARY: ("auc", "gauc", "log_loss", "ne"),
    LossKind.SQUARED: ("rmse", "mae", "r2"),
    "ranking": RANKING_METRICS,
}
"""The metrics that differences are reported for; of the rest, more or less is not better or worse."""

LOWER_IS_BETTER = frozenset({"log_loss", "ne", "rmse", "mae"})

_NAN = float("nan")
_ROUNDING = 1e-12  # equal predictions summed in another order differ by this much


@dataclass(frozen=True)
class Run:
    """One method on one seed. Metrics that do not apply to the loss, or are undefined, are NaN (null in the file)."""

    dataset: str
    protocol: str
    seed: int
    method: str
    bucket: str
    auc: float = _NAN
    gauc: float = _NAN
    gauc_coverage: float = _NAN
    log_loss: float = _NAN
    ne: float = _NAN
    calibration: float = _NAN
    rmse: float = _NAN
    mae: float = _NAN
    r2: float = _NAN
    n: int = 0  # query rows
    tasks: int = 0


@dataclass(frozen=True)
class Delta:
    """method − baseline, averaged over seeds, with the bounds of its interval over tasks."""

    dataset: str
    protocol: str
    method: str
    baseline: str
    bucket: str
    metric: str
    delta: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class MetricInterval:
    """A metric averaged over seeds, with the bounds of its interval over tasks."""

    dataset: str
    protocol: str
    method: str
    bucket: str
    metric: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CalibrationCurve:
    """Mean prediction against mean label, in bins of equal weight over the rows of all seeds."""

    dataset: str
    protocol: str
    method: str
    predicted: tuple[float, ...]
    label: tuple[float, ...]
    share: tuple[float, ...]
    ece: float


@dataclass(frozen=True)
class BucketSize:
    """Who is in an activity bucket: counts per seed on average, and the range of support rows over all seeds."""

    dataset: str
    protocol: str
    bucket: str
    tasks: float
    rows: float
    support_low: int | None  # None where the bucket is empty
    support_high: int | None


@dataclass(frozen=True)
class Summary:
    """All numbers of a comparison, and how they were made."""

    runs: tuple[Run, ...]
    deltas: tuple[Delta, ...]
    intervals: tuple[MetricInterval, ...]
    calibration: tuple[CalibrationCurve, ...]
    buckets: tuple[BucketSize, ...]
    baselines: tuple[str, ...]
    losses: Mapping[str, str]  # dataset → loss, or "ranking" where candidates were ranked
    replicates: int
    seed: int
    level: float

    def as_json(self) -> dict[str, object]:
        """The content of `metrics.json`: strict JSON, so what is not a number is null."""
        rows = {
            name: [strict(asdict(entry)) for entry in getattr(self, name)]
            for name in ("runs", "deltas", "intervals", "calibration", "buckets")
        }
        bootstrap_settings = {"over": "tasks", "replicates": self.replicates, "seed": self.seed, "level": self.level}
        losses = {name: str(loss) for name, loss in self.losses.items()}
        return {**rows, "baselines": list(self.baselines), "losses": losses, "bootstrap": bootstrap_settings}

    def groups(self) -> list[tuple[str, str]]:
        """The (dataset, protocol) pairs, in the order in which they were given."""
        return list(dict.fromkeys((run.dataset, run.protocol) for run in self.runs))

    def methods(self, dataset: str, protocol: str) -> list[str]:
        """The methods of a group: baselines first."""
        found = dict.fromkeys(r.method for r in self.runs if (r.dataset, r.protocol) == (dataset, protocol))
        return [m for m in self.baselines if m in found] + [m for m in found if m not in self.baselines]

    def seeds(self, dataset: str, protocol: str) -> list[int]:
        return sorted({r.seed for r in self.runs if (r.dataset, r.protocol) == (dataset, protocol)})

    def metrics(self, dataset: str) -> tuple[str, ...]:
        """The metrics that methods are compared by."""
        return COMPARED[self.losses[dataset]]

    def interval(self, dataset: str, protocol: str, method: str, bucket: str, metric: str) -> MetricInterval | None:
        key = (dataset, protocol, method, bucket, metric)
        return next((i for i in self.intervals if (i.dataset, i.protocol, i.method, i.bucket, i.metric) == key), None)

    def delta(self, dataset: str, protocol: str, method: str, baseline: str, bucket: str, metric: str) -> Delta | None:
        key = (dataset, protocol, method, baseline, bucket, metric)
        return next(
            (d for d in self.deltas if (d.dataset, d.protocol, d.method, d.baseline, d.bucket, d.metric) == key), None
        )

    def pairs(self, dataset: str, protocol: str) -> list[tuple[str, str]]:
        """The (method, baseline) pairs that are compared in a group."""
        return list(pairs_of(self.methods(dataset, protocol), self.baselines))


def groups(predictions: Sequence[Predictions]) -> dict[tuple[str, str], list[Predictions]]:
    """(dataset, protocol) → its predictions, in the order in which they were given."""
    found: dict[tuple[str, str], list[Predictions]] = {}
    for item in predictions:
        found.setdefault((item.dataset, item.protocol), []).append(item)
    return found


def summarise(
    predictions: Sequence[Predictions],
    *,
    baselines: Sequence[str] | None = None,
    replicates: int = 500,
    seed: int = 0,
    level: float = 0.95,
    bins: int = 15,
) -> Summary:
    """Compare methods on the same query rows.

    `baselines` are what each method is compared with, the weakest first; a later baseline is compared with the earlier
    ones too. By default those of `BASELINES` that are there. `replicates`, `seed` and `level` are the bootstrap's over
    tasks; `bins` the calibration curve's. Raises `DataError` where methods were not judged on the same rows, and
    `ConfigError` for a baseline that nobody predicted with.
    """
    if not predictions:
        raise DataError("There are no predictions to compare.")
    check_comparable(predictions)
    methods = list(dict.fromkeys(p.method for p in predictions))
    if baselines is None:
        baselines = [name for name in BASELINES if name in methods]
    for name in baselines:
        if name not in methods:
            near = get_close_matches(name, methods, 1)
            hint = f" Did you mean '{near[0]}'?" if near else f" There are {methods}."
            raise ConfigError(f"No predictions of the baseline '{name}' were given.{hint}")

    runs: list[Run] = []
    deltas: list[Delta] = []
    intervals: list[MetricInterval] = []
    curves: list[CalibrationCurve] = []
    sizes: list[BucketSize] = []
    for (dataset, protocol), items in groups(predictions).items():
        draws = bootstrap(items, replicates=replicates, seed=seed, level=level)
        for item in items:
            runs += _runs(item, draws)
        intervals += intervals_of(draws, dataset, protocol)
        deltas += deltas_of(draws, dataset, protocol, baselines, COMPARED[items[0].loss])
        curves += [_calibration([p for p in items if p.method == method], bins) for method in draws.methods]
        sizes += _bucket_sizes(items)
    return Summary(
        runs=tuple(runs),
        deltas=tuple(deltas),
        intervals=tuple(intervals),
        calibration=tuple(curves),
        buckets=tuple(sizes),
        baselines=tuple(baselines),
        losses={p.dataset: p.loss for p in predictions},
        replicates=replicates,
        seed=seed,
        level=level,
    )


def write_metrics(summary: Summary, path: str | Path, notes: Sequence[str] = ()) -> None:
    """Write `metrics.json`; the folder is made if need be. `notes` are sentences that say what was chosen."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**summary.as_json(), "notes": list(notes)} if notes else summary.as_json()
    path.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")


def intervals_of(draws: Replicates, dataset: str, protocol: str) -> Iterator[MetricInterval]:
    """Every metric of each method in each bucket."""
    for method in draws.methods:
        for bucket in draws.buckets:
            for metric in draws.metrics:
                found = draws.interval(method, bucket, metric)
                yield MetricInterval(dataset, protocol, method, bucket, metric, found.value, found.low, found.high)


def deltas_of(
    draws: Replicates, dataset: str, protocol: str, baselines: Sequence[str], metrics: Sequence[str]
) -> Iterator[Delta]:
    """How each method differs from the baselines it is compared with, in each bucket and each of these `metrics`."""
    for method, baseline in pairs_of(draws.methods, baselines):
        for bucket in draws.buckets:
            for metric in metrics:
                found = draws.difference(method, baseline, bucket, metric)
                verdict = verdict_of(metric, found)
                yield Delta(
                    dataset, protocol, method, baseline, bucket, metric, found.value, found.low, found.high, verdict
                )


def pairs_of(methods: Sequence[str], baselines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The (method, baseline) pairs that are compared: a baseline only with the earlier ones."""
    for method in methods:
        earlier = baselines[: baselines.index(method)] if method in baselines else baselines
        for baseline in earlier:
            if baseline in methods:
                yield method, baseline


def verdict_of(metric: str, found: Interval) -> Verdict:
    """What a difference in `metric` means."""
    if not found.excludes_zero or min(abs(found.low), abs(found.high)) < _ROUNDING:
        return "unclear"
    return "better" if (found.value < 0) == (metric in LOWER_IS_BETTER) else "worse"


def _runs(item: Predictions, draws: Replicates) -> Iterator[Run]:
    _, support, row_task = task_supports(item)
    bucket_of_task = quartiles(support)
    bucket_of_row = bucket_of_task[row_task]
    for position, bucket in enumerate(draws.buckets):
        metrics = {m: draws.of_seed(item.seed, item.method, bucket, m) for m in draws.metrics}
        n = len(item) if bucket == ALL else int((bucket_of_row == position - 1).sum())
        tasks = len(support) if bucket == ALL else int((bucket_of_task == position - 1).sum())
        yield Run(item.dataset, item.protocol, item.seed, item.method, bucket, n=n, tasks=tasks, **metrics)


def _calibration(items: Sequence[Predictions], bins: int) -> CalibrationCurve:
    curve = reliability(
        np.concatenate([p.label for p in items]),
        np.concatenate([p.predicted for p in items]),
        np.concatenate([p.row_weight for p in items]),
        bins=bins,
    )
    return CalibrationCurve(
        items[0].dataset,
        items[0].protocol,
        items[0].method,
        tuple(curve.predicted.tolist()),
        tuple(curve.label.tolist()),
        tuple(curve.share.tolist()),
        curve.ece,
    )


def _bucket_sizes(items: Sequence[Predictions]) -> Iterator[BucketSize]:
    one_per_seed = list({p.seed: p for p in items}.values())
    tables = [(support, quartiles(support), row) for _, support, row in map(task_supports, one_per_seed)]
    for position, name in enumerate((ALL, *QUARTILES), start=-1):
        inside = [bucket == position if position >= 0 else np.ones(len(bucket), np.bool_) for _, bucket, _ in tables]
        supports = np.concatenate([support[mask] for (support, _, _), mask in zip(tables, inside, strict=True)])
        yield BucketSize(
            items[0].dataset,
            items[0].protocol,
            name,
            tasks=len(supports) / len(tables),
            rows=sum(int(mask[row].sum()) for (_, _, row), mask in zip(tables, inside, strict=True)) / len(tables),
            support_low=int(supports.min()) if len(supports) else None,
            support_high=int(supports.max()) if len(supports) else None,
        )


def strict(value: object) -> object:
    """The value as strict JSON: what is not a number is null."""
    if isinstance(value, dict):
        return {key: strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
