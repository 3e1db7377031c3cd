"""What a method predicted on the query rows of one seed, and to which activity bucket each task belongs.

Everything in this folder starts from `Predictions`: flat arrays, one entry per query row, never one model object. So
scores that were computed elsewhere are compared in the same way as limaml's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from limaml.errors import DataError
from limaml.types import LossKind

__all__ = ["QUARTILES", "Floats", "Ints", "Predictions", "check_comparable", "quartiles", "sigmoid", "task_supports"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

QUARTILES = ("q1", "q2", "q3", "q4")
"""Activity buckets: `q1` holds the quarter of the tasks with the fewest support rows, `q4` the one with the most."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of one method on the query rows of one (dataset, protocol, seed).

    `task` `[n]` holds integers or strings; `support` `[n]` the number of support rows of the row's task, the same for
    all rows of a task; `label` `[n]` is 0 or 1 for the binary loss and any finite number for the squared loss;
    `logit` `[n]` is the log-odds for the binary loss and the predicted value itself for the squared loss; `weight`
    `[n]` is ≥ 0 and counts as 1 where it is not given. `moment` `[n]` numbers the states of a model that learns between
    query rows: GAUC ranks a task's rows of one moment only, since what a model learns from a positive row lifts the task's
    later rows, of which fewer are positive the more came before. Anything `numpy.asarray` takes is accepted. Raises `DataError`
    that lists every problem found.
    """

    dataset: str
    protocol: str
    seed: int
    method: str
    task: NDArray[np.generic]
    support: Ints
    label: Floats
    logit: Floats
    weight: Floats | None = None
    loss: LossKind = LossKind.BINARY
    moment: Ints | None = None

    def __post_init__(self) -> None:
        problems: list[str] = []
        object.__setattr__(self, "loss", LossKind(self.loss))
        object.__setattr__(self, "task", _task_array(self.task, problems))
        for name in ("support", "label", "logit", "weight"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _numbers(name, value, problems))
        rows = {name: getattr(self, name).shape for name in self._columns()}
        if self.moment is not None:
            object.__setattr__(self, "moment", np.asarray(self.moment, dtype=np.int64))
            rows["moment"] = self.moment.shape
        if any(len(shape) != 1 for shape in rows.values()) or len(set(rows.values())) > 1:
            shapes = ", ".join(f"{name} {list(shape)}" for name, shape in rows.items())
            problems.append(f"All arrays must be flat and equally long, but they have the shapes: {shapes}.")
        if not problems:
            problems = self._value_problems()
        if problems:
            raise DataError(
                f"The predictions of {self.where} cannot be used:\n" + "\n".join(f"- {p}" for p in problems)
            )
        object.__setattr__(self, "support", self.support.astype(np.int64))

    def __len__(self) -> int:
        return int(self.label.shape[0])

    @property
    def where(self) -> str:
        """The run in words, for messages."""
        return f"method '{self.method}' (dataset '{self.dataset}', protocol '{self.protocol}', seed {self.seed})"

    @property
    def predicted(self) -> Floats:
        """`[n]` predictions in the unit of the label: probabilities for the binary loss."""
        return sigmoid(self.logit) if self.loss is LossKind.BINARY else self.logit

    @property
    def row_weight(self) -> Floats:
        """`[n]` weights, 1 where none were given."""
        return np.ones(len(self)) if self.weight is None else self.weight

    def _columns(self) -> list[str]:
        columns = ("task", "support", "label", "logit", "weight")
        return [f.name for f in fields(self) if f.name in columns and getattr(self, f.name) is not None]

    def _value_problems(self) -> list[str]:
        problems = []
        for name in self._columns()[1:]:
            bad = ~np.isfinite(getattr(self, name))
            if bad.any():
                problems.append(f"{_count(bad, name, getattr(self, name))} not finite. {_REMEDY[name]}")
        if self.loss is LossKind.BINARY:
            bad = np.isfinite(self.label) & (self.label != 0) & (self.label != 1)
            if bad.any():
                problems.append(
                    f"{_count(bad, 'label', self.label)} neither 0 nor 1. The binary loss needs 0 and 1; for other "
                    "values use the squared loss."
                )
        if self.weight is not None and (self.weight < 0).any():
            problems.append(f"{_count(self.weight < 0, 'weight', self.weight)} negative. Weights must be ≥ 0.")
        bad = (self.support < 0) | (self.support != np.floor(self.support))
        if bad.any():
            problems.append(f"{_count(bad, 'support', self.support)} no count of rows (0, 1, 2, …).")
        elif not problems and len(self):
            names, code = np.unique(self.task, return_inverse=True)
            last = np.zeros(len(names))
            last[code] = self.support
            differs = self.support != last[code]
            if differs.any():
                row = int(np.flatnonzero(differs)[0])
                problems.append(
                    f"Task {self.task[row]!s} has different numbers of support rows in its query rows (row {row}: "
                    f"{int(self.support[row])}, elsewhere {int(last[code[row]])}). Give every row of a task the number "
                    "of support rows its meta embedding was made from."
                )
        return problems


def quartiles(support: Ints) -> Ints:
    """The activity quartile 0 … 3 of each task, `[tasks]`, from its number of support rows.

    Tasks with equally many support rows always share a bucket (the one their middle rank falls into), so the answer
    does not hang on the order of the rows. Where many tasks tie, the buckets are unequal, and some can be empty.
    """
    if not len(support):
        return np.empty(0, np.int64)
    _, code, count = np.unique(support, return_inverse=True, return_counts=True)
    middle = (np.cumsum(count) - count / 2) / len(support)
    return np.minimum(np.floor(middle * len(QUARTILES)).astype(np.int64), len(QUARTILES) - 1)[code]


def task_supports(predictions: Predictions) -> tuple[NDArray[np.generic], Ints, Ints]:
    """The distinct tasks `[tasks]`, the support rows of each `[tasks]`, and the task's position for each row `[n]`."""
    names, code = np.unique(predictions.task, return_inverse=True)
    support = np.zeros(len(names), np.int64)
    support[code] = predictions.support
    return names, support, code.astype(np.int64)


