"""Warm start: the global block begins where an ordinary trained model ended.

    trained = MyModel(...)                      # trained without limaml
    model = MetaModel(MyModel(..., dim=16), {"user_id": meta_block})
    warm_start(model, trained)

Names and shapes decide what goes where. A layer that read `[x]` and now reads `[x, z]` has more columns than it had: the
old ones are copied, and the new ones, which read the meta embedding, keep a tenth of their fresh values. They are small so
that the model starts near the one it came from, and not zero because behind zeros nothing can be adapted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from limaml.errors import ModelError

__all__ = ["WarmStart", "warm_start"]

SMALL = 0.1
"""What is left of the fresh values of columns that read a meta embedding."""

PREFIXES = ("module.", "_orig_mod.", "global_block.", "model.")
"""What wrappers put before the names of a model's parameters."""


@dataclass(frozen=True)
class WarmStart:
    """What a warm start did. Names are those of the global block, but for `unexpected`."""

    loaded: tuple[str, ...]  # copied as they are
    grown: tuple[str, ...]  # old columns copied, new ones small
    missing: tuple[str, ...]  # in the global block alone: left as they were initialised
    unexpected: tuple[str, ...]  # in the trained weights alone: not used
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name → shape here, shape there: left as it was

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.grown:
            parts.append(f"grown by the meta embedding: {', '.join(self.grown)}")
        if self.missing:
            parts.append(f"not in the trained model: {', '.join(self.missing)}")
        if self.unexpected:
            parts.append(f"not used: {', '.join(self.unexpected)}")
        if self.mismatched:
            shapes = (
                f"{name} ({list(here)} here, {list(there)} there)" for name, (here, there) in self.mismatched.items()
            )
            parts.append(f"of another shape: {', '.join(shapes)}")
        return "; ".join(parts) + "."


@torch.no_grad()
def warm_start(
    model: nn.Module,
    weights: Mapping[str, Tensor] | nn.Module,
    *,
    new_columns: Literal["last", "first"] = "last",
) -> WarmStart:
    """Copy an ordinary trained model's weights into the global block of `model` (a `MetaModel`, or any module).

    `weights` is that model, or its state dict. `new_columns` says on which side of its old inputs a grown layer reads the
    meta embeddings: `last` for `torch.cat([x, z], 1)`. A layer counts as grown if its extra columns are as many as some of
    the meta embeddings together are wide (any number, where `model` does not know their widths). Nothing else is guessed:
    what does not fit is left alone and said. Raises `ModelError` if nothing fits.
    """
    block = getattr(model, "global_block", model)
    assert isinstance(block, nn.Module)
    here = block.state_dict(keep_vars=True)
    there = weights.state_dict() if isinstance(weights, nn.Module) else weights
    named = _named_like(here, there)
    widths = _widths(model)
    loaded: list[str] = []
    grown: list[str] = []
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name, target in here.items():
        if name not in named:
            continue
        source = named[name]
        if source.shape == target.shape:
            target.copy_(source)
            loaded.append(name)
        elif _has_grown(target, source, widths):
            old = source.shape[1]
            target.mul_(SMALL)
            columns = target[:, :old] if new_columns == "last" else target[:, -old:]
            columns.copy_(source)
            grown.append(name)
        else:
            mismatched[name] = tuple(target.shape), tuple(source.shape)
    result = WarmStart(
        tuple(loaded),
        tuple(grown),
        tuple(name for name in here if name not in named),
        tuple(name for name in named if name not in here),
        mismatched,
    )
    if not loaded and not grown:
        raise ModelError(
            f"Nothing of the trained weights fits the global block {type(block).__name__}: {result} Build the global block "
            "from the same class as the trained model, so that names and shapes are the same."
        )
    return result


def _named_like(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`there` with the prefixes of wrappers removed, if that makes more names fit."""
    best = dict(there)
    found = dict(there)
    for _ in range(len(PREFIXES)):
        prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
        if len(found.keys() & here.keys()) > len(best.keys() & here.keys()):
            others = {name: tensor for name, tensor in there.items() if not any(tensor is t for t in found.values())}
            best = {**others, **found}
    return best


def _widths(model: nn.Module) -> set[int] | None:
    """The numbers of columns that meta embeddings can add to a layer; None where they are not known."""
    dims = getattr(model, "dims", None)
    if not isinstance(dims, Mapping):
        return None
    sizes = [dim for dim in dims.values() if isinstance(dim, int)]
    return {sum(some) for count in range(1, len(sizes) + 1) for some in itertools.combinations(sizes, count)}


def _has_grown(target: Tensor, source: Tensor, widths: set[int] | None) -> bool:
    if target.dim() != 2 or source.dim() != 2 or target.shape[0] != source.shape[0]:
        return False
    extra = target.shape[1] - source.shape[1]
    return extra > 0 and (widths is None or extra in widths)
