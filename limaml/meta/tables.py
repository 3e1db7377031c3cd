"""Embedding tables inside a block whose inner steps are followed: look-ups that can be watched, and derived twice.

`nn.EmbeddingBag` has no second derivative in PyTorch, and `F.embedding` forgets `padding_idx` for all tasks but the first
where `torch.func.vmap` runs over its weight. So, while an engine runs a block, every look-up of its tables goes through one
function, `Lookup`, and a bag is what it stands for: rows looked up, weighted, and reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from limaml.errors import ModelError

__all__ = ["Lookup", "Table", "bag", "by_task", "looked_up", "plain", "refuse_unadaptable", "tables_of"]

Table = nn.Embedding | nn.EmbeddingBag

Lookup = Callable[[str, Table, Tensor], Tensor]
"""(name of the module, the module, ids `[…]`) → rows `[…, width]`."""


def tables_of(block: nn.Module) -> dict[str, Table]:
    """Name → module. Subclasses may look up in their own way, and are left alone."""
    return {name: module for name, module in block.named_modules() if type(module) in (nn.Embedding, nn.EmbeddingBag)}


def refuse_unadaptable(block: nn.Module) -> None:
    """Raise `ModelError` that names the tables whose options the inner loop cannot follow."""
    for name, module in block.named_modules():
        if not isinstance(module, Table) or not module.weight.requires_grad:
            continue
        reasons = {
            "max_norm": "rescales its rows whenever they are looked up" if module.max_norm is not None else None,
            "scale_grad_by_freq": "makes a task's slopes depend on the batch" if module.scale_grad_by_freq else None,
        }
        for option, reason in reasons.items():
            if reason is not None:
                raise ModelError(
                    f"The inner loop cannot adapt table '{name}' ({type(module).__name__}), because {option} {reason}: "
                    f"remove {option}, call requires_grad_(False) on the table, or set adapt.adapt_embeddings=false."
                )


def plain(_name: str, module: Table, ids: Tensor) -> Tensor:
    """What `nn.Embedding` does."""
    return nn.functional.embedding(
        ids,
        module.weight,
        module.padding_idx,
        module.max_norm,
        module.norm_type,
        module.scale_grad_by_freq,
        module.sparse,
    )


def by_task(adapted: Collection[str]) -> Lookup:
    """Look-ups under `vmap`, where the tables named in `adapted` (`"….weight"`) may have rows of their own per task."""

    def lookup(name: str, module: Table, ids: Tensor) -> Tensor:
        if f"{name}.weight" not in adapted:
            return plain(name, module, ids)
        rows = nn.functional.embedding(ids, module.weight)
        if module.padding_idx is None:
            return rows
        return torch.where((ids == module.padding_idx).unsqueeze(-1), rows.detach(), rows)

    return lookup


@contextmanager
def looked_up(block: nn.Module, lookup: Lookup) -> Iterator[None]:
    """While this is open, every table of `block` is read by `lookup`."""
    replaced: list[Table] = []
    try:
        for name, module in tables_of(block).items():
            own = partial(lookup, name, module)
            forward = own if isinstance(module, nn.Embedding) else partial(bag, module, own)
            module.__dict__["forward"] = forward
            replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.__dict__["forward"]


def bag(
    module: nn.EmbeddingBag,
    lookup: Callable[[Tensor], Tensor],
    input: Tensor,  # noqa: A002
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """`module(input, offsets, per_sample_weights)` `[bags, width]`, by `lookup` and a reduction.

    A bag without ids (but `padding_idx`) gives zeros. Calls that `nn.EmbeddingBag` refuses are left to it to refuse, and
    so is the largest entry (`mode="max"`) of bags given by offsets.
    """
    weighted, mode = per_sample_weights, module.mode
    ragged = input.dim() == 1 and offsets is not None
    matrix = input.dim() == 2 and offsets is None and (weighted is None or weighted.shape == input.shape)
    if (weighted is not None and mode != "sum") or not (matrix or (ragged and mode != "max")):
        return nn.EmbeddingBag.forward(module, input, offsets, per_sample_weights)
    rows = lookup(input)
    present = torch.ones_like(input) if module.padding_idx is None else input != module.padding_idx
    present = present.to(rows.dtype).unsqueeze(-1)  # (…, 1)
    if mode == "max":
        found = torch.where(present > 0, rows, rows.new_tensor(-torch.inf)).max(1).values
        return torch.where(present.sum(1) > 0, found, torch.zeros_like(found))
    rows = rows * (present if weighted is None else present * weighted.unsqueeze(-1))
    if ragged:
        assert offsets is not None
        bags = offsets[:-1] if module.include_last_offset else offsets
        owner = torch.bucketize(torch.arange(len(input), device=input.device), bags, right=True) - 1
        total = rows.new_zeros(len(bags), rows.shape[-1]).index_add(0, owner, rows)
        number = present.new_zeros(len(bags), 1).index_add(0, owner, present)
    else:
        total, number = rows.sum(1), present.sum(1)
    return total if mode == "sum" else total / number.clamp(min=1.0)
