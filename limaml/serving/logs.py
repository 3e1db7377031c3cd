"""Logs as one JSON object a line, with the request's id where there is one."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import orjson

__all__ = ["JsonLines", "log_as_json"]

FIELDS = ("request_id", "endpoint", "status", "milliseconds", "error")


class JsonLines(logging.Formatter):
    """A record as a JSON object: time (UTC), level, logger, message, and what `extra` gave of `FIELDS`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in FIELDS:
            value = getattr(record, name, None)
            if value is not None:
                line[name] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return (
            orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode() if _clean(line) else _ascii(line)
        )


def _clean(line: dict[str, Any]) -> bool:
    """Whether all its texts are UTF-8: what a request holds need not be."""
    return not any(isinstance(value, str) and not value.isascii() for value in line.values())


def _ascii(line: dict[str, Any]) -> str:
    texts = {
        name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for name, value in line.items()
    }
    return orjson.dumps(texts, default=str).decode()


def log_as_json(level: str = "INFO") -> None:
    """Send what the package and its web server log to stderr, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("limaml", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
