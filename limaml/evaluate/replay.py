"""Walk through time as production does: train on the past, serve a period with what was known before it, take it in.

Every policy (`replay_policies.POLICIES`) is judged on the same rows, in the same run; what each costs after the first
training is counted in processor seconds. Jobs run in worker processes of one thread each. With a folder, what is done is
kept, and the same call goes on where it was killed.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.artifact import read_folder, write_folder
from limaml.config import Config, parse_config
from limaml.errors import ArtifactError, ConfigError
from limaml.evaluate.compare import JobProgress
from limaml.evaluate.replay_first import first_training, of_family, with_item_tasks
from limaml.evaluate.replay_past import Timeline
from limaml.evaluate.replay_periods import Periods, choose_periods, equal_parts
from limaml.evaluate.replay_policies import POLICIES, Personalised, Policy, Trained, make_policy
from limaml.evaluate.replay_results import Cost, Replayed, Rows, predictions_of
from limaml.interactions import Schema
from limaml.interactions.columns import factorise

__all__ = ["DEFAULT_POLICIES", "replay"]

DEFAULT_POLICIES = tuple(name for name in POLICIES if name not in ("base_retrained", "limaml_items_never"))
"""The policies of a replay that names none; those of items only where the schema names the column of what is scored."""

KIND, FORMAT = "replay", 1


@dataclass(frozen=True)
class Plan:
    """What all jobs of a replay share; sent to the workers."""

    table: str
    schema: str  # JSON
    config: str  # JSON
    method: str
    periods: Periods
    refreshes: int
    folder: str


@dataclass(frozen=True)
class Job:
    """The first training of a family, or the walk of one policy."""

    family: str
    seed: int
    policy: str | None = None

    def __str__(self) -> str:
        return f"{self.policy or f'{self.family}, first training'} · seed {self.seed}"

    def place(self, plan: Plan) -> Path:
        """The folder of its result; what streams has one for each number of refreshes."""
        name = f"{self.policy or f'first-{self.family}'}-{self.seed}"
        streams = self.policy is not None and POLICIES[self.policy][1] == "stream"
        return Path(plan.folder) / (f"{name}-{plan.refreshes}" if streams else name)


def replay(
    table: Path,
    schema: Schema,
    config: Config | None = None,
    *,
    dataset: str,
    policies: Sequence[str] | None = None,
    method: str = "limaml_newton",
    periods: int | None = None,
    period: str | None = None,
    start: int | None = None,
    refreshes: int = 15,
    seeds: int = 1,
    folder: Path | None = None,
    workers: int | None = None,
    progress: Callable[[JobProgress], None] | None = None,
) -> Replayed:
    """Replay the Parquet file `table`, whose columns `schema` explains.

    `policies` are names of `POLICIES`; `method` is the personalised method, `limaml_newton` or `limaml_gradient`. `periods`,
    `period` and `start` are those of `choose_periods`. A policy that streams refreshes `refreshes` times in each period.
    With `folder` what is done is kept there, and what streams is kept for every number of refreshes. `workers` processes run at a time (default: one per core).

    Raises `DataError` where the rows have no clock that all tasks share, and `ConfigError` for a policy, a method or
    periods that there are none of.
    """
    config = config or Config()
    chosen = _checked(policies, schema, method, refreshes, seeds)
    timeline = _timeline(str(table), schema.model_dump_json())
    cut = choose_periods(timeline.plain, schema.tasks[0].name, periods=periods, period=period, start=start)
    with tempfile.TemporaryDirectory() as scratch:
        plan = Plan(
            str(table),
            schema.model_dump_json(),
            config.model_dump_json(exclude_unset=True),
            method,
            cut,
            refreshes,
            scratch,
        )
        if folder is not None:
            plan = replace(plan, folder=str(Path(folder) / _fingerprint(plan)))
        _run_all(plan, chosen, seeds, workers, progress)
        return _collect(plan, timeline, dataset, chosen, seeds)


def _checked(
    policies: Sequence[str] | None, schema: Schema, method: str, refreshes: int, seeds: int
) -> tuple[str, ...]:
    if method not in ("limaml_newton", "limaml_gradient"):
        raise ConfigError(f"The method of a replay is limaml_newton or limaml_gradient, not '{method}'.")
    if refreshes < 1 or seeds < 1:
        raise ConfigError(f"A replay needs at least 1 seed and 1 refresh per period, not {seeds} and {refreshes}.")
    if policies is None:
        return tuple(name for name in DEFAULT_POLICIES if schema.row is not None or "items" not in name)
    if not policies:
        raise ConfigError(f"Name at least one policy; there are {', '.join(POLICIES)}.")
    for name in policies:
        if name not in POLICIES:
            near = get_close_matches(name, POLICIES, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(POLICIES)}."
            raise ConfigError(f"There is no policy '{name}'; {hint}")
        if "items" in name and schema.row is None:
            raise ConfigError(f"The policy '{name}' needs the column that names what is scored: give it with --row.")
    return tuple(dict.fromkeys(policies))


def _fingerprint(plan: Plan) -> str:
    """Results are taken up only where all that they depend on is the same."""
    digest = hashlib.sha256(Path(plan.table).read_bytes())
    digest.update(repr((plan.schema, plan.config, plan.method, plan.periods)).encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=2)
def _timeline(path: str, schema: str) -> Timeline:
    return Timeline.of(pl.read_parquet(path), Schema.model_validate_json(schema))


@lru_cache(maxsize=2)
def _of_family(plan: Plan, family: str, seed: int) -> tuple[Timeline, Config]:
    config = parse_config(Config.model_validate_json(plan.config).model_dump(exclude_unset=True))
    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    return of_family(_timeline(plan.table, plan.schema), config, family, plan.method, plan.periods.train_rows)


# ---- jobs -----------------------------------------------------------------------------------------------------------


def work(job: Job, plan: Plan) -> Job:
    """Do a job, unless its result is there already; the result is a folder."""
    place = job.place(plan)
    if _done(place):
        return job
    timeline, config = _of_family(plan, job.family, job.seed)
    rows = plan.periods.train_rows
    if job.policy is None:
        trained, seconds = first_training(timeline, config, job.family, rows, None)
        document: dict[str, object] = {"epochs": trained.epochs, "passes": trained.passes, "seconds": seconds}
        tensors = {"state": dict(trained.state)}
    else:
        policy = make_policy(timeline, config, job.family, POLICIES[job.policy][1])
        policy.begin(rows, _first(plan, job.family, job.seed)[0])
        policy.watch.read()  # the first embeddings are part of the first training
        outputs, aged, seconds_of = walk(policy, plan.periods, timeline.plain.time.numpy(), plan.refreshes)
        document, tensors = {"seconds": seconds_of}, {"answer": {"outputs": outputs, **aged}}
    write_folder(place, tensors=tensors, documents={"done": document}, kind=KIND, format=FORMAT)
    return job


def walk(
    policy: Policy, periods: Periods, moments: NDArray[np.int64], refreshes: int
) -> tuple[Tensor, dict[str, Tensor], list[float]]:
    """Serve and absorb every period: outputs `[rows, heads]`, outputs by age of the embeddings, seconds of each period.

    A policy that refreshes is also asked what it would have served with the embeddings of up to half of all periods ago:
    `age 0` is as it serves, `age 3` with the tables of three periods before, each for the rows of the periods that all ages
    have.
    """
    oldest = len(periods) // 2 if policy.then == "refresh" else 0
    outputs: list[Tensor] = []
    aged: dict[str, list[Tensor]] = {f"age {age}": [] for age in range(oldest + 1)} if oldest else {}
    kept: list[Mapping[str, Tensor]] = []
    seconds = []
    for number, period in enumerate(periods.periods):
        if oldest and isinstance(policy, Personalised):
            kept.append(policy.tables)
            if number >= oldest:
                for age in range(oldest + 1):
                    aged[f"age {age}"].append(policy.serve_with(kept[number - age], period))
        parts = equal_parts(moments[: period.last], period.first, refreshes) if policy.then == "stream" else (period,)
        for part in parts:
            outputs.append(policy.serve(part))
            policy.absorb(part)
        seconds.append(policy.watch.read())
    return torch.cat(outputs), {name: torch.cat(found) for name, found in aged.items()}, seconds


def _done(place: Path) -> bool:
    """Whether a whole result is there; one that was cut short is made again."""
    try:
        read_folder(place, kind=KIND, format=FORMAT)
    except ArtifactError:
        return False
    return True


def _first(plan: Plan, family: str, seed: int) -> tuple[Trained, float]:
    found = read_folder(Job(family, seed).place(plan), kind=KIND, format=FORMAT)
    done = found.documents["done"]
    return Trained(found.tensors["state"], int(done["epochs"]), int(done["passes"])), float(done["seconds"])


def _run_all(
    plan: Plan, policies: Sequence[str], seeds: int, workers: int | None, progress: Callable[[JobProgress], None] | None
) -> None:
    families = list(dict.fromkeys(POLICIES[name][0] for name in policies))
    families.sort(key=lambda family: family in ("base", "wide_and_deep"))  # the slow ones first
    todo = [Job(family, seed) for seed in range(seeds) for family in families]
    total, done = len(todo) + seeds * len(policies), 0

    def follow(job: Job) -> list[Job]:
        nonlocal done
        done += 1
        if progress is not None:
            progress(JobProgress(done, total, {}, str(job)))
        own = [name for name in policies if POLICIES[name][0] == job.family] if job.policy is None else []
        return [Job(job.family, job.seed, name) for name in own]

    workers = min(workers or os.cpu_count() or 1, total)
    if workers <= 1:
        while todo:
            todo = follow(work(todo.pop(0), plan)) + todo
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        pending: set[Future[Job]] = {pool.submit(work, job, plan) for job in todo}
        try:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    pending |= {pool.submit(work, job, plan) for job in follow(future.result())}
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise


# ---- results --------------------------------------------------------------------------------------------------------


def _collect(plan: Plan, timeline: Timeline, dataset: str, policies: Sequence[str], seeds: int) -> Replayed:
    streamed = any(POLICIES[name][1] == "stream" for name in policies)
    rows = _rows(timeline, plan.periods, plan.refreshes if streamed else 1)
    predictions, costs, epochs = [], [], {}
    for seed in range(seeds):
        for name in policies:
            family = POLICIES[name][0]
            trained, first = _first(plan, family, seed)
            found = read_folder(Job(family, seed, name).place(plan), kind=KIND, format=FORMAT)
            costs.append(Cost(name, seed, first, tuple(found.documents["done"]["seconds"])))
            epochs[family] = (trained.epochs, trained.passes)
            answer = dict(found.tensors["answer"])
            predictions += predictions_of(timeline, plan.periods, rows, dataset, name, seed, answer)
    return Replayed(
        dataset,
        timeline.schema.tasks[0].name,
        plan.method,
        plan.periods,
        plan.refreshes,
        rows,
        tuple(policies),
        tuple(predictions),
        tuple(costs),
        epochs,
        tuple(_notes(plan, timeline, rows, epochs, policies)),
        Config.model_validate_json(plan.config).compare.replicates,
    )


def _rows(timeline: Timeline, periods: Periods, refreshes: int) -> Rows:
    cut, schema = periods.train_rows, timeline.schema
    task = schema.tasks[0].name
    index = timeline.plain.index[task].numpy()
    period = np.repeat(np.arange(len(periods)), [len(p) for p in periods.periods])
    new_row = None
    if schema.row is not None:
        codes, first = factorise(timeline.frame[schema.row])
        new_row = first[codes][cut:] >= cut
    quiet = np.zeros(len(index) - cut, np.bool_)
    for p in periods.periods:
        rows_before = np.bincount(index[: p.first], minlength=timeline.plain.count(task))
        there, owner = np.unique(index[p.first : p.last], return_inverse=True)
        quiet[p.first - cut : p.last - cut] = (rows_before[there] <= np.median(rows_before[there]))[owner]
    time = timeline.plain.time.numpy()
    parts = [len(part) for p in periods.periods for part in equal_parts(time[: p.last], p.first, refreshes)]
    moment = np.repeat(np.arange(len(parts)), parts)
    support = np.bincount(index[:cut], minlength=timeline.plain.count(task))[index[cut:]]
    return Rows(period, moment, index[cut:], support, support == 0, new_row, quiet)


def _notes(
    plan: Plan,
    timeline: Timeline,
    rows: Rows,
    epochs: Mapping[str, tuple[int, int]],
    policies: Sequence[str],
) -> list[str]:
    cut, periods, schema = plan.periods.train_rows, plan.periods, timeline.schema
    trained = timeline.tasks_before(schema.tasks[0].name, cut)
    notes = [
        f"Trained on the first {cut:,} rows ({trained:,} tasks '{schema.tasks[0].name}'), up to "
        f"{periods.shown(periods.periods[0].start)}; then {len(periods)} periods of {periods.length}, up to "
        f"{periods.shown(periods.periods[-1].end)}, are served and taken in one after the other: {len(rows.task):,} rows."
    ]
    if periods.seconds == 1.0:
        notes.append(f"The numbers in '{schema.time}' are taken as seconds since 1970.")
    if periods.left_out:
        notes.append(f"{periods.left_out} stretches of {periods.length} have no row and are no period.")
    within = "between two refreshes of a policy that streams" if rows.moment.max() >= len(periods) else "in one period"
    notes.append(
        f"GAUC ranks a task's rows {within} with each other: across them, a policy that learns lifts rows that come after "
        "positive ones, of which fewer are left."
    )
    new = f"{rows.new_task.mean():.0%} of the served rows are of tasks without a training row"
    if rows.new_row is not None:
        new += f", {rows.new_row.mean():.0%} of a {schema.row} without one"
    notes.append(new + ".")
    if any("items" in name for name in policies):
        second = with_item_tasks(timeline.frame.head(cut), schema)
        told = [f.name for f in second.features if f.side == schema.row]
        notes.append(
            f"Where items are tasks, '{schema.row}' is a second task type; its meta block reads {', '.join(told)}."
        )
    found = ", ".join(f"{family} {number}" for family, (number, _) in epochs.items())
    share = Config.model_validate_json(plan.config).compare.validation_share
    notes.append(
        f"Epochs found on the last {share:.0%} of the training rows, kept for every later training (last seed): {found}."
    )
    passes = [number for _, number in epochs.values() if number]
    if passes:
        notes.append(f"Fine-tuning makes {passes[0]} passes over a period's rows, found on the same rows.")
    return notes
