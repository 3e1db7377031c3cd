"""Everything that a run knows of a task, removed place by place, and kept from coming back."""

from __future__ import annotations

from collections.abc import Sequence

from limaml.cli.workspace import MODEL_NAME, Workspace
from limaml.embeddings.refresher import live_versions
from limaml.embeddings.spool import Spool
from limaml.errors import StoreError
from limaml.interactions.schema import Task
from limaml.meta.scrub import scrub_model
from limaml.store import Store
from limaml.stream.dead_letters import DeadLetters

__all__ = ["forget_tasks", "recall_tasks"]


def forget_tasks(place: Workspace, store: Store | None, task: Task, keys: Sequence[str]) -> list[str]:
    """Remove the tasks `keys` from the store, from shards that are not published, from the windows, the log, the dead letters,
    the side tables, the candidates and the model's vocabularies; a sentence for each place.

    Tombstones come first, in the log and in the store: from then on a replay or a redelivery brings nothing back. Killed at any
    moment, the same call completes it, as each place is left last by what leads to the others: the log's rows name the
    windows of other task types that hold them.
    """
    log, columns = place.log(place.schema), list(task.columns)
    log.mark_forgotten(task.name, columns, keys)
    said = []
    if store is not None:
        told = store.forget(task.name, keys)
        for model, versions in told.removed.items():
            said += [
                f"{count:,} vectors left version {version} of '{model}'."
                for version, count in versions.items()
                if count
            ]
    said += [] if said else ["No version held a vector."]
    said += _unpublished(place)
    with place.windows() as windows:
        said.append(_counted(windows.forget(task.name, keys), "window", "was removed or made shorter"))
    said.append(_counted(log.forget(task.name, columns, keys), "interaction", "left the log"))
    said.append(_counted(DeadLetters(place.folder).forget(columns, keys), "dead letter", "was removed"))
    said.append(_counted(place.forget_features(task, keys), "row", "left the side tables and the candidates"))
    if len(columns) == 1:
        scrubbed = scrub_model(place.model, columns[0], frozenset(keys))
        for feature, count in scrubbed.features.items():
            said.append(_counted(count, "id", f"left the vocabulary and the tables of feature '{feature}'"))
        old = [] if store is None else [v.id for v in live_versions(store, MODEL_NAME) if v.artifact == scrubbed.before]
        if scrubbed.features and old:
            said.append(
                f"The copy of the model in {', '.join(old)} has it still. Publish the new one and remove that: limaml embed "
                f"{place.folder} --keep 1"
            )
    return said


def recall_tasks(place: Workspace, store: Store | None, task: Task, keys: Sequence[str]) -> int:
    """Lift the tombstones of tasks that come back; returns how many there were. What was removed stays removed."""
    lifted = place.log(place.schema).recall(task.name, keys)
    return max(lifted, 0 if store is None else store.recall(task.name, keys))


def _unpublished(place: Workspace) -> list[str]:
    """Remove the shards of a generation that was killed: they may be of forgotten tasks, or made of their rows."""
    if not place.generation.exists():
        return []
    spool = Spool(place.generation)
    try:
        with spool.held():
            there = any(spool.shards.glob("*"))
            spool.clear()
    except StoreError:
        return [
            f"Embeddings are being generated in {place.generation}. When they are published, none is of a forgotten task, and the "
            "files are removed; if that run is ended before, do this again."
        ]
    return ["What a generation had made, and not published, was removed."] if there else []


def _counted(count: int, what: str, happened: str) -> str:
    plural = happened.replace("was ", "were ", 1) if count != 1 else happened
    return f"{count:,} {what}{'' if count == 1 else 's'} {plural}."
