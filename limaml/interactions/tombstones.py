"""The tasks that were forgotten: what keeps a replay from bringing their rows back.

    forgotten.json    {"format": 1, "tasks": {"user_id": {"columns": ["user_id"], "keys": ["42"]}}}

The file stands beside the log's manifest and not in it, since a stream writes the manifest several times a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from limaml.errors import DataError
from limaml.interactions.atomic_files import write_atomically
from limaml.interactions.columns import canonical_text, factorise
from limaml.interactions.keys import join_key

__all__ = ["Tombstone", "named", "read_tombstones", "write_tombstones"]

FORMAT = 1


@dataclass(frozen=True)
class Tombstone:
    """The forgotten tasks of one type, which `columns` name."""

    columns: tuple[str, ...]
    keys: frozenset[str] = field(default_factory=frozenset)


def read_tombstones(path: Path) -> dict[str, Tombstone]:
    """Task type → its tombstones; none if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r} is not {FORMAT}")
        return {
            str(name): Tombstone(tuple(entry["columns"]), frozenset(entry["keys"]))
            for name, entry in raw["tasks"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"The list of forgotten tasks, {path}, cannot be read ({type(error).__name__}: {error}). Restore it from a "
            "copy: without it a replay could bring forgotten tasks back."
        ) from error


def write_tombstones(path: Path, tombstones: Mapping[str, Tombstone]) -> None:
    tasks = {name: {"columns": t.columns, "keys": sorted(t.keys)} for name, t in tombstones.items() if t.keys}
    write_atomically(path, json.dumps({"format": FORMAT, "tasks": tasks}).encode())


def named(frame: pl.DataFrame, tombstones: Mapping[str, Tombstone]) -> pl.Series:
    """Which rows of `frame` `[rows]` are of a forgotten task."""
    bad = np.zeros(frame.height, bool)
    for tombstone in tombstones.values():
        if tombstone.keys and frame.height and set(tombstone.columns) <= set(frame.columns):
            codes, first = factorise(frame.select(tombstone.columns))
            found = [text is not None and text in tombstone.keys for text in _texts(frame, tombstone.columns, first)]
            bad |= np.array(found)[codes]
    return pl.Series(bad)


def _texts(
    frame: pl.DataFrame, columns: Sequence[str], rows: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> list[str | None]:
    parts = [canonical_text(frame[column].gather(rows)).to_list() for column in columns]
    return [None if None in row else join_key(row) for row in zip(*parts, strict=True)]
