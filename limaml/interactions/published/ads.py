"""Logs of advertisements: Criteo's display and attribution sets, and Avazu's."""

from __future__ import annotations

import polars as pl

from limaml.interactions.published.files import Files, Tables, scan_text

__all__ = ["ATTRIBUTION_OUTCOMES", "read_attribution", "read_avazu", "read_criteo"]

NUMBERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
ATTRIBUTION_OUTCOMES = (
    *("conversion", "conversion_timestamp", "conversion_id", "attribution", "click_pos", "click_nb", "cost", "cpo"),
)
_AVAZU = (
    *("C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type", *(f"C{i}" for i in range(14, 22))),
)


def read_criteo(files: Files) -> Tables:
    """The Display Advertising Challenge (train.txt) or days of the terabyte log: no ids, no times, rows in order of time."""
    names = files.find("train.txt", "train.txt.gz", "day_[0-9]*", needed="log")
    names.sort(key=lambda name: (len(name.removesuffix(".gz")), name))  # day_2 before day_10
    columns = {"label": pl.Int8, **dict.fromkeys(NUMBERS, pl.Int64), **dict.fromkeys(CATEGORIES, pl.String)}
    parts = [scan_text(files.plain(n), columns, separator="\t", header=False, quote=None)[0] for n in names]
    rows = pl.concat(parts).with_row_index("row_number").with_columns(pl.col("row_number").cast(pl.Int64))
    note = "Rows have no time: they are in order of time, and 'row_number' stands for it."
    return Tables(rows.rename({"label": "click"}), None, None, (note,))


def read_attribution(files: Files) -> Tables:
    """The Criteo Attribution set: impressions of campaigns with members' ids; seconds since the first one."""
    kinds = {"timestamp": pl.Int64, "uid": pl.String, "campaign": pl.String, "click": pl.Int8}
    outcomes = dict.fromkeys(ATTRIBUTION_OUTCOMES, pl.Float64)
    kinds |= {**outcomes, "time_since_last_click": pl.Int64, **{f"cat{i}": pl.String for i in range(1, 10)}}
    path = files.one("criteo_attribution_dataset.tsv*", needed="log")
    frame, _ = scan_text(path, kinds, separator="\t", optional=ATTRIBUTION_OUTCOMES)
    since = pl.when(pl.col("time_since_last_click") >= 0).then(pl.col("time_since_last_click"))
    return Tables(frame.with_columns(since.alias("time_since_last_click")))


def read_avazu(files: Files) -> Tables:
    """The Avazu click log: the hour is written YYMMDDHH."""
    columns = {"id": pl.String, "click": pl.Int8, "hour": pl.String, **dict.fromkeys(_AVAZU, pl.String)}
    frame, _ = scan_text(files.one("train", "train.gz", "train.csv", "train.csv.gz", needed="log"), columns)
    when = ("20" + pl.col("hour") + "00").str.to_datetime("%Y%m%d%H%M")
    return Tables(frame.drop("id").with_columns(when.alias("hour")))