def check_comparable(predictions: Sequence[Predictions]) -> None:
    """Raise `DataError` unless the methods of each seed were judged on the same rows, in the same order.

    Differences between methods are paired, row by row; on different rows they would compare data, not methods.
    """
    first: dict[tuple[str, str, int], Predictions] = {}
    seen: set[tuple[str, str, int, str]] = set()
    losses: dict[str, Predictions] = {}
    task_kinds: dict[tuple[str, str], Predictions] = {}
    for item in predictions:
        key = (item.dataset, item.protocol, item.seed)
        if (*key, item.method) in seen:
            raise DataError(f"There are two sets of predictions of {item.where}. Give each once.")
        seen.add((*key, item.method))
        other = losses.setdefault(item.dataset, item)
        if other.loss is not item.loss:
            raise DataError(
                f"{item.where} has the {item.loss} loss and {other.where} the {other.loss} loss. Methods can only be "
                "compared on one label: give each label a dataset name of its own."
            )
        other = task_kinds.setdefault(key[:2], item)
        if len(item) and len(other) and other.task.dtype.kind != item.task.dtype.kind:
            raise DataError(
                f"{item.where} names its tasks by {_KIND[item.task.dtype.kind]} and {other.where} by "
                f"{_KIND[other.task.dtype.kind]}. Use the same ids in both."
            )
        other = first.setdefault(key, item)
        for name in ("task", "label", "support", "row_weight"):
            mine, theirs = getattr(item, name), getattr(other, name)
            if mine.shape != theirs.shape:
                raise DataError(
                    f"{item.where} has {len(item):,} rows and {other.where} has {len(other):,}. Methods can only be "
                    "compared on the same query rows."
                )
            if not np.array_equal(mine, theirs):
                row = int(np.flatnonzero(mine != theirs)[0])
                raise DataError(
                    f"{item.where} and {other.where} disagree on '{name.removeprefix('row_')}' in row {row} "
                    f"({mine[row]!s} and {theirs[row]!s}). Methods can only be compared on the same query rows in the "
                    "same order."
                )


def sigmoid(logit: ArrayLike) -> Floats:
    """1 / (1 + e^−logit), without overflow at any finite logit."""
    x = np.asarray(logit, dtype=np.float64)
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


_REMEDY = {
    "support": "Give the number of support rows of the row's task.",
    "label": "Leave rows without a label out.",
    "logit": "The model has diverged, or was given values that are not numbers.",
    "weight": "Give every row a finite weight.",
}
_KIND = {"i": "integers", "U": "strings"}


def _task_array(value: ArrayLike, problems: list[str]) -> NDArray[np.generic]:
    array = np.asarray(value)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.dtype.kind in "UT" or (array.dtype.kind == "O" and all(isinstance(t, str) for t in array.flat)):
        return array.astype(np.str_)
    problems.append(f"Tasks must be named by integers or by strings, but the array has the type {array.dtype}.")
    return array


def _numbers(name: str, value: ArrayLike, problems: list[str]) -> Floats:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        problems.append(f"'{name}' is not an array of numbers ({error}).")
        return np.empty(0)


def _count(bad: NDArray[np.bool_], name: str, values: Floats | Ints) -> str:
    row = int(np.flatnonzero(bad)[0])
    number = int(bad.sum())
    verb = "is" if number == 1 else "are"
    return f"{number:,} of {len(bad):,} values of '{name}' (the first in row {row}: {values[row]:g}) {verb}"
