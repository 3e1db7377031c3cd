"""How much at once: rows that fit the cache, and rows and tasks that fit the memory that is free."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["FREE_SHARE", "chunk_rows", "free_bytes", "kept_bytes", "piece_rows"]

CACHE = 2**20
"""Bytes that the widest activation of a piece of rows may take, so that the next layer finds it in the cache."""

GPU_PIECE = 2**18
"""Rows of a piece on a GPU: enough for its kernels to take longer than their launch, a few hundred megabytes a layer."""

CHUNK = {"cpu": 2**16, "cuda": 2**20}
"""Support rows that are adapted on at once, where memory allows."""

FREE_SHARE = 0.5
"""Of the memory that is free, where no limit is set."""


def chunk_rows(device: torch.device) -> int:
    """Support rows of a chunk of tasks that are adapted together, unless the caller says otherwise."""
    return CHUNK.get(device.type, CHUNK["cpu"])


def piece_rows(modules: Iterable[nn.Module], device: torch.device) -> int:
    """Rows that are worked on at once: those whose activations stay in the cache of one core, between two of the Linear
    layers among `modules`; on a GPU, as many as keep it busy."""
    if device.type == "cuda":
        return GPU_PIECE
    widths = [max(m.in_features, m.out_features) for m in modules if isinstance(m, nn.Linear)]
    return max(256, CACHE // (4 * max(widths, default=64)))


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that this process may still take on `device`: what the system calls available, or its control group leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [2**32]  # where nothing can be read, as on macOS
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")] or found
        group = root / "sys/fs/cgroup"
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except OSError:
        pass
    return max(0, min(found))


class _Packed:
    """A tensor that autograd keeps for as long as it keeps this."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(run: Callable[[], object], held: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps, behind the result of `run`, for the backward pass, beside the tensors `held` already."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: weakref.WeakSet[_Packed] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Packed:
        packed = _Packed(tensor)
        kept.add(packed)
        return packed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        result = run()
    storages = [packed.tensor.untyped_storage() for packed in kept]
    del result
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in owned}.values())
