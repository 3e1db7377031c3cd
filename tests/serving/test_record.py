"""Recorded requests come back as they were, in bounded files; scoring them again finds what differs, and only that."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import publish_small, small

import limaml
from limaml.errors import ConfigError, DataError
from limaml.serving import record
from limaml.serving.agreement import agreement_lines, check_served
from limaml.serving.record import Recorder, Served, ServedTask, read_served


def served_by_predictor(folder: Path, frame: pl.DataFrame, name: str = "r1") -> Served:
    """A request as a server would record it, answered by the predictor."""
    with limaml.open_store(folder / "store") as store, limaml.Predictor(store, "model") as predictor:
        scores = predictor.score(frame)
        keys = frame["user_id"].unique(maintain_order=True).cast(pl.String).to_list()
        with store.read("model", scores.version) as reader:
            found = reader.get("user_id", keys)
    owner = np.array([keys.index(str(key)) for key in frame["user_id"].to_list()])
    task = ServedTask(keys, owner, found.found, found.count, found.event_time)
    return Served(name, 1, "model", scores.version, {}, frame, scores.logits, {"user_id": task})


def kept(folder: Path, *served: Served) -> Path:
    recorder = Recorder(folder, share=1)
    for one in served:
        assert recorder.wants()
        recorder.keep(one)
    recorder.close()
    assert (recorder.kept, recorder.lost) == (len(served), 0)
    return folder


values = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.none(), min_size=1, max_size=4).map(lambda x: pl.Series(x, dtype=pl.Int64)),
    st.lists(st.floats() | st.none(), min_size=1, max_size=4).map(lambda x: pl.Series(x, dtype=pl.Float64)),
    st.lists(st.text(max_size=3) | st.none(), min_size=1, max_size=4).map(lambda x: pl.Series(x, dtype=pl.String)),
    st.lists(st.lists(st.integers(0, 9), max_size=2) | st.none(), min_size=1, max_size=4).map(
        lambda x: pl.Series(x, dtype=pl.List(pl.Int64))
    ),
)  # fmt: skip


@settings(max_examples=40)
@given(
    series=values, name=st.text(max_size=3), parameters=st.dictionaries(st.text(max_size=2), st.integers() | st.text())
)
def test_what_was_kept_comes_back(
    tmp_path_factory: pytest.TempPathFactory, series: pl.Series, name: str, parameters: dict[str, object]
) -> None:
    n = len(series)
    logits = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
    count = np.array([3])
    task = ServedTask(["ä|\u2028"], np.zeros(n, np.int64), np.array([True]), count, count * 10**15)
    given = Served(name, 7, "m", "v1", parameters, pl.DataFrame({"x": series}), logits, {"user_id": task})
    (found,) = read_served(kept(tmp_path_factory.mktemp("served"), given))
    assert (found.id, found.time, found.model, found.version, found.parameters) == (name, 7, "m", "v1", parameters)
    assert found.columns.equals(given.columns) and found.columns.schema == given.columns.schema
    np.testing.assert_array_equal(found.logits, logits)
    back = found.tasks["user_id"]
    assert back.keys == task.keys
    for name in ("owner", "found", "count", "event_time"):
        np.testing.assert_array_equal(getattr(back, name), getattr(task, name))


def test_files_are_bounded_and_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "FILE_BYTES", 20_000)
    recorder = Recorder(tmp_path / "served", share=1, limit=100_000)
    source = np.random.default_rng(0)
    none = np.zeros(0, np.int64)
    sent = 0
    for number in range(200):
        frame = pl.DataFrame({"x": source.standard_normal(400)})  # does not compress
        task = ServedTask([], np.zeros(400, np.int64), none.astype(bool), none, none)
        recorder.keep(Served(str(number), 0, "m", "v", {}, frame, np.zeros((400, 1), np.float32), {"t": task}))
        sent += 1
        if number % 3 == 0:
            recorder._write()  # as its thread does every few seconds
    recorder.close()
    assert recorder.kept + recorder.lost == sent
    assert sum(file.stat().st_size for file in (tmp_path / "served").iterdir()) <= 100_000
    ids = [int(served.id) for served in read_served(tmp_path / "served")]
    assert ids[-1] == 199 and ids == sorted(ids) and len(ids) > 10
    assert not list((tmp_path / "served").glob(".*"))


def test_a_disk_that_refuses_costs_records_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish_small(tmp_path)
    recorder = Recorder(tmp_path / "served", share=1)
    (tmp_path / "served").rmdir()  # as when the disk went away
    recorder.keep(served_by_predictor(tmp_path, small().frame.head(3)))
    recorder.close()
    assert (recorder.kept, recorder.lost) == (0, 1)
    assert "1 requests could not be recorded" in caplog.text


def test_the_share_is_kept_and_threads_may_share_one(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "served", share=0.25)
    wanted = sum(recorder.wants() for _ in range(4000))
    assert abs(wanted - 1000) < 6 * (4000 * 0.25 * 0.75) ** 0.5
    none, one = np.zeros(0, np.int64), np.zeros((1, 1), np.float32)
    task = ServedTask([], np.zeros(1, np.int64), none.astype(bool), none, none)

    def keep_many() -> None:
        for _ in range(50):
            recorder.keep(Served("a", 0, "m", "v", {}, pl.DataFrame({"x": [1]}), one, {"t": task}))

    threads = [threading.Thread(target=keep_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    assert recorder.kept == len(list(read_served(tmp_path / "served"))) == 200


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 1.5}, {"limit": 10}])
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"must be above 0|at least"):
        Recorder(tmp_path, **options)


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no recorded requests"):
        list(read_served(tmp_path))
    (tmp_path / "served-1.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match="no file of recorded requests"):
        list(read_served(tmp_path))
    pl.DataFrame({"id": ["a"]}).write_parquet(tmp_path / "served-1.parquet")
    with pytest.raises(DataError, match="no file of recorded requests"):
        list(read_served(tmp_path))


@pytest.mark.parametrize("with_features", [True, False], ids=["features sent", "features of the store"])
def test_serving_agrees_with_training_and_one_wrong_logit_is_found(tmp_path: Path, with_features: bool) -> None:
    publish_small(tmp_path)
    made = small()
    frame = made.frame.sample(60, seed=1, shuffle=True).with_columns(
        user_id=pl.when(pl.int_range(60) % 7 == 0).then(10**6 + pl.int_range(60)).otherwise("user_id")  # strangers
    )
    if not with_features:
        frame = frame.drop([name for name in made.members.columns if name != "user_id"])
    right = served_by_predictor(tmp_path, frame)
    with limaml.open_store(tmp_path / "store") as store:
        found = check_served(kept(tmp_path / "right", right, right), store)
        assert (found.requests, found.compared, found.refreshed, found.gone) == (2, 120, 0, 0)
        assert found.worst <= 1e-5 and found.percentile(99) <= found.worst
        logits = right.logits.copy()
        logits[17] += 1e-3
        wrong = Served("r2", 1, "model", right.version, {}, frame, logits, right.tasks)
        found = check_served(kept(tmp_path / "wrong", right, wrong), store)
        off = np.diff(1 / (1 + np.exp(-np.array([right.logits[17, 0], logits[17, 0]], np.float64))))[0]  # of the score
        assert abs(found.worst - off) < 1e-5 < off and found.worst_where == f"request r2, version {right.version}"
        logits[3] = np.nan
        found = check_served(kept(tmp_path / "nan", Served("r3", 1, *[*[right.model, right.version], {}, frame, logits, right.tasks])), store)  # fmt: skip
        assert found.worst == float("inf")


def test_refreshed_rows_and_gone_versions_are_told_apart(tmp_path: Path) -> None:
    made = small()
    trained = made.training.save(tmp_path / "model")
    frame = made.frame.sort("timestamp")
    cut = frame["timestamp"][int(0.9 * len(frame))]
    with limaml.open_store(tmp_path / "store") as store:
        data = trained.encoder.encode(frame.filter(pl.col("timestamp") < cut))
        limaml.publish(store, "model", trained, tmp_path / "model", data)
    before = served_by_predictor(tmp_path, frame, "before")
    touched = frame.filter(pl.col("timestamp") >= cut)["user_id"].unique()
    with limaml.open_store(tmp_path / "store") as store:
        history = frame.filter(pl.col("user_id").is_in(touched.implode()))
        limaml.refresh(store, "model", trained, history, {"user_id": touched.cast(pl.String).to_list()})
        found = check_served(kept(tmp_path / "served", before), store)
        assert found.refreshed == history.height and found.compared == frame.height - history.height > 0
        assert found.worst <= 1e-5
        for _ in range(2):
            limaml.publish(store, "model", trained, tmp_path / "model", data)
        assert before.version in store.expire("model", 1).removed
        found = check_served(tmp_path / "served", store)
        assert (found.compared, found.gone) == (0, frame.height)
        assert "versions that the store has no more" in "\n".join(agreement_lines(found))
