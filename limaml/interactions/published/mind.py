"""MIND: what Microsoft News showed to members and what they clicked, one line for each visit."""

from __future__ import annotations

import polars as pl

from limaml.interactions.published.files import Files, Tables, scan_text

__all__ = ["read_mind"]

TIME = "%m/%d/%Y %I:%M:%S %p"  # 11/15/2019 9:55:12 AM
_BEHAVIOURS = ("impression_id", "user_id", "time", "history", "impressions")
_NEWS = ("news_id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")


def read_mind(files: Files) -> Tables:
    """One row for each news item that was shown: `clicked` is the digit behind its last dash. Of the test set, which has
    none, `clicked` is null. `history` are the items that the member had clicked before, oldest first, of the last 50."""
    behaviours = files.one("behaviors.tsv", "behaviors.tsv.gz", needed="table of visits")
    visits, _ = scan_text(behaviours, dict.fromkeys(_BEHAVIOURS, pl.String), separator="\t", header=False, quote=None)
    shown = visits.with_columns(pl.col("impressions").str.split(" "))
    shown = shown.explode("impressions").filter(pl.col("impressions") != "")
    interactions = shown.select(
        "impression_id",
        "user_id",
        pl.col("impressions").str.extract(r"^(.*?)(?:-[01])?$", 1).alias("news_id"),
        pl.col("time").str.to_datetime(TIME).alias("timestamp"),
        pl.col("impressions").str.extract(r"-([01])$", 1).cast(pl.Int8).alias("clicked"),
        pl.col("history").str.split(" ").list.tail(50).list.join(" ").alias("history"),
    )
    news, _ = scan_text(
        files.one("news.tsv", "news.tsv.gz", needed="table of news"),
        dict.fromkeys(_NEWS, pl.String),
        separator="\t",
        header=False,
        quote=None,
    )
    note = "A member's visits are rows of several news each, which tie in time; no split parts them."
    return Tables(interactions, None, news.select("news_id", "category", "subcategory", "title"), (note,))
