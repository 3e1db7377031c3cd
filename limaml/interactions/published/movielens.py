"""MovieLens 20M, 25M, 32M and "latest": ratings.csv and movies.csv, UTF-8, titles with commas in quotes."""

from __future__ import annotations

import polars as pl

from limaml.interactions.published.files import Files, Tables, scan_text

__all__ = ["read_movielens"]

NO_GENRES = "(no genres listed)"
_YEAR = r"\((\d{4})(?:[-–]\d{0,4})?\)\s*$"


def read_movielens(files: Files) -> Tables:
    """Ratings (0.5 to 5 stars, seconds since 1970), and each film's title, year and genres."""
    ratings, _ = scan_text(
        files.one("ratings.csv", "ratings.csv.gz", needed="table of ratings"),
        {"userId": pl.Int64, "movieId": pl.Int64, "rating": pl.Float64, "timestamp": pl.Int64},
    )
    movies, _ = scan_text(
        files.one("movies.csv", "movies.csv.gz", needed="table of films"),
        {"movieId": pl.Int64, "title": pl.String, "genres": pl.String},
    )
    genres = pl.when(pl.col("genres") != NO_GENRES).then(pl.col("genres").str.replace_all("|", " ", literal=True))
    items = movies.select(
        pl.col("movieId").alias("item_id"),
        pl.col("title").str.replace(r"\s*" + _YEAR, "").alias("movie_title"),
        pl.col("title").str.extract(_YEAR, 1).cast(pl.Int64).alias("release_year"),
        genres.alias("genres"),
    )
    interactions = ratings.select(
        pl.col("userId").alias("user_id"),
        pl.col("movieId").alias("item_id"),
        "rating",
        pl.from_epoch("timestamp", "s").alias("timestamp"),
    )
    return Tables(interactions, None, items)
