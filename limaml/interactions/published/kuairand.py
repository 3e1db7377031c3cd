"""KuaiRand (Pure, 1K, 27K): logs of a short-video app, in part of videos that were shown at random."""

from __future__ import annotations

from typing import Any

import polars as pl

from limaml.interactions.published.files import Files, Tables, scan_text

__all__ = ["OUTCOMES", "read_kuairand"]

OUTCOMES = (
    *("long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "is_profile_enter"),
    *("play_time_ms", "profile_stay_time", "comment_stay_time"),
)
"""What is known of a shown video only afterwards, beside `is_click`."""

_USER = (
    *(
        "user_active_degree",
        "follow_user_num_range",
        "fans_user_num_range",
        "friend_user_num_range",
        "register_days_range",
    ),
    *(f"onehot_feat{i}" for i in range(18)),
)
_USER_NUMBERS = ("is_lowactive_period", "is_live_streamer", "is_video_author")
_VIDEO = ("author_id", "video_type", "upload_type", "music_id", "music_type", "tag")


def read_kuairand(files: Files) -> Tables:
    """All logs that are there, one below the other: `is_rand` tells those shown at random; times are milliseconds."""
    names = files.find("log_standard_*.csv*", "log_random_*.csv*", needed="log")
    columns: dict[str, Any] = {
        "user_id": pl.Int64,
        "video_id": pl.Int64,
        "time_ms": pl.Int64,
        "is_click": pl.Int8,
        "tab": pl.Int64,
    }
    columns |= {"is_rand": pl.Int8, "duration_ms": pl.Float64, **dict.fromkeys(OUTCOMES, pl.Float64)}
    logs = [scan_text(files.plain(name), columns, optional=OUTCOMES)[0] for name in names]
    interactions = pl.concat(logs).select(
        "user_id",
        "video_id",
        pl.from_epoch("time_ms", "ms").alias("timestamp"),
        "is_click",
        pl.col("tab").cast(pl.String),
        "is_rand",
        *OUTCOMES,
    )
    users, videos = None, None
    if files.find("user_features_*.csv*"):
        types = {"user_id": pl.Int64, **dict.fromkeys(_USER, pl.String), **dict.fromkeys(_USER_NUMBERS, pl.Int64)}
        path = files.one("user_features_*.csv*", needed="table of members")
        users = scan_text(path, types, optional=[*_USER, *_USER_NUMBERS])[0]
    if files.find("video_features_basic_*.csv*"):
        types = {"video_id": pl.Int64, **dict.fromkeys(_VIDEO, pl.String), "video_duration": pl.Float64}
        parts = files.find("video_features_basic_*.csv*")
        videos = pl.concat([scan_text(files.plain(p), types, optional=[*_VIDEO, "video_duration"])[0] for p in parts])
        videos = videos.with_columns(pl.col("tag").str.replace_all(",", " ", literal=True))
    said = f"{len(names)} logs were found: {', '.join(name.rpartition('/')[2] for name in names)}."
    left = (
        "video_features_statistic is left out: its counts are of the whole month, the days to be predicted among them."
    )
    return Tables(interactions, users, videos, (said, left))
