"""gRPC's messages ↔ the service's types.

The messages are made from `protocol/messages.binpb` (`make proto`) in a pool of their own: a process that has
tritonclient's or KServe's copy of the same protocol loaded can run this server too, and no generated code ties it to one
version of protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from limaml.errors import require
from limaml.serving.layouts import LAYOUTS_KEPT, LONGEST_KEPT, Layout
from limaml.serving.raw import check_shape, decode_raw, encode_raw
from limaml.serving.tensors import (
    InferRequest,
    InferResponse,
    InferTensor,
    ModelMetadata,
    Refused,
    datatype_of,
    numpy_dtype,
)

if TYPE_CHECKING:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf import message as protobuf
else:
    descriptor_pb2 = require("google.protobuf.descriptor_pb2", "grpc")
    descriptor_pool = require("google.protobuf.descriptor_pool", "grpc")
    message_factory = require("google.protobuf.message_factory", "grpc")
    protobuf = require("google.protobuf.message", "grpc")

__all__ = ["decode_infer", "encode_infer", "encode_metadata", "message", "parse"]

_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Datatype → the field of `InferTensorContents` that it is sent in; FP16 has none."""


def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    compiled = (files("limaml.serving") / "protocol" / "messages.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
        pool.Add(file)
    return pool


_POOL = _pool()


def message(name: str) -> Any:
    """The class of a message, by its full name: `inference.ModelInferRequest`."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(name))


_REQUEST, _RESPONSE = message("inference.ModelInferRequest"), message("inference.ModelInferResponse")
_METADATA = message("inference.ModelMetadataResponse")


def parse(kind: Any, raw: bytes) -> Any:
    """A message out of its bytes; `Refused` (400) if they are none."""
    try:
        return kind.FromString(raw)
    except protobuf.DecodeError:
        name = kind.DESCRIPTOR.full_name
        raise Refused(400, f"The request is no {name}: its bytes are cut short, or its text is not UTF-8.") from None


def decode_infer(raw: bytes) -> tuple[InferRequest, bool]:
    """An inference request, and whether its tensors came as raw bytes."""
    for known in _layouts:
        if len(raw) == known.size and raw.startswith(known.head) and known.fits(raw):
            return known.layout.request(known.model, known.version, raw), True
    given = parse(_REQUEST, raw)
    contents = given.raw_input_contents
    if contents and len(contents) != len(given.inputs):
        raise Refused(
            400,
            f"The request has {len(given.inputs)} inputs but {len(contents)} raw_input_contents. Send all inputs raw, one "
            "entry each in the same order, or none.",
        )
    inputs: dict[str, InferTensor] = {}
    for place, tensor in enumerate(given.inputs):
        where = f"Input {tensor.name[:80]!r}"
        if tensor.name in inputs:
            raise Refused(400, f"{where} is there twice; send each input once.")
        _refuse_shared_memory(tensor.parameters, where)
        if contents:
            if tensor.HasField("contents") and tensor.contents.ListFields():
                raise Refused(400, f"{where} has contents, and raw_input_contents as well. Send one of the two.")
            inputs[tensor.name] = decode_raw(contents[place], tensor.name, tensor.datatype, tensor.shape, where)
        else:
            inputs[tensor.name] = _typed(tensor, where)
    for output in given.outputs:
        where = f"Output {output.name[:80]!r}"
        _refuse_shared_memory(output.parameters, where)
        if "classification" in output.parameters:
            raise Refused(400, f"{where} asks for 'classification', which scores have no classes for. Leave it out.")
    request = InferRequest(
        model=given.model_name,
        version=given.model_version or None,
        id=given.id or None,
        inputs=inputs,
        outputs=tuple(output.name for output in given.outputs),
        parameters={name: _value(name, value) for name, value in given.parameters.items()},
    )
    if contents and request.id is None:
        _keep(raw, request, contents)
    return request, bool(contents)


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """How a message begins, and where its raw contents are: the last field, as protobuf writes them."""

    head: bytes
    between: tuple[tuple[bytes, int], ...]  # the tag and length of each, and where they stand
    size: int
    layout: Layout
    model: str
    version: str | None

    def fits(self, raw: bytes) -> bool:
        return all(raw.startswith(tag, place) for tag, place in self.between)


_layouts: list[_Known] = []
"""Those of the last few clients: a message is compared with one after the other."""
MESSAGES_KEPT = 16


def _keep(raw: bytes, request: InferRequest, contents: Sequence[bytes]) -> None:
    """Remember how a message is laid out; the one known longest makes room."""
    tags = [_RAW_INPUT + _varint(len(one)) for one in contents]
    tail = b"".join(part for pair in zip(tags, contents, strict=True) for part in pair)
    start = len(raw) - len(tail)
    if start > LONGEST_KEPT or not raw.endswith(tail):
        return
    try:
        if _REQUEST.FromString(raw[:start]).raw_input_contents:  # the tail may be a part of something else
            return
    except protobuf.DecodeError:
        return
    between, places, place = [], [], start
    for tag, one in zip(tags, contents, strict=True):
        between.append((tag, place))
        places.append((place + len(tag), place + len(tag) + len(one)))
        place = places[-1][1]
    layout = Layout.of(request, places)
    _layouts.append(_Known(raw[:start], tuple(between), len(raw), layout, request.model, request.version))
    del _layouts[:-MESSAGES_KEPT]


_RAW_INPUT, _RAW_OUTPUT = b"\x3a", b"\x32"
"""Tags of `raw_input_contents` in a request (field 7) and `raw_output_contents` in an answer (field 6), both bytes."""


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


def _refuse_shared_memory(parameters: Mapping[str, Any], where: str) -> None:
    if any(name.startswith("shared_memory") for name in parameters):
        raise Refused(400, f"{where} is in shared memory, which this server does not read. Send it in the request.")


def _typed(tensor: Any, where: str) -> InferTensor:
    """A tensor whose values came as numbers (or bytes) in the field of its datatype."""
    dtype, size = numpy_dtype(tensor.datatype, where), check_shape(tensor.shape, where)
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise Refused(400, f"{where} is {tensor.datatype}, which has no contents. Send it in raw_input_contents.")
    others = [found.name for found, _ in tensor.contents.ListFields() if found.name != field]
    if others:
        raise Refused(400, f"{where} is {tensor.datatype} but has {others[0]}. Put its values in {field}.")
    values = getattr(tensor.contents, field)
    if len(values) != size:
        raise Refused(
            400, f"{where} has {len(values)} values in {field}; shape {list(tensor.shape)} takes {size}. Send them all."
        )
    if dtype.hasobject:
        data: NDArray[Any] = np.empty(size, dtype=np.object_)
        data[:] = list(values)
    elif dtype.kind in "iu" and dtype.itemsize < 4:
        wide = np.fromiter(values, np.int64, size)
        bounds = np.iinfo(dtype)
        wrong = (wide < bounds.min) | (wide > bounds.max)
        if bool(wrong.any()):
            raise Refused(
                400, f"{where} has the value {int(wide[wrong][0])}, which {tensor.datatype} has no place for."
            )
        data = wide.astype(dtype)
    else:
        data = np.fromiter(values, dtype, size)
    return InferTensor(tensor.name, tensor.datatype, tuple(tensor.shape), data.reshape(tuple(tensor.shape)))


def _value(name: str, parameter: Any) -> bool | int | str | float:
    choice = parameter.WhichOneof("parameter_choice")
    if choice is None:
        raise Refused(400, f"Parameter {name[:80]!r} has no value. Give it one, or leave it out.")
    value: bool | int | str | float = getattr(parameter, choice)
    return value


def encode_infer(response: InferResponse, raw: bool) -> bytes:
    """The answer's bytes, its tensors raw or as numbers: as the request's were."""
    raw = raw or any(output.datatype not in _CONTENTS for output in response.outputs)
    if not raw:
        return _described(response, raw=False)
    heads = _heads
    told = response.id is not None or bool(response.parameters)
    key = (response.model, response.version, *((one.name, one.datatype, one.shape) for one in response.outputs))
    head = None if told else heads.get(key)
    if head is None:
        head = _described(response, raw=True)
        if not told:
            while len(heads) >= LAYOUTS_KEPT:
                heads.pop(next(iter(heads)))
            heads[key] = head
    parts = [head]
    for output in response.outputs:
        data = encode_raw(output.data)
        parts += (_RAW_OUTPUT, _varint(len(data)), data)
    return b"".join(parts)


_heads: dict[tuple[Any, ...], bytes] = {}
"""What an answer says of its tensors, before their bytes."""


def _described(response: InferResponse, *, raw: bool) -> bytes:
    """An answer's bytes, up to the raw ones."""
    outputs = []
    for output in response.outputs:
        described: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if not raw:
            described["contents"] = {_CONTENTS[datatype_of(output.data.dtype)]: output.data.reshape(-1).tolist()}
        outputs.append(described)
    answer = _RESPONSE(
        model_name=response.model,
        model_version=response.version,
        id=response.id or "",
        parameters={name: _parameter(value) for name, value in response.parameters.items()},
        outputs=outputs,
    )
    encoded: bytes = answer.SerializeToString()
    return encoded


def _parameter(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"bool_param": value}
    if isinstance(value, int):
        return {"int64_param": value}
    if isinstance(value, float):
        return {"double_param": value}
    return {"string_param": str(value)}


def encode_metadata(metadata: ModelMetadata) -> bytes:
    """What a model takes and gives, as the protocol's message."""
    sides = {
        side: [{"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape} for tensor in tensors]
        for side, tensors in (("inputs", metadata.inputs), ("outputs", metadata.outputs))
    }
    answer = _METADATA(name=metadata.name, versions=metadata.versions, platform=metadata.platform, **sides)
    encoded: bytes = answer.SerializeToString()
    return encoded
