"""Compare methods on a table: every protocol, seed and method, in worker processes, from one config.

The number of epochs is found on validation rows (of the first seed, per protocol and method, the same rule for every
method); then each seed trains on all its training rows for that many epochs, and is judged on rows nothing has seen.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import polars as pl
import torch

from limaml.config import CompareConfig, Config, parse_config
from limaml.errors import DataError
from limaml.evaluate.embedding_map import EmbeddingMap
from limaml.evaluate.figures import Curve
from limaml.evaluate.methods import Fitted, Problem, check_methods, config_of, fit_method
from limaml.evaluate.predictions import Predictions
from limaml.evaluate.ranking import Ranked
from limaml.evaluate.ranking_problem import Candidates, ranked_of, ranking_problem
from limaml.interactions import Encoder, Schema, index_interactions
from limaml.meta.outer import Progress
from limaml.meta.saved import save_model
from limaml.tasks import Split, TaskRows, check_no_leak, split_by_new_tasks, split_by_task_order
from limaml.types import Interactions, LossKind, Rows

__all__ = ["Compared", "Job", "JobProgress", "compare", "job_problem", "predictions_of", "split_rows", "train_job"]


@dataclass(frozen=True)
class Job:
    """One training: `epochs` is None where they are to be found on validation rows."""

    protocol: str
    method: str
    seed: int
    epochs: int | None = None
    keep: str | None = None  # folder to save the trained model in

    def __str__(self) -> str:
        search = ", finding epochs" if self.epochs is None else ""
        return f"{self.protocol} · {self.method} · seed {self.seed}{search}"


@dataclass(frozen=True)
class JobProgress:
    """Where the comparison stands: jobs done of all, and the latest news of each running one."""

    done: int
    total: int
    running: Mapping[str, Progress] = field(default_factory=dict)
    finished: str | None = None


@dataclass(frozen=True)
class Compared:
    """All that a report is made of."""

    predictions: tuple[Predictions, ...]
    curves: tuple[Curve, ...]
    epochs: Mapping[tuple[str, str], int]  # (protocol, method) → epochs trained
    notes: tuple[str, ...]
    embedding_map: EmbeddingMap | None = None
    ranked: tuple[Ranked, ...] = ()  # of implicit feedback, in place of predictions


@dataclass(frozen=True)
class Answer:
    """What a job found: its best epoch and learning curve; predictions only where it trained for good."""

    job: Job
    best: int
    predictions: tuple[Predictions, ...]
    curve: Curve
    embedding_map: EmbeddingMap | None = None
    ranked: tuple[Ranked, ...] = ()


def split_rows(data: Interactions, task: str, protocol: str, seed: int, settings: CompareConfig) -> Split:
    """Training and test rows of a protocol."""
    if protocol == "warm":
        return split_by_task_order(data, task, share=settings.test_share)
    return split_by_new_tasks(data, task, seed=seed, share=settings.test_share)


def _validation(data: Interactions, task: str, split: Split, seed: int, settings: CompareConfig) -> Split:
    """The protocol once more, inside the training rows."""
    share = settings.validation_share
    if split.protocol == "warm":
        return split_by_task_order(data, task, share=share, among=split.train, protocol="warm")
    return split_by_new_tasks(data, task, seed=seed + 10_000, share=share, among=split.train)


@lru_cache(maxsize=2)
def _load(path: str, schema: str) -> tuple[pl.DataFrame, Schema, Interactions]:
    frame = pl.read_parquet(path)
    parsed = Schema.model_validate_json(schema)
    return frame, parsed, index_interactions(frame, parsed)


@lru_cache(maxsize=3)
def _problem(
    path: str, schema: str, protocol: str, seed: int, config: str
) -> tuple[Problem, Encoder, Candidates | None]:
    """Rows, split and encoding of one (protocol, seed), kept between the jobs of a worker."""
    frame, parsed, plain = _load(path, schema)
    settings = CompareConfig.model_validate_json(config)
    task = parsed.tasks[0].name
    if settings.implicit.negatives:

        def divide(data: Interactions) -> Split:
            return split_rows(data, task, protocol, seed, settings)

        return ranking_problem(frame, parsed, divide, settings.implicit, seed)
    split = split_rows(plain, task, protocol, seed, settings)
    if not bool(split.test.any()) or not bool(split.train.any()):
        raise DataError(
            f"Protocol '{protocol}' leaves no rows to {'judge' if bool(split.train.any()) else 'train'} on: there are "
            f"{len(plain)} rows of {plain.count(task)} tasks of type '{task}'. More rows per task are needed."
        )
    encoder = Encoder.fit(frame, parsed, split.train)
    data = encoder.encode(frame)
    rows = split.test.nonzero().flatten()
    grouped = TaskRows.of(data.index[task], data.count(task), split.support)
    tasks, owner = torch.unique(data.index[task][rows], return_inverse=True)
    order = torch.sort(owner, stable=True).indices
    check_no_leak(data, task, grouped.of_tasks(tasks), Rows(rows[order], owner[order]), tasks)
    losses = tuple(label.loss for label in parsed.labels)
    return Problem(data, encoder.specs, losses, tuple(t.name for t in parsed.tasks), split), encoder, None


def job_problem(job: Job, path: str, schema: str, config: str) -> tuple[Problem, Encoder]:
    """What a job trains on and is judged on: kept from one job to the next of the same (protocol, seed)."""
    settings = parse_config(json.loads(config)).compare
    problem, encoder, _ = _problem(path, schema, job.protocol, job.seed, settings.model_dump_json())
    if job.epochs is None:
        held = _validation(problem.data, problem.tasks[0], problem.split, job.seed, settings)
        problem = replace(problem, validation=held)
    return problem, encoder


def train_job(
    job: Job, path: str, schema: str, config: str, progress: Callable[[Progress], None] | None = None
) -> tuple[Fitted, Problem, Encoder]:
    """Train one job in this process. The rows of a (protocol, seed) are read, split and encoded once per process.

    `path` names a Parquet file; `schema` and `config` are a `Schema` and a `Config` as JSON.
    """
    problem, encoder = job_problem(job, path, schema, config)
    settings = parse_config(json.loads(config))
    fitted = fit_method(job.method, problem, settings, seed=job.seed, epochs=job.epochs, progress=progress)
    return fitted, problem, encoder


def _run(job: Job, path: str, schema: str, dataset: str, config: str, progress: Callable[[Progress], None]) -> Answer:
    fitted, problem, encoder = train_job(job, path, schema, config, progress)
    epochs = fitted.history.epochs
    valid = [epoch.valid_loss for epoch in epochs]
    curve = Curve(
        dataset,
        job.protocol,
        job.seed,
        job.method,
        [epoch.epoch for epoch in epochs],
        [epoch.train_loss for epoch in epochs],
        None if any(loss is None for loss in valid) else [float(loss) for loss in valid if loss is not None],
        best_epoch=fitted.history.best if job.epochs is None else None,
    )
    if job.epochs is None:
        return Answer(job, fitted.history.best, (), curve)
    if job.keep is not None and fitted.model is not None:
        save_model(
            job.keep,
            fitted.model,
            encoder,
            config_of(job.method, parse_config(json.loads(config))),
            {"protocol": job.protocol, "seed": job.seed, "epochs": job.epochs, "train_loss": epochs[-1].train_loss},
        )
    settings = parse_config(json.loads(config)).compare
    candidates = _problem(path, schema, job.protocol, job.seed, settings.model_dump_json())[2]
    embedding_map = _map(job, problem, fitted.embeddings) if job.keep is not None else None
    if candidates is not None:
        ranked = ranked_of(dataset, job.protocol, job.seed, job.method, candidates, fitted.outputs)
        return Answer(job, job.epochs, (), curve, embedding_map, (ranked,))
    predictions = tuple(predictions_of(job, dataset, problem, fitted.rows, fitted.outputs, encoder))
    return Answer(job, job.epochs, predictions, curve, embedding_map)


def predictions_of(
    job: Job, dataset: str, problem: Problem, rows: torch.Tensor, outputs: torch.Tensor, encoder: Encoder
) -> list[Predictions]:
    """`outputs` `[n, heads]` for the rows `[n]`, as one `Predictions` per label; rows without the label are left out."""
    data, task = problem.data, problem.tasks[0]
    support = TaskRows.of(data.index[task], data.count(task), problem.split.support).size
    owner = data.index[task][rows]
    found = []
    for head, label in enumerate(encoder.schema.labels):
        known = data.labels[rows, head].isfinite()
        weight = data.weights[rows][known].double().numpy()
        found.append(
            Predictions(
                dataset if len(problem.losses) == 1 else f"{dataset}/{label.name}",
                job.protocol,
                job.seed,
                job.method,
                owner[known].numpy(),
                support[owner[known]].numpy(),
                data.labels[rows, head][known].double().numpy(),
                outputs[known, head].double().numpy(),
                None if bool((weight == 1).all()) else weight,
                LossKind(label.loss),
            )
        )
    return found


def _map(job: Job, problem: Problem, embeddings: Mapping[str, torch.Tensor] | None) -> EmbeddingMap | None:
    if not embeddings:
        return None
    data, task = problem.data, problem.tasks[0]
    grouped = TaskRows.of(data.index[task], data.count(task), problem.split.support)
    label = torch.nan_to_num(data.labels[grouped.rows, 0])
    owner = torch.repeat_interleave(torch.arange(data.count(task)), grouped.size)
    total = torch.zeros(data.count(task)).index_add(0, owner, label)
    mean = torch.where(grouped.size > 0, total / grouped.size.clamp(min=1), torch.nan)
    return EmbeddingMap(
        job.protocol,
        job.method,
        embeddings[task].numpy().astype(np.float64),
        data.ids[task],
        grouped.size.numpy(),
        mean.double().numpy(),
    )


# ---- worker processes ---------------------------------------------------------------------------------------------------

_queue: Any = None


def start_worker(queue: Any) -> None:
    global _queue
    _queue = queue
    torch.set_num_threads(1)


def work(job: Job, path: str, schema: str, dataset: str, config: str) -> Answer:
    def tell(progress: Progress) -> None:
        if _queue is not None:
            _queue.put((str(job), progress))

    return _run(job, path, schema, dataset, config, tell)


def compare(
    table: Path,
    schema: Schema,
    config: Config,
    *,
    dataset: str,
    keep: Path | None = None,
    workers: int | None = None,
    progress: Callable[[JobProgress], None] | None = None,
) -> Compared:
    """Compare `config.compare.methods` on the Parquet file `table`, whose columns `schema` explains.

    Runs in `workers` processes of one thread each (default: one per core). With `keep`, the model of `limaml_newton`
    (else of the first personalised method) of the first protocol and seed is saved in that folder.
    """
    settings = config.compare
    check_methods(settings.methods)
    kept = next((m for m in ("limaml_newton", *settings.methods) if m in settings.methods and "limaml" in m), None)
    text, plan = config.model_dump_json(exclude_unset=True), schema.model_dump_json()
    searches = [Job(protocol, method, 0) for protocol in settings.protocols for method in settings.methods]
    # The slow ones first, so that no worker waits for the last.
    searches.sort(key=lambda job: not job.method.startswith("limaml"))
    answers: list[Answer] = []
    best: dict[tuple[str, str], int] = {}
    total = len(searches) * (1 + settings.seeds)
    running: dict[str, Progress] = {}

    def follow(job: Job) -> list[Job]:
        return [
            Job(
                job.protocol,
                job.method,
                seed,
                best[job.protocol, job.method],
                str(keep)
                if keep is not None and (job.protocol, job.method, seed) == (settings.protocols[0], kept, 0)
                else None,
            )
            for seed in range(settings.seeds)
        ]

    def take(answer: Answer) -> list[Job]:
        answers.append(answer)
        running.pop(str(answer.job), None)
        if progress is not None:
            progress(JobProgress(len(answers), total, dict(running), str(answer.job)))
        if answer.job.epochs is not None:
            return []
        best[answer.job.protocol, answer.job.method] = answer.best
        return follow(answer.job)

    def tell(name: str, news: Progress) -> None:
        running[name] = news
        if progress is not None:
            progress(JobProgress(len(answers), total, dict(running)))

    workers = min(workers or os.cpu_count() or 1, total)
    if workers <= 1:
        todo = list(searches)
        while todo:
            job = todo.pop(0)
            todo += take(_run(job, str(table), plan, dataset, text, partial(tell, str(job))))
    else:
        _run_in_processes(searches, (str(table), plan, dataset, text), workers, take, tell)
    answers.sort(key=lambda a: (a.job.protocol, settings.methods.index(a.job.method), a.job.seed))
    return Compared(
        tuple(p for answer in answers for p in answer.predictions),
        tuple(answer.curve for answer in answers if answer.job.epochs is None),
        best,
        tuple(_notes(table, schema, settings, best)),
        next((answer.embedding_map for answer in answers if answer.embedding_map is not None), None),
        tuple(r for answer in answers for r in answer.ranked),
    )


def _run_in_processes(
    jobs: Sequence[Job],
    arguments: tuple[str, str, str, str],
    workers: int,
    take: Callable[[Answer], list[Job]],
    tell: Callable[[str, Progress], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        queue = manager.Queue()
        with ProcessPoolExecutor(workers, context, start_worker, (queue,)) as pool:
            pending: set[Future[Answer]] = {pool.submit(work, job, *arguments) for job in jobs}
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                    try:
                        while True:
                            tell(*queue.get_nowait())
                    except Empty:
                        pass
                    for future in done:
                        pending |= {pool.submit(work, job, *arguments) for job in take(future.result())}
            except BaseException:
                pool.shutdown(cancel_futures=True, wait=False)
                raise


def _notes(table: Path, schema: Schema, settings: CompareConfig, best: Mapping[tuple[str, str], int]) -> list[str]:
    """What was decided on the way: splits, ties, epochs."""
    _, _, data = _load(str(table), schema.model_dump_json())
    task = schema.tasks[0].name
    notes = []
    for protocol in settings.protocols:
        split = split_rows(data, task, protocol, 0, settings)
        what = (
            f"each task's last {settings.test_share:.0%} of rows is the test"
            if protocol == "warm"
            else f"{settings.test_share:.0%} of the tasks are never trained on; the later half of each is the test"
        )
        tied = (
            f" {split.tied} rows tie in time with their task's cut and went to the test's side." if split.tied else ""
        )
        notes.append(
            f"Protocol {protocol}: {what}: {int(split.train.sum())} training rows, {int(split.test.sum())} test rows "
            f"(seed 0).{tied}"
        )
        epochs = ", ".join(f"{method} {best[protocol, method]}" for method in settings.methods)
        notes.append(
            f"Protocol {protocol}: epochs found on validation rows of seed 0 ({settings.validation_share:.0%}, held out as "
            f"the test rows are), then every seed trained on all training rows: {epochs}."
        )
        if settings.implicit.negatives:
            candidates = _problem(str(table), schema.model_dump_json(), protocol, 0, settings.model_dump_json())[2]
            notes += [f"Protocol {protocol}: {note}" for note in candidates.notes] if candidates is not None else []
    return notes
