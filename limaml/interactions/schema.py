"""What the columns of an interaction table mean.

A `Schema` is data: it is written by hand, or found by `infer_schema`, saved beside what it produced, and never changed
by reading a file. Everything fitted (vocabularies, scalings) lives in the `Encoder`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from limaml.types import ROW, FeatureKind, LossKind

__all__ = ["Feature", "Label", "Schema", "Task", "parse_rule", "parse_task"]

Operator = Literal[">=", ">", "<=", "<", "==", "!="]
_RULE = re.compile(r"^\s*(?P<column>.+?)\s*(?P<operator>>=|<=|==|!=|>|<)\s*(?P<value>.+?)\s*$")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Task(_Frozen):
    """A kind of thing that is personalised for. Its key is one column, or several together."""

    name: str
    columns: tuple[str, ...] = ()  # default: the one column called `name`

    @model_validator(mode="before")
    @classmethod
    def _name_is_column(cls, value: object) -> object:
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, dict) and not value.get("columns"):
            value = {**value, "columns": (value.get("name"),)}
        return value

    @field_validator("name")
    @classmethod
    def _usable(cls, name: str) -> str:
        if name == ROW or not name or "." in name:
            raise ValueError(f"A task cannot be called {name!r}: '{ROW}', an empty name and dots are taken.")
        return name


class Label(_Frozen):
    """What is predicted: a column as it is, or a rule on it (`rating >= 4`)."""

    name: str
    column: str
    operator: Operator | None = None
    value: float | str | bool | None = None
    loss: LossKind = LossKind.BINARY

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return parse_rule(value) if isinstance(value, str) else value


def parse_rule(text: str) -> dict[str, object]:
    """`"rating >= 4"` → the fields of a `Label`; a bare column name is the column as it is."""
    match = _RULE.match(text)
    if match is None:
        return {"name": text.strip(), "column": text.strip()}
    raw = match["value"]
    value: float | str | bool
    try:
        value = float(raw)
    except ValueError:
        value = {"true": True, "false": False}.get(raw.lower(), raw.strip("'\""))
    return {"name": text.strip(), "column": match["column"], "operator": match["operator"], "value": value}


def parse_task(text: str, columns: Sequence[str]) -> Task:
    """`"user_id"` → the task that this column names; `"user_id+type"`, if no column is called so, a compound key."""
    if text in columns or "+" not in text:
        return Task.model_validate(text)
    return Task(name=text, columns=tuple(part.strip() for part in text.split("+")))


class Feature(_Frozen):
    """One input of the model.

    `side` is a task's name if the feature is constant within each task of that type (it may then enter the task's meta
    block), else `row`. `buckets` hashes values instead of keeping a vocabulary; `min_count` sends rarer values to the
    unseen id; `length` caps tokens and sequences.
    """

    name: str
    kind: FeatureKind
    side: str = ROW
    column: str = ""  # default: the column called `name`
    buckets: int | None = Field(default=None, ge=1)
    min_count: int = Field(default=1, ge=1)
    length: int = Field(default=16, ge=1)
    separator: str = " "  # splits a text column into tokens; a list column needs none

    @model_validator(mode="before")
    @classmethod
    def _column_is_name(cls, value: object) -> object:
        if isinstance(value, dict) and not value.get("column"):
            value = {**value, "column": value.get("name")}
        return value

    @property
    def is_id(self) -> bool:
        return self.kind in (FeatureKind.CATEGORICAL, FeatureKind.TOKENS, FeatureKind.SEQUENCE)


class Schema(_Frozen):
    """The meaning of an interaction table's columns."""

    tasks: tuple[Task, ...] = Field(min_length=1)
    labels: tuple[Label, ...] = Field(min_length=1)
    features: tuple[Feature, ...] = ()
    time: str | None = None  # any column that can be ordered; None: a seeded shuffle stands in for it
    row: str | None = None  # the column that names what is scored (the item): `recommend` ranks its values
    weight: str | None = None
    offset: str | None = None  # a number added to every logit: the log-odds correction of sampled negatives
    seed: int = 0  # of the shuffle, where there is no time

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        names = [task.name for task in self.tasks]
        problems = [f"Task '{name}' is declared twice." for name in sorted({n for n in names if names.count(n) > 1})]
        seen: set[str] = set()
        hidden = {label.column for label in self.labels} | {name for name in (self.time, self.offset) if name}
        for feature in self.features:
            if feature.name in seen:
                problems.append(f"Feature '{feature.name}' is declared twice.")
            seen.add(feature.name)
            if feature.side != ROW and feature.side not in names:
                problems.append(
                    f"Feature '{feature.name}' is on side '{feature.side}', which is no task; use one of {[*names, ROW]}."
                )
            if not feature.is_id and (feature.buckets is not None or feature.min_count > 1):
                problems.append(
                    f"Feature '{feature.name}' is {feature.kind} and has no ids: remove its buckets and min_count."
                )
            if feature.buckets is not None and feature.min_count > 1:
                problems.append(
                    f"Feature '{feature.name}' has buckets, which need no vocabulary, and a min_count, which needs "
                    "one: remove one of them."
                )
            if feature.column in hidden:
                problems.append(
                    f"Feature '{feature.name}' reads column '{feature.column}', which is the time, the offset or what a "
                    "label is made from: the model would be shown what it has to predict. Remove the feature."
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def columns(self) -> set[str]:
        """Every column that encoding reads."""
        columns = {feature.column for feature in self.features} | {label.column for label in self.labels}
        columns |= {column for task in self.tasks for column in task.columns}
        return columns | {column for column in (self.time, self.weight, self.offset) if column is not None}
