"""Made-up clicks to try the commands on: `python examples/clicks.py data`, or `… data 20000` for 20,000 members in place of 200.

Writes `clicks.parquet`, `users.parquet`, `items.parquet`; `tomorrow.parquet`, clicks that come later, some of new members; and
`events.jsonl`, clicks later still, one JSON object a line, as a stream has them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

import limaml


def main(folder: Path, tasks: int = 200) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = limaml.make_interactions(tasks=tasks, items=200, seed=0)
    frame = made.interactions
    cuts = [frame["timestamp"][int(share * frame.height)] for share in (0.8, 0.9)]
    past = frame.filter(pl.col("timestamp") < cuts[0])
    tomorrow = frame.filter((pl.col("timestamp") >= cuts[0]) & (pl.col("timestamp") < cuts[1]))
    later = frame.filter(pl.col("timestamp") >= cuts[1])
    past.write_parquet(folder / "clicks.parquet")
    tomorrow.write_parquet(folder / "tomorrow.parquet")
    later.write_ndjson(folder / "events.jsonl")
    made.users.write_parquet(folder / "users.parquet")
    made.items.write_parquet(folder / "items.parquet")
    print(f"{past.height:,} clicks, {tomorrow.height:,} for tomorrow and {later.height:,} events are in {folder}.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"), int(sys.argv[2]) if len(sys.argv) > 2 else 200)
