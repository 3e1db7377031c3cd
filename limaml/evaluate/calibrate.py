"""Unit costs of one core of this machine, measured with the code that does the work: one to two minutes.

What is made is small and all there: two logs of as many rows, of many members with few rows and of few with many, with tables of
features of members and items beside them; a model for each size of the meta embedding. Then all members are adapted by jobs of
a generation, published, a few act and are refreshed, and a request is scored. Each cost is the median of some runs, and what
depends on the length of the support is the difference between the two logs.

All is done by a process with one thread: the libraries in it would else take all cores, and a core's cost would not be seen.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
import polars as pl
import torch

from limaml.config import parse_config
from limaml.embeddings.engines import ONE_THREAD, variables
from limaml.embeddings.generation import Generation, generation
from limaml.embeddings.refresher import Refresher
from limaml.errors import LimamlError
from limaml.evaluate.machine import processor_name
from limaml.evaluate.plan import AdaptCost, UnitCosts
from limaml.interactions import InteractionLog, infer_schema, join_tables
from limaml.interactions.side_tables import SideTables
from limaml.meta import TrainedModel, train
from limaml.serving import Predictor
from limaml.store import open_store
from limaml.store.contract import Store

__all__ = ["calibrate"]

SHORT, LONG = 8, 64
REFRESHED_BUCKETS = 64  # of the log that is refreshed from: those of a log of a hundred million rows
TASKS, ITEMS, CANDIDATES = 2048, 20_000, 100
TASK = "user_id"
START, DAY = 1_700_000_000, 86_400
Tell = Callable[[str], None]


def calibrate(
    dims: Sequence[int] = (16, 32, 64, 128),
    *,
    solver: str = "newton",
    repetitions: int = 3,
    tasks: int = TASKS,
    progress: Tell = lambda _: None,
) -> UnitCosts:
    """Measure with `tasks` members of 64 rows and eight times as many of 8; `progress` is called with what is measured next."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    folder = tempfile.TemporaryDirectory(prefix="limaml-plan-")  # removed here, also where the process is killed
    given = there, Path(folder.name), tuple(dims), solver, repetitions, tasks
    process = context.Process(target=_told, args=given, daemon=True)
    with variables(ONE_THREAD):
        process.start()
    there.close()
    try:
        while True:
            what, value = here.recv()
            if what == "next":
                progress(value)
            elif what == "failed":
                raise LimamlError(f"The unit costs could not be measured: {value}")
            else:
                return UnitCosts.model_validate_json(value)
    except EOFError as error:
        raise LimamlError(
            "The process that measured the unit costs was ended from outside, perhaps for lack of memory."
        ) from error
    finally:
        process.kill()
        process.join()
        folder.cleanup()


def _told(pipe: Connection, folder: Path, dims: Sequence[int], solver: str, repetitions: int, tasks: int) -> None:
    torch.set_num_threads(1)
    try:
        found = _Bench(folder, solver, repetitions, tasks, lambda what: pipe.send(("next", what))).costs(dims)
        pipe.send(("done", found.model_dump_json()))
    except Exception as error:  # told where it is read
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


