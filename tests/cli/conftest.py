"""The command line in this process, and tables as a user would have them."""

from __future__ import annotations

import polars as pl
import pytest
from commands import Command, Outcome, Tables

import limaml
from limaml.cli import main


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("store", "list", folder)` runs `limaml store list FOLDER`."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder = tmp_path_factory.mktemp("tables")
    made = limaml.make_interactions(tasks=60, items=40, mean_rows=20, seed=3)
    whole = made.interactions.sort("timestamp")
    cut = whole["timestamp"][int(0.8 * len(whole))]
    late = pl.col("user_id") < 4
    before = (pl.col("timestamp") < cut) & ~late
    whole.filter(before).write_parquet(folder / "past.parquet")
    whole.filter(~before & (late | (pl.col("user_id") % 2 == 0))).write_csv(folder / "new.csv")
    made.users.filter(~late).write_parquet(folder / "users.parquet")
    made.users.filter(late).write_csv(folder / "new_users.csv")
    titled = made.items.with_columns(title=pl.format("Item [{}]", "item_id"))
    titled.write_parquet(folder / "items.parquet")
    options = ["--task", "user_id", "--row", "item_id", "--time", "timestamp", "--label", "click"]
    options += ["--task-features", str(folder / "users.parquet"), "--row-features", str(folder / "items.parquet")]
    return Tables(folder, whole, tuple(options))
