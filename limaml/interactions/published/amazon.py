"""Amazon Reviews 2023, one category: reviews as JSON lines or as the "0-core" or "5-core" CSV, and the items' metadata."""

from __future__ import annotations

import polars as pl

from limaml.errors import DataError
from limaml.interactions.published.files import Files, Tables, scan_json_lines, scan_text

__all__ = ["read_amazon"]

_REVIEW = {"user_id": pl.String, "parent_asin": pl.String, "rating": pl.Float64, "timestamp": pl.Int64}
_META = {
    "parent_asin": pl.String,
    "main_category": pl.String,
    "title": pl.String,
    "store": pl.String,
    "price": pl.String,
    "categories": pl.List(pl.String),
}


def read_amazon(files: Files) -> Tables:
    """Ratings of 1 to 5 with times in milliseconds, and what describes each item.

    Averages and numbers of ratings in the metadata are left out: they were counted when the data were collected, after
    what is to be predicted.
    """
    metas = files.find("meta_*.jsonl*")
    texts = [name for name in files.find("*.jsonl*") if name not in metas]
    tables = files.find("*.csv*")
    found = [*texts, *tables]
    if len(found) != 1:
        raise DataError(
            f"'{files.source}' has {len(found)} files that could be the reviews of a category ({', '.join(found) or 'none'}): "
            "one is needed, Category.jsonl.gz or a CSV of it, and perhaps meta_Category.jsonl.gz. Put them into a folder of "
            "their own."
        )
    path = files.plain(found[0])
    reviews = scan_json_lines(path, _REVIEW, list(_REVIEW)) if texts else scan_text(path, _REVIEW)[0]
    interactions = reviews.select(
        "user_id",
        pl.col("parent_asin").alias("item_id"),
        "rating",
        pl.from_epoch("timestamp", "ms").alias("timestamp"),
    )
    items = None
    if metas:
        if len(metas) > 1:
            raise DataError(f"'{files.source}' has {len(metas)} files of metadata ({', '.join(metas)}); one is needed.")
        meta = scan_json_lines(files.plain(metas[0]), _META, ["parent_asin"])
        items = meta.select(
            pl.col("parent_asin").alias("item_id"),
            "main_category",
            "title",
            "store",
            pl.col("price").str.replace_all(r"[$,]", "").cast(pl.Float64, strict=False).alias("price"),
            "categories",
        )
    said = (
        "Texts, images and votes of the reviews are left out, and so are average_rating and rating_number of the items."
    )
    return Tables(interactions, None, items, (said,))
