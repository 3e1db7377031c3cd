"""Row-wise Adagrad: one number of state for each row of a table, where Adam keeps two for each weight.

    s_r ← s_r + mean(g_r²)      w_r ← w_r − rate · g_r / (√s_r + ε)

for the rows r that have a gradient. So a table `[n, d]` has `n` numbers of state and not `2·n·d`, and a step costs what a batch looks up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["RowwiseAdagrad"]


class RowwiseAdagrad(torch.optim.Optimizer):
    """Steps tables `[n, d]` that have sparse gradients over their first dimension, coalesced."""

    def __init__(self, tables: Sequence[nn.Parameter], rate: float, eps: float = 1e-8) -> None:
        super().__init__([{"params": [table]} for table in tables], {"rate": rate, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the rows that have a gradient."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                rows, slopes = table.grad.indices()[0], table.grad.values()
                state = self.state[table]
                if not state:
                    state["sum"] = torch.zeros(len(table), dtype=table.dtype, device=table.device)
                state["sum"].index_add_(0, rows, slopes.square().flatten(1).mean(1))
                scale = state["sum"][rows].sqrt() + group["eps"]
                table.index_add_(0, rows, slopes / scale.view(-1, *[1] * (slopes.ndim - 1)), alpha=-group["rate"])
