"""`replay` on files: what it writes, what it says, and that it goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import SMALL, Command, Tables

QUICK = [*SMALL, "train.epochs=1", "compare.replicates=20", "--workers", "1", "--periods", "3"]


def test_replay_writes_numbers_report_and_settings(tables: Tables, command: Command, tmp_path: Path) -> None:
    arguments = ("replay", tables.past, *tables.options, "--out", tmp_path, *QUICK, "--name", "mine")
    chosen = (
        "--policies",
        "limaml_never, limaml_refreshed,limaml_streamed,wide_and_deep_retrained",
        "--refreshes",
        "3",
    )
    done = command(*arguments, *chosen)
    assert done.code == 0, done.err
    content = json.loads((tmp_path / "replay.json").read_text())
    assert content["policies"] == ["limaml_never", "limaml_refreshed", "limaml_streamed", "wide_and_deep_retrained"]
    assert len(content["periods"]) == 3
    assert content["cost_ratio"]["limaml_refreshed"] > 0
    assert content["cost_ratio"]["wide_and_deep_retrained"] == 1
    page = (tmp_path / "report.html").read_text()
    assert "Quality against the age of the embeddings" in page
    said = " ".join(done.out.split())
    assert "Trained on the first" in said and "then 3 periods of 1/3 of the rows" in said
    assert "limaml_refreshed − wide_and_deep_retrained: AUC" in said
    assert not list(tmp_path.glob(".*"))  # no table left behind

    def kept() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "replayed").rglob("*.safetensors")}

    before = kept()
    again = command(*arguments, *chosen)
    assert again.code == 0, again.err
    assert before == kept()
    assert json.loads((tmp_path / "replay.json").read_text())["summary"] == content["summary"]

    less_often = command(*arguments, *chosen[:2], "--refreshes", "2")
    assert less_often.code == 0, less_often.err
    (new,) = kept().items() - before.items()  # of what streams alone
    assert new[0].parent.name == "limaml_streamed-0-2"
    costs = json.loads((tmp_path / "replay.json").read_text())["cost_ratio"]
    assert costs["limaml_refreshed"] == content["cost_ratio"]["limaml_refreshed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "limaml_refresh"], "did you mean 'limaml_refreshed'?"),
        (["--start", "soon"], "The time 'soon' cannot be read"),
        (["--period", "1y"], "The period '1y' cannot be read"),
    ],
)
def test_what_cannot_be_replayed_is_said(
    tables: Tables, command: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = command("replay", tables.past, *tables.options, "--out", tmp_path, *SMALL, *arguments)
    assert done.code == 2
    assert message in " ".join(done.err.split())


def test_replay_needs_a_time(tables: Tables, command: Command, tmp_path: Path) -> None:
    done = command("replay", tables.past, "--task", "user_id", "--label", "click", "--out", tmp_path)
    assert done.code == 2
    assert "name one with --time" in " ".join(done.err.split())
