"""Publications in an LMDB store: sorted files, written first and then named in a version's totals in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store import tombstones
from limaml.store.batch import Batch, Layout
from limaml.store.catalog import Record
from limaml.store.catalogued import Stored
from limaml.store.documents import Documents
from limaml.store.environment import Environment
from limaml.store.lmdb_values import Change, check_run, held, hide, payload
from limaml.store.packing import checks, checksum, newer, revisions
from limaml.store.run_files import RunFile
from limaml.store.run_folder import RunFolder
from limaml.store.runs import Embeddings
from limaml.store.version import layouts_of, state_of

__all__ = ["compact", "write_published"]


def write_published(
    environment: Environment,
    catalog: Documents,
    runs: RunFolder,
    record: Record,
    layout: Layout,
    batches: Sequence[Batch],
) -> Stored:
    """The batches as one more file: written first, then named in the totals in one step."""
    while True:
        banned, totals = environment.read(
            lambda txn: (
                tombstones.Banned(txn, environment, layout.task_type),
                catalog.totals(txn, record),
            )
        )
        earlier = runs.opened(layout, totals.of(layout.task_type).runs)
        adding = _Adding(layout, earlier, banned, _known([batch.embeddings for batch in batches], earlier))
        name, written = runs.write(
            layout, [batch.embeddings for batch in batches], [batch.text_size for batch in batches], adding.choose
        )
        if not written.rows:
            runs.remove([name])
            return Stored(0, adding.forgotten)
        new = runs.run(layout, name)

        def work(
            txn: Any,
            new: RunFile = new,
            name: str = name,
            adding: _Adding = adding,
            earlier: tuple[RunFile, ...] = earlier,
            total: int = written.checksum,
        ) -> Stored | None:
            found = catalog.find(txn, record.model, record.id)
            if found.state != "writing":
                raise StoreError(
                    f"Version {record.id} of model '{record.model}' is {state_of(found)}: it cannot be written to."
                )
            if tombstones.changes(txn, environment) != adding.banned.changes:
                return None
            totals = catalog.totals(txn, found)
            tally = totals.of(layout.task_type)
            change = Change(adding.fresh, total - adding.replaced, adding.bytes)
            change, hidden = hide(txn, environment.values, layout, new, earlier, change)
            tally = replace(change.on(tally), runs=(*tally.runs, name))
            catalog.save_totals(txn, found, totals.having(layout.task_type, tally))
            return Stored(len(new) - hidden, adding.forgotten)

        try:
            done = environment.write(work)
        except BaseException:
            runs.remove([name])
            raise
        if done is not None:
            return done
        runs.remove([name])  # somebody was forgotten meanwhile


def compact(
    environment: Environment,
    catalog: Documents,
    runs: RunFolder,
    record: Record,
    finish_erasing: Callable[[], None],
) -> None:
    """Each task type of a version that was written in several files as one."""
    for layout in layouts_of(record).values():
        while True:
            before, totals = environment.read(
                lambda txn: (tombstones.changes(txn, environment), catalog.totals(txn, record))
            )
            finish_erasing()
            old = totals.of(layout.task_type).runs
            if len(old) < 2:
                break
            opened = runs.opened(layout, old)
            for run in opened:
                check_run(layout, run)
            name = runs.merge(layout, opened)

            def work(txn: Any, name: str = name, before: int = before, layout: Layout = layout) -> bool:
                totals = catalog.totals(txn, record)
                if tombstones.changes(txn, environment) != before:
                    return False
                tally = replace(totals.of(layout.task_type), runs=(name,))
                catalog.save_totals(txn, record, totals.having(layout.task_type, tally))
                return True

            done = environment.write(work)
            runs.remove(old if done else [name])
            if done:
                break


class _Adding:
    """Chooses what of a publication is stored, beside what was stored before; and counts."""

    def __init__(
        self, layout: Layout, earlier: Sequence[RunFile], banned: tombstones.Banned, known: NDArray[np.uint64]
    ) -> None:
        self.layout, self.earlier, self.banned, self.known = layout, earlier, banned, known
        self.forgotten: set[bytes] = set()
        self.fresh = self.replaced = self.bytes = 0

    def choose(self, piece: Embeddings) -> NDArray[np.bool_]:
        gone = self.banned.mask(piece)
        wanted = ~gone
        if gone.any():
            self.forgotten |= {raw or b"" for raw in piece.raws(np.flatnonzero(gone))}
        found = np.zeros(len(piece), np.bool_)
        if len(self.known) and len(rows := np.flatnonzero(np.isin(piece.hashes, self.known))):
            raws = [raw or b"" for raw in piece.raws(rows)]
            old, there = held(self.layout, raws, piece.hashes[rows], [None] * len(raws), self.earlier)
            above = ~there | newer(*revisions(piece.rows[rows]), *revisions(old))
            found[rows] = there
            self.replaced += checksum(checks(old[above & there & wanted[rows]]))
            wanted[rows] &= above
        fresh = wanted & ~found
        self.fresh += int(fresh.sum())
        self.bytes += payload(self.layout, piece.spans if fresh.all() else piece.spans[fresh])
        return wanted


def _known(parts: Sequence[Embeddings], earlier: Sequence[RunFile]) -> NDArray[np.uint64]:
    """The hashes `[≤ n]` that an earlier file has as well: mostly none, which is found out much faster for all at once."""
    if not earlier:
        return np.empty(0, np.uint64)
    hashes = np.sort(np.concatenate([part.hashes for part in parts]))
    there = np.zeros(len(hashes), np.bool_)
    for run in earlier:
        if len(run):
            there |= run.hashes[np.minimum(np.searchsorted(run.hashes, hashes), len(run) - 1)] == hashes
    return hashes[there]
