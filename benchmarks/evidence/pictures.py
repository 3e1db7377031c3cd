"""The page's pictures, from the result files."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.evidence.bar import differences
from benchmarks.evidence.results import Entry
from benchmarks.evidence.svg import Mark, Series, intervals, lines
from limaml.evaluate.predictions import QUARTILES

__all__ = ["draw"]


def draw(results: Mapping[str, Entry]) -> dict[str, str]:
    """File name → SVG."""
    found = {}
    for protocol, other in (("warm", "wide_and_deep"), ("new_tasks", "base")):
        groups: dict[str, dict[str, Mark]] = {}
        for name, result in results.items():
            for bucket in QUARTILES:
                for d in differences({name: result}, protocol, other, bucket, ("auc",)):
                    if d.low is not None and d.high is not None:
                        groups.setdefault(name, {})[bucket] = Mark(d.delta, d.low, d.high)
        if groups:
            title = f"{protocol}: AUC of LiMAML − {other}, by quarters of activity"
            found[f"results-activity-{protocol}.svg"] = intervals(
                title, groups, "difference in AUC, 95 % interval over members"
            )
    for name, result in results.items():
        ages = [
            e for e in result.get("replay", {}).get("by_age", ()) if e["metric"] == "auc" and e["delta"] is not None
        ]
        series = []
        for policy, protocol in dict.fromkeys((e["policy"], e["protocol"]) for e in ages):
            own = [e for e in ages if (e["policy"], e["protocol"]) == (policy, protocol) and e["delta_low"] is not None]
            if own:
                marks = [Mark(e["delta"], e["delta_low"], e["delta_high"]) for e in own]
                who = "known members" if protocol == "replay_ages_known" else "all members"
                series.append(Series(f"{policy}, {who}", [e["at"] for e in own], marks))
        if series:
            title = f"{name}: AUC lost by embeddings of an age"
            found[f"results-age-{name}.svg"] = lines(title, series, "age of the embeddings, periods", "AUC − fresh")
    return found
