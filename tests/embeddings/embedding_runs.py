"""Run folders with a small model and a log of four buckets, and what all of it gives when it is adapted in memory at once."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import polars as pl

import limaml
from limaml.config import parse_config
from limaml.embeddings.generation import Generation, generation
from limaml.interactions import InteractionLog, clean
from limaml.meta import TrainedModel
from limaml.store import Store
from limaml.store.lmdb import LmdbStore

MADE = limaml.make_interactions(tasks=50, items=25, mean_rows=12, seed=2)
ROWS = MADE.interactions.sort("timestamp")
CUT = int(0.7 * len(ROWS))
SMALL = {
    "train": {"epochs": 1, "rows_per_batch": 512},
    "model": {"embedding_dim": 4, "hidden": [8], "dim": 4, "factors": 4},
}


class World:
    """A folder with `model`, `log`, `side` and `store`, as a run folder has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trained: TrainedModel = limaml.load_model(folder / "model")
        self.schema = self.trained.encoder.schema
        self.log = InteractionLog(folder / "log", list(self.schema.tasks[0].columns), buckets=4)
        self.store: Store = LmdbStore(folder / "store")

    @property
    def spool(self) -> Path:
        return self.folder / "generation"

    @property
    def shards(self) -> list[Path]:
        return sorted((self.spool / "shards").glob("*"))

    def fill(self, rows: pl.DataFrame) -> None:
        """Two appends, the second as a stream's, in no order of time, with exact duplicates in and between them."""
        again = rows.sample(20, seed=1)
        self.log.append(pl.concat([rows[:CUT], again]).sample(fraction=1, shuffle=True, seed=3))
        self.log.append(pl.concat([rows[CUT:], again]), positions={"stream": 1})

    def generation(self, **options: object) -> AbstractContextManager[Generation]:
        """`generation` of all that is here."""
        side = self.folder / "side"
        return generation(self.log, self.trained, self.folder / "model", self.spool, side=side, **options)  # type: ignore[arg-type]

    def publish(self, name: str = "shards", **options: object) -> Generation:
        """Generate and publish; what was generated, cleared."""
        with self.generation(**options) as made:
            made.publish(self.store, name)
            made.clear()
        return made

    def assert_as_in_memory(self, name: str = "shards", *, uncertainty: bool = False) -> None:
        """The version `name` has what one table in memory gives."""
        files = json.loads((self.folder / "side" / "tables.json").read_text())
        tables = {key: self.folder / "side" / file for key, file in files.items()}
        frame, _ = clean(limaml.join_tables(self.log.read(), tables).frame, self.schema)
        data = self.trained.encoder.encode(frame)
        model = self.folder / "model"
        limaml.publish(self.store, "memory", self.trained, model, data, uncertainty=uncertainty)
        with self.store.read(name) as one, self.store.read("memory") as other:
            assert dict(one.dims) == dict(other.dims)
            for kind in one.dims:
                ids = sorted(other.ids(kind))
                assert sorted(one.ids(kind)) == ids and ids
                held, wanted = one.get(kind, ids), other.get(kind, ids)
                np.testing.assert_array_equal(held.count, wanted.count)
                np.testing.assert_array_equal(held.event_time, wanted.event_time)
                np.testing.assert_allclose(held.vectors, wanted.vectors, atol=1e-6, rtol=1e-6)
                cold, expected = one.cold(kind), other.cold(kind)
                assert cold is not None and expected is not None
                np.testing.assert_array_equal(cold, expected)
        described, expected_too = self.store.describe(name), self.store.describe("memory")
        assert described.watermark == expected_too.watermark
        assert described.extra["time_unit"] == expected_too.extra["time_unit"]


def trained_run(
    folder: Path,
    solver: str,
    tasks: tuple[str, ...],
    rows: pl.DataFrame,
    time: str | None,
    keep: int,
    adapt: dict[str, object],
) -> Path:
    tables = {"user_id": MADE.users, "item_id": MADE.items}
    if "item_id" in tasks:  # their features stand in the interactions: a table of them would be of the row's side
        del tables["item_id"]
    joined = limaml.join_tables(rows[:CUT], tables)
    schema = limaml.infer_schema(
        joined.frame,
        task=list(tasks),
        row="item_id",
        time=time,
        label="click",
        task_columns={tasks[0]: joined.columns["user_id"]} if tasks[0] == "user_id" else {},
        row_columns=joined.columns.get("item_id", ()),
        exclude=["timestamp"] if time != "timestamp" else [],
    ).schema
    config = parse_config({**SMALL, "adapt": {"solver": solver, "max_support": keep, **adapt}})
    limaml.train(joined.frame, schema, config).save(folder / "model")
    (folder / "side").mkdir()
    for key, table in tables.items():
        table.write_parquet(folder / "side" / f"{key}.parquet")
    (folder / "side" / "tables.json").write_text(json.dumps({key: f"{key}.parquet" for key in tables}))
    return folder
