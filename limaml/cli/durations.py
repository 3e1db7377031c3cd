"""Lengths of time as people type them: 90d, 6h, 15m."""

from __future__ import annotations

import re

from limaml.errors import ConfigError

__all__ = ["seconds_of"]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


def seconds_of(text: str, option: str) -> float:
    """`15m` in seconds; `option` is where it was typed."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip())
    if found is None:
        raise ConfigError(f"{option} is '{text}'; write a number and s, m, h, d or w, such as 15m or 90d.")
    return float(found[1]) * _UNITS[found[2]]
