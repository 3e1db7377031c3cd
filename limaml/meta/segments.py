"""Sums over the rows of each task, without padding tasks to one length.

Rows are flat and sorted by owner. A sum adds up rows that lie side by side (`spread`). A Gram matrix `Σ a aᵀ` per task would need an outer product per
row that way; instead rows are laid into tiles of a few rows that never cross tasks, each tile is one small matrix product,
and only the tiles are index-added: the padding is less than a tile per task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limaml.meta.spread import Spread

__all__ = ["Segments"]


class Segments:
    """`owner` `[n]`, ascending, in `0 … count − 1`; `begin` `[count]`, if it is known: the first row of each."""

    def __init__(self, owner: Tensor, count: int, tile: int = 16, begin: Tensor | None = None) -> None:
        self.owner, self.count, self.tile = owner, count, tile
        if begin is None:
            size = torch.bincount(owner, minlength=count)
            begin = torch.cumsum(size, 0) - size
        self.begin = begin
        self._spread = Spread(owner[:, None], count, begin=begin)
        self._tiles: tuple[Tensor, Tensor, int] | None = None

    def rows(self, values: Tensor) -> Tensor:
        """`[count, …]` → `[n, …]`: to every row its owner's."""
        return self._spread.rows(values)

    def sum(self, values: Tensor) -> Tensor:
        """`[n, …]` → `[count, …]`."""
        if values.dim() == 1:
            return values.new_zeros(self.count).index_add(0, self.owner, values)
        return self._spread.sums(values)

    def weighted(self, values: Tensor, weight: Tensor) -> Tensor:
        """`sum` of `values` `[n, width]` times `weight` `[n, 1]`, which is not multiplied out; without gradients."""
        return self._spread.weighted(values, weight[:, 0].contiguous())

    def _layout(self) -> tuple[Tensor, Tensor, int]:
        """Slot of each row in the tiles, owner of each tile, number of tiles."""
        if self._tiles is None:
            size = torch.bincount(self.owner, minlength=self.count)
            tiles = torch.div(size + self.tile - 1, self.tile, rounding_mode="floor")
            first_tile = torch.cumsum(tiles, 0) - tiles
            first_row = torch.cumsum(size, 0) - size
            rank = torch.arange(len(self.owner), device=self.owner.device) - first_row[self.owner]
            tile_owner = torch.repeat_interleave(torch.arange(self.count, device=size.device), tiles)
            self._tiles = (first_tile[self.owner] * self.tile + rank, tile_owner, len(tile_owner))
        return self._tiles

    def gram(self, left: Tensor, right: Tensor) -> Tensor:
        """`Σ leftₙ rightₙᵀ` per task: `[n, a]`, `[n, b]` → `[count, a, b]`."""
        slot, tile_owner, tiles = self._layout()

        def tiled(values: Tensor) -> Tensor:
            flat = values.new_zeros(tiles * self.tile, values.shape[1]).index_copy(0, slot, values)
            return flat.view(tiles, self.tile, values.shape[1])

        products = torch.bmm(tiled(left).transpose(1, 2), tiled(right))
        return products.new_zeros(self.count, *products.shape[1:]).index_add(0, tile_owner, products)
