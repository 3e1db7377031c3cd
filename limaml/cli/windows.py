"""`limaml windows`: each task's recent interactions, as a refresh sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import polars as pl
from cyclopts import App, Parameter
from rich.markup import escape
from rich.table import Table

from limaml.cli.console import console, say
from limaml.cli.times import shown_time
from limaml.cli.workspace import Workspace

__all__ = ["split_task", "windows_app"]

windows_app = App(name="windows", help="Each task's recent interactions, packed beside the store: look, make anew.")


def split_task(text: str, types: list[str]) -> tuple[str, str]:
    """`user_id:42` → task type and key; a key alone is of the first type."""
    kind, colon, key = text.partition(":")
    return (kind, key) if colon and kind in types else (types[0], text)


@windows_app.command
def rebuild(folder: Path, /) -> None:
    """Make the windows anew from the log, which holds all that they do.

    `limaml windows rebuild runs/mine`
    """
    place = Workspace(folder)
    with place.windows() as windows:
        done = windows.rebuild()
        told = ", ".join(f"{windows.count(task):,} '{task}'" for task in windows.layout.tasks)
    say([f"{done.rows:,} interactions made windows of {told}; {done.duplicates:,} exact duplicates do not count."])


@windows_app.command
def show(
    folder: Path,
    /,
    *,
    task: Annotated[str | None, Parameter(help="One task's window: type:key, such as user_id:42.")] = None,
    rows: Annotated[int, Parameter(help="Show at most so many of its interactions.")] = 20,
) -> None:
    """Show how far the windows are, or the interactions that one task is adapted on.

    `limaml windows show runs/mine --task user_id:42`
    """
    place = Workspace(folder)
    log = place.log(place.schema)
    with place.windows() as windows:
        kind = log.schema[windows.layout.time]
        if task is None:
            keep = "all" if windows.layout.keep is None else f"the last {windows.layout.keep}"
            say(
                [
                    f"The windows have come to append {windows.position} of {log.position}; they keep {keep} interactions."
                ]
            )
            say([f"{windows.count(name):,} tasks '{name}'" for name in windows.layout.tasks])
            return
        name, key = split_task(task, list(windows.layout.tasks))
        held = windows.read(name, [key])
    if not held.frame.height:
        say([f"There is no interaction of {name}:{key} in the windows."])
        return
    newest = shown_time(int(held.newest[0]), kind)
    say([f"{name}:{key} has {int(held.count[0]):,} interactions, the newest at {newest}; the last are:"])
    console.print(_table(held.frame.tail(rows)))


def _table(frame: pl.DataFrame) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in frame.columns:
        table.add_column(escape(column), max_width=40, no_wrap=True)
    for row in frame.iter_rows():
        table.add_row(*(escape("" if value is None else str(value)) for value in row))
    return table
