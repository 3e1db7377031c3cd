"""What a request says of the raw bytes in it, remembered: a client that asks again says the same.

bytes that describe ──checked once──► Layout ──bytes of the tensors──► InferRequest
                                         └── what a version makes of requests laid out so (`Plan` in `plans.py`)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limaml.serving.raw import decode_raw
from limaml.serving.tensors import InferRequest, InferTensor

__all__ = ["LAYOUTS_KEPT", "LONGEST_KEPT", "Layout", "RawInputs"]

LAYOUTS_KEPT, LONGEST_KEPT = 256, 4096


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Tensors `(like, start, stop)`: one with these names and shapes, and where its bytes are in `size` bytes."""

    tensors: tuple[tuple[InferTensor, int, int], ...]
    size: int
    outputs: tuple[str, ...]
    parameters: Mapping[str, Any]
    raw: frozenset[str] | None
    fields: tuple[tuple[np.dtype[Any], int, int], ...] | None
    """Type, length and place of each tensor, where all are one-dimensional numbers, of which any bytes are good."""

    @staticmethod
    def of(request: InferRequest, places: Sequence[tuple[int, int]], raw: frozenset[str] | None = None) -> Layout:
        """Of a request whose inputs are the bytes from `start` to `stop`, one pair each."""
        tensors = []
        for tensor, (start, stop) in zip(request.inputs.values(), places, strict=True):
            like = InferTensor(tensor.name, tensor.datatype, tensor.shape, np.empty(0, tensor.data.dtype))
            tensors.append((like, start, stop))
        plain = sys.byteorder == "little" and all(
            len(like.shape) == 1 and like.data.dtype.kind in "iuf" for like, *_ in tensors
        )
        fields = tuple((like.data.dtype, like.shape[0], start) for like, start, _ in tensors) if plain else None
        size = max((stop for _, stop in places), default=0)
        return Layout(tuple(tensors), size, request.outputs, dict(request.parameters), raw, fields)

    def request(self, model: str, version: str | None, data: bytes | memoryview) -> InferRequest:
        """The request that is laid out so in `data`; `Refused` if the bytes of a tensor are none of its type."""
        inputs: Mapping[str, InferTensor]
        if self.fields is not None:
            inputs = RawInputs(self, data)
        else:
            inputs = {
                like.name: decode_raw(
                    data[start:stop], like.name, like.datatype, like.shape, f"Input '{like.name[:80]}'"
                )
                for like, start, stop in self.tensors
            }
        return InferRequest(model, version, None, inputs, self.outputs, dict(self.parameters), self)


class RawInputs(Mapping[str, InferTensor]):
    """The inputs of a request in its bytes, all of them numbers; arrays can only be read."""

    def __init__(self, layout: Layout, data: bytes | memoryview) -> None:
        self._layout, self._data = layout, data

    def arrays(self) -> list[NDArray[Any]]:
        """In the order of the layout's tensors."""
        data = self._data
        return [np.frombuffer(data, dtype, length, start) for dtype, length, start in self._layout.fields or ()]

    def __getitem__(self, name: str) -> InferTensor:
        for (like, *_), (dtype, length, start) in zip(self._layout.tensors, self._layout.fields or (), strict=True):
            if like.name == name:
                return InferTensor(name, like.datatype, like.shape, np.frombuffer(self._data, dtype, length, start))
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (like.name for like, *_ in self._layout.tensors)

    def __len__(self) -> int:
        return len(self._layout.tensors)
