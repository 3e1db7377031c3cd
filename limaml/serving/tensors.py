"""The Open Inference Protocol's words as types: what HTTP and gRPC both decode requests into, and answer with.

    bytes on the wire ──decode──► InferRequest ──Service.infer──► InferResponse ──encode──► bytes on the wire

https://github.com/kserve/open-inference-protocol; shapes and datatypes are the protocol's, arrays are numpy's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from limaml.serving.layouts import Layout

__all__ = [
    "DATATYPES",
    "InferRequest",
    "InferResponse",
    "InferTensor",
    "ModelMetadata",
    "Refused",
    "TensorMetadata",
    "datatype_of",
    "numpy_dtype",
]

DATATYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
"""The protocol's datatype → numpy's, little-endian on the wire. BYTES are an object array of `bytes`. (BF16 has no numpy
type of its own, and no column here would be sent in it.)"""


class Refused(Exception):
    """A request that is not answered: an HTTP `status` (gRPC maps it to its own) and a sentence for who asked.

    `retry_after` is the number of seconds after which asking again makes sense, where it does.
    """

    def __init__(self, status: int, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


def numpy_dtype(datatype: str, where: str) -> np.dtype[Any]:
    """Numpy's type of a datatype; `Refused` (400) names `where` it stood if there is none."""
    try:
        return DATATYPES[datatype]
    except KeyError:
        raise Refused(400, f"{where} has datatype {datatype[:40]!r}; use one of {', '.join(DATATYPES)}.") from None


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The protocol's datatype of a numpy type that is in the table."""
    return _NAMES[dtype]


_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class InferTensor:
    """`data` has the shape `shape` and the numpy type of `datatype`."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: NDArray[Any]

    @classmethod
    def of(cls, name: str, data: NDArray[Any]) -> InferTensor:
        return cls(name, datatype_of(data.dtype), data.shape, data)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class InferRequest:
    """`version` None is the one that is current; `outputs` empty are the usual ones. `layout` is one for all requests that differ in
    nothing but the values of their tensors, where that is known."""

    model: str
    version: str | None
    id: str | None
    inputs: Mapping[str, InferTensor]
    outputs: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout | None = None


@dataclass(frozen=True, slots=True, eq=False)
class InferResponse:
    """`version` is the one that every number in `outputs` comes from."""

    model: str
    version: str
    id: str | None
    outputs: tuple[InferTensor, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """One input or output as the protocol describes it; −1 in `shape` is any number."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """`versions` are those that can be asked for; `inputs` and `outputs` those of the version that was described."""

    name: str
    versions: Sequence[str]
    platform: str
    inputs: Sequence[TensorMetadata]
    outputs: Sequence[TensorMetadata]
