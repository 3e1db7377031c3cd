"""The rows of the log dealt out by tasks that it is not partitioned by: those of one item, say, from all buckets to one place.

    rows/<task type>/<bucket>.rows    the rows of one bucket, in as many parts as there are shards

    starts of the parts, and the end, int64 | the parts, as Arrow IPC files

A task's rows are then in the parts of one number, of all files; read in the order of the buckets they are in the log's order.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import polars as pl

from limaml.errors import StoreError
from limaml.interactions.atomic_files import write_atomically
from limaml.interactions.keys import task_keys
from limaml.interactions.schema import Task

__all__ = ["deal", "dealt", "is_dealt"]


def deal(frame: pl.DataFrame, task: Task, parts: int, path: Path) -> None:
    """Write the rows of one bucket, in their order, each into the part of its `task`."""
    keys, codes = task_keys(frame, task)
    part = np.array([zlib.crc32(key.encode()) % parts for key in keys], np.int64)[codes]
    order = np.argsort(part, kind="stable")
    ends = np.cumsum(np.bincount(part, minlength=parts))
    ordered = frame[order]
    written, start = list[bytes](), 0
    for end in ends.tolist():
        buffer = io.BytesIO()
        if end > start:
            ordered[start:end].write_ipc(buffer, compression="lz4")
        written.append(buffer.getvalue())
        start = end
    places = np.cumsum([8 * (parts + 1), *(len(part) for part in written)], dtype="<i8")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, places.tobytes() + b"".join(written))


def dealt(path: Path, part: int) -> pl.DataFrame | None:
    """The rows of one part of a file; None if it has none."""
    try:
        with path.open("rb") as file:
            file.seek(8 * part)
            start, end = np.frombuffer(file.read(16), "<i8").tolist()
            file.seek(start)
            content = file.read(end - start)
        if len(content) != end - start:
            raise ValueError("it is too short")
        return pl.read_ipc(io.BytesIO(content)) if content else None
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise StoreError(
            f"The rows in {path} cannot be read ({error}). Run the same command again: they are dealt out anew."
        ) from error


def is_dealt(path: Path, parts: int) -> bool:
    """Whether the file is there and as long as it says."""
    try:
        with path.open("rb") as file:
            file.seek(8 * parts)
            return int.from_bytes(file.read(8), "little") == path.stat().st_size
    except OSError:
        return False
