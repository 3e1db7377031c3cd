"""Sums over pieces of rows that keep nothing of a piece: its activations are made again when the backward pass needs them.

`torch.utils.checkpoint` does this for a forward pass. What is computed here is a derivative already (slopes, Gauss-Newton
matrices), so the second computation has to keep its graph where the first did not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["recomputed"]

Compute = Callable[[Sequence[Tensor | None], bool], Sequence[Tensor]]
"""(inputs, create_graph) → outputs. Differentiable by its inputs, and by the parameters, if `create_graph`."""


def recomputed(compute: Compute, inputs: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`compute(inputs, …)`, which is computed again, with its graph, in the backward pass; differentiable once.

    `parameters` are the leaf tensors that `compute` reads beside its inputs.
    """
    found: tuple[Tensor, ...] = _Recomputed.apply(compute, len(inputs), *inputs, *parameters)  # type: ignore[no-untyped-call]
    return found


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, count: int, *given: Tensor | None) -> tuple[Tensor, ...]:
        ctx.compute, ctx.count, ctx.given = compute, count, given
        inputs = [None if tensor is None else tensor.detach() for tensor in given[:count]]
        return tuple(out.detach() for out in compute(inputs, False))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        given = ctx.given
        inputs = [
            tensor.detach().requires_grad_() if tensor is not None and wanted else tensor
            for tensor, wanted in zip(given[: ctx.count], ctx.needs_input_grad[2:], strict=False)
        ]
        with torch.enable_grad():
            outputs = ctx.compute(inputs, True)
        pairs = [(o, g) for o, g in zip(outputs, slopes, strict=True) if g is not None and o.requires_grad]
        sources = [
            tensor
            for tensor, wanted in zip([*inputs, *given[ctx.count :]], ctx.needs_input_grad[2:], strict=True)
            if wanted
        ]
        if not pairs or not sources:
            return (None,) * (2 + len(given))
        found = iter(torch.autograd.grad([o for o, _ in pairs], sources, [g for _, g in pairs], allow_unused=True))
        return None, None, *(next(found) if wanted else None for wanted in ctx.needs_input_grad[2:])
