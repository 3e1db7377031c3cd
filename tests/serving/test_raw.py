"""Raw tensors: what tritonclient packs is read, and what is broken is refused in a sentence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from limaml.serving.raw import decode_raw, encode_raw
from limaml.serving.tensors import DATATYPES, Refused

NUMBERS = sorted(name for name in DATATYPES if name != "BYTES")
shapes = array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@given(st.data(), st.sampled_from(NUMBERS), shapes)
def test_numbers_come_back(data: st.DataObject, datatype: str, shape: tuple[int, ...]) -> None:
    array = data.draw(arrays(DATATYPES[datatype], shape))
    found = decode_raw(encode_raw(array), "x", datatype, shape, "Input 'x'")
    assert (found.name, found.datatype, found.shape, found.data.dtype) == ("x", datatype, shape, array.dtype)
    np.testing.assert_array_equal(found.data, array)


@given(st.lists(st.binary(max_size=9), max_size=7))
def test_bytes_are_as_tritonclient_has_them(values: list[bytes]) -> None:
    array = np.array([*values, None], dtype=np.object_)[:-1]  # the None keeps numpy from making one string type of it
    raw = encode_raw(array)
    if values:
        assert raw == serialize_byte_tensor(array).item()
        assert deserialize_bytes_tensor(raw).tolist() == values
    assert decode_raw(raw, "x", "BYTES", [len(values)], "Input 'x'").data.tolist() == values


@given(
    st.binary(max_size=40),
    st.sampled_from([*DATATYPES, "BF16", ""]),
    st.lists(st.integers(-2, 2) | st.integers(0, 2**63), max_size=9),
)
def test_whatever_arrives_is_read_or_refused(raw: bytes, datatype: str, shape: list[int]) -> None:
    try:
        found = decode_raw(raw, "x", datatype, shape, "Input 'x'")
    except Refused as refusal:
        said = refusal
    else:
        assert found.data.shape == tuple(shape)
        assert encode_raw(found.data) == raw
        return
    assert said.status == 400 and said.message.startswith("Input 'x'") and said.message.endswith(".")


@pytest.mark.parametrize(
    ("raw", "datatype", "shape", "message"),
    [
        (b"1234567", "INT32", [2], r"has 7 bytes; INT32 of shape \[2\] takes 8"),
        (b"", "FP32", [10**9], "takes 4000000000"),
        (b"", "FP32", [0, 2**62, 2**62], "more than 4294967296 elements"),
        (b"", "FP32", [-1], "every dimension must be at least 0"),
        (b"\x02", "BOOL", [1], "neither 0 nor 1"),
        (b"", "FLOAT", [0], r"datatype 'FLOAT'; use one of BOOL, .*BYTES\."),
        (b"\x02\0\0\0a", "BYTES", [1], "element 0 of 1: 2 bytes were announced, 1 are there"),
        (b"\0\0\0\0", "BYTES", [2], "at least 8"),
        (b"\xff\xff\xff\xff", "BYTES", [1], "4294967295 bytes were announced, 0 are there"),
        (b"\x03\0\0\0abc\0\0", "BYTES", [2], "within the length of BYTES element 1 of 2"),
        (b"\0\0\0\0\0", "BYTES", [1], "1 bytes behind its last element"),
    ],
)
def test_broken_tensors_are_refused(raw: bytes, datatype: str, shape: list[int], message: str) -> None:
    with pytest.raises(Refused, match=message):
        decode_raw(raw, "x", datatype, shape, "Input 'x'")
