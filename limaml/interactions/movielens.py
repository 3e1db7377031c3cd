"""MovieLens-100K out of either of the two archives that carry it, as the same three tables.

GroupLens's own archive has `u.data` (tabs), `u.user` and `u.item` (bars, Latin-1); the copy that recbole ships with its
examples has the same rows as atomic files (tabs, typed header, UTF-8). What differs: GroupLens writes a film's year into
its title and its genres as 19 flags; the copy misspells its one film without a name and without a year (267), and has
read the year of one other film (1412) wrongly. Both are put right here, so that the tables are equal to the byte.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence

import polars as pl

from limaml.errors import DataError

__all__ = ["GENRES", "from_atomic", "from_grouplens"]

GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
"""The genres of a film, in the order of `u.item`'s flags."""

Lines = Sequence[Sequence[str | None]]

_TITLE = re.compile(r"^(?P<title>.*?)\s*\((?P<year>\d{4})\)\s*(?:\(\w+\)\s*)*$")  # the year, then perhaps "(V)"
_INTERACTIONS = pl.Schema({"user_id": pl.Int64, "item_id": pl.Int64, "rating": pl.Int64, "timestamp": pl.Int64})
_USERS = pl.Schema(
    {"user_id": pl.Int64, "age": pl.Int64, "gender": pl.String, "occupation": pl.String, "zip_code": pl.String}
)
_ITEMS = pl.Schema({"item_id": pl.Int64, "movie_title": pl.String, "release_year": pl.Int64, "class": pl.String})


def from_grouplens(archive: zipfile.ZipFile) -> dict[str, pl.DataFrame]:
    """The tables of GroupLens's `ml-100k.zip`."""
    lines = {name: _member(archive, name).decode("latin-1").splitlines() for name in ("u.data", "u.user", "u.item")}
    items: list[Sequence[str | None]] = []
    for line in filter(None, lines["u.item"]):
        fields = line.split("|")
        if len(fields) != 5 + len(GENRES):
            raise DataError(f"A line of u.item has {len(fields)} fields instead of {5 + len(GENRES)}: {line[:80]!r}.")
        genres = " ".join(genre for genre, flag in zip(GENRES, fields[5:], strict=True) if flag == "1")
        items.append((fields[0], *_title_and_year(fields[1]), genres))
    return _tables(
        [line.split("\t") for line in filter(None, lines["u.data"])],
        [line.split("|") for line in filter(None, lines["u.user"])],
        items,
    )


def from_atomic(archive: zipfile.ZipFile) -> dict[str, pl.DataFrame]:
    """The tables of the recbole wheel's `ml-100k.{inter,user,item}`."""
    rows = {}
    for kind in ("inter", "user", "item"):
        lines = _member(archive, f"ml-100k.{kind}").decode("utf-8").splitlines()
        rows[kind] = [line.split("\t") for line in lines[1:] if line]
    items: list[Sequence[str | None]] = []
    for item, title, year, genres in rows["item"]:
        if year == "unkonwn":
            items.append((item, "unknown", None, genres))
        else:
            items.append((item, *_title_and_year(f"{title} ({year})"), genres))
    return _tables(rows["inter"], rows["user"], items)


def _title_and_year(text: str) -> tuple[str, str | None]:
    match = _TITLE.match(text)
    return (text.strip(), None) if match is None else (match["title"], match["year"])


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The content of the one file called `name`, in whatever folder of the archive."""
    found = [path for path in archive.namelist() if path.rpartition("/")[2] == name]
    if len(found) != 1:
        raise DataError(f"The archive has {len(found)} files called {name} instead of one.")
    return archive.read(found[0])


def _tables(interactions: Lines, users: Lines, items: Lines) -> dict[str, pl.DataFrame]:
    """The tables in one order and one type, whatever the order and spelling of the source."""
    return {
        "interactions": _table(interactions, _INTERACTIONS).sort("timestamp", "user_id", "item_id"),
        "users": _table(users, _USERS).sort("user_id"),
        "items": _table(items, _ITEMS).sort("item_id"),
    }


def _table(rows: Lines, columns: pl.Schema) -> pl.DataFrame:
    wrong = [row for row in rows if len(row) != len(columns)]
    if wrong:
        raise DataError(
            f"A line has {len(wrong[0])} fields instead of {len(columns)} ({', '.join(columns)}): {wrong[0]}."
        )
    table = pl.DataFrame([list(row) for row in rows], schema=dict.fromkeys(columns, pl.String), orient="row")
    try:
        return table.cast(columns)
    except pl.exceptions.InvalidOperationError as error:
        raise DataError(f"The columns {', '.join(columns)} are not of the kinds expected: {error}") from error
