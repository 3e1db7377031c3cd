"""`limaml dead-letters`: events that have no row: look at them, replay them, drop them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.markup import escape
from rich.table import Table

from limaml.cli.console import console, say
from limaml.cli.stream import decoder_for, fresh_of
from limaml.cli.workspace import Workspace
from limaml.errors import ConfigError
from limaml.stream.dead_letters import DeadLetters

__all__ = ["dead_letters_app"]

dead_letters_app = App(name="dead-letters", help="Events that have no row: list, show, replay, drop.")

Ids = Annotated[tuple[str, ...], Parameter(help="Ids, such as kafka:clicks:3@1234 (default: all).")]


@dead_letters_app.command(name="list")
def list_letters(
    folder: Path,
    /,
    *,
    source: Annotated[str | None, Parameter(help="Only those of this source, such as kafka:clicks.")] = None,
    limit: Annotated[int, Parameter(help="At most so many.")] = 50,
) -> None:
    """List events that have no row, and why.

    `limaml dead-letters list runs/mine`
    """
    letters = _letters(folder)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("id", "refused at", "reason"):
        table.add_column(column, overflow="fold")
    found = letters.list(source=source, limit=limit)
    for letter in found:
        table.add_row(escape(letter.id), letter.at, escape(letter.reason))
    if found:
        console.print(table)
    say([f"{letters.count():,} dead letters in all."])


@dead_letters_app.command
def show(folder: Path, letter: str, /) -> None:
    """Show one event as it came.

    `limaml dead-letters show runs/mine kafka:clicks:3@1234`
    """
    found = _letters(folder).get(letter)
    taken = None if found.time is None else datetime.datetime.fromtimestamp(found.time, datetime.UTC).isoformat()
    say(
        [
            f"source: {found.source}",
            f"partition: {found.partition}",
            f"position: {found.position}",
            f"taken by the source at: {taken or 'unknown'}",
            f"refused at: {found.at}",
            f"reason: {found.reason}",
            f"bytes: {found.payload.decode('utf-8', errors='backslashreplace')}",
        ]
    )


@dead_letters_app.command
def replay(
    folder: Path,
    letters: Ids = (),
    /,
    *,
    store: Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")] = None,
    max_ahead: Annotated[float, Parameter(help="Seconds that an event may lie in the future.")] = 300.0,
    epoch: Annotated[
        Literal["s", "ms", "us", "ns"], Parameter(help="Unit of numbers that stand for times in a column of datetimes.")
    ] = "s",
) -> None:
    """Try events again: what has a row now goes into the log and the store, each once; the others stay.

    `limaml dead-letters replay runs/mine --epoch ms`
    """
    place = Workspace(folder)
    kept = _letters(folder)
    with place.store(store) as opened, place.refresher(opened, store) as refresher:
        decoder = decoder_for(place, refresher, max_ahead=max_ahead, epoch=epoch)
        done = kept.replay(decoder, place.log(place.schema), letters or None)
        say([f"{done.taken:,} events are rows of the log now; {done.kept:,} are refused still."])
        fresh = fresh_of(refresher.run())
    say([f"{fresh.tasks:,} tasks were adapted again."])


@dead_letters_app.command
def drop(
    folder: Path,
    letters: Ids = (),
    /,
    *,
    every: Annotated[bool, Parameter(name="--all", help="Drop all of them.", negative=())] = False,
) -> None:
    """Remove events for good.

    `limaml dead-letters drop runs/mine kafka:clicks:3@1234`
    """
    if bool(letters) == every:
        raise ConfigError("Name the dead letters to drop, or say --all, which drops every one.")
    say([f"{_letters(folder).drop(None if every else letters):,} dead letters were dropped."])


def _letters(folder: Path) -> DeadLetters:
    if not folder.is_dir():
        raise ConfigError(f"There is no run folder {folder}. Make one with: limaml train FILE … --out {folder}")
    return DeadLetters(folder)
