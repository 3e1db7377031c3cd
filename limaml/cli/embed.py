"""`limaml embed`: every task's meta embedding, published as one version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

from cyclopts import Parameter

from limaml.cli.console import amount, console, counting, say
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.embeddings.engines import EngineName
from limaml.embeddings.generation import Generation, generation
from limaml.embeddings.publish import dims_of
from limaml.embeddings.refresher import Refresher
from limaml.meta import TrainedModel

__all__ = ["Address", "Device", "Engine", "Workers", "caught_up", "embed_command", "generated"]

Engine = Annotated[
    EngineName,
    Parameter(help="Where embeddings are made: on this machine, or on a Ray cluster (pip install 'limaml[ray]')."),
]
Workers = Annotated[
    int | None,
    Parameter(help="Processes on this machine (default: 1), or Ray actors (default: one for each core, or each GPU)."),
]
Address = Annotated[
    str | None,
    Parameter(help="Address of the Ray cluster, `auto` for the one that this machine is in; else one is started."),
]
Device = Annotated[str, Parameter(help="cpu, or cuda: each worker then has a GPU.")]


def embed_command(
    folder: Path,
    /,
    *,
    store: Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")] = None,
    dtype: Annotated[Literal["float32", "float16", "int8"], Parameter(help="How vectors are stored.")] = "float32",
    note: Annotated[str, Parameter(help="A remark kept with the version.")] = "",
    uncertainty: Annotated[
        bool, Parameter(help="Also publish how sure each embedding is (solver newton): for Thompson sampling.")
    ] = False,
    keep: Annotated[int, Parameter(help="Ready versions to keep; older ones are removed.")] = 3,
    engine: Engine = "local",
    workers: Workers = None,
    address: Address = None,
    device: Device = "cpu",
) -> None:
    """Adapt every task on its latest interactions and publish the result as a new version.

    The log is read bucket by bucket, so that memory does not grow with it. Killed anywhere, the same command goes on where it
    was. Readers see the old version until the new one is complete and verified; then one pointer is flipped.

    `limaml embed runs/mine`, or `limaml embed runs/mine --engine ray --address auto --workers 64`

    Next: `limaml recommend runs/mine --task 42`, `limaml score runs/mine rows.parquet`, `limaml store list runs/mine`.
    """
    place = Workspace(folder)
    trained = place.trained
    with (
        place.store(store, create=True) as opened,
        generated(
            place,
            trained,
            place.model,
            uncertainty=uncertainty,
            engine=engine,
            workers=workers,
            address=address,
            device=device,
        ) as made,
    ):
        dims = dims_of(trained, uncertainty)
        estimate = opened.estimate(made.counts, dims, dict.fromkeys(trained.model.tasks, dtype))
        say([f"{estimate.keys:,} keys, about {amount(estimate.bytes)}."])
        grown = made.log.position > made.position
        published = made.publish(opened, MODEL_NAME, dtype=dtype, note=note, activate=not grown)
        task = made.some_task
        made.clear()
        if grown:
            with place.refresher(opened, store, published.version) as refresher:
                caught_up(refresher, published.version)
            opened.activate(MODEL_NAME, published.version)
        expired = opened.expire(MODEL_NAME, keep)
    told = ", ".join(f"{count:,} {name}" for name, count in published.counts.items())
    say([f"Version {published.version} is served: {told}; {amount(published.bytes)} of keys and values."])
    if expired.removed:
        say([f"Removed old versions: {', '.join(expired.removed)}."])
    if task is not None:
        console.print(f"\nNext: limaml recommend {folder} --task {quote(task)}", markup=False, highlight=False)


@contextmanager
def generated(
    place: Workspace,
    trained: TrainedModel,
    model: Path,
    *,
    uncertainty: bool = False,
    engine: EngineName = "local",
    workers: int | None = None,
    address: str | None = None,
    device: str = "cpu",
) -> Iterator[Generation]:
    """The embeddings that the model of the folder `model` gives all tasks in the log of a run, with what is to be said of it."""
    with (
        counting("embedding") as progress,
        generation(
            place.log(trained.encoder.schema),
            trained,
            model,
            place.generation,
            side=place.folder / "side",
            uncertainty=uncertainty,
            engine_name=engine,
            workers=workers,
            address=address,
            device=device,
            progress=progress,
        ) as made,
    ):
        if made.kept:
            say(
                [
                    f"Went on with what an earlier run had made of the log up to append {made.position}: {made.kept:,} of "
                    f"{len(made.shards):,} shards."
                ]
            )
        if made.dropped.total:
            say([str(made.dropped)])
        yield made


def caught_up(refresher: Refresher, version: str) -> None:
    """What was appended to the log while a version was made reaches it."""
    for done in refresher.run().versions:
        if done.version == version and done.tasks:
            say([f"{done.tasks:,} tasks that changed meanwhile were adapted again."])
