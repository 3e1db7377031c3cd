"""What is known of tasks and of rows, joined to the interactions: users.parquet by the task key, items.parquet by the row id.

Every interaction stays, once: a key that stands twice in a side table is an error, a key that it lacks is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from limaml.errors import DataError
from limaml.interactions.columns import canonical_text, factorise, is_list, missing_column, show
from limaml.interactions.readers import Source, read_table

__all__ = ["Joined", "join_tables"]


@dataclass(frozen=True)
class Joined:
    """The joined table, which of its columns came by which key, and a sentence for all that a reader should know."""

    frame: pl.DataFrame
    columns: Mapping[str, tuple[str, ...]]  # key → names, in `frame`, of the side table's columns
    notes: tuple[str, ...]


def join_tables(
    interactions: pl.DataFrame,
    tables: Mapping[str, Source],
) -> Joined:
    """Join each side table to `interactions` on its key, in the order given; the rows keep their order and number.

    A key is a column of both tables, or several joined by `+` (`"user_id+type"`). Keys that are numbers in one table
    and text in the other are compared as text, and that is said. A column that stands in both tables is kept once where
    it is equal in all rows; else the side table's comes in as `<column>_of_<key>`. Raises `DataError`.
    """
    frame, notes = interactions, list[str]()
    columns: dict[str, tuple[str, ...]] = {}
    for key, source in tables.items():
        frame, columns[key], said = _join(frame, key, read_table(source))
        notes += said
    return Joined(frame, columns, tuple(notes))


def _join(frame: pl.DataFrame, key: str, table: pl.DataFrame) -> tuple[pl.DataFrame, tuple[str, ...], list[str]]:
    names = [key] if key in frame.columns else key.split("+")
    for where, columns in (("the interactions", frame.columns), ("the side table", table.columns)):
        for name in names:
            if name not in columns:
                raise DataError(missing_column(name, f"the key to join {where} by", columns))
    notes: list[str] = []
    left, right = [], []
    for name in names:
        ours, theirs = _comparable(frame[name], table[name], notes)
        left.append(ours)
        right.append(theirs)
    position, keys_lacking, rows_lacking = _match(frame, names, left, right, table)
    if rows_lacking:
        row = int((position < 0).argmax())
        notes.append(
            f"{keys_lacking} value(s) of '{key}' in {rows_lacking} row(s) are not in the side table, for example "
            f"{_key_text(frame, names, row)} in row {row}: their features are null."
        )
    added: list[pl.Series] = []
    from_table: list[str] = []
    found = position >= 0
    for name in table.columns:
        if name in names:
            continue
        values = _gather(table[name], position)
        if name in frame.columns:
            differing = _differing(frame[name], values, found)
            if differing == 0 and found.any():
                notes.append(
                    f"Column '{name}' stands in the interactions and in the table of '{key}', with the same values: it is "
                    "kept once."
                )
                continue
            other = f"{name}_of_{key}"
            if other in frame.columns:
                raise DataError(f"Column '{name}' of the table of '{key}' would become '{other}', which is taken.")
            notes.append(
                f"Column '{name}' stands in the interactions and in the table of '{key}', and differs in {differing} "
                f"row(s): the table's comes in as '{other}'."
            )
            values = values.alias(other)
        added.append(values)
        from_table.append(values.name)
    return frame.with_columns(added), tuple(from_table), notes


def _comparable(ours: pl.Series, theirs: pl.Series, notes: list[str]) -> tuple[pl.Series, pl.Series]:
    """Both key columns as one type that is equal where the keys are."""
    for where, values in (("the interactions", ours), ("the side table", theirs)):
        if values.dtype.is_nested():
            raise DataError(f"The key '{values.name}' of {where} is of type {values.dtype}; use numbers or text.")
    if ours.dtype.is_integer() and theirs.dtype.is_integer():
        return ours.cast(pl.Int128), theirs.cast(pl.Int128)
    if ours.dtype == theirs.dtype and not ours.dtype.is_float():
        return ours, theirs
    if ours.dtype.is_numeric() != theirs.dtype.is_numeric():
        notes.append(
            f"The key '{ours.name}' is of type {ours.dtype} in the interactions and of type {theirs.dtype} in the side "
            "table: both are compared as text."
        )
    return canonical_text(ours), canonical_text(theirs)


def _match(
    frame: pl.DataFrame, names: list[str], left: list[pl.Series], right: list[pl.Series], table: pl.DataFrame
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int, int]:
    """For each interaction the row of the table with its key, else −1; and how many keys and rows found none."""
    both = pl.DataFrame(
        [
            pl.concat([theirs.alias(name), ours.alias(name)])
            for name, ours, theirs in zip(names, left, right, strict=True)
        ]
    )
    codes, first = factorise(both)
    height = table.height
    theirs, ours = codes[:height], codes[height:]
    null = both.select(pl.any_horizontal(pl.all().is_null())).to_series().to_numpy()
    place = np.full(len(first), -1, np.int64)
    usable = np.flatnonzero(~null[:height])
    repeats = usable[np.bincount(theirs[usable], minlength=len(first))[theirs[usable]] > 1] if len(usable) else usable
    if len(repeats):
        raise DataError(
            f"The side table has the key {_key_text(table, names, int(repeats[0]))} more than once (in "
            f"{int((theirs[usable] == theirs[repeats[0]]).sum())} rows, the first is row {int(repeats[0])}); "
            f"{len(np.unique(theirs[repeats]))} key(s) are repeated. Keep one row for each '{'+'.join(names)}'."
        )
    place[theirs[usable]] = usable
    position = np.where(null[height:], -1, place[ours]) if len(ours) else np.zeros(0, np.int64)
    lacking = position < 0
    return position, len(np.unique(ours[lacking])), int(lacking.sum())


def _gather(values: pl.Series, position: np.ndarray[Any, np.dtype[np.int64]]) -> pl.Series:
    places = pl.select(pl.when(pl.lit(pl.Series(position)) >= 0).then(pl.lit(pl.Series(position)))).to_series()
    return values.gather(places)


def _differing(ours: pl.Series, theirs: pl.Series, found: np.ndarray[Any, np.dtype[np.bool_]]) -> int:
    """Rows in which the two columns do not say the same; a list of one entry says what the entry says."""
    one, two = ours.filter(pl.Series(found)), theirs.filter(pl.Series(found))
    if is_list(two.dtype) and not is_list(one.dtype):
        several = (two.list.len() > 1).fill_null(False) if isinstance(two.dtype, pl.List) else None
        if several is None:
            return len(one)
        two = pl.select(pl.when(~several).then(two.list.first())).to_series()
        return int((several | ~_as_text(one).eq_missing(_as_text(two))).sum())
    if is_list(one.dtype) or is_list(two.dtype):
        codes, _ = factorise(pl.concat([one, two])) if one.dtype == two.dtype else (np.arange(2 * len(one)), None)
        return int((codes[: len(one)] != codes[len(one) :]).sum())
    return int((~_as_text(one).eq_missing(_as_text(two))).sum())


def _as_text(values: pl.Series) -> pl.Series:
    """`canonical_text`, worked out once for each distinct value."""
    codes, first = factorise(values)
    return canonical_text(values.gather(first)).gather(codes)


def _key_text(frame: pl.DataFrame, names: list[str], row: int) -> str:
    values = [frame[name][row] for name in names]
    return show(values[0]) if len(values) == 1 else show(tuple(values))
