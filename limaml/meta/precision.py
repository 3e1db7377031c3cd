"""Mixed precision: blocks compute in bfloat16 where autocast asks for it, everything between them in their parameters' own.

    with torch.autocast("cpu", torch.bfloat16):        # or "cuda"; in training: train.autocast=bf16
        z = model.adapt(data, "user_id", tasks, support)

Autocast alone would reach into the inner loop: Gram matrices, the deltas of adapted layers and the second derivatives are
matrix products too, and would be rounded to 8 bits where they sum over a support or are solved for. So it is switched off
while a model adapts, and on again around each call of a block; what a block returns is widened at once.

bfloat16 only. A float16 has no number between 0 and 6e-8: a task's inner slopes, divided by its support's weight, vanish
there, and a loss scale (`GradScaler`) scales the outer loss and not the inner ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from limaml.errors import ModelError

__all__ = ["Precision", "autocast", "between_blocks", "full", "precision_of_blocks"]


@dataclass(frozen=True)
class Precision:
    """How blocks compute: autocast to `dtype` on devices of type `device`, or as their parameters are if that is None."""

    device: str = "cpu"
    dtype: torch.dtype | None = None

    def block(self) -> AbstractContextManager[object]:
        """What a block is called in.

        Weights are rounded anew in every call: a rounded copy that autocast kept over all inner steps would add their
        gradients up in bfloat16. (In older versions of PyTorch, one kept from a pass without gradients had none later.)
        """
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device, self.dtype, cache_enabled=False)


_chosen: ContextVar[Precision | None] = ContextVar("precision of blocks", default=None)


def precision_of_blocks(device: torch.device | None) -> Precision:
    """What the caller asks for: torch's autocast on this device, also where `between_blocks` has switched it off."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    kind = "cpu" if device is None else device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return Precision(kind)
    dtype = torch.get_autocast_dtype(kind)
    if dtype == torch.float16:
        raise ModelError(
            "Autocast to float16 is not supported: inner slopes vanish in it, and a loss scale does not reach them. Use "
            "bfloat16: torch.autocast(…, dtype=torch.bfloat16), or train.autocast=bf16."
        )
    return Precision(kind, dtype)


@contextmanager
def between_blocks(precision: Precision) -> Iterator[None]:
    """Full precision in here, but for calls of blocks, which are made in `precision`."""
    before = _chosen.set(precision)
    try:
        with full(precision.device):
            yield
    finally:
        _chosen.reset(before)


def full(device: str) -> AbstractContextManager[object]:
    """No autocast in here, on devices of this type."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def autocast(kind: str | None, device: torch.device) -> AbstractContextManager[object]:
    """torch's autocast for the setting `train.autocast`."""
    return nullcontext() if kind is None else torch.autocast(device.type, {"bf16": torch.bfloat16}[kind])
