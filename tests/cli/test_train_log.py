"""`limaml train LOG …`: the model of the same rows in a table, bucket by bucket; what follows works as with a table."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch
from commands import SMALL, Command, Tables

from limaml.interactions import InteractionLog
from limaml.meta import load_model


@pytest.fixture(scope="module")
def log(tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    past = pl.read_parquet(tables.past)
    made = InteractionLog(folder, "user_id", buckets=4)
    made.append(past.head(past.height // 2))
    made.append(past.slice(past.height // 2))
    return folder


def test_a_log_gives_the_model_of_the_table(command: Command, tables: Tables, log: Path, tmp_path: Path) -> None:
    settings = [*SMALL, "train.epochs=1"]
    table = command("train", tables.past, *tables.options, *settings, "--out", tmp_path / "table")
    assert table.code == 0, table.err
    done = command("train", log, *tables.options, *settings, "--out", tmp_path / "log")
    assert done.code == 0, done.err
    assert "interactions are in the log; the schema is found on" in done.out
    one, other = (load_model(tmp_path / which / "model") for which in ("table", "log"))
    assert one.encoder == other.encoder
    weights = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    known, found = (pl.read_parquet(tmp_path / which / "candidates.parquet") for which in ("table", "log"))
    assert found.sort("item_id").equals(known.sort("item_id").select(found.columns)) and found.width == known.width
    assert (tmp_path / "log" / "log").resolve() == log.resolve()
    assert not (tmp_path / "log" / "checkpoint").exists()


def test_windows_of_a_log_and_what_follows(command: Command, tables: Tables, log: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [*SMALL, "train.epochs=1", "train.window_buckets=1", "train.tasks_per_epoch=20"]
    done = command("train", log, *tables.options, *settings, "train.validation_buckets=1", "--out", run)
    assert done.code == 0, done.err
    embedded = command("embed", run)
    assert embedded.code == 0, embedded.err
    task = pl.read_parquet(tables.past)["user_id"][0]
    recommended = command("recommend", run, "--task", task, "--top", "3")
    assert recommended.code == 0 and "Item [" in recommended.out, recommended.err
    other = InteractionLog(tmp_path / "other", "user_id")
    other.append(pl.read_parquet(tables.past))
    refused = command("train", tmp_path / "other", *tables.options, *settings, "--out", run)
    assert refused.code == 2 and "the two cannot be mixed" in " ".join(refused.err.split())
    sampled = command("train", log, *tables.options, "--max-tasks", "5", "--out", tmp_path / "few")
    assert sampled.code == 2 and "set train.tasks_per_epoch" in " ".join(sampled.err.split())
