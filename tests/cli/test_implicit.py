"""`compare --implicit`: from a table of choices to rankings in the report, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
from commands import SMALL, Command, Tables

from limaml import load_config

QUICK = [*SMALL, "train.epochs=1", "compare.replicates=20", "compare.protocols=[warm]", "--seeds", 1, "--workers", 1]
COLUMNS = ("--task", "user_id", "--row", "item_id", "--time", "timestamp")


def test_choices_alone_are_ranked_and_reported(tables: Tables, command: Command, tmp_path: Path) -> None:
    liked = pl.read_parquet(tables.past).filter(pl.col("click") == 1).drop("click")
    liked.write_parquet(tmp_path / "liked.parquet")
    done = command(
        *("compare", tmp_path / "liked.parquet", *COLUMNS, "--implicit", "--negatives", 2, "--sampling", "popularity"),
        *("--out", tmp_path / "out", *QUICK, "compare.methods=[popularity,base]"),
    )
    assert done.code == 0, done.err
    for said in (
        "Every interaction is a positive",
        "Candidates: the",
        "negatives were drawn with popularity 1",
        "NDCG@10",
    ):
        assert said in done.out.replace("\n", " ")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["losses"] == {"liked": "ranking"}
    assert metrics["baselines"] == ["popularity", "base"]
    whole = [run for run in metrics["runs"] if run["bucket"] == "all"]
    assert all(0 < run["mrr"] <= 1 and run["auc"] is None for run in whole)
    assert {d["metric"] for d in metrics["deltas"]} >= {"ndcg_10", "recall_50", "mrr"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "recall@20" in page
    assert "Who gains" in page
    config = load_config(tmp_path / "out" / "config.yaml")
    assert (config.compare.implicit.negatives, config.compare.implicit.sampling) == (2, "popularity")


def test_a_rule_makes_choices_of_ratings_and_time_may_be_missing(
    tables: Tables, command: Command, tmp_path: Path
) -> None:
    done = command(
        *("compare", tables.past, "--task", "user_id", "--row", "item_id", "--label", "click", "--implicit"),
        *("--max-tasks", 30, "--out", tmp_path, *QUICK, "compare.methods=[base]"),
    )
    assert done.code == 0, done.err
    assert "interactions are positives, by the rule 'click'" in done.out.replace("\n", " ")
    assert "There was no --time" in done.out.replace("\n", " ")


def test_what_does_not_go_with_choices_is_refused(tables: Tables, command: Command, tmp_path: Path) -> None:
    plain = ("compare", tables.past, *COLUMNS, "--out", tmp_path)
    for arguments, said in (
        ((*plain,), "Say what to predict with --label"),
        ((*plain, "--label", "click", "--negatives", 3), "give --implicit, too"),
        ((*plain, "--implicit", "--negatives", 0), "needs at least 1 negative"),
        ((*plain, "--implicit", "--weight", "price"), "--weight does not go with --implicit"),
        ((*plain, "--implicit", "--label", "click", "--label", "price >= 1"), "one label at most"),
    ):
        done = command(*arguments)
        assert done.code == 2
        assert said in done.err.replace("\n", " ")
