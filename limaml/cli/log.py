"""`limaml log`: the interaction log: take files in, look, verify, fold, keep only what is young."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from limaml.cli.console import amount, counting, say
from limaml.cli.durations import seconds_of
from limaml.cli.workspace import Workspace
from limaml.errors import ConfigError
from limaml.interactions import InteractionLog
from limaml.interactions.log import BUFFER_BYTES, WAIT_S
from limaml.interactions.log_retain import TimeUnit

__all__ = ["log_app"]

Folder = Annotated[Path, Parameter(help="Folder of a log, or a run folder, which has one.")]
Wait = Annotated[float, Parameter(help="Seconds to wait while another process writes to the log.")]

log_app = App(name="log", help="The interaction log: take files in, look, verify, fold, keep only what is young.")


def _place(folder: Path) -> Path:
    """The log's own folder, of it or of a run."""
    return folder / "log" if (folder / "log" / "manifest.json").exists() else folder


def _opened(folder: Path) -> InteractionLog:
    return InteractionLog(_place(folder))


@log_app.command
def append(
    folder: Folder,
    sources: Annotated[
        list[str], Parameter(help="Parquet or CSV files, folders of them, globs, or URLs that fsspec reads (s3://…).")
    ],
    /,
    *,
    task: Annotated[
        str | None, Parameter(help="For a new log: the column that names the task, or several: 'a+b'.")
    ] = None,
    buckets: Annotated[int | None, Parameter(help="For a new log: the number of partitions (16).")] = None,
    memory: Annotated[int, Parameter(help="MiB of rows that wait in memory; the peak is about twice that.")] = (
        BUFFER_BYTES >> 20
    ),
    wait: Wait = WAIT_S,
) -> None:
    """Take files into a log, each exactly once by its content, in bounded memory. Killed, the same command goes on.

    `limaml log append logs/clicks "s3://bucket/clicks/day=*/" --task user_id --buckets 64`
    """
    log = InteractionLog(_place(folder), None if task is None else task.split("+"), buckets)
    if memory < 1:
        raise ConfigError(f"--memory is {memory}; give at least 1 MiB.")
    with counting("read:") as show:

        def progress(rows: int, number: int, total: int) -> None:
            show("sources", number, total)
            show("rows", rows, rows)

        done = log.append_all(sources, wait_s=wait, buffer_bytes=memory << 20, progress=progress)
    rows, new, dropped = (sum(getattr(one, name) for one in done.values()) for name in ("rows", "new", "forgotten"))
    known = sum(one.rows > 0 and one.already == one.rows for one in done.values())
    say([f"{new:,} of {rows:,} interactions in {len(done):,} source(s) are new; the log has {log.rows:,} now."])
    if known:
        say([f"{known:,} source(s) were in the log already and added nothing."])
    if dropped:
        say([f"{dropped:,} interactions of forgotten tasks were dropped."])


@log_app.command
def info(folder: Folder, /) -> None:
    """Show what a log holds: rows, columns, partitions, sources, files.

    `limaml log info runs/mine`
    """
    log = _opened(folder)
    held = log.contents()
    rows = Counter[int]()
    for file in held.files:
        if file.bucket is not None:
            rows[file.bucket] += file.rows
    total = sum(file.rows for file in held.files)
    say(
        [
            f"{total:,} interactions in {amount(sum(file.bytes for file in held.files))}, {len(held.files):,} files, of which "
            f"{len(held.tails):,} are tails that `limaml log compact` folds.",
            f"Tasks are named by {' + '.join(log.task_columns)} and lie in {log.bucket_count:,} buckets, the largest of "
            f"{max(rows.values(), default=0):,} rows.",
            f"{held.last:,} appends; {len(held.appends):,} sources are known by their content or key.",
        ]
    )
    say([f"column {name}: {kind}" for name, kind in log.schema.items()])
    say([f"stream {name}: taken in up to {position}" for name, position in sorted(held.positions.items())])
    say([f"{len(keys):,} '{task}' are forgotten." for task, keys in sorted(log.forgotten().items())])


@log_app.command
def verify(folder: Folder, /) -> None:
    """Read every file of a log and compare it with what was written.

    `limaml log verify runs/mine`
    """
    say([f"{_opened(folder).verify():,} interactions are as they were written."])


@log_app.command
def compact(folder: Folder, /, *, wait: Wait = WAIT_S) -> None:
    """Fold the small files of a log into few; no interaction changes. A stream does it by itself, now and then.

    `limaml log compact runs/mine`
    """
    done = _opened(folder).compact(wait_s=wait)
    say([f"{done.before:,} files are {done.after:,} now; {done.rows:,} rows were written again."])


@log_app.command
def retain(
    folder: Folder,
    /,
    *,
    newer_than: Annotated[
        str | None, Parameter(help="Keep interactions younger than this: 90d, 12h, 30m; w for weeks.")
    ] = None,
    last: Annotated[int | None, Parameter(help="Keep each task's last interactions, so many.")] = None,
    time: Annotated[str | None, Parameter(help="Column of event times (default: the time of the run's model).")] = None,
    unit: Annotated[TimeUnit | None, Parameter(help="What a column of integers counts since 1970.")] = None,
    now: Annotated[
        dt.datetime | None, Parameter(help="Count the age back from this moment, in UTC (default: the clock).")
    ] = None,
    dry_run: Annotated[bool, Parameter(help="Only count what would be removed.")] = False,
    wait: Wait = WAIT_S,
) -> None:
    """Remove old interactions for good: those of a certain age, and those beyond each task's last N. With both, a row stays
    if both keep it. The next training, embedding and rebuilding of windows know only what stays (docs/log.md).

    `limaml log retain runs/mine --newer-than 90d --last 500 --dry-run`
    """
    log = _opened(folder)
    if time is None and (folder / "model").is_dir():
        time = Workspace(folder).schema.time
    if time is None:
        raise ConfigError("Say which column holds the times of the interactions: --time COLUMN.")
    with counting("buckets:") as show:
        done = log.retain(
            time,
            newer_than=None if newer_than is None else dt.timedelta(seconds=seconds_of(newer_than, "--newer-than")),
            last=last,
            now=now,
            unit=unit,
            dry_run=dry_run,
            wait_s=wait,
            progress=lambda number, total: show("looked through", number, total),
        )
    verb = "would leave" if dry_run else "left"
    say([f"{done.removed:,} of {done.rows:,} interactions {verb} the log; {done.rows - done.removed:,} stay."])
