"""`python -m benchmarks.age`: does it help to weigh old rows less? The same method, with and without.

Each data set is compared with itself: the same members, protocols, seeds and settings, once per value of
`adapt.half_life`. Differences are to `adapt.half_life=null`, with the intervals of the bootstrap over members. About six
minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from limaml.config import parse_config
from limaml.evaluate import Summary, summarise
from limaml.evaluate.compare import compare
from limaml.interactions import prepare
from limaml.meta import load_model

ROOT = Path(__file__).resolve().parents[1]
DAY = 86_400  # the data sets' times are in seconds
METRICS = ("auc", "gauc", "log_loss")


@dataclass(frozen=True)
class Set:
    """A data set, and half-lives to start from: in the unit of its time column."""

    name: str
    label: str
    time: str
    half_lives: tuple[float, ...]
    task_features: bool = False


SETS = (
    Set("ml-1m-timed", "rating >= 4", "timestamp", (30 * DAY,), task_features=True),
    Set("assistments09", "correct >= 1", "seq", (50,)),
)


def measure(
    which: Set, folder: Path, members: int, seeds: int, method: str, workers: int
) -> tuple[Summary, dict[str, float]]:
    """All variants of one data set in one summary, methods named by their half-life; and the half-lives learned."""
    users = folder / "users.parquet"
    prepared = prepare(
        folder / "interactions.parquet",
        task=["user_id"],
        row="item_id",
        time=which.time,
        label=[which.label],
        task_features=users if which.task_features else None,
        row_features=folder / "items.parquet",
        max_tasks=members,
    )
    found, learned = [], {}
    with tempfile.TemporaryDirectory() as place:
        table = Path(place) / "table.parquet"
        prepared.frame.write_parquet(table)
        for start in (None, *which.half_lives):
            name = "off" if start is None else f"{start:g}"
            config = parse_config(
                {
                    "adapt": {"half_life": start},
                    "compare": {"methods": [method], "seeds": seeds},
                }
            )
            keep = Path(place) / f"model-{name}"
            done = compare(table, prepared.schema, config, dataset=which.name, keep=keep, workers=workers)
            found += [replace(p, method=name) for p in done.predictions]
            for half_life in load_model(keep).model.half_lives.values():
                learned[name] = float(half_life.log_half_life.detach().exp())
    return summarise(found, baselines=["off"]), learned


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.age", description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=ROOT / "../shared/data", help="the folder with the data sets' folders"
    )
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["limaml_newton"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/age.json")
    chosen = parser.parse_args()
    results = []
    for which in SETS:
        for method in chosen.methods:
            summary, learned = measure(
                which, chosen.data / which.name, chosen.members, chosen.seeds, method, chosen.workers
            )
            for (dataset, protocol), metric in ((g, m) for g in summary.groups() for m in METRICS):
                off = summary.interval(dataset, protocol, "off", "all", metric)
                for name, half_life in learned.items():
                    change = summary.delta(dataset, protocol, name, "off", "all", metric)
                    assert off is not None and change is not None
                    print(
                        f"{dataset} · {protocol} · {method} · half-life {name} (learned, warm: {half_life:.4g}) · {metric} "
                        f"{off.value:.4f} {change.delta:+.4f} [{change.low:+.4f}, {change.high:+.4f}]",
                        flush=True,
                    )
                    results.append(
                        {
                            "dataset": dataset,
                            "protocol": protocol,
                            "method": method,
                            "start": float(name),
                            "learned": half_life,
                            "metric": metric,
                            "off": off.value,
                            "change": [change.delta, change.low, change.high],
                        }
                    )
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
