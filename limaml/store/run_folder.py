"""The folder of an embedded store's runs: their names, the files that are mapped, and what is in the way of a disk."""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from limaml.errors import StoreError
from limaml.store.batch import Layout
from limaml.store.run_files import RunFile, Written, erase, merge_runs, open_run, write_run
from limaml.store.runs import Embeddings

__all__ = ["RunFolder"]

_T = TypeVar("_T")
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class RunFolder:
    """`runs/NUMBER-PLACE-TOKEN`: files of version NUMBER's task type at PLACE. Those that no catalogue names are left-overs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[str, RunFile] = {}
        self._guard = threading.Lock()

    def run(self, layout: Layout, name: str) -> RunFile:
        found = self._open.get(name)
        if found is not None:
            return found
        try:
            found = open_run(self.path / name, layout.size)
        except ValueError as error:
            raise StoreError(
                f"Version {layout.version} of model '{layout.model}' is damaged: {error}. Roll back to another version, or "
                "publish this one again."
            ) from error
        with self._guard:
            for other in [each for each in self._open if not (self.path / each).exists()]:
                del self._open[other]  # removed by another process: the disk gets its room back
            self._open[name] = found
        return found

    def opened(self, layout: Layout, names: Sequence[str]) -> tuple[RunFile, ...]:
        return tuple(self.run(layout, name) for name in names)

    def write(
        self,
        layout: Layout,
        parts: Sequence[Embeddings],
        text_sizes: Sequence[int],
        choose: Callable[[Embeddings], NDArray[np.bool_]],
    ) -> tuple[str, Written]:
        return self._written(layout, lambda path: write_run(path, parts, text_sizes, layout.size, choose))

    def merge(self, layout: Layout, runs: Sequence[RunFile]) -> str:
        return self._written(layout, lambda path: merge_runs(path, runs, layout.size))[0]

    def _written(self, layout: Layout, work: Callable[[Path], _T]) -> tuple[str, _T]:
        name = f"{self._stem(layout)}-{secrets.token_hex(4)}"
        try:
            self.path.mkdir(exist_ok=True)
            return name, work(self.path / name)
        except OSError as error:
            free = shutil.disk_usage(self.path.parent).free
            what = "full, or over a limit" if error.errno in _FULL else "failing"
            raise StoreError(
                f"The disk of the store {self.path.parent} is {what} ({error}; {free} bytes are free). Nothing of this step was "
                "stored, and what was served is served on. Make room (`expire`, `gc`, other files), then do it again."
            ) from error

    def erase(self, name: str, rows: Sequence[int]) -> None:
        with contextlib.suppress(FileNotFoundError):  # its version was removed
            erase(self.path / name, rows)

    def remove(self, names: Collection[str]) -> None:
        with self._guard:
            for name in names:
                self._open.pop(name, None)
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def of_version(self, number: int) -> list[str]:
        return sorted(path.name for path in self.path.glob(f"{number:06d}-*"))

    def sizes(self) -> tuple[int, int]:
        """Bytes of all files, and on the disk."""
        found = []
        for path in self.path.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                found.append(path.stat())
        return sum(each.st_size for each in found), sum(
            getattr(each, "st_blocks", each.st_size // 512) * 512 for each in found
        )

    @staticmethod
    def _stem(layout: Layout) -> str:
        return f"{int.from_bytes(layout.prefix[:4], 'big'):06d}-{int.from_bytes(layout.prefix[4:], 'big')}"
