"""A request as the service sees it, whatever protocol it came by: its columns, checked by name, type and length."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.interactions.columns import nearest, show
from limaml.serving.columns import Column
from limaml.serving.scoring import Asked, Entries, Scorer
from limaml.serving.tensors import InferTensor, Refused
from limaml.types import FeatureKind

__all__ = [
    "SHADOWED",
    "Answer",
    "Question",
    "column_of_tensor",
    "column_of_values",
    "columns_of_rows",
    "refuse_partial",
    "rows_of",
]

SHADOWED = "shadowed"
"""Parameter of a question that is scored in the shadow of another: nobody reads its answer."""

LISTS = (FeatureKind.TOKENS, FeatureKind.SEQUENCE, FeatureKind.VECTOR)
LIMIT = 2**63
LARGEST = sys.float_info.max


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """`rows` rows to score. `version` None is the one that is current."""

    columns: Mapping[str, Column]
    rows: int
    version: str | None = None
    id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """Which of a batch's entries are one request's: from row `row`, and from entry `first` of each task type, on."""

    whole: Mapping[str, Entries]
    row: int
    first: tuple[int, ...]

    def known(self, asked: Asked) -> NDArray[np.bool_]:
        """`[n]` whether the store knew all tasks of each row."""
        known = np.ones(asked.rows, dtype=np.bool_)
        for (task, one), first in zip(self.whole.items(), self.first, strict=True):
            named = asked.tasks[task]
            known &= one.found[first : first + len(named.keys)][named.codes]
        return known

    def entries(self, asked: Asked) -> dict[str, Entries]:
        """The request's own."""
        rows, found = slice(self.row, self.row + asked.rows), {}
        for (task, one), first in zip(self.whole.items(), self.first, strict=True):
            part = slice(first, first + len(asked.tasks[task].keys))
            found[task] = Entries(
                one.keys[part],
                one.owner[rows] - first,
                one.found[part],
                one.count[part],
                one.event_time[part],
                one.z[part],
                {name: values[part] for name, values in one.table.items()},
            )
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """Scores of a question's rows, all from `version`. `store_down`: every task was taken for unknown. `sampled`: scores
    and logits are of a draw of the embeddings."""

    version: str
    logits: NDArray[np.float32]  # [n, heads]
    predictions: NDArray[np.float32]  # [n, heads]
    asked: Asked
    share: Share
    store_down: bool = False
    sampled: bool = False
    deviations: NDArray[np.float32] | None = None  # [n, heads], where asked for

    @property
    def known(self) -> NDArray[np.bool_]:
        """`[n]` whether the store knew all tasks of each row; found out when it is asked for."""
        return self.share.known(self.asked)

    @property
    def entries(self) -> Mapping[str, Entries]:
        """The tasks of the request alone, as they were found; cut out of the batch's when they are asked for."""
        return self.share.entries(self.asked)


def column_of_tensor(tensor: InferTensor, scorer: Scorer, missing_allowed: bool) -> Column:
    """The column in a tensor `[n]` or `[n, 1]`, or `[n, width]` for a feature that takes lists; `[1]` is for all rows.

    `missing_allowed`: NaN stands for a value that is not known, and is not refused.
    """
    data = tensor.data
    if data.ndim == 1 and tensor.name in scorer.columns:  # as most are: nothing to find out but values
        kind = data.dtype.kind
        if kind == "i" and (tensor.name not in scorer.not_negative or np.minimum.reduce(data, initial=0) >= 0):
            return Column.of_array(data)
        if kind == "f" and tensor.name not in scorer.keys and np.logical_and.reduce(np.isfinite(data)):
            return Column.of_array(data)
    where = f"Input '{tensor.name[:80]}'"
    kinds = _kinds(scorer, tensor.name, where)
    lists = bool(kinds) and all(kind in LISTS for kind in kinds)
    if data.ndim == 0:
        data = data.reshape(1)
    if data.ndim == 2 and data.shape[1] == 1 and not (lists and FeatureKind.VECTOR in kinds):
        data = data[:, 0]
    if data.ndim > 2 or (data.ndim == 2 and not lists):
        raise Refused(
            400, f"{where} has shape {list(tensor.shape)}; it must be [rows], or [1] for one value for all rows."
        )
    if data.dtype.kind == "f":
        data = _checked_numbers(data, scorer, tensor, where, missing_allowed)
    elif data.dtype.kind in "iu":
        refuse_negative(tensor.name, data, scorer, where)
    try:
        return Column.of_array(data)
    except UnicodeDecodeError as error:
        flat = data.reshape(-1).tolist()
        place = next(i for i, value in enumerate(flat) if not _is_text(value))
        raise Refused(
            400, f"{where} is no UTF-8 text in element {place} (they count from 0): {error.reason}."
        ) from None


def _kinds(scorer: Scorer, name: str, where: str) -> set[FeatureKind]:
    """Kinds of the features that read a column; none for one that only names a task."""
    if name not in scorer.columns:
        guess = nearest(name[:200], scorer.columns)
        hint = f"Did you mean '{guess}'?" if guess else f"It has {', '.join(sorted(scorer.columns))}."
        raise Refused(400, f"{where} is none that this model reads. {hint}")
    return scorer.kinds.get(name, set())


