"""`--schema`: what was found, edited by hand, is used as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import limaml
from limaml.cli.options import DataOptions, read


def test_an_edited_schema_is_used_and_a_contradicting_one_refused(tmp_path: Path) -> None:
    made = limaml.make_interactions(tasks=20, items=10, seed=0)
    table = tmp_path / "rows.parquet"
    made.interactions.write_parquet(table)
    plain = DataOptions(task=["user_id"], label=["click"], row="item_id", time="timestamp")
    found = read(table, plain).schema
    edited = json.loads(found.model_dump_json())
    (item,) = [feature for feature in edited["features"] if feature["name"] == "item_id"]
    item.update(buckets=4, min_count=1)
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(edited))
    prepared = read(table, DataOptions(**{**plain.__dict__, "schema": path}))
    spec = {s.name: s for s in limaml.Encoder.fit(prepared.frame, prepared.schema).specs}["item_id"]
    assert spec.size == 2 + 4
    with pytest.raises(limaml.ConfigError, match=r"has row 'item_id', but the command says None"):
        read(table, DataOptions(**{**plain.__dict__, "schema": path, "row": None}))
    path.write_text("{}")
    with pytest.raises(limaml.ConfigError, match="is no schema"):
        read(table, DataOptions(**{**plain.__dict__, "schema": path}))
    with pytest.raises(limaml.ConfigError, match="There is no schema file"):
        read(table, DataOptions(**{**plain.__dict__, "schema": tmp_path / "none.json"}))
