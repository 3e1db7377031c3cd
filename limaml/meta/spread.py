"""Rows out of tables, and back: the linear map `rows = Σⱼ table[index[:, j]]` and its transpose, as fast as memory allows.

Autograd's own gather adds gradients up row by row, and one gather per table makes one pass over all rows each. Here all
tables lie in one, a row is summed in one pass, and the transpose is a sum over the rows of each entry, laid out once.
Each is the derivative of the other, so any order of differentiation works.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["Spread", "summed"]


class Spread:
    """`index` `[n, m]` into a table of `entries` rows.

    With `begin` `[entries]`, `m` is 1 and the index is sorted: the rows of an entry lie side by side, from there on.
    """

    def __init__(self, index: Tensor, entries: int, *, begin: Tensor | None = None) -> None:
        self.index, self.entries, self._begin = index.contiguous(), entries, begin

    @cached_property
    def _forth(self) -> tuple[Tensor, Tensor]:
        """The entries of every row, one after the other, and where each row's begin."""
        rows, entries = self.index.shape
        return self.index.flatten(), torch.arange(0, rows * entries, entries, device=self.index.device)

    @cached_property
    def _back(self) -> tuple[Tensor, Tensor]:
        """The rows of every entry, one after the other, and where each entry's begin."""
        flat = self.index.flatten()
        if self._begin is not None:
            return torch.arange(len(flat), device=flat.device), self._begin
        size = torch.bincount(flat, minlength=self.entries)
        begin = torch.cumsum(size, 0) - size
        order = torch.sort(flat, stable=True).indices
        return torch.div(order, self.index.shape[1], rounding_mode="floor"), begin

    def rows(self, table: Tensor) -> Tensor:
        """`[entries, …]` → `[n, …]`."""
        if self.index.shape[1] == 1 and not table.requires_grad:  # torch's own gather: no gradient will be slow
            return self._rows(table)
        return self._apply(_Rows, self._rows, table, len(self.index))

    def sums(self, rows: Tensor) -> Tensor:
        """`[n, …]` → `[entries, …]`: what `rows` takes apart, added up."""
        return self._apply(_Sums, self._sums, rows, self.entries)

    def weighted(self, rows: Tensor, weight: Tensor) -> Tensor:
        """`sums` of rows `[n, width]` times their weights `[n]`, without gradients; for an index with `begin`."""
        index, begin = self._back
        return summed(rows, index, begin, weight) if len(rows) else rows.new_zeros(self.entries, rows.shape[1])

    def _apply(self, function: type[_Linear], plain: Callable[[Tensor], Tensor], values: Tensor, count: int) -> Tensor:
        flat = values.reshape(len(values), values.shape[1:].numel())
        if not torch.is_grad_enabled():  # a Function's call is as long as a small sum takes
            return plain(flat).view(count, *values.shape[1:])
        found: Tensor = function.apply(flat, self)  # type: ignore[no-untyped-call]
        return found.view(count, *values.shape[1:])

    def _rows(self, table: Tensor) -> Tensor:
        if self.index.shape[1] == 1:
            return table.index_select(0, self.index[:, 0])
        return summed(table, *self._forth)

    def _sums(self, rows: Tensor) -> Tensor:
        if not len(rows):
            return rows.new_zeros(self.entries, rows.shape[1])
        return summed(rows.contiguous(), *self._back)


def summed(table: Tensor, index: Tensor, begin: Tensor, weight: Tensor | None = None) -> Tensor:
    """`table[index]`, summed over what lies between one entry of `begin` and the next, each times its `weight`."""
    found: Tensor = torch.embedding_bag(table.detach(), index, begin, per_sample_weights=weight)[0]  # mode 0: sum
    return found


class _Linear(torch.autograd.Function):
    """What both maps share: they are linear, and batched over a further dimension by widening the rows."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Spread], output: Tensor) -> None:
        ctx.spread = inputs[1]


class _Rows(_Linear):
    @staticmethod
    def forward(table: Tensor, spread: Spread) -> Tensor:
        return spread._rows(table)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return ctx.spread.sums(slope), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return cast(Tensor, ctx.spread.rows(tangent))

    @staticmethod
    def vmap(_info: Any, dims: tuple[int, None], table: Tensor, spread: Spread) -> tuple[Tensor, int]:
        return spread.rows(table.movedim(dims[0], 1)), 1


class _Sums(_Linear):
    @staticmethod
    def forward(rows: Tensor, spread: Spread) -> Tensor:
        return spread._sums(rows)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return ctx.spread.rows(slope), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return cast(Tensor, ctx.spread.sums(tangent))

    @staticmethod
    def vmap(_info: Any, dims: tuple[int, None], rows: Tensor, spread: Spread) -> tuple[Tensor, int]:
        return spread.sums(rows.movedim(dims[0], 1)), 1
