"""What everybody works on: MovieLens-1M's members as tasks, with their real support sizes and items.

Where the data set is not at hand, the same distributions are drawn: support sizes log-normal, a little wider above the
median than below (p10 27, median 96, p90 370, mean 169; clipped to 20 … 2,314; the data: 27, 96, 400, 165), each member's items without repetition, by a popularity that falls as MovieLens-1M's does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import polars as pl
import torch
from torch import Tensor

from limaml.types import Rows

__all__ = ["ITEMS", "Problem", "Table", "generated_table", "movielens_table", "problem_of", "uniform_table"]

ITEMS = 3706
SHORTEST, MEDIAN, LONGEST = 20, 96.0, 2314
BELOW, ABOVE = 0.99, 1.06  # standard deviation of the logarithm, on either side of the median

Work = Literal["generate", "train"]


@dataclass(frozen=True)
class Table:
    """Interactions grouped by member, oldest first: member `t` owns rows `offset[t]:offset[t + 1]`."""

    item: Tensor  # [rows] int64
    label: Tensor  # [rows] float32, 0 or 1
    offset: Tensor  # [members + 1] int64
    source: str

    @property
    def size(self) -> Tensor:
        return self.offset[1:] - self.offset[:-1]

    def members(self, chosen: Tensor) -> Table:
        """The table of some members, in the order given."""
        rows = torch.cat([torch.arange(self.offset[t], self.offset[t + 1]) for t in chosen.tolist()])
        return Table(self.item[rows], self.label[rows], _offsets(self.size[chosen]), self.source)


def _offsets(size: Tensor) -> Tensor:
    return torch.cat([size.new_zeros(1), torch.cumsum(size, 0)])


def movielens_table(folder: Path, members: int) -> Table:
    """`members` of MovieLens-1M's 6,040, spread evenly over the order of their support sizes, the longest included."""
    frame = pl.read_parquet(folder / "interactions.parquet").sort("user_id", "orig_row", maintain_order=True)
    user = torch.from_numpy(frame["user_id"].rank("dense").cast(pl.Int64).to_numpy() - 1)
    item = torch.from_numpy(frame["item_id"].rank("dense").cast(pl.Int64).to_numpy() - 1)
    label = torch.from_numpy((frame["rating"] >= 4).cast(pl.Float32).to_numpy().copy())
    size = torch.bincount(user)
    by_size = torch.sort(size, stable=True).indices
    chosen = by_size[((torch.arange(members) + 0.5) / members * len(size)).long()]
    chosen[-1] = by_size[-1]
    whole = Table(item, label, _offsets(size), "MovieLens-1M")
    return whole.members(chosen[_shuffle(members)])


def generated_table(members: int) -> Table:
    """As `movielens_table`, out of the distributions instead of the data."""
    quantile = (torch.arange(members, dtype=torch.float64) + 0.5) / members
    normal = torch.special.ndtri(quantile)
    size = MEDIAN * torch.exp(torch.where(normal < 0, BELOW, ABOVE) * normal)
    size = size.round().clamp(SHORTEST, LONGEST).long()
    size[-1] = LONGEST
    return _drawn(size[_shuffle(members)], "generated with the distributions of MovieLens-1M")


def uniform_table(members: int, rows: int) -> Table:
    """Every member has `rows` rows; items may repeat where there are more rows than items."""
    generator = torch.Generator().manual_seed(4)
    total = members * rows
    item = torch.randint(0, ITEMS, (total,), generator=generator)
    label = (torch.rand(total, generator=generator) < 0.5752).float()
    return Table(item, label, torch.arange(members + 1) * rows, f"{rows} rows a task")


def _shuffle(members: int) -> Tensor:
    return torch.randperm(members, generator=torch.Generator().manual_seed(1))


def _drawn(size: Tensor, source: str) -> Table:
    generator = torch.Generator().manual_seed(2)
    rank = torch.arange(ITEMS, dtype=torch.float64)
    popularity = -0.3 * torch.log(rank + 20) - rank / 900
    items = []
    for n in size.tolist():  # the n largest of log p + Gumbel noise: n items without repetition, each by its popularity
        noise = -torch.log(
            -torch.log(torch.rand(ITEMS, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12))
        )
        chosen = torch.topk(popularity + noise, min(n, ITEMS)).indices
        items.append(chosen[torch.randperm(len(chosen), generator=generator)])
    item = torch.cat(items)
    label = (torch.rand(len(item), generator=generator) < 0.5752).float()
    return Table(item, label, _offsets(size), source)


@dataclass(frozen=True)
class Problem:
    """A batch of tasks, handed to every contender alike. Rows are items; an item is a dense vector of fixed numbers.

    `support` and `query` hold positions in `item` and `label`. `generate` has no query.
    """

    work: Work
    features: Tensor  # [tasks, in]: the meta block's input
    vectors: Tensor  # [items, width]: the rows' features
    item: Tensor  # [rows]
    label: Tensor  # [rows]
    support: Rows
    query: Rows
    longest: int  # rows of the longest support or query of the batch that this one was taken from

    @property
    def tasks(self) -> int:
        return len(self.features)

    @cached_property
    def per_task(self) -> list[tuple[Tensor, Tensor]]:
        """Support and query row positions of each task."""
        pieces = []
        for rows in (self.support, self.query):
            pieces.append(torch.split(rows.rows, torch.bincount(rows.owner, minlength=self.tasks).tolist()))
        return list(zip(*pieces, strict=True))

    def thinned(self, every: int) -> Problem:
        """Each `every`-th task in the order of support sizes: the same distribution of sizes, fewer tasks."""
        size = torch.bincount(self.support.owner, minlength=self.tasks)
        kept = torch.sort(torch.sort(size, stable=True).indices[every // 2 :: every]).values
        place = torch.full((self.tasks,), -1)
        place[kept] = torch.arange(len(kept))

        def only(rows: Rows) -> Rows:
            owner = place[rows.owner]
            return Rows(rows.rows[owner >= 0], owner[owner >= 0])

        return Problem(
            self.work,
            self.features[kept],
            self.vectors,
            self.item,
            self.label,
            only(self.support),
            only(self.query),
            self.longest,
        )


def problem_of(table: Table, work: Work, cap: int | None, inputs: int, width: int) -> Problem:
    """`generate`: the support is a task's `cap` newest rows. `train`: its rows fall to support and query in turn, the
    `cap` newest of each are kept."""
    generator = torch.Generator().manual_seed(3)
    tasks = len(table.size)
    owner = torch.repeat_interleave(torch.arange(tasks), table.size)
    rows = torch.arange(len(owner))
    behind = table.offset[1:][owner] - 1 - rows  # 0 for the newest row of each task
    if work == "generate":
        kept = behind < (cap or LONGEST)
        support, query = Rows(rows[kept], owner[kept]), Rows.empty()
    else:
        kept = torch.div(behind, 2, rounding_mode="floor") < (cap or LONGEST)
        judged = behind % 2 == 0
        support = Rows(rows[kept & ~judged], owner[kept & ~judged])
        query = Rows(rows[kept & judged], owner[kept & judged])
    longest = max(int(torch.bincount(r.owner, minlength=tasks).max()) for r in (support, query))
    return Problem(
        work,
        torch.randn(tasks, inputs, generator=generator),
        torch.randn(ITEMS, width, generator=generator),
        table.item,
        table.label,
        support,
        query,
        longest,
    )
