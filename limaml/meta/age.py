"""Age weighting: the weight of a support row is halved with every half-life that it lies behind its task's newest row.

    w_s ← w_s · 2^(−age_s / half_life)

The half-life is learned by the outer loop, one per task type. Ages count back from the newest row of the task's *own*
support, never from now: a task without new interactions keeps its embedding, whenever it is made again.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from limaml.errors import ConfigError
from limaml.tasks import TaskRows
from limaml.types import Interactions, Rows

__all__ = ["AGE_UNITS", "HalfLife", "ages", "warn_if_short"]

logger = logging.getLogger("limaml")

DAY = 86_400_000_000  # microseconds
AGE_UNITS = {"us": "days", "integer": "units of the time column", "order": "rows"}
"""`Interactions.time_unit` → what ages are counted in."""


def ages(data: Interactions, task: str, rows: Rows, tasks: int) -> Tensor:
    """How far each row lies behind the newest row of the same owner, `[n]` float64, ≥ 0.

    In days where `data.time_unit` is "us"; in the source's own unit where it is "integer" (seconds, if the column counts
    seconds). Where it is "order" times of different tasks have no common measure, and age is the number of the task's
    rows from there on to its newest one in `rows`: of *all* its rows in `data`, so that a support that is a part of
    them, as in cross-fit, ages no faster than the whole. `rows.owner` counts to `tasks`.
    """
    time = data.time
    if data.time_unit == "order":
        index = data.index[task]
        concerned = torch.zeros(data.count(task), dtype=torch.bool)
        concerned[index[rows.rows]] = True
        grouped = TaskRows.of(index, data.count(task), concerned[index])
        time = torch.zeros(len(data), dtype=torch.int64)
        time[grouped.rows] = torch.arange(len(grouped.rows))
    time = time[rows.rows]
    newest = torch.full((tasks,), torch.iinfo(torch.int64).min).scatter_reduce(0, rows.owner, time, "amax")
    age = (newest[rows.owner] - time).double()
    return age / DAY if data.time_unit == "us" else age


class HalfLife(nn.Module):
    """Ages `[n]` → factors of the weights `[n]`, in (0, 1]. Parameter: `log_half_life` `[]`, in the unit of `ages`."""

    def __init__(self, half_life: float) -> None:
        super().__init__()
        if not (half_life > 0 and math.isfinite(half_life)):
            raise ConfigError(
                f"A half-life must be a finite number greater than 0, in the unit of the rows' ages, but adapt.half_life is "
                f"{half_life}. Leave it at null to weigh all rows alike, however old."
            )
        self.log_half_life = nn.Parameter(torch.tensor(math.log(half_life)))

    def forward(self, age: Tensor) -> Tensor:
        return torch.exp2(-age.to(self.log_half_life) * torch.exp(-self.log_half_life))


def warn_if_short(half_life: float, data: Interactions, task: str, grouped: TaskRows) -> None:
    """Say so in the log where most support rows of `grouped` would weigh next to nothing: a half-life in another unit."""
    age = ages(data, task, grouped.of_tasks(torch.arange(data.count(task))), data.count(task))
    median = float(age.median()) if len(age) else 0.0
    if median > 20 * half_life:
        logger.warning(
            "adapt.half_life is %g, but half of the rows of '%s' lie more than %g behind their task's newest one, so they "
            "would weigh less than a millionth. It is counted in %s here: give it in that unit.",
            half_life,
            task,
            median,
            AGE_UNITS[data.time_unit],
        )
