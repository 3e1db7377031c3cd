"""Synthetic interactions of any number of tasks, made in pieces, so that nothing here holds more than one piece.

Row by row, the member is ⌊tasks · u^2.5⌋ with u uniform, under another name: half of the members have less than two thirds of
the mean, the most active of 10⁶ has 0.4 % of all rows. Items are drawn alike. Rows come in the order of time, as a log of
events does, so that the rows of one member are scattered over all pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from limaml.interactions.log import buckets_for

ROWS_PER_TASK = 20
ITEMS = 100_000
PIECE_ROWS = 2_000_000
SKEW = 2.5
START, DAYS = 1_700_000_000, 120


def rows_of(tasks: int) -> int:
    return tasks * ROWS_PER_TASK


def buckets_of(tasks: int) -> int:
    return max(64, buckets_for(rows_of(tasks)))


def pieces(tasks: int, seed: int = 0) -> Iterator[pl.DataFrame]:
    """The interactions, at most `PIECE_ROWS` at a time: user_id, item_id, time (seconds), seconds watched, click."""
    total = rows_of(tasks)
    for start in range(0, total, PIECE_ROWS):
        rng = np.random.default_rng([seed, start])
        rows = min(PIECE_ROWS, total - start)
        member = named((tasks * rng.random(rows) ** SKEW).astype(np.int64), tasks)
        item = named((ITEMS * rng.random(rows) ** SKEW).astype(np.int64), ITEMS)
        time = START + (np.arange(start, start + rows) * (DAYS * 86_400 / total)).astype(np.int64)
        taste = np.sin(member * 0.7) * np.cos(item * 0.3) + 0.5 * np.sin(item * 1.3)
        click = rng.random(rows) < 1 / (1 + np.exp(1 - 2 * taste))
        watched = rng.exponential(30 * (1 + click)).astype(np.float32)
        yield pl.DataFrame({"user_id": member, "item_id": item, "time": time, "watched": watched, "click": click})


def named(rank: np.ndarray, count: int) -> np.ndarray:
    """Another id for each rank, one to one: a multiplication modulo `count` by a number prime to it."""
    step = int(count * 0.618) | 1
    while np.gcd(step, count) != 1:
        step += 2
    return rank * step % count


def members(tasks: int) -> pl.DataFrame:
    """Features of every member."""
    ids = np.arange(tasks)
    return pl.DataFrame(
        {"user_id": ids, "country": (ids * 7919) % 60, "age": (18 + (ids * 104_729) % 60).astype(np.float32)}
    )


def items() -> pl.DataFrame:
    """Features of every item."""
    ids = np.arange(ITEMS)
    return pl.DataFrame({"item_id": ids, "kind": (ids * 31) % 40, "length": (10 + ids % 300).astype(np.float32)})


def make_source(folder: Path, tasks: int) -> Path:
    """A folder with the interactions in Parquet files of one piece each; made once."""
    target = folder / f"source-{tasks}"
    if (target / ".complete").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    for number, piece in enumerate(pieces(tasks)):
        piece.write_parquet(target / f"part-{number:05d}.parquet", compression="zstd", compression_level=1)
    (target / ".complete").touch()
    return target
