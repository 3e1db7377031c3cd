"""The options that say what a table means: the same for every verb that reads one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import ValidationError

from limaml.errors import ConfigError
from limaml.interactions import Prepared, Schema, prepare
from limaml.interactions.implicit import prepare_implicit

__all__ = ["DataOptions", "asked_schema", "read", "read_implicit"]


@Parameter(name="*")
@dataclass(frozen=True)
class DataOptions:
    """What the columns of an interaction table mean."""

    task: Annotated[
        list[str],
        Parameter(
            help="Column that names the task to personalise for (user_id). 'a+b' is a compound key; repeat for more.",
            negative=(),
        ),
    ]
    label: Annotated[
        list[str] | None,
        Parameter(
            help="What to predict: a column, or a rule such as 'rating >= 4'. Repeat for several labels.", negative=()
        ),
    ] = None
    row: Annotated[str | None, Parameter(help="Column that names what is scored (item_id).")] = None
    time: Annotated[
        str | None,
        Parameter(
            help="Any column that can be ordered. Without it a seeded shuffle stands in, and every output says so."
        ),
    ] = None
    task_features: Annotated[Path | None, Parameter(help="Table of task features, joined on the first task.")] = None
    row_features: Annotated[Path | None, Parameter(help="Table of row features, joined on --row.")] = None
    weight: Annotated[str | None, Parameter(help="Column of row weights.")] = None
    exclude: Annotated[
        list[str] | None, Parameter(help="Column that must not become a feature. Repeat for more.", negative=())
    ] = None
    schema: Annotated[
        Path | None,
        Parameter(help="A schema.json to use in place of what would be found: the one a run wrote, edited by hand."),
    ] = None
    max_tasks: Annotated[int | None, Parameter(help="Use a seeded sample of at most so many tasks.")] = None
    data_seed: Annotated[int, Parameter(help="Seed of that sample, and of the shuffle where there is no time.")] = 0


def read(file: Path, options: DataOptions) -> Prepared:
    """Read, join, explain, clean and check the table."""
    if not options.label:
        raise ConfigError(
            "Say what to predict with --label: a column, or a rule such as --label 'rating >= 4'. (A table that holds nothing "
            "but positives can be compared without one: limaml compare … --implicit.)"
        )
    return prepare(
        file,
        task=options.task,
        label=options.label,
        row=options.row,
        time=options.time,
        task_features=options.task_features,
        row_features=options.row_features,
        weight=options.weight,
        exclude=options.exclude or (),
        schema=None if options.schema is None else asked_schema(options.schema, options),
        max_tasks=options.max_tasks,
        seed=options.data_seed,
    )


def read_implicit(file: Path, options: DataOptions) -> Prepared:
    """Read the table as implicit feedback: its positives, joined and explained."""
    if options.label is not None and len(options.label) > 1:
        raise ConfigError("Implicit feedback has one label at most: the rule that says what a positive is.")
    refused = {"--weight": options.weight, "--schema": options.schema}
    if given := [name for name, value in refused.items() if value is not None]:
        raise ConfigError(
            f"{given[0]} does not go with --implicit: rows are chosen or not, and what describes them is found."
        )
    return prepare_implicit(
        file,
        task=options.task,
        row=options.row,
        time=options.time,
        label=options.label[0] if options.label else None,
        task_features=options.task_features,
        row_features=options.row_features,
        exclude=options.exclude or (),
        max_tasks=options.max_tasks,
        seed=options.data_seed,
    )


def asked_schema(path: Path, options: DataOptions) -> Schema:
    """The schema in a file, which must mean the same tasks, row and time as the options do."""
    try:
        schema = Schema.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no schema file '{path}'.") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is no schema: {error}") from error
    named = [task.name for task in schema.tasks], [label.name for label in schema.labels], schema.row, schema.time
    asked = options.task, options.label, options.row, options.time
    for what, has, wanted in zip(("task", "label", "row", "time"), named, asked, strict=True):
        if has != wanted:
            raise ConfigError(
                f"The schema '{path}' has {what} {has!r}, but the command says {wanted!r}. Make them agree."
            )
    return schema
