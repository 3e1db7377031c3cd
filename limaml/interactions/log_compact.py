"""Folding: many small files of a log into few, with no row and no order changed, in the memory of one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import polars as pl

from limaml.interactions.log_files import APPEND, LogFiles
from limaml.interactions.log_manifest import File, Manifest

__all__ = ["folded", "without"]

GROWTH = 2
"""A file is folded if it is at most so many times as large as what is newer: each row is then written again a
logarithmic number of times, however often the log is compacted."""

FILE_BYTES = 2**26
"""No file is folded into one that would be larger, so that a bucket of any size is folded in the memory of one file."""

TAIL_BYTES = 2**27
"""So much of a stream's tails is dealt to the buckets at once."""

Piece = File | pl.DataFrame


def folded(files: LogFiles, manifest: Manifest) -> list[File]:
    """The files of the log after folding: written durably, no manifest names them yet.

    Tails beyond `TAIL_BYTES` are among them as they were: then the same is to be done again.
    """
    now, later = _first_tails(sorted(manifest.tails, key=lambda file: file.first))
    loose = _by_bucket(files, now) if now else {}
    result: list[File] = []
    for bucket in range(manifest.buckets):
        own = sorted((file for file in manifest.files if file.bucket == bucket), key=lambda file: file.first)
        # what is newer than a tail that waits is not folded with what is older
        ready = [file for file in own if not later or file.first < later[0].first]
        for group in _groups(_in_order(ready, loose.get(bucket))):
            result.append(_one(files, group, bucket))
        result += own[len(ready) :]
    result += later
    if not result and now:  # nothing but empty tails: one stays, as the columns are known from it
        result.append(files.write(files.read(now[-1]), 0, now[-1].first, now[-1].first))
    return result


def _first_tails(tails: Sequence[File]) -> tuple[list[File], list[File]]:
    size = np.cumsum([file.bytes for file in tails])
    number = max(1, int(np.searchsorted(size, TAIL_BYTES, side="right")))
    return list(tails[:number]), list(tails[number:])


def _by_bucket(files: LogFiles, tails: Sequence[File]) -> dict[int, pl.DataFrame]:
    whole = files.gather(tails)
    buckets = files.bucket_of(whole)  # ascending, as `gather` sorts by it
    found, start = np.unique(buckets, return_index=True)
    ends = np.append(start[1:], len(buckets))[: len(start)]
    return {int(b): whole[int(s) : int(e)] for b, s, e in zip(found, start, ends, strict=True)}


def _in_order(own: Sequence[File], rows: pl.DataFrame | None) -> list[Piece]:
    """A bucket's files and its rows out of tails, by append: a tail is older or newer than a whole file."""
    if rows is None:
        return list(own)
    pieces: list[Piece] = []
    cuts = [0, *np.searchsorted(rows[APPEND].to_numpy(), [file.first for file in own]).tolist(), rows.height]
    for place, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        if end > start:
            pieces.append(rows[start:end])
        if place < len(own):
            pieces.append(own[place])
    return pieces


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """What becomes one file each, oldest first."""
    groups: list[list[Piece]] = []
    rows, size = 0, 0
    for piece in reversed(pieces):
        more = piece.rows if isinstance(piece, File) else piece.height
        bulk = piece.bytes if isinstance(piece, File) else int(piece.estimated_size())
        if groups and more <= GROWTH * rows and size + bulk <= FILE_BYTES:
            groups[-1].insert(0, piece)
            rows, size = rows + more, size + bulk
        else:
            groups.append([piece])
            rows, size = more, bulk
    return groups[::-1]


def _one(files: LogFiles, group: Sequence[Piece], bucket: int) -> File:
    if len(group) == 1 and isinstance(group[0], File):
        return group[0]
    files.refuse_damaged([piece for piece in group if isinstance(piece, File)])
    numbers = list(
        chain.from_iterable(
            (piece.first, piece.last) if isinstance(piece, File) else (piece[APPEND][0], piece[APPEND][-1])
            for piece in group
        )
    )
    whole = pl.concat([files.read(piece) if isinstance(piece, File) else piece for piece in group])
    return files.write(whole, bucket, int(min(numbers)), int(max(numbers)))


def without(
    files: LogFiles, manifest: Manifest, chosen: Callable[[File], bool], bad: Callable[[pl.DataFrame], pl.Series]
) -> tuple[list[File], int]:
    """The files of the log without the rows that are `bad`, and how many these were; only files that are `chosen` are
    read. A file that loses all rows stays, empty."""
    result, removed = [], 0
    for file in manifest.files:
        if not chosen(file):
            result.append(file)
            continue
        files.refuse_damaged([file])
        frame = files.read(file)
        gone = bad(frame)
        number = int(gone.sum())
        removed += number
        result.append(files.write(frame.filter(~gone), file.bucket, file.first, file.last) if number else file)
    return result, removed
