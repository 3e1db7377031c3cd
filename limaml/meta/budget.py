"""How much at once: rows of a piece, tasks in flight."""

from __future__ import annotations

from torch import nn

__all__ = ["cache_rows"]

CACHE = 2**20
"""Bytes that the widest activation of a piece of rows may take, so that the next layer finds it in the cache."""


def cache_rows(block: nn.Module) -> int:
    """Rows whose activations stay in the cache of one core, between two layers of `block`."""
    widest = max((max(m.in_features, m.out_features) for m in block.modules() if isinstance(m, nn.Linear)), default=64)
    return max(256, CACHE // (4 * widest))
