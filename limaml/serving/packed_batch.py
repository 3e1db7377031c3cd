"""A batch as the packed block scores it: kept rows gathered, all else added in one product.

    kept rows [n, width] += [ x, x² of the numbers │ 1 where a task owns the row ] @ [ what they are multiplied by │ tasks' shares ]

Rows of many requests do not fit a processor's nearest cache, and each pass over them costs as much as a product: so there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limaml.serving.columns import Lookup
from limaml.serving.packed import PackedInteraction
from limaml.serving.row_cache import RowCache
from limaml.types import Features, embedding_name

if TYPE_CHECKING:
    from limaml.serving.scoring import Asked, Entries

__all__ = ["PackedBatch"]

Array = NDArray[Any]

FEW = 32
"""Tasks whose shares are added by the product; those of more are gathered, which then costs less."""


class PackedBatch:
    """Logits of batches by one packed block. `encode` makes a row's numbers features, `on_device` what the block takes."""

    def __init__(
        self,
        packed: PackedInteraction,
        cache: RowCache,
        numbers: Sequence[Lookup],
        encode: Callable[[Sequence[Asked]], Features],
        on_device: Callable[[Features], Features],
    ) -> None:
        self._packed, self._cache, self._encode, self._on_device = packed, cache, encode, on_device
        self._any_numbers = bool(numbers)
        names = tuple(lookup.feature.name for lookup in numbers)
        scales = [(lookup.feature.column, scale) for lookup in numbers if (scale := lookup.scale_of_one())]
        plain = packed.takes(names) and len(scales) == len(names) and packed.dtype == np.float32
        self._names, self._scales = (names, scales) if plain else ((), [])

    def logits(self, asked: Sequence[Asked], entries: Mapping[str, Entries], z: Mapping[str, Tensor]) -> Array:
        """Logits `[n, heads]` of all rows, for embeddings `z` (task type → `[k, dim]`)."""
        packed = self._packed
        n = sum(one.rows for one in asked)
        if self._cache.names:
            rows = self._cache.rows([(one.ids, one.rows) for one in asked])
        else:
            rows = np.zeros((n, packed.width), packed.dtype)
        numbers = self._scaled(asked, n)
        if numbers is None and self._any_numbers:
            rows += _array(packed.encode(self._on_device(self._encode(asked))))
        shares, owners, few = [], [], 0
        for task, one in entries.items():
            share = packed.share(embedding_name(task), z[task].numpy())
            if one.table:
                share += _array(packed.encode(self._on_device(one.table)))
            if few + len(share) > FEW:
                rows += share.take(one.owner.numpy(), 0)
            else:
                shares.append(share)
                owners.append((few, one.owner.numpy()))
                few += len(share)
        s = 0 if numbers is None else numbers.shape[1]
        if few + s:
            x = np.zeros((n, few + 2 * s), packed.dtype)
            for place, owner in owners:
                x[np.arange(n), place + owner] = 1
            if numbers is not None:
                x[:, few : few + s] = numbers
                np.square(x[:, few : few + s], out=x[:, few + s :])
                shares.append(packed.product(self._names))
            weights = shares[0] if len(shares) == 1 else np.concatenate(shares)
            torch.from_numpy(rows).addmm_(torch.from_numpy(x), torch.from_numpy(weights))
        return packed.logits(rows)

    def _scaled(self, asked: Sequence[Asked], n: int) -> Array | None:
        """The encoded numbers `[n, s]` of all rows; None where one is missing, or comes in another form than an array."""
        if not self._scales:
            return None
        x, row = np.empty((n, len(self._scales))), 0
        for one in asked:
            for place, (column, _) in enumerate(self._scales):
                array = one.numbers[column].array
                if array is None or array.ndim > 1:
                    return None
                x[row : row + one.rows, place] = array
            row += one.rows
        return x if all(scale(x[:, place]) for place, (_, scale) in enumerate(self._scales)) else None


def _array(parts: tuple[Tensor | None, ...]) -> Array:
    (part,) = parts
    assert part is not None
    found: Array = part.numpy()
    return found
