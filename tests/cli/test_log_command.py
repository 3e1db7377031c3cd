"""`limaml log`: the verbs on a log of its own, and what they say."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import polars as pl
import pytest

from limaml.cli import main
from limaml.interactions import InteractionLog


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    if code:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert ended.value.code == code
    else:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return " ".join((out + err).split())


def test_from_files_to_a_young_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = dt.datetime(2026, 1, 1)
    for day in range(3):
        frame = pl.DataFrame(
            {"user": [f"u{i % 20}" for i in range(60)], "item": range(60), "day": [start + dt.timedelta(days=day)] * 60}
        ).with_columns(pl.lit(day).alias("part"))
        (tmp_path / "in" / f"day={day}").mkdir(parents=True)
        frame.write_parquet(tmp_path / "in" / f"day={day}" / "a.parquet")
    log = tmp_path / "log"
    assert "There is no log in" in said(capsys, "log", "info", log, code=2)
    assert "--task user_id" in said(capsys, "log", "append", log, tmp_path / "in", code=2)
    text = said(capsys, "log", "append", log, f"{tmp_path}/in/day=[01]", "--task", "user", "--buckets", 4)
    assert "120 of 120 interactions in 2 source(s) are new; the log has 120 now." in text
    text = said(capsys, "log", "append", log, tmp_path / "in", "--memory", 1)
    assert "60 of 180 interactions in 3 source(s) are new; the log has 180 now." in text
    assert "2 source(s) were in the log already" in text
    InteractionLog(log).append(pl.read_parquet(tmp_path / "in" / "day=2"), positions={"kafka:clicks:0": 59})
    text = said(capsys, "log", "info", log)
    for part in (
        "240 interactions",
        "1 are tails",
        "named by user",
        "4 buckets",
        "4 appends",
        "3 sources",
        "column day",
    ):
        assert part in text
    assert "stream kafka:clicks:0: taken in up to 59" in text
    assert "files are" in said(capsys, "log", "compact", log)
    assert "240 interactions are as they were written" in said(capsys, "log", "verify", log)

    assert "--time COLUMN" in said(capsys, "log", "retain", log, "--last", 3, code=2)
    assert "--newer-than is 'soon'; write a number" in said(
        capsys, "log", "retain", log, "--time", "day", "--newer-than", "soon", code=2
    )
    arguments = ("log", "retain", log, "--time", "day", "--newer-than", "2d", "--last", 5, "--now", "2026-01-04")
    assert "140 of 240 interactions would leave" in said(capsys, *arguments, "--dry-run")
    assert "140 of 240 interactions left the log; 100 stay." in said(capsys, *arguments)
    assert "0 of 100 interactions left" in said(capsys, *arguments)
    assert "3 source(s) were in the log already" in said(capsys, "log", "append", log, tmp_path / "in")

    victim = next((log / "data").glob("*/*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert f"{victim.name} has" in said(capsys, "log", "verify", log, code=2)
