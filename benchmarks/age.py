"""`python -m benchmarks.age`: does it help to weigh old rows less? The same method, with and without.

Each data set is compared with itself: the same members, protocols, seeds and settings. "off": rows weigh alike
(`adapt.find_half_life=false`); "found": the default; a number: a half-life that is learned from there. Differences are to "off",
with the intervals of the bootstrap over members. Made-up members turn towards new tastes by as many degrees in all; where they
do not turn, nothing should be found. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import limaml
from limaml.config import parse_config
from limaml.evaluate import Summary, summarise
from limaml.evaluate.compare import compare
from limaml.interactions import Prepared, prepare
from limaml.interactions.readers import Source
from limaml.meta import load_model

ROOT = Path(__file__).resolve().parents[1]
DAY = 86_400  # the data sets' times are in seconds
METRICS = ("auc", "gauc", "log_loss")
VARIANTS = {"off": {"find_half_life": False}, "found": {}}


@dataclass(frozen=True)
class Set:
    """A data set, and half-lives to start from: in the unit of its time column."""

    name: str
    label: str
    time: str
    half_lives: tuple[float, ...] = ()
    task_features: bool = False
    turns: float | None = None  # degrees, of made-up members

    def prepared(self, data: Path, members: int) -> Prepared:
        source: Source
        users: Source | None
        items: Source
        if self.turns is None:
            folder = data / self.name
            source = folder / "interactions.parquet"
            users, items = folder / "users.parquet" if self.task_features else None, folder / "items.parquet"
        else:
            made = limaml.make_interactions(tasks=members, drift=self.turns / 90, seed=1)
            source, users, items = made.interactions, made.users, made.items
        return prepare(
            source,
            task=["user_id"],
            row="item_id",
            time=self.time,
            label=[self.label],
            task_features=users,
            row_features=items,
            max_tasks=members,
        )


SETS = (
    *(Set(f"made up, {turns:g}°", "click", "timestamp", turns=turns) for turns in (0, 30, 90)),
    Set("ml-1m-timed", "rating >= 4", "timestamp", (30 * DAY,), task_features=True),
    Set("assistments09", "correct >= 1", "seq", (50,)),
)


def measure(
    which: Set, data: Path, members: int, seeds: int, method: str, workers: int
) -> tuple[Summary, dict[str, float | None]]:
    """All variants of one data set, and wide-and-deep IDs, in one summary, methods named by their variant; and the half-lives,
    None where rows weigh alike."""
    prepared = which.prepared(data, members)
    found, known = [], dict[str, float | None]()
    with tempfile.TemporaryDirectory() as place:
        table = Path(place) / "table.parquet"
        prepared.frame.write_parquet(table)
        variants = VARIANTS | {f"{start:g}": {"half_life": start} for start in which.half_lives}
        for name, adapt in variants.items():
            methods = ["wide_and_deep", method] if name == "off" else [method]
            config = parse_config({"adapt": adapt, "compare": {"methods": methods, "seeds": seeds}})
            keep = Path(place) / f"model-{name}"
            done = compare(table, prepared.schema, config, dataset=which.name, keep=keep, workers=workers)
            found += [replace(p, method=name) if p.method == method else p for p in done.predictions]
            known[name] = next(iter(load_model(keep).model.half_life_values().values()), None)
    return summarise(found, baselines=["off"]), known


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
        if which.turns is None and not (chosen.data / which.name).exists():
            print(f"{which.name} is not in {chosen.data}, and is left out.")
            continue
        for method in chosen.methods:
            summary, known = measure(which, chosen.data, chosen.members, chosen.seeds, method, chosen.workers)
            for (dataset, protocol), metric in ((g, m) for g in summary.groups() for m in METRICS):
                off = summary.interval(dataset, protocol, "off", "all", metric)
                for name in ("wide_and_deep", *(variant for variant in known if variant != "off")):
                    change = summary.delta(dataset, protocol, name, "off", "all", metric)
                    assert off is not None and change is not None
                    half_life = known.get(name)
                    said = "" if name == "wide_and_deep" else f" (half-life, warm: {half_life or 'none'})"
                    print(
                        f"{dataset} · {protocol} · {method} {name}{said} · {metric} "
                        f"{off.value:.4f} {change.delta:+.4f} [{change.low:+.4f}, {change.high:+.4f}]",
                        flush=True,
                    )
                    results.append(
                        {
                            "dataset": dataset,
                            "protocol": protocol,
                            "method": method,
                            "variant": name,
                            "half_life": half_life,
                            "metric": metric,
                            "off": off.value,
                            "change": [change.delta, change.low, change.high],
                        }
                    )
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
