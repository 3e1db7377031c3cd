"""What all calls of a block in one batch have in common: their random masks, and the precision they compute in.

Dropout in a meta block or a global block draws its masks once per batch: every inner step, and the forward pass behind the
last one, sees the same thinned network. So the inner loop descends one function, not a new one each step, and Newton's
damping compares like with like. In evaluation mode nothing is drawn. The precision is the caller's autocast (`precision`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from limaml.meta.precision import Precision, precision_of_blocks

__all__ = ["SharedMasks", "seeded"]


class SharedMasks:
    """Whatever is drawn inside `with masks.drawn(like):` is the same each time. The seed comes from torch's generator."""

    precision: Precision

    def __init__(self, block: nn.Module) -> None:
        self.precision = precision_of_blocks(next((p.device for p in block.parameters()), None))
        training = any(module.training for module in block.modules())
        self.seed = int(torch.randint(2**62, ())) if training else None

    @contextmanager
    def drawn(self, like: Tensor) -> Iterator[None]:
        """`like`: a tensor on the device where the block runs."""
        with self.precision.block(), nullcontext() if self.seed is None else seeded(self.seed, like.device):
            yield


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What is drawn in here, on the CPU and on `device`, starts from `seed`; the generators go on behind it as if nothing
    had been."""
    generators = [torch.default_generator]  # not torch.random.fork_rng, which takes longer than a small block does
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
