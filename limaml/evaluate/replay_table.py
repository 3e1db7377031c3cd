"""A replay as one table: each policy's quality over all rows and over what is new, and what it cost."""

from __future__ import annotations

import math

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from limaml.evaluate.replay_results import DEAR, REPLAYED, SLICES, Replayed
from limaml.evaluate.summary import LOWER_IS_BETTER
from limaml.evaluate.table import METRIC_NAMES, delta_text

__all__ = ["replay_table"]

_SHORT = {
    "replay_new_tasks": "new tasks",
    "replay_known_tasks": "known tasks",
    "replay_new_rows": "new items",
    "replay_least_active": "least active",
}


def replay_table(replayed: Replayed) -> Group:
    """The tables for `rich.print`: one for each label."""
    summary = replayed.summary
    parts: list[Table | Text] = []
    for dataset in dict.fromkeys(run.dataset for run in summary.runs):
        metrics = summary.metrics(dataset)[:3]
        first = metrics[0]
        slices = [p for d, p in summary.groups() if d == dataset and p != REPLAYED]
        table = Table(title=f"{dataset}, replay", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.add_column("policy", no_wrap=True)
        for metric in metrics:
            table.add_column(f"{METRIC_NAMES[metric]} {'↓' if metric in LOWER_IS_BETTER else '↑'}", justify="right")
        for name in slices:
            table.add_column(f"{METRIC_NAMES[first]}, {_SHORT.get(name, name)}", justify="right")
        table.add_column("cost, s", justify="right")
        table.add_column("of retraining", justify="right")
        for policy in replayed.policies:
            found = [summary.interval(dataset, REPLAYED, policy, "all", metric) for metric in metrics]
            found += [summary.interval(dataset, name, policy, "all", first) for name in slices]
            cells = ["–" if i is None or math.isnan(i.value) else f"{i.value:.4f}" for i in found]
            ratio = replayed.ratio(policy)
            table.add_row(
                policy, *cells, f"{replayed.seconds(policy):,.1f}", "–" if math.isnan(ratio) else f"{ratio:.3f}"
            )
        parts.append(table)
        lines = []
        for policy in replayed.policies:
            for baseline in summary.baselines:
                deltas = [summary.delta(dataset, REPLAYED, policy, baseline, "all", metric) for metric in metrics]
                told = [f"{METRIC_NAMES[d.metric]} {delta_text(d)}" for d in deltas if d is not None]
                if told:
                    lines.append(f"{policy} − {baseline}: {', '.join(told)}")
        parts.append(Text("\n".join(lines)))
    legend = "; ".join(f"{short}: {SLICES[name]}" for name, short in _SHORT.items())
    parts.append(
        Text(
            f"\n{legend}. Cost: processor seconds after the first training; 'of retraining' is over those of {DEAR}. "
            f"± half of a {summary.level:.0%} interval (bootstrap over tasks); ✓ better, ✗ worse.",
            "dim",
        )
    )
    return Group(*parts)
