"""Everything limaml raises on purpose.

    LimamlError
    ├── ConfigError     a setting is unknown, of the wrong type, or contradicts another
    ├── DataError       the interactions cannot be used as they are; lists every problem at once
    ├── LeakError       a support row does not strictly precede its query, or a split lets the future in
    ├── ModelError      a block, an engine or a solver cannot do what was asked of it
    ├── TrainingError   training cannot go on (a loss that is not a number, say); the last good checkpoint is kept
    ├── ArtifactError   a model folder is incomplete, changed or of an unknown format
    ├── StoreError      a store refuses: unknown version, failed verification, two publishers at once
    │   └── StoreDown   the server that a store is on does not answer: asking again later makes sense
    └── MissingExtra    an optional dependency is not installed; says what to type

A message is a full sentence: what is wrong, where (column, row, task, parameter), and what to do about it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "ArtifactError",
    "ConfigError",
    "DataError",
    "LeakError",
    "LimamlError",
    "MissingExtra",
    "ModelError",
    "StoreDown",
    "StoreError",
    "TrainingError",
    "require",
]


class LimamlError(Exception):
    """Base of all errors that limaml raises on purpose."""


class ConfigError(LimamlError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(LimamlError, ValueError):
    """The interactions cannot be used as they are. The message lists every problem found."""


class LeakError(LimamlError, ValueError):
    """The future has leaked: into a support, or into the training rows of a split."""


class ModelError(LimamlError, ValueError):
    """A block, an engine or a solver cannot do what was asked of it."""


class TrainingError(LimamlError, RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


class ArtifactError(LimamlError, ValueError):
    """A model folder is incomplete, changed since it was written, or of a format this version does not know."""


class StoreError(LimamlError, RuntimeError):
    """A store refuses an operation."""


class StoreDown(StoreError):
    """The server that a store is on does not answer."""


class MissingExtra(LimamlError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of limaml brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            raise  # the package is there, but broken: its own message says more than ours would
        raise MissingExtra(
            f"This needs the package '{package}', which is not installed. Type: pip install 'limaml[{extra}]'"
        ) from error
