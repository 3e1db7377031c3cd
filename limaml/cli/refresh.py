"""`limaml refresh`: new interactions reach the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import polars as pl
from cyclopts import Parameter

from limaml.cli.console import say
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.embeddings import refresh
from limaml.interactions import check, read_table, task_keys
from limaml.meta import load_model

__all__ = ["refresh_command"]


def refresh_command(
    folder: Path,
    file: Path,
    /,
    *,
    store: Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")] = None,
) -> None:
    """Take new interactions in: append them to the log once, adapt the touched tasks again, upsert their embeddings.

    Running it again with the same file changes nothing. Tasks that are not in the file keep what they have.

    `limaml refresh runs/mine today.parquet`
    """
    place = Workspace(folder)
    schema = place.schema
    new = read_table(file)
    check(place.joined(new), schema).raise_if_bad()
    log = place.log(schema)
    appended = log.append(new)
    if appended.already:
        say([f"{file} is in the log already: nothing was appended. Its tasks are looked at again all the same."])
    else:
        say([f"{appended.new:,} interactions were appended to the log."])
    touched = {task.name: task_keys(new, task)[0] for task in schema.tasks}
    # The log is partitioned by the first task only: the rows of other task types may be anywhere.
    history = log.read(touched[schema.tasks[0].name]) if len(schema.tasks) == 1 else log.read()
    trained = load_model(place.model)
    with place.store(store) as opened:
        done = refresh(opened, MODEL_NAME, trained, place.joined(history), touched)
    for task, applied in done.applied.items():
        stale = f"; {done.stale[task]:,} had nothing newer" if done.stale[task] else ""
        say([f"{applied:,} of {len(touched[task]):,} touched tasks '{task}' have a new embedding{stale}."])
    say([f"Version {done.version} is refreshed up to {_moment(done.watermark, history, schema.time)}."])


def _moment(watermark: int | None, history: pl.DataFrame, time: str | None) -> str:
    if watermark is None or time is None:
        return "no time"
    return f"{time} = {history[time].max()!s}"
