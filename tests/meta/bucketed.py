"""Training from a log of a few buckets, small enough for tests. As a script, `bucketed.py FOLDER OUT WINDOW_BUCKETS` trains the
log in FOLDER/log with checkpoints in FOLDER/checkpoint, prints a line per step, and writes what it ended with to OUT.RANK."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import polars as pl
import torch
from safetensors.torch import save_file
from torch import Tensor

import limaml
from limaml.config import Config, parse_config
from limaml.interactions import InteractionLog, Schema
from limaml.interactions.buckets import LogBuckets
from limaml.interactions.side_tables import SideTables
from limaml.meta.distributed import Ranks
from limaml.meta.outer import Progress
from limaml.meta.train import Training, train

BUCKETS = 5


def made_log(folder: Path, *, types: tuple[str, ...] = ("user_id",)) -> tuple[pl.DataFrame, Schema]:
    """A log in `folder`/log with side tables in `folder`/side, and the joined table that went into it, with its schema."""
    made = limaml.make_interactions(tasks=50, items=20, mean_rows=8, label="click", seed=4)
    tables = {"user_id": made.users, "item_id": made.items}
    joined = limaml.join_tables(made.interactions, tables)
    side = folder / "side"
    side.mkdir()
    for key, table in tables.items():
        table.write_parquet(side / f"{key}.parquet")
    (side / "tables.json").write_text(json.dumps({key: f"{key}.parquet" for key in tables}), encoding="utf-8")
    schema = limaml.infer_schema(
        joined.frame,
        task=types,
        row="item_id",
        time="timestamp",
        label="click",
        task_columns={name: joined.columns[name] for name in types},
        row_columns=joined.columns["item_id"],
    ).schema
    log = InteractionLog(folder / "log", "user_id", buckets=BUCKETS)
    log.append(made.interactions.head(300))
    log.append(made.interactions.slice(300))
    (folder / "schema.json").write_text(schema.model_dump_json(), encoding="utf-8")
    return joined.frame, schema


def buckets_of(folder: Path, through: int = 2) -> LogBuckets:
    schema = Schema.model_validate_json((folder / "schema.json").read_text(encoding="utf-8"))
    return LogBuckets(InteractionLog(folder / "log"), schema, through, SideTables(folder / "side"))


def settings(solver: str = "newton", **train_settings: object) -> Config:
    model = {"embedding_dim": 4, "hidden": [8], "factors": 2, "dim": 4, "meta_hidden": [], "dropout": 0.1}
    outer = {"epochs": 2, "patience": 5, "rows_per_batch": 60, "lr": 0.02, "table_decay": 1.0, **train_settings}
    return parse_config({"model": model, "adapt": {"solver": solver, "max_support": 16}, "train": outer})


def ended_with(training: Training) -> dict[str, Tensor]:
    """Weights and losses of both trainings."""
    epochs = [*(training.search.epochs if training.search else ()), *training.history.epochs]
    losses = torch.tensor([(e.train_loss, e.valid_loss or 0.0) for e in epochs], dtype=torch.float64)
    return {**training.model.state_dict(), "losses": losses}


def run(folder: Path, out: Path, window: int) -> None:
    def say(part: str, news: Progress) -> None:
        print(f"{part} {os.getpid()} {news.epoch} {news.step}", flush=True)

    buckets = buckets_of(folder)
    config = settings(window_buckets=window)
    training = train(buckets, buckets.schema, config, checkpoint=folder / "checkpoint", progress=say)
    made = {name: value.contiguous() for name, value in ended_with(training).items()}
    save_file(made, f"{out}.{Ranks.joined('cpu').rank}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
