"""A small model, trained once a process, and its embeddings in a store: what the serving tests serve."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

import limaml
from limaml.config import parse_config
from limaml.meta import TrainedModel, Training

SMALL = {
    "train": {"epochs": 2, "rows_per_batch": 512},
    "model": {"embedding_dim": 4, "hidden": [8], "dim": 4, "factors": 4},
}


@dataclass(frozen=True)
class Small:
    """What was trained, and the interactions it was trained on."""

    training: Training
    frame: pl.DataFrame
    members: pl.DataFrame
    items: pl.DataFrame


@cache
def small(solver: str = "newton", seed: int = 1) -> Small:
    made = limaml.make_interactions(tasks=40, items=30, mean_rows=15, seed=seed)
    joined = limaml.join_tables(made.interactions, {"user_id": made.users, "item_id": made.items})
    schema = limaml.infer_schema(
        joined.frame,
        task="user_id",
        row="item_id",
        time="timestamp",
        label="click",
        task_columns=joined.columns["user_id"],
        row_columns=joined.columns["item_id"],
    ).schema
    training = limaml.train(joined.frame, schema, parse_config({**SMALL, "adapt": {"solver": solver}}))
    return Small(training, joined.frame, made.users, made.items)


def publish_small(folder: Path, name: str = "model", *, solver: str = "newton", **options: Any) -> TrainedModel:
    """The model in `folder/model`, its embeddings in `folder/store`."""
    made = small(solver)
    trained = made.training.save(folder / "model")
    with limaml.open_store(folder / "store") as store:
        limaml.publish(store, name, trained, folder / "model", made.training.data, **options)
    return trained