def _checked_numbers(
    data: NDArray[Any], scorer: Scorer, tensor: InferTensor, where: str, missing_allowed: bool
) -> NDArray[Any]:
    if tensor.name in scorer.keys:
        raise Refused(400, f"{where} names tasks and is {tensor.datatype}; send BYTES or INT64.")
    finite = np.isfinite(data)
    if not finite.all():
        bad = ~finite
        place = int(bad.reshape(-1).argmax())
        value = data.reshape(-1)[place]
        if not (missing_allowed and not np.isinf(data).any()):
            raise Refused(
                400, f"{where} is {value} in element {place} (they count from 0). Send finite numbers; if NaN shall mean "
                "that a value is not known, say so with the request parameter nan_is_missing=true."
            )  # fmt: skip
    return data


def refuse_negative(name: str, values: NDArray[Any], scorer: Scorer, where: str) -> None:
    """No id is negative: a negative one is a mistake of the caller's, such as a −1 for "none"."""
    if name in scorer.not_negative and len(values) and int(values.min()) < 0:
        place = int((values.reshape(-1) < 0).argmax())
        raise Refused(400, f"{where} is {values.reshape(-1)[place]} in element {place} (they count from 0); ids are not "
                      "negative. Leave rows without an id out.")  # fmt: skip


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def rows_of(columns: Mapping[str, Column], limit: int) -> int:
    """Number of rows that columns have together, each so many or one for all."""
    if not columns:
        raise Refused(400, "The request has no inputs; send the columns of the rows to score.")
    lengths = {name: len(column) for name, column in columns.items()}
    rows = max(lengths.values())
    if 0 in lengths.values():
        rows = 0 if rows <= 1 else rows
    wrong = [name for name, length in lengths.items() if length not in (1, rows)]
    if wrong:
        longest = next(name for name, length in lengths.items() if length == rows)
        raise Refused(
            400, f"Input '{wrong[0]}' has {lengths[wrong[0]]} rows and '{longest}' has {rows}; each must have as many as the "
            "others, or one for all."
        )  # fmt: skip
    if rows > limit:
        raise Refused(400, f"The request has {rows} rows; at most {limit} are scored at once. Send them in parts.")
    return rows


def refuse_partial(columns: Mapping[str, Column], scorer: Scorer) -> None:
    """A task's features come all together or not at all: with some of them alone, the rest would be guessed."""
    for task, own in scorer.together.items():
        missing = sorted(own - columns.keys())
        if missing and len(missing) < len(own):
            raise Refused(
                400, f"Features of '{task}' must be sent all or none (the store knows those of the tasks it knows); "
                f"{', '.join(map(repr, missing))} are missing."
            )  # fmt: skip


def column_of_values(name: str, values: Sequence[Any], scorer: Scorer, where: str) -> Column:
    """The column of values out of JSON: numbers, texts, Booleans, null, or lists of one of them."""
    kinds = _kinds(scorer, name, where)
    present = [value for value in values if value is not None]
    if any(isinstance(value, list) for value in present):
        if not all(kind in LISTS for kind in kinds) or not kinds:
            raise Refused(400, f"{where} is a list; send one value for each row.")
        if not all(isinstance(value, list) for value in present):
            raise Refused(400, f"{where} is a list in some rows and none in others.")
        inner = _dtype_of([entry for value in present for entry in value if entry is not None], where)
        return Column(pl.List(inner), [value if value is None else list(value) for value in values])
    dtype = _dtype_of(present, where)
    if dtype == pl.Int64 and present:
        refuse_negative(name, np.array(present), scorer, where)
    if dtype == pl.Float64:
        values = [None if value is None else float(value) for value in values]
    return Column(dtype, list(values))


def _dtype_of(values: Sequence[Any], where: str) -> pl.DataType:
    types = {type(value) for value in values}
    if types <= {int}:
        if any(not -LIMIT <= value < LIMIT for value in values):
            raise Refused(400, f"{where} holds an integer of more than 64 bits; send it as text.")
        return pl.Int64() if types else pl.Null()
    if types <= {int, float}:
        if not all(-LARGEST <= value <= LARGEST for value in values):  # an integer may be too large for any float
            raise Refused(
                400, f"{where} holds NaN, an infinity or a number beyond 64 bits; send null where nothing is known."
            )
        return pl.Float64()
    if types == {str}:
        if not all(value.isascii() or _is_encodable(value) for value in values):
            raise Refused(
                400, f"{where} holds half a surrogate pair (such as \\ud800), which is no text; send whole characters."
            )
        return pl.String()
    if types == {bool}:
        return pl.Boolean()
    names = ", ".join(sorted(kind.__name__ for kind in types))
    raise Refused(400, f"{where} holds {names}; send numbers alone, or texts alone, or Booleans alone.")


def columns_of_rows(rows: Sequence[Mapping[str, Any]], scorer: Scorer, where: str) -> dict[str, Column]:
    """The columns of rows that came as JSON objects; what a row does not say is null."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: column_of_values(name, [row.get(name) for row in rows], scorer, f"'{show(name)[1:-1]}' in {where}")
        for name in names
    }
