"""The options that say what a table means: the same for every verb that reads one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from limaml.interactions import Prepared, prepare

__all__ = ["DataOptions", "read"]


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
        list[str],
        Parameter(
            help="What to predict: a column, or a rule such as 'rating >= 4'. Repeat for several labels.", negative=()
        ),
    ]
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
    max_tasks: Annotated[int | None, Parameter(help="Use a seeded sample of at most so many tasks.")] = None
    data_seed: Annotated[int, Parameter(help="Seed of that sample, and of the shuffle where there is no time.")] = 0


def read(file: Path, options: DataOptions) -> Prepared:
    """Read, join, explain, clean and check the table."""
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
        max_tasks=options.max_tasks,
        seed=options.data_seed,
    )
