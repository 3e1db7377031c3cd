"""Tensors as the protocol's raw bytes: what HTTP's binary extension and gRPC's `raw_input_contents` have in common.

Numbers are little-endian, one after the other, the last dimension fastest. A BYTES tensor is, element by element, four
bytes of length and so many bytes. BOOL is one byte, 0 or 1.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limaml.serving.tensors import InferTensor, Refused, numpy_dtype

__all__ = ["check_shape", "decode_raw", "encode_raw"]

LENGTH = struct.Struct("<I")
MOST_ELEMENTS = 2**32


def check_shape(shape: Sequence[int], where: str) -> int:
    """Number of elements of a shape that a request gives; `Refused` if it is none."""
    if len(shape) == 1 and 0 <= shape[0] <= MOST_ELEMENTS:  # as most are
        return shape[0]
    if any(dimension < 0 for dimension in shape):
        raise Refused(400, f"{where} has shape {list(shape)[:8]}; every dimension must be at least 0.")
    if len(shape) > 8:
        raise Refused(400, f"{where} has {len(shape)} dimensions; at most 8 make sense here.")
    if math.prod(max(1, dimension) for dimension in shape) > MOST_ELEMENTS:
        raise Refused(
            400, f"{where} has shape {list(shape)}, more than {MOST_ELEMENTS} elements. Send fewer at a time."
        )
    return math.prod(shape)


def decode_raw(raw: bytes | memoryview, name: str, datatype: str, shape: Sequence[int], where: str) -> InferTensor:
    """The tensor in raw bytes; `Refused` (400) names `where` it stood, and both sizes, if they are not as many as its
    shape needs. Numbers are not copied: the array can only be read."""
    dtype, size = numpy_dtype(datatype, where), check_shape(shape, where)
    if dtype.hasobject:
        data = _decode_bytes(raw, size, where)
    else:
        needed = size * dtype.itemsize
        if len(raw) != needed:
            raise Refused(
                400, f"{where} has {len(raw)} bytes; {datatype} of shape {list(shape)} takes {needed}. Send them all."
            )
        if dtype == np.bool_:
            codes = np.frombuffer(raw, np.uint8)
            if size and int(codes.max()) > 1:
                raise Refused(400, f"{where} is BOOL, and has a byte that is neither 0 nor 1.")
            data = codes.view(np.bool_)
        else:
            data = np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype, copy=False)
    return InferTensor(name, datatype, tuple(shape), data.reshape(tuple(shape)))


def _decode_bytes(raw: bytes | memoryview, size: int, where: str) -> NDArray[np.object_]:
    raw = bytes(raw)
    if size * LENGTH.size > len(raw):
        raise Refused(
            400,
            f"{where} has {len(raw)} bytes; {size} BYTES elements take at least {size * LENGTH.size}. Send them all.",
        )
    data = np.empty(size, dtype=np.object_)
    place = 0
    for i in range(size):
        start = place + LENGTH.size
        if start > len(raw):
            raise Refused(400, f"{where} ends within the length of BYTES element {i} of {size}.")
        place = start + LENGTH.unpack_from(raw, place)[0]
        if place > len(raw):
            raise Refused(
                400, f"{where} ends within BYTES element {i} of {size}: {place - start} bytes were announced, "
                f"{len(raw) - start} are there."
            )  # fmt: skip
        data[i] = raw[start:place]
    if place != len(raw):
        raise Refused(400, f"{where} has {len(raw) - place} bytes behind its last element.")
    return data


def encode_raw(data: NDArray[Any]) -> bytes:
    """The raw bytes of an array; an object array holds `bytes`."""
    if data.dtype.hasobject:
        return b"".join(LENGTH.pack(len(value)) + value for value in data.reshape(-1))
    return np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("<")).tobytes()
