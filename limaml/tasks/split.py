"""Who is trained on, what may be looked at, and what is judged: the protocols, and the check that none of them leaks.

Every protocol answers with one `Split`. In all of them the support of a task strictly precedes its test rows: rows that
tie in time with the first test row go to the test's side, and are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limaml.errors import ConfigError, DataError, LeakError
from limaml.tasks.windows import TaskRows
from limaml.types import Interactions, Rows

__all__ = ["Split", "check_no_leak", "split_by_new_tasks", "split_by_task_order", "split_by_time"]


@dataclass(frozen=True)
class Split:
    """Three masks over the rows of `Interactions`, `[rows]` bool.

    `train`: the weights of both blocks, vocabularies and scalings may depend on these rows. `support`: what a task may
    be adapted on before it is judged (contains `train`). `test`: what it is judged on. `tied` counts the rows that went
    to the test's side because their time equals the cut.
    """

    protocol: str
    task: str
    train: Tensor
    support: Tensor
    test: Tensor
    tied: int = 0

    def __post_init__(self) -> None:
        if bool((self.support & self.test).any()) or bool((self.train & self.test).any()):
            raise LeakError(f"Split '{self.protocol}' of task '{self.task}' has rows both before and behind its cut.")


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise ConfigError(f"A split's {name} must lie between 0 and 1, both excluded, but is {share}.")


def _last_share(data: Interactions, task: str, among: Tensor, share: float) -> tuple[Tensor, int]:
    """Mask of each task's last `share` of the rows in `among`, grown by ties, and by how many rows."""
    grouped = TaskRows.of(data.index[task], data.count(task), among)
    size = grouped.size
    behind = torch.floor(size.double() * share + 0.5).long()
    cut = grouped.offset[:-1] + size - behind  # first test row of each task
    time = data.time[grouped.rows]
    has = behind > 0
    cut_time = torch.full((len(size),), torch.iinfo(torch.int64).max)
    cut_time[has] = time[cut[has]]
    owner = torch.repeat_interleave(torch.arange(len(size)), size)
    test = time >= cut_time[owner]
    mask = torch.zeros(len(data), dtype=torch.bool)
    mask[grouped.rows[test]] = True
    return mask, int(test.sum() - behind.sum())


def split_by_task_order(
    data: Interactions, task: str, *, share: float = 0.2, among: Tensor | None = None, protocol: str = "warm"
) -> Split:
    """`warm`: each task's last `share` of rows (rounded) is the test; the rest is training and support."""
    _check_share("share", share)
    among = torch.ones(len(data), dtype=torch.bool) if among is None else among
    test, tied = _last_share(data, task, among, share)
    train = among & ~test
    return Split(protocol, task, train, train, test, tied)


def split_by_new_tasks(
    data: Interactions,
    task: str,
    *,
    seed: int,
    share: float = 0.2,
    behind: float = 0.5,
    among: Tensor | None = None,
    protocol: str = "new_tasks",
) -> Split:
    """`new_tasks`: a seeded `share` of the tasks is never trained on; the last `behind` of each such task is the test,
    what precedes it is its support."""
    _check_share("share", share)
    _check_share("behind", behind)
    among = torch.ones(len(data), dtype=torch.bool) if among is None else among
    tasks = data.count(task)
    present = torch.zeros(tasks, dtype=torch.bool)
    present[data.index[task][among]] = True
    candidates = present.nonzero().flatten()
    if len(candidates) < 2:
        raise DataError(
            f"Holding out tasks needs at least 2 of type '{task}' with rows, but there are {len(candidates)}."
        )
    order = candidates[torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))]
    held = torch.zeros(tasks, dtype=torch.bool)
    held[order[: min(max(1, round(share * len(order))), len(order) - 1)]] = True
    of_held = held[data.index[task]] & among
    test, tied = _last_share(data, task, of_held, behind)
    return Split(protocol, task, among & ~of_held, among & ~test, test, tied)


def split_by_time(
    data: Interactions, task: str, *, cut: int, until: int | None = None, among: Tensor | None = None
) -> Split:
    """`time`: rows before time `cut` are training and support, rows from it on (and before `until`) the test."""
    if until is not None and until <= cut:
        raise ConfigError(f"A time split's test ends at {until}, which is not after its cut at {cut}.")
    among = torch.ones(len(data), dtype=torch.bool) if among is None else among
    train = among & (data.time < cut)
    test = among & (data.time >= cut)
    if until is not None:
        test &= data.time < until
    return Split("time", task, train, train, test)


def check_no_leak(data: Interactions, task: str, support: Rows, query: Rows, tasks: Tensor) -> None:
    """Raise `LeakError` unless every support row strictly precedes every query row of the same task.

    `owner` of both counts within `tasks` `[tasks]`, positions in the table of task type `task`.
    """
    if not len(support) or not len(query):
        return
    newest = torch.full((len(tasks),), torch.iinfo(torch.int64).min)
    newest = newest.scatter_reduce(0, support.owner, data.time[support.rows], "amax")
    late = (data.time[query.rows] <= newest[query.owner]).nonzero().flatten()
    if len(late):
        first = int(late[0])
        owner = int(query.owner[first])
        key = data.ids[task][int(tasks[owner])]
        raise LeakError(
            f"The support of task {task}:{key} reaches time {int(newest[owner])}, but it is judged on a row of time "
            f"{int(data.time[query.rows[first]])} (row {int(query.rows[first])}); {len(late)} query rows in all do not "
            "strictly follow their support. Cut each task's rows by time, ties on the query's side, as the splits of "
            "limaml.tasks do."
        )
