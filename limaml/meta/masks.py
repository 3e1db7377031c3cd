"""Random masks that stay the same through all inner steps.

Dropout in a meta block or a global block draws its masks once per batch: every inner step, and the forward pass behind the
last one, sees the same thinned network. So the inner loop descends one function, not a new one each step, and Newton's
damping compares like with like. In evaluation mode nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["SharedMasks", "seeded"]


class SharedMasks:
    """Whatever is drawn inside `with masks.drawn(like):` is the same each time. The seed comes from torch's generator."""

    def __init__(self, block: nn.Module) -> None:
        training = any(module.training for module in block.modules())
        self.seed = int(torch.randint(2**62, ())) if training else None

    @contextmanager
    def drawn(self, like: Tensor) -> Iterator[None]:
        """`like`: a tensor on the device where the block runs."""
        if self.seed is None:
            yield
            return
        with seeded(self.seed, like.device):
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
