"""Model folders kept beside the embeddings, under their digest, for as long as a version names them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from limaml.artifact import copy_folder, verify_folder
from limaml.errors import ArtifactError, StoreError
from limaml.store.lease import Lease

__all__ = ["ModelFolders"]

_GRACE = 3600.0
"""Seconds that a folder which no version names is left: its publisher may not have begun the version yet."""

_PATIENCE = 60.0


class ModelFolders:
    """The folder `root`, changed only under a lease that all processes share."""

    def __init__(self, root: Path, lease: Callable[[], Lease]) -> None:
        self.root = root
        self._lease = lease

    def put(self, folder: str | Path) -> str:
        """Copy a folder here, verified; returns its digest."""
        digest = verify_folder(folder).digest
        with self._alone():
            place = self.root / digest
            try:
                if self.has(digest) and verify_folder(place).digest == digest:
                    os.utime(place)
                    return digest
            except ArtifactError:
                shutil.rmtree(place)  # the copy was damaged
            copied = copy_folder(folder, place).digest
            if copied != digest:
                shutil.rmtree(place)
                raise StoreError(f"The model folder {folder} was replaced while it was copied; put it again.")
            return digest

    def has(self, digest: str) -> bool:
        return digest in self.digests()

    def is_kept(self, digest: str) -> bool:
        """`has`, after any removal that is under way: True stays true for a folder that a version names by now."""
        with self._alone():
            return self.has(digest)

    def digests(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in self.root.iterdir() if not entry.name.startswith("."))

    def path(self, digest: str) -> Path:
        if not self.has(digest):
            raise StoreError(f"The store has no model folder {digest!r}; it has {', '.join(self.digests()) or 'none'}.")
        return self.root / digest

    def remove(self, digest: str, unused: Callable[[], bool]) -> None:
        """Remove a folder if, with the lease held, `unused()` still holds."""
        with self._alone():
            if unused() and self.has(digest):
                self._delete(digest)

    def sweep(self, used: Callable[[], Collection[str | None]]) -> list[str]:
        """Remove the folders that no version names and that were put an hour ago or more."""
        removed = []
        with self._alone():
            names = used()
            for digest in self.digests():
                age = time.time() - (self.root / digest).stat().st_mtime
                if digest not in names and not 0 <= age < _GRACE:
                    self._delete(digest)
                    removed.append(digest)
            if self.root.is_dir():
                for entry in self.root.glob(".*.removed"):
                    shutil.rmtree(entry, ignore_errors=True)
        return removed

    def _delete(self, digest: str) -> None:
        aside = self.root / f".{digest}.removed"  # so that what is left of an interrupted removal is no folder
        shutil.rmtree(aside, ignore_errors=True)
        (self.root / digest).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lease = self._lease()
        until = time.monotonic() + _PATIENCE
        while not lease.take(exclusive=True):
            if time.monotonic() > until:
                raise StoreError(f"Another process has been copying model folders into {self.root} for a minute.")
            time.sleep(0.02)
        try:
            yield
        finally:
            lease.release()
