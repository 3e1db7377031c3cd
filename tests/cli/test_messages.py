"""Every mistake is answered by a sentence that says what to do, on stderr, with exit code 2 and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Command, Tables

import limaml

NEEDED = ["--task", "user_id", "--label", "click"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", "FILE"], 'Did you mean "train"'),
        (["compare", "FILE", *NEEDED, "--out", "OUT", "--sedes", "3"], "Did you mean --seeds"),
        (["compare", "FILE", *NEEDED], "--out"),
        (["compare", "OUT/none.csv", *NEEDED, "--out", "OUT"], "There is no file"),
        (["compare", "FILE", "--task", "usr_id", "--label", "clik", "--out", "OUT"], "Did you mean 'user_id'"),
        (["compare", "FILE", "--task", "usr_id", "--label", "clik", "--out", "OUT"], "Did you mean 'click'"),
        (["compare", "FILE", *NEEDED, "--out", "OUT", "train.epoch=5"], "did you mean 'train.epochs'"),
        (["compare", "FILE", *NEEDED, "--out", "OUT", "epochs"], "has no '='"),
        (["compare", "FILE", *NEEDED, "--out", "OUT", "compare.methods=[bse]"], "There is no method 'bse'"),
        (["compare", "FILE", *NEEDED, "--out", "OUT", "--config", "OUT/c.yaml"], "There is no config file"),
        (["compare", "FILE", *NEEDED, "--out", "OUT", "--row-features", "FILE"], "--row item_id"),
        (["train", "FILE", *NEEDED, "--out", "OUT", "--solver", "newtn"], "newtn"),
        (["train", "FILE", *NEEDED, "--out", "OUT", "--validation", "1.5"], "between 0 and 1"),
        (["train", "FILE", *NEEDED, "--out", "/dev/null/run", "train.epochs=1"], "Check the path"),
        (["embed", "OUT/none"], "There is no run folder"),
        (["embed", "OUT"], "has no model"),
        (["score", "OUT", "FILE", "--out", "OUT/scores.txt"], ".parquet and .csv"),
        (["recommend", "OUT", "--task", "1", "--top", "0"], "Must be >= 1"),
        (["store", "list", "OUT/none"], "There is no store"),
        (["data", "get", "ml-10k"], "ml-100k"),
        (["data", "describe", "OUT/none.csv"], "There is no file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_by_a_sentence(
    arguments: list[str], said: str, tables: Tables, tmp_path: Path, command: Command
) -> None:
    filled = [a.replace("FILE", str(tables.past)).replace("OUT", str(tmp_path)) for a in arguments]
    done = command(*filled)
    assert done.code == 2
    assert said in done.err.replace("\n", " ")
    assert "Traceback" not in done.err


def test_debug_shows_where_an_error_came_from(command: Command, tmp_path: Path) -> None:
    with pytest.raises(limaml.ConfigError, match="There is no run folder"):
        command("embed", tmp_path / "none", "--debug")


def test_scoring_before_anything_is_published_says_what_to_type(
    tables: Tables, command: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert command("train", tables.past, *NEEDED, "--out", run, "train.epochs=1", "--no-refit").code == 0
    done = command("score", run, tables.past, "--out", tmp_path / "scores.csv")
    assert done.code == 2
    assert f"limaml embed {run}" in done.err.replace("\n", "")
    ranked = command("recommend", run, "--task", 11)
    assert "trained without --row" in ranked.err
    assert command("embed", run).code == 0
    late = command("refresh", run, tables.past)
    assert late.code == 2
    assert "trained without --time" in late.err


@pytest.mark.parametrize("verb", ["compare", "tune", "train", "embed", "refresh", "score", "recommend"])
def test_help_says_what_happens_and_what_to_type(verb: str, command: Command) -> None:
    shown = command(verb, "--help")
    assert shown.code == 0
    assert f"limaml {verb} " in shown.out
    assert "Next:" in shown.out


def test_overview_names_every_verb(command: Command) -> None:
    shown = command("--help").out
    for verb in ["data", "compare", "tune", "train", "embed", "refresh", "score", "recommend", "store", "demo"]:
        assert f"│ {verb} " in shown
