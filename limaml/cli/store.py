"""`limaml store`: versions of embeddings: look, roll back, remove, verify."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.markup import escape
from rich.table import Table

from limaml.cli.console import amount, console, say
from limaml.cli.forget import forget_tasks, recall_tasks
from limaml.cli.windows import split_task
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.embeddings.features import task_of
from limaml.embeddings.publish import dims_of
from limaml.interactions import task_keys
from limaml.interactions.schema import Task
from limaml.store import Store, open_store

__all__ = ["store_app"]

Where = Annotated[str, Parameter(help="Run folder, or path or URL of a store.")]
Name = Annotated[str, Parameter(help="Name of the model in the store.")]

store_app = App(name="store", help="Versions of embeddings: list, show, roll back, expire, verify, estimate, forget.")


@contextmanager
def _opened(where: str) -> Iterator[Store]:
    inside = Path(where) / "store"
    if _is_run(where):
        opened = Workspace(Path(where)).store()
    else:
        opened = open_store(inside if "://" not in where and inside.is_dir() else where, create=False)
    with opened as store:
        yield store


def _is_run(where: str) -> bool:
    return "://" not in where and (Path(where) / "model").is_dir()


@store_app.command(name="list")
def list_versions(where: Where, /) -> None:
    """List the models and versions in a store; the one that is served is marked.

    `limaml store list runs/mine`
    """
    with _opened(where) as store:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("model", "version", "state", "created", "embeddings", "size", "watermark", "note"):
            table.add_column(column, justify="right" if column in ("embeddings", "size", "watermark") else "left")
        for model in store.models():
            current = store.current(model)
            for version in store.versions(model):
                served = "served" if version.id == current else version.state
                counts = sum(count for name, count in version.counts.items() if task_of(name) == name)
                mark = "" if version.watermark is None else str(version.watermark)
                table.add_row(
                    model,
                    version.id,
                    served,
                    version.created,
                    f"{counts:,}",
                    amount(version.bytes),
                    mark,
                    escape(version.note),
                )
        console.print(table)
        size = store.size()
        say([f"{size.keys:,} keys, {amount(size.payload)} of keys and values, {amount(size.file_bytes)} on disk."])


@store_app.command
def show(
    where: Where,
    /,
    *,
    task: Annotated[str | None, Parameter(help="Look one task up: type:key, such as user_id:42.")] = None,
    version: Annotated[str | None, Parameter(help="Version (default: the one that is served).")] = None,
    model: Name = MODEL_NAME,
) -> None:
    """Show all that a store knows of a version, or one task's embedding.

    `limaml store show runs/mine --task user_id:42`
    """
    with _opened(where) as store:
        described = store.describe(model, version)
        if task is None:
            for name in (
                "id",
                "state",
                "created",
                "artifact",
                "watermark",
                "note",
                "dims",
                "dtypes",
                "counts",
                "bytes",
            ):
                say([f"{name}: {getattr(described, name)}"])
            for pointer in store.history(model)[-10:]:
                say([f"served since {pointer.at}: {pointer.version} ({pointer.reason})"])
            return
        kind, _, key = task.partition(":")
        if kind not in described.dims:
            kind, key = next(iter(described.dims)), task
        with store.read(model, described.id) as reader:
            found = reader.get(kind, [key])
        if not bool(found.found[0]):
            say([f"{kind}:{key} is not in version {described.id}; it is served the cold embedding."])
            return
        say(
            [
                f"{kind}:{key} in {described.id}: {int(found.count[0])} interactions, newest at {int(found.event_time[0])}"
            ]
        )
        say([" ".join(f"{value:.4f}" for value in found.vectors[0])])


@store_app.command
def rollback(
    where: Where,
    /,
    *,
    to: Annotated[str | None, Parameter(help="Version to serve (default: the one served before).")] = None,
    model: Name = MODEL_NAME,
) -> None:
    """Serve an earlier version, at once.

    `limaml store rollback runs/mine`
    """
    with _opened(where) as store:
        version = store.rollback(model, to)
        described = store.describe(model, version)
        say(
            [f"Version {version} of '{model}' is served again; it is refreshed up to event time {described.watermark}."]
        )
        if _is_run(where) and model == MODEL_NAME and (Path(where) / "windows").is_dir():
            with Workspace(Path(where)).refresher(store) as refresher:
                behind, missed = refresher.behind().get(version, 0), refresher.missed
            if behind or missed:
                say(
                    [
                        f"{behind:,} tasks have changed since{', and the log has more' if missed else ''}; a stream catches it up by "
                        f"itself, and so does: limaml refresh {where}"
                    ]
                )


@store_app.command
def expire(
    where: Where, /, *, keep: Annotated[int, Parameter(help="Ready versions to keep.")] = 3, model: Name = MODEL_NAME
) -> None:
    """Remove old versions; never the served one, nor one that somebody reads.

    `limaml store expire runs/mine --keep 2`
    """
    with _opened(where) as store:
        done = store.expire(model, keep)
        say([f"Removed: {', '.join(done.removed) or 'nothing'}."])
        if done.held:
            say([f"Kept, as they are being read: {', '.join(done.held)}."])


Tasks = Annotated[list[str], Parameter(name="--task", help="Task: type:key, such as user_id:42. May be repeated.")]
Address = Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")]


@store_app.command
def forget(folder: Path, /, *, tasks: Tasks, store: Address = None) -> None:
    """Remove all that is known of a member (or of another task), and keep a replay from bringing it back.

    It leaves every version in the store, the windows, the log, the dead letters, the side tables, and the model's
    vocabularies, if it is known there by its id. What was removed is counted, place by place. Killed at any moment, the
    same command completes it.

    `limaml store forget runs/mine --task user_id:42`
    """
    place = Workspace(folder)
    published = store is not None or (folder / "store").is_dir()
    for task, keys in _by_type(place, tasks).items():
        with place.store(store) if published else nullcontext() as opened:
            say(forget_tasks(place, opened, task, keys))


@store_app.command
def recall(folder: Path, /, *, tasks: Tasks, store: Address = None) -> None:
    """Let tasks that were forgotten come back: their interactions are taken in again from now on.

    `limaml store recall runs/mine --task user_id:42`
    """
    place = Workspace(folder)
    published = store is not None or (folder / "store").is_dir()
    for task, keys in _by_type(place, tasks).items():
        with place.store(store) if published else nullcontext() as opened:
            lifted = recall_tasks(place, opened, task, keys)
        say([f"{lifted:,} of {len(keys):,} '{task.name}' were forgotten, and may come back."])


def _by_type(place: Workspace, tasks: list[str]) -> dict[Task, list[str]]:
    types = {task.name: task for task in place.schema.tasks}
    found: dict[Task, list[str]] = {}
    for text in tasks:
        name, key = split_task(text, list(types))
        found.setdefault(types[name], []).append(key)
    return found


@store_app.command
def verify(where: Where, /, *, version: str | None = None, model: Name = MODEL_NAME) -> None:
    """Read a version back and compare counts and checksums.

    `limaml store verify runs/mine`
    """
    with _opened(where) as store:
        counts = store.verify(model, version)
        say([f"{count:,} of '{name}' are as they were written." for name, count in counts.items()])


@store_app.command
def estimate(
    folder: Path,
    /,
    *,
    store: Annotated[str | None, Parameter(help="URL of the store that it is for (default: LMDB in a folder).")] = None,
    tasks: Annotated[int | None, Parameter(help="Number of tasks of each type (default: those in the log).")] = None,
    dtype: Annotated[Literal["float32", "float16", "int8"], Parameter(help="How vectors are stored.")] = "float32",
) -> None:
    """Size of a version before it is published: keys and bytes, what the store adds included.

    `limaml store estimate runs/mine --tasks 10000000 --dtype float16`
    """
    place = Workspace(folder)
    trained = place.trained
    dims = dims_of(trained)
    frame = place.log(place.schema).read() if tasks is None else None
    counts: dict[str, int] = {}
    for task in trained.encoder.schema.tasks:
        number = tasks if frame is None else len(task_keys(frame, task)[0])
        counts |= {name: number or 0 for name in dims if task_of(name) == task.name}
    with tempfile.TemporaryDirectory() as scratch, open_store(store or Path(scratch) / "store") as opened:
        found = opened.estimate(counts, dims, dict.fromkeys(trained.model.tasks, dtype))
    say([f"{found.keys:,} keys, about {amount(found.bytes)}."])
