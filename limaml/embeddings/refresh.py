"""New interactions reach the store: the touched tasks are adapted again, all others keep what they have.

For tables in memory. `Refresher` does it for a log, without reading the past of the touched tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from limaml.embeddings.upsert import check_made_by, upsert_adapted
from limaml.errors import DataError
from limaml.meta.saved import TrainedModel
from limaml.store.contract import Store

__all__ = ["Refreshed", "refresh"]


@dataclass(frozen=True)
class Refreshed:
    """What a refresh did, per task type: `applied` embeddings are new in the store, `stale` ones it had already."""

    version: str
    applied: Mapping[str, int] = field(default_factory=dict)
    stale: Mapping[str, int] = field(default_factory=dict)
    watermark: int | None = None


def refresh(
    store: Store,
    name: str,
    trained: TrainedModel,
    history: pl.DataFrame,
    touched: Mapping[str, Sequence[str]],
    *,
    version: str | None = None,
) -> Refreshed:
    """Adapt the `touched` tasks (task type → keys) again on `history`, and upsert them into the served version.

    `history` holds *all* interactions of each touched task, old and new, with all feature columns. The store takes a
    vector only if its support is newer than what the stored one was made from, so a replay changes nothing. Raises
    `StoreError` if the version was made by another model, `DataError` if the times cannot be compared between tables.
    """
    served = store.describe(name, version)
    check_made_by(served, trained, "refresh")
    data = trained.encoder.encode(history)
    if data.time_unit == "order":
        raise DataError(
            f"The time column '{trained.encoder.schema.time}' only gives an order within one table, so new rows cannot be "
            "placed behind old ones. Use numbers or dates as the time, or publish all tasks anew (limaml embed)."
        )
    watermark = int(data.time[-1]) if len(data) else None
    applied, stale = {}, {}
    for task in trained.model.tasks:
        keys = list(dict.fromkeys(touched.get(task, ())))
        known = set(data.ids[task])
        missing = [key for key in keys if key not in known]
        if missing:
            raise DataError(f"The history has no row of the touched task {task}:{missing[0]} ({len(missing)} in all).")
        if not keys:
            continue
        done = upsert_adapted(store, served, trained, data, task, keys, watermark=watermark)
        applied[task], stale[task] = done.applied, done.stale
    return Refreshed(served.id, applied, stale, watermark)
