"""A refresh out of windows ends where embedding everything anew ends, in every live version, whatever came between."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import limaml
from limaml.config import parse_config
from limaml.embeddings.refresher import Refresher, live_versions, log_position
from limaml.embeddings.windows import Windows
from limaml.errors import ConfigError, StoreError
from limaml.interactions import InteractionLog, clean
from limaml.interactions.side_tables import SideTables
from limaml.meta import TrainedModel, Training
from limaml.store.lmdb import LmdbStore

SMALL = {
    "train": {"epochs": 1, "rows_per_batch": 512},
    "model": {"embedding_dim": 4, "hidden": [8], "dim": 4, "factors": 4},
}
MADE = limaml.make_interactions(tasks=50, items=25, mean_rows=15, seed=2)
ROWS = MADE.interactions.sort("timestamp")
CUT = int(0.7 * len(ROWS))


def trained_with(solver: str, tasks: list[str], keep: int = 6) -> tuple[Training, dict[str, pl.DataFrame]]:
    tables = {"user_id": MADE.users} if "item_id" in tasks else {"user_id": MADE.users, "item_id": MADE.items}
    joined = limaml.join_tables(ROWS[:CUT], tables)
    schema = limaml.infer_schema(
        joined.frame,
        task=tasks,
        row="item_id",
        time="timestamp",
        label="click",
        task_columns={"user_id": joined.columns["user_id"]},
        row_columns=joined.columns.get("item_id", ()),
    ).schema
    config = parse_config({**SMALL, "adapt": {"solver": solver, "max_support": keep}})
    return limaml.train(joined.frame, schema, config), tables


@pytest.fixture(
    scope="module",
    params=[("newton", ["user_id"]), ("gradient", ["user_id"]), ("newton", ["user_id", "item_id"])],
    ids=["newton", "gradient", "two task types"],
)
def training(request: pytest.FixtureRequest) -> tuple[Training, dict[str, pl.DataFrame]]:
    solver, tasks = request.param
    return trained_with(solver, tasks)


class Run:
    """A log with the older part of the interactions, and what was published from it."""

    def __init__(self, folder: Path, training: Training, tables: dict[str, pl.DataFrame]) -> None:
        self.folder = folder
        self.trained: TrainedModel = training.save(folder / "model")
        self.log = InteractionLog(folder / "log", "user_id", buckets=4)
        self.log.append(ROWS[:CUT])
        self.tables = tables
        (folder / "side").mkdir()
        for key, table in tables.items():
            table.write_parquet(folder / "side" / f"{key}.parquet")
        files = {key: f"{key}.parquet" for key in tables}
        (folder / "side" / "tables.json").write_text(json.dumps(files))
        self.store = LmdbStore(folder / "store")

    def publish(self, name: str = "m", **options: object) -> str:
        """Everything that is in the log, adapted at once."""
        position = self.log.position
        frame, _ = clean(limaml.join_tables(self.log.read(), self.tables).frame, self.trained.encoder.schema)
        data = self.trained.encoder.encode(frame)
        extra = log_position(self.log, position)
        return limaml.publish(
            self.store, name, self.trained, self.folder / "model", data, extra=extra, **options
        ).version  # type: ignore[arg-type]

    def refresher(self, name: str = "m", version: str | None = None) -> Refresher:
        side = SideTables(self.folder / "side")
        return Refresher(self.store, name, self.log, self.folder / "windows", side, where="here", version=version)

    def assert_fresh(self, version: str | None = None) -> None:
        """`version` has what a version that is published from the whole log has."""
        anew = self.publish("anew")
        with self.store.read("m", version) as one, self.store.read("anew", anew) as other:
            assert dict(one.dims) == dict(other.dims)
            for kind in one.dims:
                ids = sorted(other.ids(kind))
                assert sorted(one.ids(kind)) == ids
                held, wanted = one.get(kind, ids), other.get(kind, ids)
                np.testing.assert_array_equal(held.count, wanted.count)
                np.testing.assert_array_equal(held.event_time, wanted.event_time)
                np.testing.assert_allclose(held.vectors, wanted.vectors, atol=1e-6)


@pytest.fixture
def run(tmp_path: Path, training: tuple[Training, dict[str, pl.DataFrame]]) -> Iterator[Run]:
    made = Run(tmp_path, *training)
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def plain() -> tuple[Training, dict[str, pl.DataFrame]]:
    return trained_with("newton", ["user_id"])


@pytest.fixture
def one(tmp_path: Path, plain: tuple[Training, dict[str, pl.DataFrame]]) -> Iterator[Run]:
    made = Run(tmp_path, *plain)
    yield made
    made.store.close()


def test_refreshing_equals_embedding_everything_anew(run: Run) -> None:
    """With ties, exact duplicates and late rows, in several appends, some of them a stream's."""
    version = run.publish()
    rng = np.random.default_rng(0)
    rest = ROWS[CUT:]
    late = ROWS[rng.integers(0, CUT, 40)].with_columns(click=1 - pl.col("click"))
    tied = rest.head(30).with_columns(item_id=(pl.col("item_id") + 1) % 25)
    with run.refresher() as refresher:
        assert refresher.run().versions == ()  # the version holds what the log has
        seen = 0
        for number, part in enumerate([rest[::2], late, rest[1::2], tied, ROWS[5:25], late]):
            run.log.append(
                part, positions={"s": number} if number % 2 else None, key=None if number % 2 else str(number)
            )
            report = refresher.run()
            seen += report.caught_up.duplicates
            assert [done.version for done in report.versions] in ([version], [])
        assert seen >= 20 + 40
        assert refresher.run().versions == ()
    run.assert_fresh()
    assert run.store.describe("m").watermark == ROWS["timestamp"].max()


