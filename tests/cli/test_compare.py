"""`compare` and `tune` on files, without any configuration beyond what makes them quick."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import polars as pl
import pytest
import yaml
from commands import SMALL, Command, Tables

from limaml import load_config
from limaml.config import Config

QUICK = [*SMALL, "train.epochs=2", "compare.replicates=20", "--workers", "1"]


def test_compare_writes_numbers_report_and_settings(tables: Tables, command: Command, tmp_path: Path) -> None:
    done = command(
        *("compare", tables.past, *tables.options, "--out", tmp_path, "--seeds", 1, "--name", "mine"),
        *(*QUICK, "compare.methods=[base,limaml_newton]"),
    )
    assert done.code == 0, done.err
    for name in ("metrics.json", "report.html", "config.yaml", "schema.json"):
        assert str(tmp_path / name) in done.out.replace("\n", "")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    found = {(r["dataset"], r["protocol"], r["method"], r["seed"]) for r in metrics["runs"] if r["bucket"] == "all"}
    assert found == {("mine", p, m, 0) for p in ("warm", "new_tasks") for m in ("base", "limaml_newton")}
    assert all(0 < run["auc"] < 1 for run in metrics["runs"] if run["bucket"] == "all")
    assert {d["method"] for d in metrics["deltas"]} == {"limaml_newton"}
    page = (tmp_path / "report.html").read_text()
    assert "limaml_newton" in page
    assert "Rows are ordered by" in page
    assert load_config(tmp_path / "config.yaml").compare.seeds == 1
    assert "Rows are ordered by 'timestamp'" in done.out
    assert not list(tmp_path.glob(".*"))  # no table left behind


def test_without_time_every_output_says_so(tables: Tables, command: Command, tmp_path: Path) -> None:
    done = command(
        *("compare", tables.past, "--task", "user_id", "--row", "item_id", "--label", "click", "--max-tasks", 30),
        *("--out", tmp_path, "--seeds", 1, *QUICK, "compare.methods=[base]", "compare.protocols=[warm]"),
    )
    assert done.code == 0, done.err
    assert "There is no time column: a shuffle" in done.out
    assert "There was no --time" in done.out.replace("\n", " ")
    assert "A sample of 30 of 56 tasks 'user_id' is used (seed 0)" in done.out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for text in (" ".join(metrics["notes"]), (tmp_path / "report.html").read_text()):
        assert "There is no time column" in text
        assert "A sample of 30 of 56 tasks" in text


def test_a_search_is_recorded_goes_on_and_is_not_mixed(tables: Tables, command: Command, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    narrow = [*QUICK, "compare.methods=[limaml_newton]", "compare.protocols=[warm]"]
    arguments = ["tune", tables.past, *tables.options, "--out", tmp_path, *narrow, "--trials"]
    done = command(*arguments, 2)
    assert done.code == 0, done.err
    record = tmp_path / "trials.jsonl"
    trials = [json.loads(line) for line in record.read_text().splitlines()]
    assert [bool(trial["settings"]) for trial in trials] == [False, True]  # the config as it is comes first
    best = min(trials, key=lambda trial: trial["loss"])
    tuned = yaml.safe_load((tmp_path / "tuned.yaml").read_text())
    for name, value in best["settings"].items():
        section, _, key = name.partition(".")
        assert tuned["methods"]["limaml_newton"][section][key] == value
    assert load_config(tmp_path / "tuned.yaml").model.dim == 4

    record.write_text(record.read_text() + '{"method": "limaml_new')  # killed while it wrote
    again = command(*arguments, 3)
    assert again.code == 0, again.err
    assert "1 of 1: limaml_newton" in again.out
    lines = record.read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[3])["settings"] not in [trial["settings"] for trial in trials]

    refused = command(*arguments, 3, "model.dropout=0.5")
    assert refused.code == 2
    assert "from another config" in refused.err.replace("\n", " ")


def test_the_demo_has_settings_for_every_method_that_is_compared_by_default() -> None:
    config = load_config(str(files("limaml.cli") / "demo.yaml"))
    assert set(config.methods) == set(Config().compare.methods)


def test_data_is_described_and_listed(tables: Tables, command: Command) -> None:
    shown = command("data", "describe", tables.past, tables.folder / "items.parquet").out
    assert f"{pl.read_parquet(tables.past).height:,} rows" in shown
    assert "Item [" in shown
    assert "ml-100k" in command("data", "list").out
