"""Data sets by name that their users download themselves: files as published → Parquet tables, in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl

from limaml.durable import sync
from limaml.errors import ConfigError, DataError
from limaml.interactions.atomic_files import write_atomically
from limaml.interactions.catalog import DataSet
from limaml.interactions.published.ads import ATTRIBUTION_OUTCOMES, read_attribution, read_avazu, read_criteo
from limaml.interactions.published.amazon import read_amazon
from limaml.interactions.published.files import Files, Published
from limaml.interactions.published.kuairand import OUTCOMES, read_kuairand
from limaml.interactions.published.mind import read_mind
from limaml.interactions.published.movielens import read_movielens

__all__ = ["PUBLISHED", "convert"]

_GROUPLENS = "research use; no commercial use without permission, no redistribution without permission; cite Harper and Konstan 2015"

_SETS = (
    Published(
        "ml-25m",
        "MovieLens 25M",
        "25 million ratings (0.5 to 5) of 62,000 films by 162,000 members; also 20M, 32M and the 'latest' sets",
        "https://grouplens.org/datasets/movielens/25m/",
        _GROUPLENS,
        read_movielens,
        "user_id",
        "item_id",
        "timestamp",
        "seconds since 1970",
        "rating >= 4",
    ),
    Published(
        "ml-32m",
        "MovieLens 32M",
        "32 million ratings (0.5 to 5) of 88,000 films by 201,000 members",
        "https://grouplens.org/datasets/movielens/32m/",
        _GROUPLENS,
        read_movielens,
        "user_id",
        "item_id",
        "timestamp",
        "seconds since 1970",
        "rating >= 4",
    ),
    Published(
        "kuairand",
        "KuaiRand (Pure, 1K or 27K)",
        "videos shown to members of an app, in part at random, with clicks and features of both",
        "https://kuairand.com/",
        "CC BY-SA 4.0; cite Gao et al. 2022",
        read_kuairand,
        "user_id",
        "video_id",
        "timestamp",
        "milliseconds since 1970",
        "is_click",
        OUTCOMES,
    ),
    Published(
        "mind",
        "MIND (small or large)",
        "news shown to members of Microsoft News, and which they clicked",
        "https://msnews.github.io/",
        "Microsoft Research License: research use, no redistribution; cite Wu et al. 2020",
        read_mind,
        "user_id",
        "news_id",
        "timestamp",
        "month/day/year and a clock of 12 hours",
        "clicked",
        ("impression_id",),
    ),
    Published(
        "amazon-2023",
        "Amazon Reviews 2023 (one category)",
        "ratings (1 to 5) of products, 33 categories, to September 2023",
        "https://amazon-reviews-2023.github.io/",
        "for research; no licence is stated, the texts are the reviewers'; cite Hou et al. 2024",
        read_amazon,
        "user_id",
        "item_id",
        "timestamp",
        "milliseconds since 1970",
        "rating >= 4",
    ),
    Published(
        "criteo",
        "Criteo Display Advertising (Kaggle's train.txt, or days of the terabyte log)",
        "impressions with 13 counts, 26 hashed categories and whether there was a click",
        "https://ailab.criteo.com/ressources/",
        "CC BY-NC-SA 4.0 (terabyte log); the challenge's own terms (Kaggle)",
        read_criteo,
        None,
        None,
        "row_number",
        "order of the rows",
        "click",
        task_choices=("C1", "C14", "C20"),
    ),
    Published(
        "criteo-attribution",
        "Criteo Attribution",
        "16 million impressions of 700 campaigns for 6 million members, with clicks and conversions",
        "https://ailab.criteo.com/criteo-attribution-modeling-bidding-dataset/",
        "CC BY-NC-SA 4.0; cite Diemert et al. 2017",
        read_attribution,
        "uid",
        "campaign",
        "timestamp",
        "seconds since the first impression",
        "click",
        ATTRIBUTION_OUTCOMES,
    ),
    Published(
        "avazu",
        "Avazu click-through (Kaggle)",
        "40 million impressions on mobile devices, and whether there was a click",
        "https://www.kaggle.com/c/avazu-ctr-prediction/data",
        "the challenge's own terms (Kaggle)",
        read_avazu,
        None,
        None,
        "hour",
        "hours, written YYMMDDHH",
        "click",
        task_choices=("device_ip", "site_id", "app_id"),
    ),
)

PUBLISHED: Mapping[str, Published] = {entry.name: entry for entry in _SETS}
"""Name → the data set."""


def convert(name: str, source: Path, folder: Path, *, progress: Callable[[str], None] | None = None) -> DataSet:
    """Read the data set `name` from the folder or archive `source` as published; write Parquet tables into `folder`.

    Memory is bounded: what is packed is unpacked to disk, and tables stream through. Each table appears whole or not at
    all. Raises `ConfigError` for an unknown name, and `DataError`, with the file's name, for files that are missing, cut
    short, or not of this data set, and for rows without a task, an item, a time or (but for a test set) a label.
    """
    say = progress or (lambda sentence: None)
    if name not in PUBLISHED:
        raise ConfigError(f"There is no data set called '{name}'. Known names: {', '.join(sorted(PUBLISHED))}.")
    entry = PUBLISHED[name]
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".reading-") as scratch:
        tables = entry.read(Files(source.expanduser(), Path(scratch)))
        for note in tables.notes:
            say(note)
        named = {"interactions": tables.interactions, "tasks": tables.task_features, "rows": tables.row_features}
        for table, frame in named.items():
            if frame is not None:
                paths[table] = _write(entry, table, frame, source, folder)
        rows = _check(entry, paths["interactions"], source, say)
        for table, path in paths.items():
            final = folder / f"{table}.parquet"
            path.replace(final)
            paths[table] = final
        for stale in {"tasks", "rows"} - paths.keys():  # of files that an earlier source had
            (folder / f"{stale}.parquet").unlink(missing_ok=True)
    write_atomically(folder / "LICENCE.txt", f"{entry.title}: {entry.licence}\n{entry.address}\n".encode())
    write_atomically(folder / "SOURCE.txt", f"{source}\n".encode())
    return DataSet(
        name=name,
        title=entry.title,
        folder=folder,
        interactions=paths["interactions"],
        task_features=paths.get("tasks"),
        row_features=paths.get("rows"),
        task=entry.task or "",
        row=entry.row or "",
        time=entry.time,
        label=entry.label,
        licence=entry.licence,
        citation=entry.address,
        source=str(source),
        rows=rows,
    )


def _write(entry: Published, table: str, frame: pl.LazyFrame, source: Path, folder: Path) -> Path:
    path = folder / f".{table}.parquet.new"
    try:
        frame.sink_parquet(path, compression="zstd")
    except pl.exceptions.PolarsError as error:
        path.unlink(missing_ok=True)
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"The {table} of {entry.title} in '{source}' cannot be read: {said}. A file may be cut short, changed, or of "
            "another version."
        ) from error
    sync(path)
    return path


def _check(entry: Published, path: Path, source: Path, say: Callable[[str], None]) -> int:
    """The number of rows, if each says who, what, when and how it went."""
    needed = [name for name in (entry.task, entry.row, entry.time) if name is not None]
    label = entry.label.split()[0]
    frame = pl.scan_parquet(path, glob=False)
    counts = frame.select(pl.len().alias("rows"), pl.col([*needed, label]).null_count()).collect()
    rows = int(counts["rows"][0])
    if not rows:
        raise DataError(f"'{source}' has no interactions: its files have a header and nothing else.")
    for name in needed:
        if counts[name][0]:
            place = frame.select(pl.col(name).is_null().arg_max()).collect().item()
            raise DataError(
                f"{counts[name][0]:,} of {rows:,} interactions in '{source}' have no '{name}', the first is row {place} (rows "
                "count from 0). The file is cut short or damaged: download it again."
            )
    if counts[label][0] == rows:
        raise DataError(f"No interaction in '{source}' has a '{label}': this is a test set without labels.")
    if counts[label][0]:
        say(f"{counts[label][0]:,} of {rows:,} interactions have no '{label}': they are not learned from.")
    return rows
