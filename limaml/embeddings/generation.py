"""All meta embeddings of a log that may be larger than memory: bucket by bucket into shards, then into a store.

    with generation(log, trained, model_folder, spool_folder, side=…, engine="ray") as made:
        made.publish(store, "model")
        made.clear()

Each step can be killed and begun again: shards that are there and whole are not made again, and readers of the store see a
version when it is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from limaml.config import Config
from limaml.embeddings.deal import is_dealt
from limaml.embeddings.engines import EngineName, engine
from limaml.embeddings.features import task_of
from limaml.embeddings.jobs import Job, Setting, jobs_of
from limaml.embeddings.order import is_clock, write_times
from limaml.embeddings.piece import Piece
from limaml.embeddings.publish import dims_of, publish_pieces
from limaml.embeddings.refresher import log_position
from limaml.embeddings.shards import Made, read_shard
from limaml.embeddings.spool import Plan, Spool, plan_of
from limaml.errors import ConfigError
from limaml.interactions import Encoder, InteractionLog
from limaml.interactions.check import Dropped
from limaml.meta.model import MetaModel
from limaml.meta.saved import TrainedModel
from limaml.store.contract import Published, Store

__all__ = ["Generation", "generation"]

Progress = Callable[[str, int, int], None]
"""Called with (task type, tasks done, tasks in all, as far as can be told)."""


@dataclass(frozen=True)
class Generation:
    """Every shard of a plan. Nobody else generates in its folder while it is held."""

    log: InteractionLog
    trained: TrainedModel
    model: Path
    spool: Spool
    plan: Plan
    shards: Sequence[Made]
    kept: int  # shards that an earlier generation had made

    @property
    def position(self) -> int:
        """The last append that was read."""
        return self.plan.position

    @property
    def tasks(self) -> dict[str, int]:
        """Task type → number of tasks."""
        found = dict.fromkeys(self.plan.tasks, 0)
        for made in self.shards:
            found[self.plan.tasks[made.task]] += made.tasks
        return found

    @property
    def counts(self) -> dict[str, int]:
        """Task type of a store → number of vectors."""
        return {name: self.tasks[task_of(name)] for name in dims_of(self.trained, self.plan.uncertainty)}

    @property
    def dropped(self) -> Dropped:
        """Rows of the log that were left out, by reason."""
        found: Counter[str] = Counter()
        for made in self.shards:
            found.update(made.dropped)
        return Dropped(**found)

    @property
    def some_task(self) -> str | None:
        """The key of a task of the first type; None if there is none."""
        made = next((made for made in self.shards if made.task == 0 and made.tasks), None)
        return None if made is None else read_shard(self.spool.shards / made.file).ids[0]

    def pieces(self) -> Iterator[Piece]:
        """All embeddings, one shard in memory at a time."""
        for made in self.shards:
            if made.tasks:
                yield read_shard(self.spool.shards / made.file)

    def publish(
        self,
        store: Store,
        name: str,
        *,
        dtype: str = "float32",
        note: str = "",
        resume: bool = False,
        activate: bool = True,
    ) -> Published:
        """Publish the shards as a new version, as `embeddings.publish` does; it notes up to which append it holds the log.

        With `resume`, a version that a killed publisher of the same model left half written is gone on with; without
        `activate` it is ready and not served."""
        times = [made.newest for made in self.shards if made.rows]
        units = {made.time_unit for made in self.shards if made.rows}
        return publish_pieces(
            store,
            name,
            self.trained,
            self.model,
            self.pieces(),
            tasks=self.tasks,
            watermark=max(times, default=None),
            time_unit=min(units, default="order"),
            dtype=dtype,
            note=note,
            uncertainty=self.plan.uncertainty,
            extra=log_position(self.log, self.position),
            resume=resume,
            activate=activate,
        )

    def clear(self) -> None:
        """Remove the shards: they are published, or not wanted."""
        self.spool.clear()


@contextmanager
def generation(
    log: InteractionLog,
    trained: TrainedModel,
    model: Path,
    folder: Path,
    *,
    side: Path | None = None,
    uncertainty: bool = False,
    engine_name: EngineName = "local",
    workers: int | None = None,
    address: str | None = None,
    device: str = "cpu",
    build: Callable[[Encoder, Config], MetaModel] | None = None,
    progress: Progress | None = None,
) -> Iterator[Generation]:
    """Adapt every task of `log`, shard by shard into `folder`, with the model of the folder `model`, loaded as `trained`.

    `side` is the folder of the side tables. `engine_name`, `workers` and `address` say where (`engines.engine`), `device` on
    what; the folders must be seen there under the same names. A generation of the same model that was killed is gone on with, up
    to the append it had begun with; what was appended since is for a refresh, and if that is much all begins anew. Memory
    is that of one bucket for each worker, however many there are. Raises `StoreError` if another process generates in
    `folder`, `DataError` for a log that is damaged or was changed while it was read.
    """
    schema = trained.encoder.schema
    if tuple(schema.tasks[0].columns) != log.task_columns:
        raise ConfigError(
            f"The log in {log.folder} is partitioned by {list(log.task_columns)}, but the model's first task is named by "
            f"{list(schema.tasks[0].columns)}. Generate from a log that is partitioned by these."
        )
    tasks = tuple(task.name for task in schema.tasks if task.name in trained.model.tasks)
    if schema.tasks[0].name not in tasks:
        raise ConfigError(
            f"The log in {log.folder} is partitioned by '{schema.tasks[0].name}', which the model does not adapt. Make a log "
            f"that is partitioned by '{tasks[0]}', or publish from a table in memory (limaml.publish)."
        )
    if uncertainty:
        dims_of(trained, uncertainty)  # refuses a solver that knows no posterior
    spool = Spool(folder)
    with spool.held():
        fixed = not is_clock(schema, log.schema)
        plan, there = spool.begin(plan_of(log, trained.digest, tasks, side, uncertainty=uncertainty), fixed=fixed)
        setting = Setting(
            log=log.folder.absolute(),
            position=plan.position,
            model=model.absolute(),
            digest=trained.digest,
            tasks=tasks,
            side=None if side is None else side.absolute(),
            spool=folder.absolute(),
            order=write_times(spool.times, log, schema, plan.position) if fixed else "",
            uncertainty=uncertainty,
            device=device,
            build=build,
        )
        there = [made for made in there if _deals(spool, plan, made)]
        shards = {Job(made.task, made.number): made for made in there}
        with engine(setting, engine_name, workers=workers, address=address) as run:
            for step in jobs_of(plan.tasks, plan.shards):
                left = [job for job in step if job not in shards]
                told = _Told(plan, step, shards, progress)
                for made in run(left, told.inside) if left else ():
                    shards[Job(made.task, made.number)] = made
                    told.done()
        ordered = [shards[job] for step in jobs_of(plan.tasks, plan.shards) for job in step]
        yield Generation(log, trained, model, spool, plan, ordered, len(there))


class _Told:
    """Tells how far a step is: the number of its tasks is guessed from the shards that are made, which hashing makes alike."""

    def __init__(self, plan: Plan, step: Sequence[Job], shards: Mapping[Job, Made], progress: Progress | None) -> None:
        self._plan, self._step, self._shards, self._progress = plan, step, shards, progress

    def done(self) -> None:
        self.inside(0, 0)

    def inside(self, done: int, of: int) -> None:
        """`done` tasks of `of` in the shard that is being made; 0 of 0 where none is, or nothing is known of it."""
        if self._progress is None:
            return
        now = max(job.task for job in self._step)
        current = next((job.task for job in self._step if job not in self._shards), now)
        made = [self._shards[job] for job in self._step if job.task == current and job in self._shards]
        have = sum(one.tasks for one in made)
        seen = len(made) + (1 if of else 0)
        total = round((have + of) * self._plan.shards / seen) if seen else 0
        self._progress(self._plan.tasks[current], have + done, max(total, have + done))


def _deals(spool: Spool, plan: Plan, made: Made) -> bool:
    """Whether what a job left beside its shard is there as well: the rows for the other task types."""
    if made.task or not made.rows:
        return True
    files = (spool.rows / str(task) / f"{made.number:05d}.rows" for task in range(1, len(plan.tasks)))
    return all(is_dealt(file, plan.shards) for file in files)
