"""`limaml refresh`: new interactions reach the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import polars as pl
from cyclopts import Parameter

from limaml.cli.align import aligned
from limaml.cli.console import counting, say
from limaml.cli.times import parsed_time, shown_time
from limaml.cli.workspace import Workspace
from limaml.embeddings.refresher import RefreshReport
from limaml.errors import DataError
from limaml.interactions import Schema, check, read_table
from limaml.interactions.index import time_values

__all__ = ["refresh_command", "say_refreshed"]


def refresh_command(
    folder: Path,
    file: Path | None = None,
    /,
    *,
    task_features: Annotated[Path | None, Parameter(help="Table with the features of new tasks.")] = None,
    row_features: Annotated[Path | None, Parameter(help="Table with the features of new row ids.")] = None,
    store: Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")] = None,
    version: Annotated[
        str | None, Parameter(help="Refresh this version only (default: the served one and every newer one).")
    ] = None,
    since: Annotated[
        str | None,
        Parameter(help="Also adapt all tasks with an interaction after this time: what a store lost comes back."),
    ] = None,
) -> None:
    """Take new interactions in: append them to the log once, adapt the touched tasks again, upsert their embeddings.

    Running it again with the same file changes nothing. Tasks that are not in the file keep what they have. The result
    is that of embedding everything anew. What is known of new members or new items comes in by `--task-features` and
    `--row-features`. Every live version is refreshed, each by its own model.

    Without a file it catches up: with what a refresh that was killed has left, or with what happened while a version that
    is served again, after a roll-back, was not.

    `limaml refresh runs/mine today.parquet`

    Next: `limaml recommend` and `limaml score` use the new embeddings at once.
    """
    place = Workspace(folder)
    schema = place.schema
    time = _time_of(schema, folder)
    for key, table in ((schema.tasks[0].name, task_features), (schema.row, row_features)):
        if table is not None:
            say([place.add_features(key, table)])
    new = None if file is None else _checked(place, file, time)
    with place.store(store) as opened, place.refresher(opened, store, version) as refresher:
        if new is not None:
            appended = place.log(schema).append(new)
            if appended.forgotten:
                say([f"{appended.forgotten:,} of the interactions are of forgotten tasks, and are left out."])
            if appended.already:
                say([f"'{file}' is in the log already: nothing was appended."])
            else:
                say([f"{appended.new:,} interactions were appended to the log."])
            if added := place.add_candidates(place.joined(new)[0]):
                say([f"{added:,} new row ids can be recommended now."])
        kind = place.log(schema).schema[time]
        with counting("adapting") as progress:
            report = refresher.run(
                lambda _, task, done, of: progress(task, done, of),
                since=None if since is None else parsed_time(since, kind),
            )
    say_refreshed(report, time, kind)


def say_refreshed(report: RefreshReport, time: str, kind: pl.DataType) -> None:
    """What a refresh did, in sentences."""
    caught = report.caught_up
    if caught.rebuilt:
        say([f"The windows of recent interactions were made from the log, as {caught.rebuilt}."])
    if caught.duplicates:
        say([f"{caught.duplicates:,} interactions are exact duplicates of earlier ones, and do not count."])
    if not report.versions:
        say(["Every live version has all interactions already."])
    for version in report.versions:
        for task, applied in version.applied.items():
            stale, forgotten = version.stale[task], version.forgotten[task]
            rest = f"; {stale:,} had nothing newer" if stale else ""
            rest += f"; {forgotten:,} are forgotten" if forgotten else ""
            say([f"{applied:,} of {applied + stale + forgotten:,} touched tasks '{task}' have a new embedding{rest}."])
        say([f"Version {version.version} is refreshed up to {time} = {shown_time(version.watermark, kind)}."])


def _checked(place: Workspace, file: Path, time: str) -> pl.DataFrame:
    """The rows of `file` as the log takes them; what is wrong with them is said before anything is written."""
    schema, log = place.schema, place.log(place.schema)
    new, extra = aligned(read_table(file), dict(log.schema), f"'{file}'")
    if extra:
        say([f"Columns {', '.join(extra)} of '{file}' are not in the log, and are left out."])
    if new.height and new[time].null_count() == 0 and time_values(new[time])[1] == "order":
        raise DataError(
            f"The time column '{time}' holds {new[time].dtype}, which only gives an order within one table. "
            "Use numbers or dates as the time, and train again (limaml train)."
        )
    joined, dropped = place.joined(new)
    check(joined, schema, added=True).raise_if_bad()
    say([dropped] if dropped else [])
    return new


def _time_of(schema: Schema, folder: Path) -> str:
    if schema.time is None:
        raise DataError(
            f"The model in {folder} was trained without --time, so interactions cannot be placed behind those that are "
            "there. Train again on the whole table (limaml train), with --time if it has a time."
        )
    return schema.time
