"""The tables of the pages are those of the result files, and the parts hand on to each other what they made."""

import json
from pathlib import Path

import pytest

from benchmarks.scale import generate, ingest, train
from benchmarks.scale.measure import RESULTS, ROOT
from benchmarks.scale.page import PAGES, with_table


@pytest.mark.parametrize("part", sorted(PAGES))
def test_a_page_shows_what_was_measured(part: str) -> None:
    name, table = PAGES[part]
    page = (ROOT / name).read_text(encoding="utf-8")
    file = RESULTS / f"{part}.json"
    sizes = json.loads(file.read_text(encoding="utf-8"))["sizes"] if file.exists() else []
    assert with_table(page, table(sizes) if sizes else []) == page


def test_a_log_that_was_taken_in_is_trained_on_and_embedded_whole(tmp_path: Path) -> None:
    given = ["--tasks", "300", "--folder", str(tmp_path), "--buckets", "4"]
    ingest.main([*given, "--repeats", "1", "--no-upkeep", "--out", str(tmp_path / "ingest.json")])
    train.main([*given, "--sample", "50", "--out", str(tmp_path / "train.json")])
    generate.main([*given, "--runs", "local:1", "--no-refresh", "--out", str(tmp_path / "g.json")])
    found = [json.loads((tmp_path / f"{name}.json").read_text())["sizes"][0] for name in ("ingest", "train", "g")]
    assert [one["rows"] for one in found] == [6000] * 3
    assert found[1]["survey_rows"] == 6000
    assert found[2]["buckets"] == 4
