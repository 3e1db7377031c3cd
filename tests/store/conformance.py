"""What every backend must do. A backend's test file subclasses `StoreConformance` and gives it one fixture:

class TestRedis(StoreConformance):
    @pytest.fixture
    def open_empty(self, …) -> Callable[[], Store]:
        '''Each call opens the same store, empty at first.'''
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limaml.artifact import write_folder
from limaml.errors import StoreError
from limaml.store import Lookup, Publication, Published, Reader, Store

Open = Callable[[], Store]
modest = settings(
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


def column(n: int, value: int = 1) -> np.ndarray:
    return np.full(n, value, np.int64)


def fill(publication: Publication, ids: list[str], value: float, dim: int = 3, task_type: str = "member") -> None:
    n = len(ids)
    publication.put(task_type, ids, np.full((n, dim), value, np.float32), column(n), column(n))


def release(store: Store, value: float, ids: list[str] | None = None, model: str = "m", **options: Any) -> Published:
    with store.publish(model, dims={"member": 3}, **options) as publication:
        fill(publication, ids or ["a", "b", "c"], value)
        return publication.commit()


def release_as(store: Store, task_type: str, ids: list[str]) -> str:
    with store.publish("m", dims={task_type: 3}) as publication:
        fill(publication, ids, 1.0, task_type=task_type)
        return publication.commit().version


def values(found: Lookup) -> list[float]:
    return [float(row[0]) for row in found.vectors]


class StoreConformance:
    @pytest.fixture
    def store(self, open_empty: Open) -> Iterator[Store]:
        with open_empty() as store:
            yield store

    # ---------------------------------------------------------------------------------------- publish and read

    def test_the_protocols_are_met(self, store: Store) -> None:
        assert isinstance(store, Store)
        with store.publish("m", dims={"member": 3}) as publication:
            assert isinstance(publication, Publication)
            publication.commit()
        with store.read("m") as reader:
            assert isinstance(reader, Reader)

    def test_round_trip_in_the_order_asked_for(self, store: Store) -> None:
        vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
        with store.publish("m", dims={"member": 3}, note="first", watermark=5, extra={"seed": 1}) as publication:
            publication.put("member", ["d", "b"], vectors[[3, 1]], np.array([4, 2]), np.array([40, 20]))
            publication.put("member", ["a", "c"], vectors[[0, 2]], np.array([1, 3]), np.array([10, 30]))
            published = publication.commit(expected={"member": 4})
        assert published.counts == {"member": 4}
        assert (published.applied, published.stale, published.active) == (4, 0, True)
        assert published.version == store.current("m")
        asked = ["c", "nobody", "a", "c", "d", "b"]
        with store.read("m") as reader:
            for found in (store.get("m", "member", asked), reader.get("member", asked)):
                assert found.version == published.version
                assert found.found.tolist() == [True, False, True, True, True, True]
                assert np.array_equal(
                    found.vectors, [vectors[2], np.zeros(3), vectors[0], vectors[2], vectors[3], vectors[1]]
                )
                assert found.count.tolist() == [3, 0, 1, 3, 4, 2]
                assert found.event_time.tolist() == [30, 0, 10, 30, 40, 20]
                assert found.vectors.dtype == np.float32
        described = store.describe("m")
        assert (described.id, described.state, described.note) == (published.version, "ready", "first")
        assert (described.counts, described.watermark, described.extra) == ({"member": 4}, 5, {"seed": 1})
        assert (described.dims, described.dtypes, described.cold) == ({"member": 3}, {"member": "float32"}, ())
        assert described.bytes == published.bytes > 0
        assert store.verify("m") == {"member": 4}

    def test_nothing_asked_nothing_found(self, store: Store) -> None:
        release(store, 1.0)
        found = store.get("m", "member", [])
        assert found.vectors.shape == (0, 3)
        assert found.found.shape == found.count.shape == found.event_time.shape == (0,)
        assert not store.get("m", "member", ["x", "y"]).found.any()

    def test_an_empty_version(self, store: Store) -> None:
        with store.publish("m", dims={"member": 3, "item": 2}) as publication:
            publication.put("item", [], np.zeros((0, 2)), column(0), column(0))
            assert publication.commit().counts == {"member": 0, "item": 0}
        with store.read("m") as reader:
            assert list(reader.ids("member")) == []
            assert list(reader.scan("item")) == []

    def test_task_types_do_not_mix(self, store: Store) -> None:
        with store.publish("m", dims={"member": 3, "item": 2}) as publication:
            fill(publication, ["x", "y"], 1.0)
            fill(publication, ["x"], 2.0, 2, "item")
            publication.commit()
        assert values(store.get("m", "member", ["x", "y"])) == [1.0, 1.0]
        found = store.get("m", "item", ["x", "y"])
        assert found.vectors.tolist() == [[2.0, 2.0], [0.0, 0.0]]
        assert store.describe("m").counts == {"member": 2, "item": 1}
        with pytest.raises(StoreError, match="no task type 'advertiser'; it has 'member', 'item'"):
            store.get("m", "advertiser", ["x"])

    @modest
    @given(
        ids=st.lists(
            st.text(st.characters(codec=None), max_size=30) | st.text(min_size=390, max_size=700),
            unique=True,
            max_size=12,
        )
    )
    def test_any_id(self, open_empty: Open, ids: list[str]) -> None:
        vectors = np.arange(3 * len(ids), dtype=np.float32).reshape(-1, 3)
        with open_empty() as store:
            with store.publish("m", dims={"member": 3}) as publication:
                publication.put("member", ids, vectors, column(len(ids)), column(len(ids)))
                publication.commit(expected={"member": len(ids)})
            found = store.get("m", "member", [*ids, "é" * 300, "n" * 600])
            assert np.array_equal(found.vectors[: len(ids)], vectors)
            assert found.found.tolist() == [True] * len(ids) + [each in ids for each in ("é" * 300, "n" * 600)]
            with store.read("m") as reader:
                assert sorted(reader.ids("member")) == sorted(ids)
                scanned = [
                    pair for names, part in reader.scan("member", 5) for pair in zip(names, values(part), strict=True)
                ]
                assert sorted(scanned) == sorted(zip(ids, vectors[:, 0].tolist(), strict=True))

    @pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
    def test_dtypes(self, store: Store, dtype: str) -> None:
        vectors = np.random.default_rng(0).normal(size=(50, 5))
        ids = [f"t{row}" for row in range(50)]
        with store.publish("m", dims={"member": 5}, dtype=dtype) as publication:
            publication.put("member", ids, vectors, column(50), column(50))
            publication.commit()
        bound = {"float32": 1e-6, "float16": np.abs(vectors) * 2**-11 + 2**-25}.get(
            dtype, np.abs(vectors).max(axis=1, keepdims=True) / 253
        )
        assert (np.abs(store.get("m", "member", ids).vectors - vectors) <= bound).all()

    def test_each_task_type_may_have_its_own_dtype(self, store: Store) -> None:
        exact = np.array([[123457.0, 2.0**24 - 1]])
        dims = {"member": 2, "member.features": 2}
        with store.publish("m", dims=dims, dtype={"member": "float16"}) as publication:
            for task_type, given_ in (("member", exact / 1e6), ("member.features", exact)):
                publication.put(task_type, ["a"], given_, column(1), column(1))
            publication.commit()
        assert store.describe("m").dtypes == {"member": "float16", "member.features": "float32"}
        assert store.get("m", "member.features", ["a"]).vectors.tolist() == exact.tolist()
        assert store.get("m", "member", ["a"]).vectors.tolist() == (exact / 1e6).astype(np.float16).tolist()
        with pytest.raises(StoreError, match="dtype is given for task type 'item'"):
            store.publish("m", dims=dims, dtype={"item": "int8"})

    def test_models_are_apart(self, store: Store) -> None:
        release(store, 1.0, model="one")
        release(store, 2.0, model="two")
        assert store.models() == ["one", "two"]
        assert values(store.get("one", "member", ["a"])) == [1.0]
        assert values(store.get("two", "member", ["a"])) == [2.0]
        assert store.current("three") is None
        assert store.versions("three") == []
        for call in (
            lambda: store.get("three", "member", ["a"]),
            lambda: store.read("three"),
            lambda: store.describe("three"),
        ):
            with pytest.raises(StoreError, match=r"no version of model 'three'\. Models with a version: one, two"):
                call()

    def test_version_ids_are_ordered_and_never_used_again(self, store: Store) -> None:
        first = [release(store, 1.0).version for _ in range(4)]
        store.expire("m", keep=1)
        with store.publish("m", dims={"member": 3}) as publication:
            abandoned = publication.version
            publication.abandon()
        later = release(store, 1.0).version
        assert [*first, abandoned, later] == sorted({*first, abandoned, later})

    # ------------------------------------------------------------------------------------------ what is refused

    @pytest.mark.parametrize(
        ("ids", "vectors", "count", "time", "message"),
        [
            (["a", "b"], np.zeros((1, 3)), column(2), column(2), r"shape \(2, 3\), one row for each of the 2 ids; got"),
            (["a"], np.zeros((1, 4)), column(1), column(1), r"shape \(1, 3\)"),
            (["a"], np.array([["x"] * 3]), column(1), column(1), "must be numbers"),
            (["a", "b"], np.array([[0, 0, 0], [0, np.nan, 0]]), column(2), column(2), r"member 'b' \(row 1\) has nan"),
            (["a"], np.zeros((1, 3)), column(2), column(1), "count .* must be 1 whole numbers"),
            (["a"], np.zeros((1, 3)), np.array([0.5]), column(1), "whole numbers"),
            (["a"], np.zeros((1, 3)), column(1, -1), column(1), "count of member 'a' .* is -1"),
            (["a"], np.zeros((1, 3)), column(1, 2**32), column(1), "must be from 0 to 4294967295"),
            ([7], np.zeros((1, 3)), column(1), column(1), "must be a list of strings.*got 7 at position 0"),
            ("a", np.zeros((1, 3)), column(1), column(1), "must be a list of strings"),
        ],
    )
    def test_bad_embeddings(self, store: Store, ids: Any, vectors: Any, count: Any, time: Any, message: str) -> None:
        version = release(store, 1.0).version
        with store.publish("m", dims={"member": 3}) as publication:
            with pytest.raises(StoreError, match=message):
                publication.put("member", ids, vectors, count, time)
            assert publication.commit().counts == {"member": 0}
        with pytest.raises(StoreError, match=message):
            store.upsert("m", version, "member", ids, vectors, count, time)

    @pytest.mark.parametrize("name", ["", "a/b", "ä", "../x", "x" * 200])
    def test_bad_model_names(self, store: Store, name: str) -> None:
        for call in (lambda: store.publish(name, dims={"member": 3}), lambda: store.get(name, "member", ["a"])):
            with pytest.raises(StoreError, match="cannot be called"):
                call()

    def test_bad_versions(self, store: Store) -> None:
        for dims, dtype, message in (
            ({}, "float32", "at least one task type"),
            ({"member": 0}, "float32", "must be from 1 to 65535, got 0"),
            ({"member": 3}, "float64", "cannot be stored as 'float64'"),
            ({"": 3}, "float32", "must be a word"),
        ):
            with pytest.raises(StoreError, match=message):
                store.publish("m", dims=dims, dtype=dtype)
        with pytest.raises(StoreError, match="must be JSON"):
            store.publish("m", dims={"member": 3}, extra={"x": object()})
        with store.publish("m", dims={"member": 3}) as publication:
            with pytest.raises(StoreError, match="no task type 'item'"):
                fill(publication, ["a"], 1.0, task_type="item")
            fill(publication, ["a"], 1.0)
            with pytest.raises(StoreError, match=r"has 1 embeddings of task type 'member', but 2 were expected"):
                publication.commit(expected={"member": 2})
            fill(publication, ["b"], 1.0)
            publication.commit(expected={"member": 2})
            with pytest.raises(StoreError, match="was committed"):
                fill(publication, ["c"], 1.0)
        for call in (
            lambda: store.read("m", "v999999-00000000"),
            lambda: store.activate("m", "v999999-00000000"),
            lambda: store.rollback("m", "v999999-00000000"),
            lambda: store.upsert("m", "v999999-00000000", "member", ["a"], np.zeros((1, 3)), column(1), column(1)),
        ):
            with pytest.raises(StoreError, match="v999999-00000000"):
                call()

    # ------------------------------------------------------------------------------------------ half-written ones

    def test_what_is_not_committed_is_never_served(self, store: Store) -> None:
        old = release(store, 1.0).version
        with store.publish("m", dims={"member": 3}) as publication:
            half = publication.version
            fill(publication, ["a", "new"], 2.0)
            publication.written("member", ["a"])  # forces it into the store
            assert values(store.get("m", "member", ["a", "new"])) == [1.0, 0.0]
            with pytest.raises(StoreError, match=f"{half} of model 'm' is still being written"):
                store.read("m", half)
            with pytest.raises(StoreError, match="still being written"):
                store.activate("m", half)
        assert store.current("m") == old
        assert [(version.id, version.state) for version in store.versions("m")] == [(old, "ready"), (half, "writing")]

        class Trouble(Exception):
            pass

        def fail() -> None:
            with store.publish("m", dims={"member": 3}) as publication:
                left.append(publication.version)
                fill(publication, ["a"], 3.0)
                raise Trouble

        left: list[str] = []
        with pytest.raises(Trouble):
            fail()
        other = left[0]
        assert [version.id for version in store.versions("m")] == [old, other]  # the first half went with this publish
        assert store.gc() == [f"version {other} of model 'm'"]
        assert [version.id for version in store.versions("m")] == [old]
        assert values(store.get("m", "member", ["a"])) == [1.0]
        assert store.gc() == []

    def test_abandon_removes_at_once(self, store: Store) -> None:
        with store.publish("m", dims={"member": 3}) as publication:
            fill(publication, ["a"], 1.0)
            publication.abandon()
        assert store.versions("m") == []
        assert store.size().keys == 0

    def test_two_publishers_at_once(self, open_empty: Open) -> None:
        with open_empty() as one, open_empty() as two:
            with one.publish("m", dims={"member": 3}) as publication:
                fill(publication, ["a"], 1.0)
                publication.written("member", [])
                with pytest.raises(StoreError, match=r"Another publisher of model 'm' is at work .*version v"):
                    two.publish("m", dims={"member": 3})
                assert two.gc() == []  # a living publisher's version is not a left-over
                release(two, 9.0, model="other")
                first = publication.commit()
            assert two.current("m") == first.version
            assert release(two, 2.0).version > first.version
            assert values(one.get("m", "member", ["a"])) == [2.0]

    def test_a_publication_is_resumed(self, store: Store) -> None:
        with store.publish("m", dims={"member": 3}) as publication:
            half = publication.version
            fill(publication, ["a", "b"], 1.0)
            publication.written("member", [])
        with store.publish("m", dims={"member": 3}, resume=True) as publication:
            assert publication.version == half
            assert publication.written("member", ["a", "x", "b"]).tolist() == [True, False, True]
            fill(publication, ["b", "c"], 1.0)
            done = publication.commit(expected={"member": 3})
        assert (done.applied, done.stale) == (1, 1)
        assert values(store.get("m", "member", ["a", "b", "c"])) == [1.0, 1.0, 1.0]
        assert store.verify("m") == {"member": 3}

    def test_only_the_same_publication_is_resumed(self, store: Store) -> None:
        with store.publish("m", dims={"member": 3}) as publication:
            half = publication.version
        with store.publish("m", dims={"member": 4}, resume=True) as publication:
            assert publication.version != half
        assert half not in [version.id for version in store.versions("m")]

    # ------------------------------------------------------------------------------------------------- upserts

    @modest
    @given(
        data=st.data(),
        writes=st.lists(
            st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(-2, 2)), min_size=1, max_size=6),
            max_size=6,
        ),
    )
    def test_any_order_of_upserts_ends_in_the_same_state(
        self, open_empty: Open, data: st.DataObject, writes: list[list[tuple[int, int, int]]]
    ) -> None:
        with open_empty() as store:
            version = release(store, -1.0, ["t0", "t1"]).version  # revision (1, 1)
            truth = {"t0": (1, 1), "t1": (1, 1)}
            again = data.draw(st.lists(st.sampled_from(writes), max_size=3)) if writes else []
            for batch in data.draw(st.permutations([*writes, *again])):
                ids = [f"t{task}" for task, _, _ in batch]
                count, when = np.array([row[1] for row in batch]), np.array([row[2] for row in batch])
                before = dict(truth)
                for task_id, revision in zip(ids, zip(count.tolist(), when.tolist(), strict=True), strict=True):
                    truth[task_id] = max(truth.get(task_id, revision), revision)
                vectors = np.stack([count, when, count + when], 1).astype(np.float32)
                result = store.upsert("m", version, "member", ids, vectors, count, when)
                changed = sum(truth[task_id] != before.get(task_id) for task_id in truth)
                assert (result.applied, result.stale) == (changed, len(batch) - changed)
            found = store.get("m", "member", sorted(truth))
            assert list(zip(found.count.tolist(), found.event_time.tolist(), strict=True)) == [
                truth[task_id] for task_id in sorted(truth)
            ]
            for task_id, vector in zip(sorted(truth), found.vectors.tolist(), strict=True):
                count_, when_ = truth[task_id]
                original = task_id in ("t0", "t1") and truth[task_id] == (1, 1)
                assert vector == ([-1.0] * 3 if original else [count_, when_, count_ + when_])
            assert store.verify("m") == {"member": len(truth)}
            assert store.describe("m").counts == {"member": len(truth)}

    def test_the_watermark_only_rises(self, store: Store) -> None:
        version = release(store, 1.0).version
        assert store.describe("m").watermark is None
        for given_mark, expected in ((5, 5), (3, 5), (None, 5), (8, 8)):
            nothing = (np.zeros((0, 3)), column(0), column(0))
            store.upsert("m", version, "member", [], *nothing, watermark=given_mark)
            assert store.describe("m").watermark == expected

    def test_upserts_reach_a_version_that_is_being_written(self, store: Store) -> None:
        with store.publish("m", dims={"member": 3}) as publication:
            fill(publication, ["a", "b"], 1.0)
            publication.written("member", [])
            fresh = np.full((2, 3), 2.0)
            store.upsert("m", publication.version, "member", ["b", "c"], fresh, column(2, 5), column(2))
            fill(publication, ["c"], 1.0)  # computed from less: it stays out
            done = publication.commit(expected={"member": 3})
        assert (done.applied, done.stale) == (2, 1)
        assert values(store.get("m", "member", ["a", "b", "c"])) == [1.0, 2.0, 2.0]

    def test_upserts_from_several_threads_lose_nothing(self, store: Store) -> None:
        version = release(store, 0.0, ["shared"]).version

        def work(worker: int) -> None:
            for step in range(20):
                ids = ["shared", f"own-{worker}-{step}"]
                store.upsert("m", version, "member", ids, np.full((2, 3), step), column(2, 2 + step), column(2))

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.verify("m") == {"member": 81}
        assert values(store.get("m", "member", ["shared"])) == [19.0]

    # ------------------------------------------------------------------------------------------------- forgetting

    def test_forgotten_tasks_are_nowhere_and_stay_out(self, store: Store) -> None:
        both = {"member": 3, "member.features": 2, "item": 3, "members": 3}
        versions = []
        for model in ("m", "other"):
            with store.publish(model, dims=both) as publication:
                for task_type, dim in both.items():
                    fill(publication, ["a", "b", "c"], 1.0, dim, task_type)
                versions.append(publication.commit().version)
        late = (np.full((2, 3), 7.0), column(2, 9), column(2))
        store.upsert("m", versions[0], "member", ["b", "d"], *late)
        done = store.forget("member", ["b", "d", "nobody", "b"])
        assert done.removed == {"m": {versions[0]: 3}, "other": {versions[1]: 2}}
        assert done.tombstones == 3
        assert store.forgotten("member") == ["b", "d", "nobody"]
        assert store.forgotten("item") == []
        for model in ("m", "other"):
            assert store.verify(model) == {"member": 2, "member.features": 2, "item": 3, "members": 3}
            assert store.describe(model).counts == store.verify(model)
            assert store.get(model, "member", ["a", "b", "c", "d"]).found.tolist() == [True, False, True, False]
            assert store.get(model, "member.features", ["b", "c"]).found.tolist() == [False, True]
            assert store.get(model, "item", ["b"]).found.tolist() == [True]
            with store.read(model) as reader:
                assert sorted(reader.ids("member")) == ["a", "c"]
                assert sorted(reader.ids("members")) == ["a", "b", "c"]
        done_ = store.upsert(
            "m", versions[0], "member", ["a", "b", "d", "e", "b"], *(np.ones((5, 3)), column(5, 20), column(5))
        )
        assert (done_.applied, done_.stale, done_.forgotten) == (2, 0, 3)
        features = store.upsert("m", versions[0], "member.features", ["b"], np.ones((1, 2)), column(1, 20), column(1))
        assert (features.applied, features.forgotten) == (0, 1)
        assert store.verify("m")["member"] == 3
        assert store.forget("member", ["b"]).tombstones == 0
        assert store.recall("member", ["b", "stranger"]) == 1
        assert store.upsert("m", versions[0], "member", ["b"], np.ones((1, 3)), column(1), column(1)).applied == 1
        assert store.get("m", "member", ["b", "d"]).found.tolist() == [True, False]
        assert store.forgotten("member") == ["d", "nobody"]
        assert store.verify("m")["member"] == 4

    def test_somebody_is_forgotten_while_a_version_is_written(self, store: Store) -> None:
        release(store, 1.0)
        store.forget("member", ["early"])
        with store.publish("m", dims={"member": 3}) as publication:
            fill(publication, ["a", "b", "early"], 2.0)
            publication.written("member", [])  # into the store
            assert publication.written("member", ["a", "early"]).tolist() == [True, False]
            fill(publication, ["c", "d"], 2.0)  # still with the publisher, where the buffer is large
            store.forget("member", ["b", "d"])
            fill(publication, ["d", "e"], 2.0)
            with pytest.raises(StoreError, match="7 were expected"):
                publication.commit(expected={"member": 7})
            done = publication.commit(expected={"member": 6})
        assert done.counts == {"member": 3}
        assert done.applied + done.stale + done.forgotten == 7
        assert done.forgotten >= 2
        assert store.get("m", "member", ["a", "b", "c", "d", "e", "early"]).found.tolist() == [
            *(True, False, True, False, True, False)
        ]
        assert store.verify("m") == {"member": 3}

    def test_a_resumed_publication_leaves_out_who_was_forgotten_between(self, store: Store) -> None:
        with store.publish("m", dims={"member": 3}) as publication:
            fill(publication, ["a", "b"], 1.0)
            publication.written("member", [])
        assert list(store.forget("member", ["b", "c"]).removed["m"].values()) == [1]
        with store.publish("m", dims={"member": 3}, resume=True) as publication:
            assert publication.written("member", ["a", "b"]).tolist() == [True, False]
            fill(publication, ["b", "c", "d"], 1.0)
            done = publication.commit(expected={"member": 4})
        assert (done.applied, done.forgotten, done.counts) == (1, 2, {"member": 2})

    @modest
    @given(
        ids=st.lists(
            st.text(st.characters(codec=None), max_size=30) | st.text(min_size=390, max_size=500),
            unique=True,
            max_size=10,
        ),
        data=st.data(),
    )
    def test_any_id_is_forgotten(self, open_empty: Open, ids: list[str], data: st.DataObject) -> None:
        gone = data.draw(st.lists(st.sampled_from(ids), unique=True)) if ids else []
        again = data.draw(st.lists(st.sampled_from(ids), unique=True)) if ids else []
        with open_empty() as store:
            before = set(store.forgotten("task"))
            version = release_as(store, "task", ids)
            if again:
                many = (np.full((len(again), 3), 2.0), column(len(again), 2), column(len(again)))
                store.upsert("m", version, "task", again, *many)
            store.forget("task", gone)
            left = set(ids) - set(gone) - before
            assert set(store.forgotten("task")) == set(gone) | before
            found = store.get("m", "task", ids)
            assert {each for each, there in zip(ids, found.found.tolist(), strict=True) if there} == left
            assert store.verify("m") == {"task": len(left)}
            store.recall("task", [*gone, *before])
            assert store.forgotten("task") == []

    def test_forgetting_while_others_write_loses_nothing_else(self, open_empty: Open) -> None:
        ids = [f"t{number}" for number in range(30)]
        with open_empty() as store, open_empty() as other:
            version = release(store, 0.0, ids).version
            stop = threading.Event()

            def write() -> None:
                step = 2
                while not stop.is_set():
                    other.upsert("m", version, "member", ids, np.full((30, 3), step), column(30, step), column(30))
                    step += 1

            thread = threading.Thread(target=write)
            thread.start()
            for number in range(0, 30, 3):
                store.forget("member", [ids[number]])
            stop.set()
            thread.join()
            gone = set(ids[::3])
            assert store.verify("m") == {"member": 20}
            assert store.get("m", "member", ids).found.tolist() == [each not in gone for each in ids]

    # ---------------------------------------------------------------------------------------- cold embeddings

    def test_cold_embeddings(self, store: Store) -> None:
        with store.publish("m", dims={"member": 3, "item": 3}) as publication:
            fill(publication, ["a"], 1.0)
            publication.put_cold("member", np.zeros(3))
            publication.put_cold("member", np.array([7.0, 8.0, 9.0]))
            with pytest.raises(StoreError, match="must be 3 numbers"):
                publication.put_cold("member", np.zeros(4))
            with pytest.raises(StoreError, match="nan"):
                publication.put_cold("item", np.full(3, np.nan))
            assert publication.commit().counts == {"member": 1, "item": 0}  # a cold embedding is nobody's
        assert store.describe("m").cold == ("member",)
        assert store.verify("m") == {"member": 1, "item": 0}
        with store.read("m") as reader:
            cold = reader.cold("member")
            assert cold is not None
            assert cold.tolist() == [7.0, 8.0, 9.0]
            assert reader.cold("item") is None
            assert list(reader.ids("member")) == ["a"]
            for get in (lambda *a, **k: store.get("m", *a, **k), reader.get):
                found = get("member", ["?", "a", ""], fill=True)
                assert found.vectors.tolist() == [[7, 8, 9], [1, 1, 1], [7, 8, 9]]
                assert found.found.tolist() == [False, True, False]
                assert get("member", ["?"]).vectors.tolist() == [[0, 0, 0]]
                with pytest.raises(StoreError, match="no cold embedding for task type 'item'"):
                    get("item", ["?"], fill=True)

    # ----------------------------------------------------------------------------------- pointers and expiry

    def test_roll_back_and_history(self, store: Store) -> None:
        with pytest.raises(StoreError, match="serves no version yet"):
            store.rollback("m")
        v1 = release(store, 1.0).version
        with pytest.raises(StoreError, match="nothing before"):
            store.rollback("m")
        v2, v3 = release(store, 2.0).version, release(store, 3.0).version
        assert store.rollback("m") == v2
        assert values(store.get("m", "member", ["a"])) == [2.0]
        assert store.rollback("m") == v1
        with pytest.raises(StoreError, match=f"Name one of {v2}, {v3}"):
            store.rollback("m")
        assert store.rollback("m", to=v3) == v3
        assert store.rollback("m", to=v3) == v3
        assert store.rollback("m") == v1
        store.activate("m", v2)
        assert store.current("m") == v2
        reasons = [(pointer.version, pointer.reason) for pointer in store.history("m")]
        assert reasons == [
            *((version, "publish") for version in (v1, v2, v3)),
            *((version, "rollback") for version in (v2, v1, v3, v1)),
            (v2, "activate"),
        ]

    def test_a_version_can_be_made_ready_without_being_served(self, store: Store) -> None:
        with store.publish("m", dims={"member": 3}) as publication:
            fill(publication, ["a"], 1.0)
            done = publication.commit(activate=False)
        assert not done.active
        assert store.current("m") is None
        with store.read("m", done.version) as reader:
            assert values(reader.get("member", ["a"])) == [1.0]
        store.activate("m", done.version)
        assert values(store.get("m", "member", ["a"])) == [1.0]

    def test_expiry_keeps_what_is_current_or_held(self, store: Store) -> None:
        versions = [release(store, float(number)).version for number in range(6)]
        store.rollback("m", to=versions[0])
        reader, second = store.read("m", versions[1]), store.read("m", versions[1])
        expired = store.expire("m", keep=2)
        assert expired.removed == tuple(versions[2:4])
        assert expired.held == (versions[1],)
        assert [version.id for version in store.versions("m")] == [versions[0], versions[1], versions[4], versions[5]]
        assert values(reader.get("member", ["a"])) == [1.0]
        reader.close()
        assert store.expire("m", keep=2).held == (versions[1],)
        second.close()
        assert store.expire("m", keep=2).removed == (versions[1],)
        with pytest.raises(StoreError, match="is closed"):
            reader.get("member", ["a"])
        with pytest.raises(StoreError, match="no version"):
            store.read("m", versions[1])
        with pytest.raises(StoreError, match="At least one"):
            store.expire("m", keep=0)
        assert store.size().keys == 9

    def test_a_reader_stays_with_its_version(self, store: Store) -> None:
        release(store, 1.0)
        with store.read("m") as reader:
            release(store, 2.0)
            assert values(reader.get("member", ["a"])) == [1.0]
            assert values(store.get("m", "member", ["a"])) == [2.0]

    def test_readers_during_flips_never_see_a_mix(self, open_empty: Open) -> None:
        ids = [f"t{number}" for number in range(40)]
        with open_empty() as store:
            seeds = {release(store, 1.0, ids).version: 1.0}
            stop = threading.Event()
            problems: list[str] = []
            reads = [0, 0]

            def watch(place: int) -> None:
                with open_empty() as mine:
                    while not stop.is_set():
                        found = mine.get("m", "member", ids)
                        if len(set(found.vectors.ravel().tolist())) != 1 or not found.found.all():
                            problems.append(f"mixed: {set(found.vectors.ravel().tolist())}")
                        expected = seeds.get(found.version)
                        if expected is not None and found.vectors[0, 0] != expected:
                            problems.append(f"{found.version} with {found.vectors[0, 0]}")
                        reads[place] += 1
                        time.sleep(0.0005)  # else threads that never wait keep the interpreter from the writer

            threads = [threading.Thread(target=watch, args=(place,)) for place in range(2)]
            for thread in threads:
                thread.start()
            begun = time.monotonic()
            number = 1.0
            while time.monotonic() < begun + 0.7 or (
                (min(reads) <= 20 or number <= 3) and time.monotonic() < begun + 60
            ):
                number += 1
                seeds[release(store, number, ids).version] = number
                store.rollback("m")
                store.expire("m", keep=2)
            stop.set()
            for thread in threads:
                thread.join()
            assert problems == []
            assert min(reads) > 20
            assert number > 3

    # -------------------------------------------------------------------------------------------- model folders

    def test_a_version_brings_its_model_folder(self, store: Store, tmp_path: Path) -> None:
        digests = []
        for number in range(2):
            write_folder(tmp_path / "model", documents={"number": number}, kind="model", format=1)
            digests.append(store.put_model(tmp_path / "model"))
            assert store.put_model(tmp_path / "model") == digests[-1]
        with pytest.raises(StoreError, match="no model folder 'feed'"):
            store.publish("m", dims={"member": 3}, artifact="feed")
        first = release(store, 1.0, artifact=digests[0]).version
        assert first.endswith(digests[0][:8])
        release(store, 1.5, artifact=digests[0], model="other")
        release(store, 2.0, artifact=digests[1])
        assert store.describe("m").artifact == digests[1]
        assert (store.model_path(digests[0]) / "number.json").read_text() == "0\n"
        store.expire("m", keep=1)
        assert store.model_path(digests[0]).is_dir()  # the other model's version names it too
        release(store, 3.0, model="other")
        store.expire("other", keep=1)
        with pytest.raises(StoreError, match=f"no model folder '{digests[0]}'; it has {digests[1]}"):
            store.model_path(digests[0])
        assert store.gc() == []

    @pytest.mark.parametrize("resume", [False, True])
    def test_what_a_killed_publisher_left_does_not_take_the_next_ones_model_folder(
        self, store: Store, tmp_path: Path, resume: bool
    ) -> None:
        write_folder(tmp_path / "model", documents={"number": 1}, kind="model", format=1)
        digest = store.put_model(tmp_path / "model")
        left = store.publish("m", dims={"member": 3}, artifact=digest)
        left.close()
        assert store.put_model(tmp_path / "model") == digest  # only what is left names it
        with store.publish("m", dims={"member": 4}, artifact=digest, resume=resume) as publication:
            version = publication.commit().version
        assert store.model_path(digest).is_dir()
        assert [kept.id for kept in store.versions("m")] == [version]
        assert store.gc() == []

    # -------------------------------------------------------------------------------------------------- sizes

    @pytest.mark.parametrize(("dim", "dtype"), [(32, "float32"), (16, "int8"), (700, "float32")])
    def test_the_estimate_is_close(self, store: Store, dim: int, dtype: str) -> None:
        n = 2000
        ids = [f"member-{number:09d}" for number in range(n)]
        before = store.size()
        assert before.keys == 0
        estimate = store.estimate({"member": n}, {"member": dim}, dtype)
        with store.publish("m", dims={"member": dim}, dtype=dtype) as publication:
            publication.put("member", ids, np.ones((n, dim)), column(n), column(n))
            published = publication.commit()
        size = store.size()
        assert size.keys == estimate.keys == n
        assert size.payload == published.bytes
        assert 0.7 < estimate.bytes / (size.bytes - before.bytes) < 1.4
        assert size.bytes > size.payload
        with pytest.raises(StoreError, match="dimension of task type 'item' is missing"):
            store.estimate({"item": 1}, {"member": 2})

    def test_a_closed_store_says_so(self, open_empty: Open) -> None:
        store = open_empty()
        store.close()
        store.close()
        with pytest.raises(StoreError, match="is closed"):
            store.get("m", "member", ["a"])
