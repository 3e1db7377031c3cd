"""train → embed → score → recommend → refresh, as a user types it, on files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from commands import SMALL, Command, Tables

import limaml
from limaml.artifact import verify_folder
from limaml.cli import main
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.serving.onnx import OnnxBlock, random_inputs
from limaml.tasks import TaskRows


@pytest.fixture(scope="module")
def trained(tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    main(["train", str(tables.past), *tables.options, "--out", str(folder), *SMALL, "train.epochs=3"])
    main(["embed", str(folder)])
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run folder, to change."""
    return shutil.copytree(trained, tmp_path / "run")


def vectors(folder: Path, version: str | None = None) -> tuple[list[str], limaml.store.Lookup]:
    with limaml.open_store(folder / "store") as store, store.read(MODEL_NAME, version) as reader:
        ids = sorted(reader.ids("user_id"))
        return ids, reader.get("user_id", ids)


def logits_of_training(folder: Path, rows: pl.DataFrame) -> np.ndarray:
    """Logits of `rows` as training code computes them, every member adapted on the whole log, in the order of `rows`."""
    model = limaml.load_model(folder / "model")
    place = Workspace(folder)
    frame, _ = place.joined(place.log(model.encoder.schema).read())
    data = model.encoder.encode(frame)
    table = model.model.embed(data, "user_id", TaskRows.of(data.index["user_id"], data.count("user_id")))
    with torch.no_grad():
        logits = model.model.logits(data, torch.arange(len(data)), {"user_id": table})[:, 0].numpy()
    assert data.source_row is not None
    order = frame[data.source_row.tolist()].with_columns(expected=pl.Series(logits))
    keys = ["user_id", "item_id", "timestamp"]
    return rows.join(order, on=keys, how="left", maintain_order="left", validate="1:1")["expected"].to_numpy()


def test_train_writes_all_that_the_other_verbs_need(trained: Path, tables: Tables) -> None:
    assert verify_folder(trained / "model").digest
    log = limaml.InteractionLog(trained / "log")
    past = pl.read_parquet(tables.past)
    assert log.read().sort(past.columns).equals(past.sort(past.columns))
    assert limaml.load_config(trained / "config.yaml").model.embedding_dim == 4
    assert limaml.Schema.model_validate_json((trained / "schema.json").read_text()).row == "item_id"
    candidates = pl.read_parquet(trained / "candidates.parquet")
    assert sorted(candidates["item_id"]) == sorted(past["item_id"].unique())
    assert "title" in candidates.columns  # no feature, but what a person reads
    assert not (trained / "checkpoint").exists()


