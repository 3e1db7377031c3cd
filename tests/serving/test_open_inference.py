"""Requests over HTTP as bytes: one whose JSON was seen before is read as if it had not been."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from limaml.serving import open_inference
from limaml.serving.open_inference import LAYOUTS_KEPT, decode_request
from limaml.serving.raw import encode_raw
from limaml.serving.tensors import DATATYPES, InferRequest, Refused


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    open_inference._layouts.clear()
    yield
    open_inference._layouts.clear()


def body(tensors: dict[str, tuple[str, Any]], **more: Any) -> tuple[bytes, str]:
    """A request with raw tensors, and the length of its JSON."""
    raws = {name: encode_raw(array) for name, (_, array) in tensors.items()}
    inputs = [
        {"name": name, "datatype": kind, "shape": array.shape, "parameters": {"binary_data_size": len(raws[name])}}
        for name, (kind, array) in tensors.items()
    ]
    head = orjson.dumps({"inputs": inputs, **more})
    return head + b"".join(raws.values()), str(len(head))


def same(found: InferRequest, wanted: InferRequest) -> None:
    assert (found.model, found.version, found.id) == (wanted.model, wanted.version, wanted.id)
    assert (found.outputs, found.parameters) == (wanted.outputs, wanted.parameters)
    assert list(found.inputs) == list(wanted.inputs)
    for name, tensor in found.inputs.items():
        other = wanted.inputs[name]
        assert (tensor.name, tensor.datatype, tensor.shape) == (other.name, other.datatype, other.shape)
        assert tensor.data.dtype == other.data.dtype
        np.testing.assert_array_equal(tensor.data, other.data)


values = st.sampled_from(sorted(DATATYPES)).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.lists(st.binary(max_size=5), max_size=4).map(lambda found: np.array([*found, None], object)[:-1])
        if kind == "BYTES"
        else arrays(DATATYPES[kind], array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=4)),
    )
)


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from("abcde"), values, max_size=4), st.data())
def test_a_request_seen_before_is_read_the_same(tensors: dict[str, tuple[str, Any]], data: st.DataObject) -> None:
    more = {"outputs": [{"name": "score", "parameters": {"binary_data": True}}], "parameters": {"nan_is_missing": True}}
    first, length = body(tensors, **more)
    others = {
        name: (kind, array if kind == "BYTES" else data.draw(arrays(array.dtype, array.shape)))
        for name, (kind, array) in tensors.items()
    }
    second, again = body(others, **more)
    assert again == length
    for given_body, version in ((first, None), (second, "v7")):
        open_inference._layouts.clear()
        wanted, raw = decode_request("m", version, given_body, length)
        assert len(open_inference._layouts) == 1
        found, found_raw = decode_request("m", version, given_body, length)
        same(found, wanted)
        assert found_raw == raw


def refused(given_body: bytes, length: str) -> str:
    with pytest.raises(Refused) as caught:
        decode_request("m", None, given_body, length)
    assert caught.value.status == 400
    return caught.value.message


def test_what_is_wrong_with_the_bytes_is_found_again() -> None:
    whole, length = body(
        {
            "flag": ("BOOL", np.array([True])),
            "text": ("BYTES", np.array([b"ab"], object)),
            "x": ("FP32", np.ones(2, "f4")),
        }
    )
    decode_request("m", None, whole, length)
    assert len(open_inference._layouts) == 1
    head = int(length)
    assert "neither 0 nor 1" in refused(whole[:head] + b"\x02" + whole[head + 1 :], length)
    assert "within BYTES element 0" in refused(whole[: head + 1] + b"\x09" + whole[head + 2 :], length)
    assert "should have 8 bytes behind the JSON, but 7 are left" in refused(whole[:-1], length)
    assert "1 bytes behind the last tensor" in refused(whole + b"x", length)


def test_an_answer_may_not_change_what_is_kept() -> None:
    whole, length = body({"x": ("FP32", np.ones(2, "f4"))}, parameters={"seed": 1})
    for _ in range(3):
        request, _ = decode_request("m", None, whole, length)
        assert request.parameters == {"seed": 1}
        request.parameters["seed"] = 2  # type: ignore[index]


def test_few_layouts_are_kept_and_none_of_requests_with_an_id_or_values() -> None:
    for place in range(2 * LAYOUTS_KEPT):
        decode_request("m", None, *body({f"x{place}": ("FP32", np.ones(2, "f4"))}))
    assert len(open_inference._layouts) == LAYOUTS_KEPT
    open_inference._layouts.clear()
    decode_request("m", None, *body({"x": ("FP32", np.ones(2, "f4"))}, id="one"))
    values_in_json = orjson.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}]})
    decode_request("m", None, values_in_json, str(len(values_in_json)))
    decode_request("m", None, *body({"x" * 5000: ("FP32", np.ones(2, "f4"))}))
    assert not open_inference._layouts


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"inputs": [7]}, "Input 0 must be an object, and is a number"),
        ({"inputs": [{"datatype": "FP32"}]}, "Input 0 has no name"),
        ({"inputs": [{"name": "x", "shape": [1.5], "datatype": "FP32"}]}, "must have a shape, a list of integers"),
        ({"inputs": [{"name": "x", "shape": [1]}]}, "must have a datatype"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32"}]}, "has no data"),
        (
            {
                "inputs": [
                    {"name": "x", "shape": [1], "datatype": "FP32", "data": [1], "parameters": {"binary_data_size": 4}}
                ]
            },
            "has data and binary_data_size",
        ),
        (
            {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": -4}}]},
            "a number of",
        ),
        (
            {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "parameters": 4}]},
            "parameters that are a number",
        ),
        (
            {"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, [2]]}]},
            "not all its data are numbers",
        ),
        (
            {"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [[1], 2]}]},
            "lists among its data in some places",
        ),
        (
            {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [[[[[[[[[[1]]]]]]]]]]}]},
            "at most 8 dimensions",
        ),
        ({"inputs": [], "outputs": [7]}, "Output 0 must be an object with a name"),
        ({"inputs": [], "outputs": [{"name": "s", "parameters": {"classification": 3}}]}, "asks for a classification"),
        ({"inputs": [{}] * 5000}, "has 5000 inputs; at most 4096"),
        ({"inputs": {}}, "must have 'inputs', a list of tensors; it is an object"),
        ({"inputs": [], "id": 7}, "id must be a text, and is a number"),
        ({"inputs": [], "extra": 7}, "has a field 'extra'"),
    ],
)
def test_what_is_wrong_with_the_json_is_said(document: dict[str, Any], message: str) -> None:
    head = orjson.dumps(document)
    assert message in refused(head, str(len(head)))


@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 20, "٣"])
def test_a_length_that_is_no_number_is_refused(length: str) -> None:
    assert "it must be a number of bytes" in refused(b"{}", length)
    assert "but the body has 2 bytes" in refused(b"{}", "3")
