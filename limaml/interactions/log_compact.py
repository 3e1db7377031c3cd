"""Folding: many small files of a log into few, with no row and no order changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from limaml.interactions.log_files import APPEND, LogFiles
from limaml.interactions.log_manifest import File, Manifest

__all__ = ["folded", "without"]

GROWTH = 2
"""A file is folded if it is at most so many times as large as what is newer: each row is then written again a
logarithmic number of times, however often the log is compacted."""


def folded(files: LogFiles, manifest: Manifest) -> list[File]:
    """The files of the log after folding: written durably, no manifest names them yet."""
    tails = manifest.tails
    loose = _by_bucket(files, tails) if tails else {}
    result: list[File] = []
    for bucket in range(manifest.buckets):
        own = sorted((file for file in manifest.files if file.bucket == bucket), key=lambda file: file.first)
        rows = loose.get(bucket)
        keep = _untouched(own, rows)
        result += own[:keep]
        if keep == len(own) and rows is None:
            continue
        parts = [files.read(file) for file in own[keep:]] + ([] if rows is None else [rows])
        whole = pl.concat(parts).sort(APPEND, maintain_order=True)
        numbers = [file.first for file in own[keep:]] + [file.last for file in own[keep:]]
        if rows is not None:
            numbers += [int(rows[APPEND][0]), int(rows[APPEND][-1])]
        result.append(files.write(whole, bucket, min(numbers), max(numbers)))
    if not result and tails:  # nothing but empty tails: one stays, as the columns are known from it
        result.append(files.write(files.read(tails[-1]), 0, tails[-1].first, tails[-1].first))
    return result


def _by_bucket(files: LogFiles, tails: tuple[File, ...]) -> dict[int, pl.DataFrame]:
    whole = files.gather(tails)
    buckets = files.bucket_of(whole)  # ascending, as `gather` sorts by it
    found, start = np.unique(buckets, return_index=True)
    ends = np.append(start[1:], len(buckets))[: len(start)]
    return {int(b): whole[int(s) : int(e)] for b, s, e in zip(found, start, ends, strict=True)}


def _untouched(own: list[File], rows: pl.DataFrame | None) -> int:
    """How many of a bucket's files, the oldest ones, stay as they are."""
    if rows is None:
        size, keep = (own[-1].rows, len(own) - 1) if own else (0, 0)
        oldest = None
    else:
        size, keep, oldest = rows.height, len(own), int(rows[APPEND][0])
    while keep and (own[keep - 1].rows <= GROWTH * size or (oldest is not None and own[keep - 1].last > oldest)):
        keep -= 1
        size += own[keep].rows
    return len(own) if rows is None and len(own) - keep < 2 else keep


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