def test_export_writes_the_block_that_the_run_scores_with(trained: Path, command: Command, tmp_path: Path) -> None:
    done = command("export", trained, "--onnx", tmp_path / "global.onnx")
    assert done.code == 0, done.err
    assert "user_id_embedding [rows, 4]" in done.out and "from torch on" in done.out
    model = limaml.load_model(trained / "model")
    block = OnnxBlock(tmp_path / "global.onnx")
    assert block.metadata["limaml.model"] == model.digest
    features = random_inputs(model.encoder.specs, {"user_id": 4}, 50, torch.float32, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(block(features), model.model.global_block(features), rtol=1e-5, atol=1e-5)


def test_rows_can_weigh_less_with_age(tables: Tables, command: Command, tmp_path: Path) -> None:
    options = ("train", tables.past, *tables.options, "--out", tmp_path / "run", *SMALL, "train.epochs=1")
    refused = command(*options, "adapt.half_life=-30")
    assert refused.code != 0 and "Setting 'adapt.half_life' is -30: Input should be greater than 0." in refused.err
    done = command(*options, "adapt.half_life=300000")
    assert done.code == 0, done.err
    assert limaml.load_config(tmp_path / "run/config.yaml").adapt.half_life == 300_000
    half_life = limaml.load_model(tmp_path / "run/model").model.half_lives["user_id"].log_half_life
    assert 0 < abs(float(half_life.detach()) - np.log(300_000)) < 2


def test_scores_equal_those_of_training(trained: Path, tables: Tables, command: Command, tmp_path: Path) -> None:
    done = command("score", trained, tables.past, "--out", tmp_path / "scores.parquet")
    assert done.code == 0, done.err
    scores, given = pl.read_parquet(tmp_path / "scores.parquet"), pl.read_parquet(tables.past)
    assert scores.select(given.columns).equals(given)
    np.testing.assert_allclose(scores["logit"].to_numpy(), logits_of_training(trained, given), atol=1e-5)
    np.testing.assert_allclose(
        scores["probability"].to_numpy(), 1 / (1 + np.exp(-scores["logit"].to_numpy())), atol=1e-6
    )
    assert scores["known"].all()
    with limaml.open_store(trained / "store") as store:
        assert scores["version"].unique().to_list() == [store.current(MODEL_NAME)]


def test_unknown_members_get_the_cold_embedding(trained: Path, command: Command, tmp_path: Path) -> None:
    rows = pl.DataFrame({"user_id": ["11", "nobody", "13"], "item_id": ["5", "5", "not an item"]})
    rows.write_csv(tmp_path / "rows.csv")
    done = command("score", trained, tmp_path / "rows.csv", "--out", tmp_path / "scores.csv")
    assert done.code == 0, done.err
    assert "1 of them name a task that the store does not know" in done.out
    assert "1 rows name a 'item_id' that is not among the candidates" in done.out
    scores = pl.read_csv(tmp_path / "scores.csv")
    assert scores["known"].to_list() == [True, False, True]
    command("score", trained, tmp_path / "rows.csv", "--out", tmp_path / "cold.csv", "--no-personal")
    cold = pl.read_csv(tmp_path / "cold.csv")
    difference = (scores["logit"] - cold["logit"]).abs()
    assert difference[1] < 1e-6
    assert difference[0] > 1e-4


def test_recommend_ranks_as_score_does(trained: Path, tables: Tables, command: Command, tmp_path: Path) -> None:
    done = command("recommend", trained, "--task", 12, "--top", 5, "--out", tmp_path / "top.parquet")
    assert done.code == 0, done.err
    assert "Item [" in done.out
    top = pl.read_parquet(tmp_path / "top.parquet")
    seen = pl.read_parquet(tables.past).filter(pl.col("user_id") == 12)["item_id"]
    assert len(top) == 5
    assert not set(top["item_id"]) & set(seen)
    rows = pl.read_parquet(trained / "candidates.parquet").select("item_id").with_columns(user_id=pl.lit(12))
    rows.write_parquet(tmp_path / "rows.parquet")
    for how, name in (("--personal", "score"), ("--no-personal", "score_cold")):
        command("score", trained, tmp_path / "rows.parquet", "--out", tmp_path / "scores.parquet", how)
        scores = pl.read_parquet(tmp_path / "scores.parquet")
        found = top.join(scores, on="item_id", maintain_order="left")
        np.testing.assert_allclose(found["probability"], found[name], atol=1e-6)
        if name == "score":
            best = scores.filter(~pl.col("item_id").is_in(seen.implode())).sort("probability", descending=True)
            np.testing.assert_allclose(best["probability"].head(5), top["score"], atol=1e-6)
    everything = command(
        "recommend", trained, "--task", 12, "--top", 100, "--no-exclude-seen", "--out", tmp_path / "all.csv"
    )
    assert everything.code == 0, everything.err
    assert len(pl.read_csv(tmp_path / "all.csv")) == len(rows)


def test_refresh_equals_embedding_everything_anew(run: Path, tables: Tables, command: Command) -> None:
    before_ids, before = vectors(run)
    new = pl.read_csv(tables.new)
    touched = new["user_id"].n_unique()
    done = command("refresh", run, tables.new, "--task-features", tables.folder / "new_users.csv")
    assert done.code == 0, done.err
    assert f"{len(new):,} interactions were appended" in done.out
    assert "Features of 4 new 'user_id' were added" in done.out
    assert f"{touched} of {touched} touched tasks" in done.out
    ids, refreshed = vectors(run)
    assert len(ids) == len(before_ids) + 4
    untouched = [i for i, key in enumerate(ids) if int(key) not in set(new["user_id"])]
    old = [before_ids.index(ids[i]) for i in untouched]
    assert len(untouched) > 10
    np.testing.assert_array_equal(refreshed.vectors[untouched], before.vectors[old])

    again = command("refresh", run, tables.new)
    assert "nothing was appended" in again.out
    assert "Every live version has all interactions already" in again.out
    assert limaml.InteractionLog(run / "log").rows == len(new) + len(pl.read_parquet(tables.past))

    assert command("embed", run).code == 0
    all_ids, anew = vectors(run)
    assert all_ids == ids
    np.testing.assert_array_equal(anew.count, refreshed.count)
    np.testing.assert_array_equal(anew.event_time, refreshed.event_time)
    np.testing.assert_allclose(anew.vectors, refreshed.vectors, atol=1e-6)
    rolled = command("store", "rollback", run)
    assert rolled.code == 0, rolled.err
    np.testing.assert_array_equal(vectors(run)[1].vectors, refreshed.vectors)


def test_a_refused_refresh_leaves_the_log_alone(run: Path, tables: Tables, command: Command, tmp_path: Path) -> None:
    new = pl.read_csv(tables.new)
    rows = limaml.InteractionLog(run / "log").rows
    bad = new.with_columns(user_id=pl.when(pl.int_range(pl.len()) == 2).then(pl.lit("?")).otherwise("user_id"))
    bad.drop("click").write_csv(tmp_path / "bad.csv")
    done = command("refresh", run, tmp_path / "bad.csv")
    assert done.code == 2
    assert "'click'" in done.err
    assert "'?' in row 2" in done.err
    assert limaml.InteractionLog(run / "log").rows == rows


def test_a_new_item_can_be_recommended_after_a_refresh(
    run: Path, tables: Tables, command: Command, tmp_path: Path
) -> None:
    last = pl.read_csv(tables.new).tail(1)
    last.with_columns(item_id=999, timestamp=pl.col("timestamp") + 60).write_parquet(tmp_path / "more.parquet")
    items = pl.read_parquet(tables.folder / "items.parquet")
    items.head(1).with_columns(item_id=pl.lit(999, pl.Int64), title=pl.lit("A new one")).write_parquet(
        tmp_path / "i.parquet"
    )
    done = command("refresh", run, tmp_path / "more.parquet", "--row-features", tmp_path / "i.parquet")
    assert done.code == 0, done.err
    assert "1 new row ids can be recommended now" in done.out
    shown = command("recommend", run, "--task", 11, "--top", 100)
    assert "A new one" in shown.out


def test_the_store_can_be_looked_at(run: Path, command: Command) -> None:
    with limaml.open_store(run / "store") as store:
        version = store.current(MODEL_NAME)
    assert version is not None
    listed = command("store", "list", run)
    assert version in listed.out
    assert "served" in listed.out
    assert version in command("store", "list", run / "store").out
    assert "56 of 'user_id' are as they were written" in command("store", "verify", run).out
    assert "newest at" in command("store", "show", run, "--task", "user_id:11").out
    assert "is served the cold embedding" in command("store", "show", run, "--task", "nobody").out
    large = command("store", "estimate", run, "--tasks", 10**7, "--dtype", "float16")
    assert "20,000,000 keys" in large.out  # vectors and features
    assert "GiB" in large.out
    refused = command("store", "rollback", run)
    assert refused.code == 2
    for _ in range(2):
        command("embed", run, "--keep", 5)
    assert "Removed: v000001" in command("store", "expire", run, "--keep", 2).out


def test_other_interactions_are_not_mixed_into_a_run(run: Path, tables: Tables, command: Command) -> None:
    rows = limaml.InteractionLog(run / "log").rows
    done = command("train", tables.new, *tables.options, "--out", run, *SMALL)
    assert done.code == 2
    assert "cannot be mixed" in done.err
    assert "search:" not in done.out  # said before anything is trained
    assert limaml.InteractionLog(run / "log").rows == rows


def test_a_killed_training_goes_on_and_ends_in_the_same_bits(tables: Tables, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from limaml.cli import main; main()", "train", str(tables.past), *tables.options]
    command += [*SMALL, "train.epochs=4", "train.patience=4", "--solver", "gradient", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed"
    child = subprocess.Popen([*command, str(killed)], env=environment, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if "search: epoch 2 " in line:
            child.send_signal(signal.SIGKILL)
            break
    child.stdout.close()
    assert child.wait(30) == -signal.SIGKILL
    assert not (killed / "model").exists()
    resumed = subprocess.run([*command, str(killed)], env=environment, capture_output=True, text=True, check=True)
    assert "Going on from the checkpoint" in resumed.stdout
    assert "search: epoch 1 " not in resumed.stdout
    whole = subprocess.run(
        [*command, str(tmp_path / "whole")], env=environment, capture_output=True, text=True, check=True
    )
    assert "Going on" not in whole.stdout
    weights = [(folder / "model" / "weights.safetensors").read_bytes() for folder in (killed, tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_a_compound_key_goes_through_the_whole_chain(tables: Tables, command: Command, tmp_path: Path) -> None:
    device = (pl.col("timestamp") % 2).replace_strict({0: "web|wide", 1: "app"}, return_dtype=pl.String)
    past = pl.read_parquet(tables.past).with_columns(device=device)
    past.write_parquet(tmp_path / "past.parquet")
    new = pl.read_csv(tables.new).with_columns(device=device)
    new.write_parquet(tmp_path / "new.parquet")
    options = ["--task", "user_id+device", "--row", "item_id", "--time", "timestamp", "--label", "click"]
    run = tmp_path / "run"
    done = command("train", tmp_path / "past.parquet", *options, "--out", run, "--no-refit", *SMALL, "train.epochs=1")
    assert done.code == 0, done.err
    assert command("embed", run).code == 0
    refreshed = command("refresh", run, tmp_path / "new.parquet")
    assert refreshed.code == 0, refreshed.err
    member = new["user_id"][0]
    shown = command("recommend", run, "--task", f"{member}|web\\|wide")
    assert "adapted on" in shown.out, shown.err
    assert json.loads((run / "side" / "tables.json").read_text()) == {}


def test_a_version_that_is_served_again_is_caught_up(run: Path, tables: Tables, command: Command) -> None:
    assert command("embed", run).code == 0
    new = pl.read_csv(tables.new)
    touched = new["user_id"].n_unique()
    assert command("refresh", run, tables.new).code == 0
    assert vectors(run)[1].count.sum() == len(new) + len(pl.read_parquet(tables.past))
    rolled = command("store", "rollback", run)
    assert f"{touched} tasks have changed since" in rolled.out and f"limaml refresh {run}" in rolled.out
    before = vectors(run)[1].count.sum()
    assert before == len(pl.read_parquet(tables.past))
    with limaml.open_store(run / "store") as store:
        served, newer = store.current(MODEL_NAME), store.versions(MODEL_NAME)[-1].id
    caught = command("refresh", run, "--version", served)
    assert f"{touched} of {touched} touched tasks" in caught.out
    ids, old = vectors(run)
    assert vectors(run, newer)[0] == ids
    np.testing.assert_array_equal(old.vectors, vectors(run, newer)[1].vectors)
    assert "Every live version has all interactions already" in command("refresh", run).out
    since = pl.read_parquet(tables.past)["timestamp"].max()
    late = new.filter(pl.col("timestamp") > since)["user_id"].n_unique()
    again = command("refresh", run, "--since", since)
    assert f"0 of {late} touched tasks 'user_id' have a new embedding; {late} had nothing newer" in again.out
    refused = command("refresh", run, "--since", "2026-01-01")
    assert refused.code == 2 and "so write a whole number" in refused.err


def test_the_windows_can_be_looked_at_and_made_anew(run: Path, tables: Tables, command: Command) -> None:
    assert command("refresh", run, tables.new).code == 0
    ids, refreshed = vectors(run)
    shown = command("windows", "show", run)
    assert "come to append 2 of 2" in shown.out and "60 tasks 'user_id'" in shown.out
    count = int(refreshed.count[ids.index("12")])
    one = command("windows", "show", run, "--task", "user_id:12", "--rows", 3)
    assert f"user_id:12 has {count} interactions" in one.out and "timestamp" in one.out
    assert "There is no interaction of user_id:nobody" in command("windows", "show", run, "--task", "nobody").out
    shutil.rmtree(run / "windows")
    made = command("windows", "rebuild", run)
    assert made.code == 0 and "made windows of 60 'user_id'" in made.out, made.err
    assert command("windows", "show", run, "--task", "12", "--rows", 3).out == one.out
    rows = limaml.InteractionLog(run / "log").rows
    assert "rows were written again" in command("log", "compact", run).out
    assert limaml.InteractionLog(run / "log").verify() == rows


def test_a_refresh_that_is_killed_is_completed_by_the_next(run: Path, tables: Tables, command: Command) -> None:
    """Killed between the log and the store, as at an upsert that never returns."""
    kill = "import os, limaml.embeddings.refresher as r; r.upsert_adapted = lambda *a, **k: os._exit(9)"
    script = f"{kill}; from limaml.cli import main; main({['refresh', str(run), str(tables.new)]!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert (
        subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False).returncode
        == 9
    )
    new = pl.read_csv(tables.new)
    again = command("refresh", run, tables.new)
    assert "nothing was appended" in again.out
    assert f"{new['user_id'].n_unique()} of {new['user_id'].n_unique()} touched tasks" in again.out
    _, refreshed = vectors(run)
    assert command("embed", run).code == 0
    np.testing.assert_array_equal(vectors(run)[1].count, refreshed.count)
