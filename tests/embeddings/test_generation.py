"""Shards made bucket by bucket give what one table in memory gives, however often whoever makes them is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from embedding_runs import ROWS, World
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.cli import main
from limaml.embeddings import jobs
from limaml.embeddings.deal import deal, dealt, is_dealt
from limaml.embeddings.piece import Piece
from limaml.embeddings.shards import Made, read_shard, whole_shards, write_shard
from limaml.embeddings.spool import Plan, Spool
from limaml.errors import ConfigError, DataError, MissingExtra, StoreError
from limaml.interactions.schema import Task

TEXT = ROWS.with_columns(timestamp=pl.from_epoch("timestamp").dt.to_string("%Y-%m-%d %H:%M:%S"))
HALVES = ROWS.with_columns(timestamp=pl.col("timestamp") + pl.when(pl.col("user_id") % 5 == 0).then(0.5).otherwise(0.0))
BOTH = ("user_id", "item_id")


@pytest.mark.parametrize(
    ("settings", "uncertainty"),
    [
        ({"solver": "newton"}, False),
        ({"solver": "newton", "half_life": 20.0}, True),
        ({"solver": "gradient"}, False),
        ({"solver": "newton", "tasks": BOTH}, True),
        ({"solver": "newton", "tasks": ("user_id+item_id",)}, False),
        ({"time": None, "tasks": BOTH, "half_life": 2.0}, False),
        ({"rows": TEXT, "half_life": 2.0}, False),
        ({"rows": HALVES, "half_life": 2.0}, False),
    ],
    ids=["newton", "posteriors", "gradient", "two types", "compound", "no time", "text", "halves"],
)
def test_shards_give_what_one_table_in_memory_gives(
    world: Callable[..., World], settings: dict[str, object], uncertainty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = world(**settings)
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(jobs, "ROWS_PER_PART", 40)  # several parts of each bucket, encoded one after the other
    made = one.publish(uncertainty=uncertainty, progress=lambda *news: told.append(news))
    one.assert_as_in_memory(uncertainty=uncertainty)
    assert {name: (done, of) for name, done, of in told} == {name: (n, n) for name, n in made.tasks.items()}
    assert made.kept == 0 and not one.shards
    timeless = one.schema.time is None
    assert made.dropped.duplicates == (0 if timeless else one.log.rows - ROWS.unique().height)


def test_several_processes_make_the_same_and_end_with_who_began_them(world: Callable[..., World]) -> None:
    """The one that drives them is killed when two shards are there; what it made is not made again."""
    one = world(tasks=BOTH)
    script = f"""
