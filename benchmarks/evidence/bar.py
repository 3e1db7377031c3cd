"""What is demanded of the method, line by line, and whether the result files meet it. Where it loses comes from here, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.evidence.replays import replay_lines
from benchmarks.evidence.results import HALVES, METRICS, Entry
from limaml.evaluate.bootstrap import ALL
from limaml.evaluate.summary import LOWER_IS_BETTER

__all__ = [
    "HISTORY",
    "METRIC_TEXT",
    "Difference",
    "Line",
    "differences",
    "holm",
    "lines",
    "losses",
    "strongest_history",
]

LEVEL = 0.05
HISTORY = ("history_mean", "history_attention")
GAIN_ON_NEW = 0.03
METRIC_TEXT = {"auc": "AUC", "gauc": "GAUC", "log_loss": "log loss"}
Results = Mapping[str, Entry]


@dataclass(frozen=True)
class Difference:
    """method − other on one set; `gain` is the difference with the sign that makes more better."""

    dataset: str
    protocol: str
    method: str
    other: str
    bucket: str
    metric: str
    delta: float
    low: float | None
    high: float | None
    p: float | None

    @property
    def gain(self) -> float:
        return -self.delta if self.metric in LOWER_IS_BETTER else self.delta

    @property
    def better(self) -> bool:
        """Its interval excludes zero, on the good side."""
        return self.gain > 0 and self.sure

    @property
    def worse(self) -> bool:
        return self.gain < 0 and self.sure

    @property
    def sure(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def differences(
    results: Results,
    protocol: str,
    other: str | Callable[[Entry], str | None],
    bucket: str = ALL,
    metrics: Sequence[str] = METRICS,
) -> list[Difference]:
    """The solver that validation picked against `other`, on every set that has both; `other` may depend on the set."""
    found = []
    for name, result in results.items():
        judged, method = result["protocols"].get(protocol), result["picked"]
        rival = other if isinstance(other, str) else other(result)
        if judged is None or method is None or rival is None:
            continue
        values = judged["deltas"].get(method, {}).get(rival, {}).get(bucket)
        if values is not None:
            found += [
                Difference(name, protocol, method, rival, bucket, metric, *values[metric])
                for metric in metrics
                if values[metric][0] is not None
            ]
    return found


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: the p-values as they are after so many comparisons. None stays None and is not counted."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted


def strongest_history(result: Entry, protocol: str = "warm") -> str | None:
    """The history method with the best AUC on the test rows: the choice that is hardest on LiMAML."""
    methods = result["protocols"].get(protocol, {}).get("methods", {})
    there = [m for m in HISTORY if m in methods and methods[m]["metrics"][ALL]["auc"][0] is not None]
    return max(there, key=lambda m: methods[m]["metrics"][ALL]["auc"][0], default=None)


def losses(results: Results) -> list[Difference]:
    """Where the picked solver is worse than another method, with an interval that excludes zero: all members only."""
    found = []
    for name, result in results.items():
        for protocol, judged in result["protocols"].items():
            for other in judged["deltas"].get(result["picked"], {}):
                if other.startswith("limaml"):
                    continue
                found += [d for d in differences({name: result}, protocol, other) if d.worse]
    return found


@dataclass(frozen=True)
class Line:
    """A demand, whether it is met (None: nothing was measured for it), and what was found."""

    demand: str
    met: bool | None
    found: str


def lines(results: Results) -> Iterator[Line]:
    """The demands, in the order of the page."""
    yield _better_than_ids(results)
    yield _never_worse(results)
    yield _new_members(results)
    yield from _history(results)
    yield from _replay(results)


def _sets(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _better_than_ids(results: Results) -> Line:
    found = differences(results, "warm", "wide_and_deep")
    sets = list(dict.fromkeys(d.dataset for d in found))
    good = [s for s in sets if all(d.better for d in found if d.dataset == s)]
    demand = "`warm`: AUC, GAUC and log loss all better than wide-and-deep IDs, intervals above zero, on at least 6 of 7 sets"
    if not sets:
        return Line(demand, None, "not measured yet")
    short = [
        f"{s} ({', '.join(METRIC_TEXT[d.metric] for d in found if d.dataset == s and not d.better)})"
        for s in sets
        if s not in good
    ]
    missing = f"; not on {_sets(short)}" if short else ""
    return Line(demand, len(good) >= 6, f"on {len(good)} of {len(sets)}{missing}")


def _never_worse(results: Results) -> Line:
    found = differences(results, "warm", "wide_and_deep")
    demand = f"`warm`: never significantly worse than wide-and-deep IDs (two-sided, Holm over all sets and metrics, {LEVEL:.0%})"
    if not found:
        return Line(demand, None, "not measured yet")
    adjusted = holm([d.p for d in found])
    worse = [d for d, p in zip(found, adjusted, strict=True) if d.gain < 0 and p is not None and p < LEVEL]
    least = min((p for p in adjusted if p is not None), default=1.0)
    said = _sets([f"{d.dataset} {METRIC_TEXT[d.metric]} ({d.delta:+.4f})" for d in worse])
    return Line(demand, not worse, f"worse: {said}; {len(found)} comparisons, smallest corrected p {least:.3g}")


def _new_members(results: Results) -> Line:
    found = differences(results, "new_tasks", "base", metrics=("auc",))
    demand = f"`new_tasks`: AUC better than `base` by at least {GAIN_ON_NEW} on at least 5 of 7 sets"
    if not found:
        return Line(demand, None, "not measured yet")
    good = [d for d in found if d.gain >= GAIN_ON_NEW]
    rest = [f"{d.dataset} ({d.delta:+.4f})" for d in found if d.gain < GAIN_ON_NEW]
    return Line(demand, len(good) >= 5, f"on {len(good)} of {len(found)}" + (f"; not on {_sets(rest)}" if rest else ""))


def _history(results: Results) -> Iterator[Line]:
    for protocol in ("warm", "new_tasks"):
        yield _against_history(results, protocol, ALL, "no worse in AUC", lambda d: not d.worse)
        yield _against_history(
            results, protocol, HALVES[0], "better in AUC in the less active half", lambda d: d.better
        )


def _against_history(
    results: Results, protocol: str, bucket: str, demand: str, fine: Callable[[Difference], bool]
) -> Line:
    def rival(result: Entry) -> str | None:
        return strongest_history(result, protocol)

    found = differences(results, protocol, rival, bucket, ("auc",))
    text = f"`{protocol}`: {demand} than the strongest history baseline, on every set"
    if not found:
        return Line(text, None, "not measured yet")
    bad = [f"{d.dataset} ({d.other} {d.delta:+.4f})" for d in found if not fine(d)]
    return Line(
        text, not bad, f"on {len(found) - len(bad)} of {len(found)}" + (f"; not on {_sets(bad)}" if bad else "")
    )


def _replay(results: Results) -> Iterator[Line]:
    yield from (Line(*line) for line in replay_lines(results))