def test_a_refresher_that_starts_again_goes_on(one: Run) -> None:
    one.publish()
    one.log.append(ROWS[CUT:-20])
    upsert, calls = one.store.upsert, []

    def fails(*arguments: object, **named: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise StoreError("The store cannot be reached.")
        return upsert(*arguments, **named)  # type: ignore[arg-type]

    one.store.upsert = fails  # type: ignore[method-assign, assignment]
    with one.refresher() as refresher, pytest.MonkeyPatch.context() as patch:
        patch.setattr("limaml.embeddings.refresher.TASKS_PER_CHUNK", 32)
        with pytest.raises(StoreError):
            refresher.run()
        assert sum(refresher.behind().values()) > 0
    one.log.append(ROWS[-20:])
    with one.refresher() as refresher:
        report = refresher.run()
        assert 0 < report.versions[0].stale["user_id"] <= 32  # the chunk that had reached the store
        assert refresher.behind() == {report.versions[0].version: 0}
    one.assert_fresh()


def test_every_live_version_is_refreshed_by_its_own_model(
    one: Run, plain: tuple[Training, dict[str, pl.DataFrame]], tmp_path: Path
) -> None:
    old = one.publish()
    served = one.publish()
    other_training, _ = trained_with("gradient", ["user_id"], keep=9)  # with longer windows
    other = other_training.save(tmp_path / "other")
    first, one.trained = one.trained, other
    with one.refresher() as refresher:
        refresher.run()
    publication = one.store.publish(
        "m", dims={"user_id": 4, "user_id.features": 5}, artifact=one.store.put_model(tmp_path / "other"),
        extra=log_position(one.log, 0),
    )  # fmt: skip
    with publication, one.refresher() as refresher:
        assert [v.id for v in live_versions(one.store, "m")] == [served, publication.version]
        one.log.append(ROWS[CUT:])
        report = refresher.run()
        assert [done.version for done in report.versions] == [served, publication.version]
        assert report.versions[1].applied["user_id"] == ROWS["user_id"].n_unique()  # nothing of it was known
        assert "a model needs longer windows" in report.caught_up.rebuilt
        publication.commit()
        new = publication.version
    (tmp_path / "model").rename(tmp_path / "first")
    (tmp_path / "other").rename(tmp_path / "model")
    one.assert_fresh(new)
    (tmp_path / "model").rename(tmp_path / "other")
    (tmp_path / "first").rename(tmp_path / "model")
    one.trained = first
    one.assert_fresh(served)
    assert one.store.describe("m", old).watermark < ROWS["timestamp"].max()  # type: ignore[operator]


def test_a_member_who_appears_while_a_version_is_written(one: Run) -> None:
    """A refresh gives the new version a task that its publisher never saw: it commits all the same, with that task."""
    one.publish()
    new = ROWS[-5:].with_columns(user_id=pl.lit(1000, pl.Int64))
    commits = []

    def between(task: str, done: int, of: int) -> None:
        if not commits:
            one.log.append(new)
            with one.refresher() as refresher:
                commits.extend(report.version for report in refresher.run().versions)

    version = one.publish(progress=between)
    assert commits[-1] == version and len(commits) == 2
    one.assert_fresh(version)


def test_a_version_that_is_served_again_is_caught_up(one: Run) -> None:
    old = one.publish()
    one.publish()
    one.log.append(ROWS[CUT:])
    with one.refresher() as refresher:
        refresher.run()
        one.store.rollback("m")
        assert one.store.current("m") == old
        assert 0 < refresher.behind()[old] <= 50
        report = refresher.run()
        assert [done.version for done in report.versions] == [old]
    one.assert_fresh()


def test_only_the_version_that_was_asked_for(one: Run) -> None:
    old, new = one.publish(), one.publish()
    one.log.append(ROWS[CUT:])
    with one.refresher(version=old) as refresher:
        assert [done.version for done in refresher.run().versions] == [old]
        with pytest.raises(StoreError, match="no version"):
            Refresher(one.store, "m", one.log, one.folder / "windows", version="v9").run()
    one.assert_fresh(old)
    assert one.store.describe("m", new).watermark < ROWS["timestamp"].max()  # type: ignore[operator]


def test_what_a_store_lost_comes_back(one: Run) -> None:
    """A store that went back to an earlier state, as one does that is restored, or whose primary died."""
    one.publish()
    before = (one.folder / "store" / "data.mdb").read_bytes()
    one.log.append(ROWS[CUT:])
    with one.refresher() as refresher:
        refresher.run()
    one.store.close()
    (one.folder / "store" / "data.mdb").write_bytes(before)
    one.store = LmdbStore(one.folder / "store")
    with one.refresher() as refresher:
        assert refresher.run().versions == ()  # it was told that all is there
        lost = refresher.run(since=one.store.describe("m").watermark)
        assert sum(lost.versions[0].applied.values()) == ROWS[CUT:]["user_id"].n_unique()
    one.assert_fresh()


def test_lost_windows_are_made_again(one: Run) -> None:
    one.publish()
    one.log.append(ROWS[CUT:-30])
    with one.refresher() as refresher:
        refresher.run()
    for file in (one.folder / "windows").iterdir():
        file.unlink()
    one.log.append(ROWS[-30:])
    with one.refresher() as refresher:
        report = refresher.run()
        assert report.caught_up.rebuilt == "there were no windows yet"
    one.assert_fresh()


def test_windows_that_change_hands_are_noticed(one: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody makes the windows anew while a refresh reads them: nothing is taken for done that was not."""
    one.publish()
    one.log.append(ROWS[CUT:])
    read, disturbed = Windows.read, []

    def disturbing(self: Windows, task_type: str, keys: list[str], **named: object) -> object:
        if disturbed:
            return read(self, task_type, keys, **named)  # type: ignore[arg-type]
        disturbed.append(self.rebuild())
        return read(self, task_type, ["not there yet"] * len(keys))

    with one.refresher() as refresher:
        monkeypatch.setattr(Windows, "read", disturbing)
        refresher.run()
    assert disturbed
    one.assert_fresh()


def test_a_side_table_that_grows_is_read_again(one: Run) -> None:
    one.publish()
    with one.refresher() as refresher:
        refresher.run()
        new = ROWS[-8:].with_columns(user_id=pl.lit(1000, pl.Int64))
        one.tables = {
            **one.tables,
            "user_id": pl.concat([MADE.users, MADE.users.head(1).with_columns(user_id=pl.lit(1000, pl.Int64))]),
        }
        one.tables["user_id"].write_parquet(one.folder / "side" / "user_id.parquet")
        one.log.append(new)
        refresher.run()
    one.assert_fresh()


def test_what_cannot_be_refreshed_says_why(one: Run, tmp_path: Path) -> None:
    with one.refresher() as refresher, pytest.raises(StoreError, match="Nothing of 'm' is published yet"):
        refresher.run()
    one.publish()
    other = InteractionLog(tmp_path / "by item", "item_id")
    other.append(ROWS[:CUT])
    refresher = Refresher(one.store, "m", other, tmp_path / "w")
    with pytest.raises(ConfigError, match="is partitioned by \\['item_id'\\]"):
        refresher.run()


Join = Callable[[pl.DataFrame], pl.DataFrame]


def test_side_tables_join_as_join_tables_does(tmp_path: Path) -> None:
    rows = pl.DataFrame({"user_id": [3, 1, None, 7, 1], "site": ["a", "b", "a", None, "b"], "age": [1, 2, 3, 4, 5]})
    users = pl.DataFrame({"user_id": ["1", "2", "3", None], "age": [10, 20, 30, 40], "zip": ["x", "y", None, "n"]})
    pairs = pl.DataFrame({"user_id": [1, 3], "site": ["b", "b"], "seen": [[1], [2, 3]], "zip": ["p", "q"]})
    (tmp_path / "tables.json").write_text(json.dumps({"user_id": "u.parquet", "user_id+site": "p.parquet"}))
    users.write_parquet(tmp_path / "u.parquet")
    pairs.write_parquet(tmp_path / "p.parquet")
    wanted = limaml.join_tables(rows, {"user_id": users, "user_id+site": pairs}).frame
    found = SideTables(tmp_path).join(rows, set(wanted.columns))
    assert found.equals(wanted.select(found.columns)) and set(found.columns) == set(wanted.columns)
    assert SideTables(tmp_path).join(rows, ["seen"]).columns == [*rows.columns, "seen"]
    users.cast({"user_id": pl.Int32}).write_parquet(tmp_path / "u.parquet")  # integers are looked up another way
    assert SideTables(tmp_path).join(rows, set(wanted.columns)).equals(found)
    assert SideTables(tmp_path / "none").join(rows, ["zip"]).equals(rows)
    empty = SideTables(tmp_path).join(rows.clear(), set(wanted.columns))
    assert empty.schema == found.schema