import os, signal, sys
from pathlib import Path
from embedding_runs import World
from multiprocessing import active_children
def kill(*_):
    if len(list((world.spool / "shards").glob("*.safetensors"))) >= 2:
        print(*(child.pid for child in active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    world = World(Path({str(one.folder)!r}))
    with world.generation(workers=2, progress=kill): pass
"""
    path = one.folder / "driver.py"
    path.write_text(script)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    one.store.close()
    ended = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    children = [int(word) for word in ended.stdout.split()]
    assert len(children) == 2
    deadline = time.monotonic() + 30
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(child) for child in children)
    before = {
        made.file: (one.spool / "shards" / made.file).stat().st_ino for made in whole_shards(one.spool / "shards")
    }
    assert 2 <= len(before) < 8
    again = World(one.folder)
    with again.generation() as made:
        assert made.kept == len(before)
        assert before.items() <= {path.name: path.stat().st_ino for path in again.shards}.items()
        assert len(again.shards) == 8
        made.publish(again.store, "shards")
    again.assert_as_in_memory()
    again.store.close()


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_damaged_shard_and_damaged_rows_are_made_again(world: Callable[..., World]) -> None:
    one = world(tasks=BOTH)
    with one.generation():
        pass
    before = {path: path.read_bytes() for path in one.shards}
    short, wrong, lost = one.shards[1], one.shards[2], one.shards[6]
    short.write_bytes(before[short][:-1])
    wrong.write_bytes(before[wrong][:-4] + b"\0\1\2\3")
    lost.unlink()
    with pytest.raises(StoreError, match=r"is not what was written .* Run the same command again"):
        read_shard(short)
    (one.spool / "shards" / "0-00001.leftover.tmp").write_bytes(b"half")
    with one.generation() as made:
        assert made.kept == 5
        assert {made.file for made in made.shards} == {path.name for path in one.shards}
    rows = sorted((one.spool / "rows" / "1").iterdir())
    rows[0].write_bytes(rows[0].read_bytes()[:-1])
    with one.generation() as made:
        assert made.kept == 7 and is_dealt(rows[0], 4)
    one.publish()
    one.assert_as_in_memory()


def test_one_of_two_drivers_wins_and_the_other_says_so(world: Callable[..., World]) -> None:
    one = world()
    with one.generation() as made:
        with pytest.raises(StoreError, match=r"Another process generates embeddings in .*generation\. Wait for it"):
            one.publish("other")
        made.publish(one.store, "shards")
    one.assert_as_in_memory()


def test_a_lost_bucket_is_named_and_nothing_is_published(world: Callable[..., World]) -> None:
    one = world()
    lost = sorted((one.log.folder / "data" / "bucket-0002").iterdir())[0]
    kept = shutil.copy(lost, one.folder / "kept")
    lost.unlink()
    with pytest.raises(DataError, match=r"file .*bucket-0002.* is missing. Restore it from a copy"):
        one.publish()
    assert one.store.models() == []
    shutil.copy(kept, lost)
    assert one.publish().kept == 2  # of the buckets before it
    one.assert_as_in_memory()


def test_what_is_gone_on_with(world: Callable[..., World]) -> None:
    """A little that was appended since is left to a refresh; much, another model or somebody forgotten begin anew."""
    one = world()

    def kept(**options: object) -> tuple[int, int]:
        with one.generation(**options) as made:
            return made.kept, made.position

    assert kept() == (0, 2)
    assert kept() == (4, 2)
    one.log.append(ROWS[:10].with_columns(timestamp=pl.col("timestamp") + 10**6))
    assert kept() == (4, 2)
    assert kept(uncertainty=True) == (0, 3)
    one.log.append(ROWS[:200].with_columns(timestamp=pl.col("timestamp") + 10**7))
    assert kept(uncertainty=True) == (0, 4)
    one.log.mark_forgotten("user_id", ["user_id"], ["3"])
    assert kept(uncertainty=True) == (0, 4)
    table = one.folder / "side" / "user_id.parquet"
    pl.read_parquet(table)[1:].write_parquet(table)
    assert kept(uncertainty=True) == (0, 4)
    (one.spool / "plan.json").write_text('{"log": ')
    assert kept(uncertainty=True) == (0, 4)
    timeless = world(time=None)
    with timeless.generation():
        pass
    timeless.log.append(ROWS[:10])
    timeless.publish()  # the shuffle of more rows is another one
    timeless.assert_as_in_memory()


def test_what_makes_no_sense_is_said(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    one = world()
    for options, error, words in (
        ({"workers": 0}, ConfigError, "`workers` is 0; set it to 1 or more"),
        ({"address": "auto"}, ConfigError, "Add --engine ray"),
        ({"device": "abacus"}, ConfigError, "There is no device 'abacus'"),
    ):
        with pytest.raises(error, match=words):
            one.publish(**options)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'limaml\[ray\]'"):
        one.publish(engine_name="ray")
    other = world("newton", BOTH)
    one.trained = other.trained
    with pytest.raises(DataError, match="was changed while embeddings were generated"):
        one.publish()
    one.trained = world(tasks=("item_id",)).trained
    with pytest.raises(ConfigError, match="but the model's first task is named by"):
        one.publish()


keys = st.lists(st.text(max_size=8), unique=True, max_size=12)


@given(keys=keys, factors=st.booleans(), features=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_a_shard_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], factors: bool, features: bool, seed: int
) -> None:
    rng, folder, n = np.random.default_rng(seed), tmp_path_factory.mktemp("shards"), len(keys)
    piece = Piece(
        "member|ä",
        keys,
        rng.normal(size=(n, 3)).astype(np.float32),
        rng.integers(0, 9, n),
        rng.integers(-(2**62), 2**62, n),
        rng.normal(size=(n, 2)).astype(np.float32) if features else None,
        rng.normal(size=(n, 6)).astype(np.float32) if factors else None,
    )
    made = write_shard(folder, piece, Made(1, 7, n, rows=5, newest=-3, time_unit="us", dropped={"duplicates": 2}))
    assert whole_shards(folder) == [made]
    back = read_shard(folder / made.file)
    assert (back.task, back.ids) == (piece.task, keys)
    assert list(back.stored) == list(piece.stored)
    for name, values in piece.stored.items():
        np.testing.assert_array_equal(back.stored[name], values)
    np.testing.assert_array_equal(back.count, piece.count)
    np.testing.assert_array_equal(back.time, piece.time)


@given(users=st.lists(st.sampled_from(["a", "b", "ü", "c|d", ""]), min_size=1, max_size=30), parts=st.integers(1, 5))
@settings(max_examples=40)
def test_dealing_loses_no_row_and_keeps_their_order(
    tmp_path_factory: pytest.TempPathFactory, users: list[str], parts: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "0.rows"
    frame = pl.DataFrame({"u": users}).with_row_index()
    deal(frame, Task(name="u", columns=("u",)), parts, path)
    assert is_dealt(path, parts) and not is_dealt(path.with_name("none"), parts)
    found = [part for number in range(parts) if (part := dealt(path, number)) is not None]
    assert pl.concat(found).sort("index").equals(frame)
    assert all(part["index"].is_sorted() for part in found)
    owners = [set(part["u"]) for part in found]
    assert sum(map(len, owners)) == len(set(users))


def test_a_worker_on_another_device_makes_the_same(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a GPU: what is not moved there, or not fetched back, fails."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "meta")
    from elsewhere import moved, second_device

    one = world()
    with one.generation(uncertainty=True) as made:
        worker = jobs.Worker(
            jobs.Setting(
                one.log.folder,
                made.position,
                one.folder / "model",
                one.trained.digest,
                ("user_id",),
                one.folder / "side",
                one.spool,
                uncertainty=True,
            )
        )
        here = read_shard(one.spool / "shards" / made.shards[0].file)
        with second_device():
            worker._trained = replace(worker._trained, model=moved(worker._trained.model))
            there = read_shard(one.spool / "shards" / worker.do(jobs.Job(0, 0)).file)
    assert here.ids == there.ids
    for name, values in here.stored.items():
        np.testing.assert_allclose(there.stored[name], values, atol=1e-6, rtol=1e-6)


def test_the_commands_and_a_member_who_is_forgotten(
    world: Callable[..., World], capsys: pytest.CaptureFixture[str]
) -> None:
    """`embed` goes on with what is there, adapts again what came meanwhile before it serves, and `forget` leaves no shard."""
    one = world()
    one.store.close()
    shutil.rmtree(one.folder / "store")
    with one.generation():
        pass
    one.log.append(ROWS[:10].with_columns(timestamp=pl.col("timestamp") + 10**6))
    main(["embed", str(one.folder)])
    said = capsys.readouterr().out
    assert "earlier run had made of the log up to append 2: 4 of 4 shards" in said
    assert f"{ROWS[:10]['user_id'].n_unique()} tasks that changed meanwhile were adapted again" in said
    assert not one.shards
    again = World(one.folder)
    again.assert_as_in_memory("model")
    with again.generation():
        pass
    again.store.close()
    member = str(ROWS["user_id"][0])
    main(["store", "forget", str(one.folder), "--task", f"user_id:{member}"])
    assert "What a generation had made, and not published, was removed" in capsys.readouterr().out
    assert not one.shards
    with again.generation():
        main(["store", "forget", str(one.folder), "--task", f"user_id:{member}"])
        assert "Embeddings are being generated in" in capsys.readouterr().out


def test_a_plan_goes_on_only_with_its_own(tmp_path: Path) -> None:
    plan = Plan("log", 3, 1000, "model", ("a",), 4, False, "side")
    spool = Spool(tmp_path / "generation")
    with spool.held():
        assert spool.begin(plan) == (plan, [])
        for rows, fixed, expected in (
            (1000, False, 3),
            (1100, False, 3),
            (1101, False, 4),
            (1000, True, 4),
            (999, False, 4),
        ):
            spool.clear()
            spool.begin(plan)
            assert (
                spool.begin(Plan("log", 4, rows, "model", ("a",), 4, False, "side"), fixed=fixed)[0].position
                == expected
            )
