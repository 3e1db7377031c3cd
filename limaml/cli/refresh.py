"""`limaml refresh`: new interactions reach the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import polars as pl
from cyclopts import Parameter

from limaml.cli.align import aligned
from limaml.cli.console import say
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.embeddings import refresh
from limaml.errors import DataError
from limaml.interactions import Schema, check, read_table, split_key, task_keys
from limaml.interactions.index import time_values

__all__ = ["refresh_command"]


def refresh_command(
    folder: Path,
    file: Path,
    /,
    *,
    task_features: Annotated[Path | None, Parameter(help="Table with the features of new tasks.")] = None,
    row_features: Annotated[Path | None, Parameter(help="Table with the features of new row ids.")] = None,
    store: Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")] = None,
) -> None:
    """Take new interactions in: append them to the log once, adapt the touched tasks again, upsert their embeddings.

    Running it again with the same file changes nothing. Tasks that are not in the file keep what they have. The result
    is that of embedding everything anew. What is known of new members or new items comes in by `--task-features` and
    `--row-features`.

    `limaml refresh runs/mine today.parquet`

    Next: `limaml recommend` and `limaml score` use the new embeddings at once.
    """
    place = Workspace(folder)
    trained = place.trained
    schema = trained.encoder.schema
    log = place.log(schema)
    new, extra = aligned(read_table(file), dict(log.read([]).schema), f"'{file}'")
    if extra:
        say([f"Columns {', '.join(extra)} of '{file}' are not in the log, and are left out."])
    time = _comparable_time(new, schema, file, folder)
    for key, table in ((schema.tasks[0].name, task_features), (schema.row, row_features)):
        if table is not None:
            say([place.add_features(key, table)])
    joined, dropped = place.joined(new)
    check(joined, schema, added=True).raise_if_bad()
    say([dropped] if dropped else [])
    with place.store(store) as opened:
        appended = log.append(new)
        if appended.already:
            say([f"'{file}' is in the log already: nothing was appended. Its tasks are looked at again all the same."])
        else:
            say([f"{appended.new:,} interactions were appended to the log."])
        if added := place.add_candidates(joined):
            say([f"{added:,} new row ids can be recommended now."])
        touched = {task.name: task_keys(new, task)[0] for task in schema.tasks}
        first = schema.tasks[0]
        # The log is partitioned by the first task only: the rows of other task types may be anywhere.
        one = len(schema.tasks) == 1
        keys = [split_key(key, len(first.columns)) for key in touched[first.name]] if one else None
        history = log.read(keys)
        done = refresh(opened, MODEL_NAME, trained, place.joined(history)[0], touched)
    for task, applied in done.applied.items():
        stale = f"; {done.stale[task]:,} had nothing newer" if done.stale[task] else ""
        say([f"{applied:,} of {len(touched[task]):,} touched tasks '{task}' have a new embedding{stale}."])
    say([f"Version {done.version} is refreshed up to {time} = {history[time].max()!s}."])


def _comparable_time(new: pl.DataFrame, schema: Schema, file: Path, folder: Path) -> str:
    """The time column. Refused, before anything is written, is one that is only an order within one table: it cannot
    place new rows behind old ones."""
    if schema.time is None:
        raise DataError(
            f"The model in {folder} was trained without --time, so '{file}' cannot be placed behind the interactions that "
            "are there. Train again on the whole table (limaml train), with --time if it has a time."
        )
    if new.height and new[schema.time].null_count() == 0 and time_values(new[schema.time])[1] == "order":
        raise DataError(
            f"The time column '{schema.time}' holds {new[schema.time].dtype}, which only gives an order within one table. "
            "Use numbers or dates as the time, and train again (limaml train)."
        )
    return schema.time
