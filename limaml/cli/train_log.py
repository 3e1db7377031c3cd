"""Training from an interaction log in place of a table: what is known of it before it is read, and what a run keeps of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from limaml.cli.options import DataOptions, asked_schema
from limaml.cli.workspace import Workspace
from limaml.errors import ConfigError
from limaml.interactions import InteractionLog, Schema, prepare, read_table
from limaml.interactions.atomic_files import file_sha256, written
from limaml.interactions.buckets import LogBuckets, rows_needed
from limaml.interactions.check import check
from limaml.interactions.side_tables import SideTables
from limaml.meta.distributed import Ranks
from limaml.types import ROW

__all__ = ["LogSource", "log_in"]

SCHEMA_ROWS = 200_000  # what the schema is found on


def log_in(folder: Path) -> InteractionLog | None:
    """The log in a folder, or in the run folder that it is; None where there is none."""
    for place in (folder, folder / "log"):
        if (place / "manifest.json").exists() and (place / "data").is_dir():
            return InteractionLog(place)
    return None


@dataclass(frozen=True)
class LogSource:
    """A log that a run trains on, as it was when the run began; the run's side tables are in their place already."""

    buckets: LogBuckets
    tables: Mapping[str, Path]  # side tables by the key that joins them
    notes: tuple[str, ...]
    digest: str  # what tells these rows from all others

    @property
    def schema(self) -> Schema:
        return self.buckets.schema

    @staticmethod
    def of(log: InteractionLog, options: DataOptions, place: Workspace, ranks: Ranks) -> LogSource:
        """Link the log to the run, copy the side tables, find the schema. All ranks call it, and one writes."""
        if options.max_tasks is not None:
            raise ConfigError(
                "--max-tasks does not go with a log. To train on a part of its tasks in each epoch, set train.tasks_per_epoch."
            )
        if ranks.leads:
            _link(log, place)
            _keep_position(log, place)
            _copy_tables(options, place)
        ranks.agree(0, "")  # everybody waits until all is there
        position = int((place.checkpoint / "position").read_text(encoding="utf-8"))
        tables = _tables(place)
        schema, notes = _schema(log, position, options, tables)
        given = [path for path in (options.task_features, options.row_features) if path is not None and path.is_file()]
        digest = " ".join([log.id, str(position), *map(file_sha256, given)])
        side = SideTables(place.folder / "side")
        return LogSource(LogBuckets(log, schema, position, side), tables, tuple(notes), digest)

    def look(self, number: int, frame: pl.DataFrame) -> None:
        """Refuse a bucket with rows that would spoil training."""
        if frame.height:
            check(frame, self.schema, sample=1000, added=True).raise_if_bad()

    def write_candidates(self, path: Path) -> None:
        """Every row id with its latest features, and what else the table of rows says of it; one bucket in memory at a time."""
        schema = self.schema
        if schema.row is None:
            return
        own = [feature.column for feature in schema.features if feature.side == ROW]
        columns = list(dict.fromkeys([schema.row, *own]))
        times = [] if schema.time is None or schema.time in columns else [schema.time]
        latest: pl.DataFrame | None = None
        for number in range(self.buckets.count):
            part = self.buckets.read(number).select([*columns, *times]).drop_nulls(schema.row)
            both = part if latest is None else pl.concat([latest, part], how="vertical_relaxed")
            ordered = both if schema.time is None else both.sort(schema.time, maintain_order=True)
            latest = ordered.unique(schema.row, keep="last", maintain_order=True)
        assert latest is not None
        found = latest.select(columns)
        if schema.row in self.tables:
            taken = {schema.row, *self.buckets.log.schema, *found.columns}
            table = self.tables[schema.row]
            more = [name for name in pl.read_parquet_schema(table) if name not in taken]
            if more:
                extra = rows_needed(found, schema.row, table, more)
                found = found.join(extra, on=schema.row, how="left", maintain_order="left")
        part_file = path.with_name(path.name + ".part")
        with written(path):
            found.write_parquet(part_file)
            part_file.replace(path)


def _link(log: InteractionLog, place: Workspace) -> None:
    """Make the log that of the run: refresh, embed and stream find it there."""
    here = place.folder / "log"
    if here.exists():
        if here.resolve() != log.folder.resolve():
            raise ConfigError(
                f"{here} is another log than {log.folder}, and the two cannot be mixed. Use another --out, or remove "
                f"{place.folder}."
            )
        return
    place.folder.mkdir(parents=True, exist_ok=True)
    here.symlink_to(log.folder.resolve(), target_is_directory=True)


def _keep_position(log: InteractionLog, place: Workspace) -> None:
    """A run that goes on trains on what the log had when it began."""
    path = place.checkpoint / "position"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (path.exists() and any(entry.is_dir() for entry in path.parent.iterdir())):
        path.write_text(str(log.position), encoding="utf-8")


def _copy_tables(options: DataOptions, place: Workspace) -> None:
    """The side tables, as Parquet, where a run keeps them; what was given in other formats is in memory meanwhile."""
    side = place.folder / "side"
    side.mkdir(parents=True, exist_ok=True)
    given: list[tuple[str, Path]] = []
    if options.task_features is not None:
        given.append((options.task[0], options.task_features))
    if options.row_features is not None:
        if options.row is None:
            raise ConfigError("Row features need the column to join them by: name it as the row (--row item_id).")
        given.append((options.row, options.row_features))
    files = {}
    for number, (key, source) in enumerate(given):
        files[key] = f"{number}.parquet"
        if source.suffix == ".parquet" and source.is_file():
            pl.scan_parquet(source).sink_parquet(side / files[key])
        else:
            read_table(source).write_parquet(side / files[key])
    (side / "tables.json").write_text(json.dumps(files), encoding="utf-8")


def _tables(place: Workspace) -> dict[str, Path]:
    side = place.folder / "side"
    files: Mapping[str, str] = json.loads((side / "tables.json").read_text(encoding="utf-8"))
    return {key: side / file for key, file in files.items()}


def _schema(
    log: InteractionLog, position: int, options: DataOptions, tables: Mapping[str, Path]
) -> tuple[Schema, list[str]]:
    """The schema that was given, or the one of the rows of the first buckets."""
    if not options.label:
        raise ConfigError("Say what to predict with --label: a column, or a rule such as --label 'rating >= 4'.")
    if options.schema is not None:
        return asked_schema(options.schema, options), [f"{log.rows:,} interactions are in the log."]
    frames: list[pl.DataFrame] = []
    for number in range(log.bucket_count):
        frames.append(log.bucket(number, through=position))
        if sum(frame.height for frame in frames) >= SCHEMA_ROWS:
            break
    sample = pl.concat(frames)
    needed = {key: rows_needed(sample, key, path) for key, path in tables.items()}
    found = prepare(
        sample,
        task=options.task,
        label=options.label,
        row=options.row,
        time=options.time,
        task_features=needed.get(options.task[0]),
        row_features=None if options.row is None else needed.get(options.row),
        weight=options.weight,
        exclude=options.exclude or (),
        seed=options.data_seed,
    )
    said = f"{log.rows:,} interactions are in the log; the schema is found on {sample.height:,} of them."
    return found.schema, [said, *found.notes[1:]]