class _Bench:
    """The logs, the tables and the models in a folder, and what is measured with them."""

    def __init__(self, folder: Path, solver: str, repetitions: int, tasks: int, tell: Tell) -> None:
        self.folder, self.solver, self.repetitions, self.tell = folder, solver, repetitions, tell
        self.lengths = {SHORT: tasks * (LONG // SHORT), LONG: tasks}  # support rows → members
        self.rows = tasks * LONG  # of each log
        self.side = _side_tables(folder / "side", max(self.lengths.values()))

    def costs(self, dims: Sequence[int]) -> UnitCosts:
        self.tell("the log")
        frames = {length: _interactions(count, length) for length, count in self.lengths.items()}
        ingest = median(self._ingested(length, frame) for length, frame in frames.items())
        files = [path for length in frames for path in self._log(length).folder.rglob("*.parquet")]
        log_bytes = sum(path.stat().st_size for path in files) / (2 * self.rows)
        adapt, reading, writing = list[AdaptCost](), list[float](), list[float]()
        for dim in dims:
            self.tell(f"adaptation, {dim} numbers")
            trained = self._trained(dim, frames[LONG])
            spent = {length: self._generated(trained, dim, length) for length in self.lengths}
            each = {length: seconds["adapt"] / self.lengths[length] for length, seconds in spent.items()}
            per_row = max((each[LONG] - each[SHORT]) / (LONG - SHORT), 1e-9)
            adapt.append(AdaptCost(dim=dim, per_task=max(0.0, each[SHORT] - SHORT * per_row), per_row=per_row))
            reading += [seconds["read"] + seconds["encode"] for seconds in spent.values()]
            writing.append(spent[SHORT]["write"] / self.lengths[SHORT])
        with open_store(self.folder / "store") as store:
            self.tell("the store")
            put = median(writing) + self._published(store, trained, dim) / self.lengths[SHORT]
            self.tell("a refresh")
            run, again = self._refreshed(store, frames[SHORT], adapt[-1], self.rows / median(reading))
            self.tell("a request")
            request = self._asked(store)
        return UnitCosts(
            machine=processor_name(),
            cores=os.cpu_count() or 1,
            date=datetime.date.today().isoformat(),
            solver=self.solver,
            adapt=tuple(adapt),
            ingest_rows=self.rows / ingest,
            read_rows=self.rows / median(reading),
            log_bytes=log_bytes,
            put_tasks=1 / put,
            refresh_run=run,
            refresh_task=again,
            request=request,
            request_rows=CANDIDATES,
        )

    def _log(self, length: int) -> InteractionLog:
        return InteractionLog(self.folder / f"log-{length}", TASK)

    def _model(self, dim: int) -> Path:
        return self.folder / f"model-{dim}"

    def _ingested(self, length: int, frame: pl.DataFrame) -> float:
        """Seconds in which all rows enter a log; the last one that is made is kept."""
        places = [self.folder / f"again-{length}-{turn}" for turn in range(self.repetitions)]
        logs = [InteractionLog(place, TASK, 2) for place in [*places, self.folder / f"log-{length}"]]
        return median([_seconds(partial(log.append, frame)) for log in logs][1:])

    def _trained(self, dim: int, frame: pl.DataFrame) -> TrainedModel:
        """A model of the default settings, trained on a quarter of the members."""
        tables = {key: pl.read_parquet(self.side / f"{key}.parquet") for key in (TASK, "item_id")}
        some = join_tables(frame.filter(pl.col(TASK) % 4 == 0), tables)
        schema = infer_schema(
            some.frame,
            task=TASK,
            row="item_id",
            time="time",
            label="click",
            task_columns={TASK: some.columns[TASK]},
            row_columns=some.columns["item_id"],
            exclude=["watched"],
        ).schema
        config = parse_config({"model": {"dim": dim}, "adapt": {"solver": self.solver}, "train": {"epochs": 1}})
        return train(some.frame, schema, config, validation_share=0.1, refit=False).save(self._model(dim))

    def _generation(self, trained: TrainedModel, dim: int, length: int) -> AbstractContextManager[Generation]:
        """All shards of a log; those that are there are kept."""
        spool = self.folder / f"spool-{length}"
        return generation(self._log(length), trained, self._model(dim), spool, side=self.side)

    def _generated(self, trained: TrainedModel, dim: int, length: int) -> dict[str, float]:
        """Seconds of what the jobs of a generation do, medians of all runs. The last run's shards are kept."""
        found = list[dict[str, float]]()
        for turn in range(self.repetitions):
            with self._generation(trained, dim, length) as made:
                names = made.shards[0].seconds
                found.append({name: sum(shard.seconds[name] for shard in made.shards) for name in names})
                if turn + 1 < self.repetitions:
                    made.clear()
        return {name: median(one[name] for one in found) for name in found[0]}

    def _published(self, store: Store, trained: TrainedModel, dim: int) -> float:
        """Seconds to publish the many members' shards that are there."""
        found = []
        with self._generation(trained, dim, SHORT) as made:
            for _ in range(self.repetitions + 1):
                found.append(_seconds(lambda: made.publish(store, "model")))
                store.expire("model", 1)
        return median(found[1:])

    def _refreshed(self, store: Store, frame: pl.DataFrame, adapt: AdaptCost, read_rows: float) -> tuple[float, float]:
        """Seconds of a run for itself, and of a member that acted beside adapting it and reading its rows: from runs for an
        eighth of the members and for few. What acted lies in as many files as the log has buckets."""
        log, members = InteractionLog(self.folder / "log-refreshed", TASK, REFRESHED_BUCKETS), self.lengths[SHORT]
        log.append(frame)
        few, many = max(1, members // 256), max(2, members // 8)
        rng, taken = np.random.default_rng(2), dict[int, list[float]]()
        with Refresher(store, "model", log, self.folder / "windows", SideTables(self.side)) as refresher:
            refresher.run()  # makes the windows, and adapts all members from them
            for turn in range(self.repetitions):
                for number in (few, many):
                    now = START + (200 + turn) * DAY + number
                    acting = rng.choice(members, number, replace=False)
                    log.append(_rows(acting, np.full(number, now), rng))
                    support = SHORT + 1 + turn
                    known = number * (adapt.per_task + support * adapt.per_row + support / read_rows)
                    taken.setdefault(number, []).append(_seconds(refresher.run) - known)
        least, most = median(taken[few]), median(taken[many])
        again = max(0.0, (most - least) / (many - few))
        return max(0.0, least - few * again), again

    def _asked(self, store: Store) -> float:
        """Seconds of a request."""
        asked = pl.DataFrame({TASK: np.zeros(CANDIDATES, np.int64), "item_id": np.arange(CANDIDATES)})
        items = pl.read_parquet(self.side / "item_id.parquet")
        asked = asked.join(items, on="item_id", how="left")
        with Predictor(store, "model") as predictor:
            return median(_seconds(lambda: predictor.score(asked)) for _ in range(50 * self.repetitions))


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _rows(members: np.ndarray, times: np.ndarray, rng: np.random.Generator) -> pl.DataFrame:
    """Interactions of these members at these times with items of which few are wanted often."""
    rows = len(members)
    return pl.DataFrame(
        {
            TASK: members,
            "item_id": (ITEMS * rng.random(rows) ** 2.5).astype(np.int64),
            "time": times,
            "watched": rng.exponential(30, rows).astype(np.float32),
            "click": rng.random(rows) < 0.3,
        }
    )


def _interactions(members: int, length: int) -> pl.DataFrame:
    """So many rows of each member, in the order of time."""
    rng = np.random.default_rng(length)
    rows = members * length
    return _rows(
        rng.permutation(np.repeat(np.arange(members), length)), START + np.arange(rows) * 100 * DAY // rows, rng
    )


def _side_tables(folder: Path, members: int) -> Path:
    """Two features of each member and two of each item."""
    folder.mkdir()
    ids, items = np.arange(members), np.arange(ITEMS)
    tables = {
        TASK: pl.DataFrame({TASK: ids, "country": ids * 7919 % 60, "age": (18 + ids % 60).astype(np.float32)}),
        "item_id": pl.DataFrame({"item_id": items, "kind": items * 31 % 40, "size": (items % 300).astype(np.float32)}),
    }
    for key, table in tables.items():
        table.write_parquet(folder / f"{key}.parquet")
    (folder / "tables.json").write_text(json.dumps({key: f"{key}.parquet" for key in tables}), encoding="utf-8")
    return folder
