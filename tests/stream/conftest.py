"""A trained and published run folder, and events that come after it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from faults.processes import Nursery, nursery

import limaml
from limaml.cli import main

from .world import World


def trained_model(tables: Path, run: Path, *settings: str) -> None:
    """`limaml train` on the tables of a folder."""
    options = ["--task", "user_id", "--row", "item_id", "--time", "timestamp", "--label", "click"]
    options += ["--task-features", str(tables / "users.parquet"), "--row-features", str(tables / "items.parquet")]
    options += [
        "model.embedding_dim=4",
        "model.hidden=[8]",
        "model.dim=4",
        "train.rows_per_batch=512",
        "train.epochs=1",
    ]
    main(["train", str(tables / "past.parquet"), *options, "adapt.max_support=12", *settings, "--out", str(run)])


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("workers")) as opened:
        yield opened


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    drawn = limaml.make_interactions(tasks=40, items=30, mean_rows=16, seed=5)
    whole = drawn.interactions.sort("timestamp").with_columns(
        pl.from_epoch("timestamp", time_unit="s").dt.replace_time_zone("UTC")
    )
    cut = whole["timestamp"][int(0.6 * whole.height)]
    past = whole.filter((pl.col("timestamp") < cut) & (pl.col("user_id") >= 3))
    past.write_parquet(folder / "past.parquet")
    drawn.users.write_parquet(folder / "users.parquet")
    drawn.items.write_parquet(folder / "items.parquet")
    trained_model(folder, folder / "run")
    main(["embed", str(folder / "run")])
    return World(folder / "run", past, whole.join(past, on=whole.columns, how="anti", maintain_order="left"))


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    """A copy of the run folder, to change."""
    return World(shutil.copytree(made.run, tmp_path / "run"), made.past, made.later)
