"""`limaml embed`: every task's meta embedding, published as one version."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

from cyclopts import Parameter

from limaml.cli.console import amount, console, counting, say
from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.embeddings import publish
from limaml.embeddings.features import task_of
from limaml.embeddings.publish import dims_of
from limaml.embeddings.refresher import log_position

__all__ = ["embed_command"]


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
) -> None:
    """Adapt every task on its latest interactions and publish the result as a new version.

    Readers see the old version until the new one is complete and verified; then one pointer is flipped.

    `limaml embed runs/mine`

    Next: `limaml recommend runs/mine --task 42`, `limaml score runs/mine rows.parquet`, `limaml store list runs/mine`.
    """
    place = Workspace(folder)
    trained = place.trained
    log = place.log(place.schema)
    position = log.position
    frame, dropped = place.joined(log.read(through=position))
    say([dropped] if dropped else [])
    data = trained.encoder.encode(frame)
    dims = dims_of(trained, uncertainty)
    with place.store(store, create=True) as opened:
        counts = {name: data.count(task_of(name)) for name in dims}
        estimate = opened.estimate(counts, dims, dict.fromkeys(trained.model.tasks, dtype))
        say([f"{estimate.keys:,} keys, about {amount(estimate.bytes)}."])
        with counting("embedding") as progress:
            published = publish(
                opened,
                MODEL_NAME,
                trained,
                place.model,
                data,
                dtype=dtype,
                note=note,
                uncertainty=uncertainty,
                extra=log_position(log, position),
                progress=progress,
            )
        expired = opened.expire(MODEL_NAME, keep)
    told = ", ".join(f"{count:,} {name}" for name, count in published.counts.items())
    say([f"Version {published.version} is served: {told}; {amount(published.bytes)} of keys and values."])
    if expired.removed:
        say([f"Removed old versions: {', '.join(expired.removed)}."])
    console.print(
        f"\nNext: limaml recommend {folder} --task {quote(data.ids[trained.model.tasks[0]][0])}",
        markup=False,
        highlight=False,
    )
