"""The Open Inference Protocol v2 over HTTP: JSON, and the binary tensor extension, to requests and back.

body = JSON, then the raw bytes of each tensor that says `binary_data_size`, in their order;
Inference-Header-Content-Length says where the JSON ends (without it, all is JSON)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from limaml.serving.layouts import LAYOUTS_KEPT, LONGEST_KEPT, Layout
from limaml.serving.raw import check_shape, decode_raw, encode_raw
from limaml.serving.tensors import InferRequest, InferResponse, InferTensor, ModelMetadata, Refused, numpy_dtype

__all__ = ["decode_request", "encode_metadata", "encode_response", "parse_json"]

MOST_TENSORS = 4096


def parse_json(body: bytes | memoryview, what: str) -> dict[str, Any]:
    """The object in a JSON text; `Refused` (400) says where it is broken."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refused(400, f"{what} is no JSON: {error}.") from None
    if not isinstance(found, dict):
        raise Refused(400, f"{what} must be a JSON object, and is {_kind(found)}.")
    return found


def decode_request(
    model: str, version: str | None, body: bytes, header_length: str | None
) -> tuple[InferRequest, frozenset[str] | None]:
    """The request in a body, and the names of the outputs that shall be sent as raw bytes (None: all of them)."""
    head, tail = _parts(body, header_length)
    layout = _layouts.get(head) if header_length is not None else None
    if layout is not None and layout.size == len(tail):
        return layout.request(model, version, tail), layout.raw
    found = parse_json(head, "The request")
    for name in found.keys() - {"id", "inputs", "outputs", "parameters"}:
        raise Refused(400, f"The request has a field {name[:80]!r}; known are id, inputs, outputs and parameters.")
    identity, parameters = found.get("id"), _object(found, "parameters", "The request")
    if identity is not None and not isinstance(identity, str):
        raise Refused(400, f"The request's id must be a text, and is {_kind(identity)}.")
    inputs: dict[str, InferTensor] = {}
    place = 0
    for number, entry in enumerate(_list(found, "inputs")):
        tensor, taken = _input(entry, number, tail[place:])
        place += taken
        if tensor.name in inputs:
            raise Refused(400, f"Input '{tensor.name[:80]}' is given twice.")
        inputs[tensor.name] = tensor
    if place != len(tail):
        raise Refused(400, f"There are {len(tail) - place} bytes behind the last tensor; each binary_data_size must say "
                      "how many are its own.")  # fmt: skip
    outputs, raw = _outputs(_list(found, "outputs") if "outputs" in found else [], parameters)
    request = InferRequest(model, version, identity, inputs, outputs, parameters)
    if header_length is not None and identity is None and len(head) <= LONGEST_KEPT:
        _keep(head, found, request, raw)
    return request, raw


_layouts: dict[bytes, Layout] = {}


def _keep(head: bytes, found: Mapping[str, Any], request: InferRequest, raw: frozenset[str] | None) -> None:
    """Remember the layout of a request whose tensors are all raw; the one known longest makes room."""
    places, start = [], 0
    for entry in found["inputs"]:
        size = (entry.get("parameters") or {}).get("binary_data_size")
        if size is None:
            return
        places.append((start, start + size))
        start += size
    while len(_layouts) >= LAYOUTS_KEPT:
        _layouts.pop(next(iter(_layouts)))
    _layouts[head] = Layout.of(request, places, raw)


def _parts(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """The JSON and the raw bytes."""
    if header_length is None:
        return body, memoryview(b"")
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 16):
        raise Refused(400, f"Inference-Header-Content-Length is {header_length[:40]!r}; it must be a number of bytes.")
    length = int(header_length)
    if length > len(body):
        raise Refused(400, f"Inference-Header-Content-Length is {length}, but the body has {len(body)} bytes.")
    whole = memoryview(body)
    return body[:length], whole[length:]


def _input(entry: Any, number: int, raw: memoryview) -> tuple[InferTensor, int]:
    """One input, and how many of the raw bytes it took."""
    where = f"Input {number}"
    if not isinstance(entry, dict):
        raise Refused(400, f"{where} must be an object, and is {_kind(entry)}.")
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise Refused(400, f"{where} has no name; give it the name of a column.")
    where = f"Input '{name[:80]}'"
    shape, datatype = entry.get("shape"), entry.get("datatype")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise Refused(400, f"{where} must have a shape, a list of integers such as [100].")
    if not isinstance(datatype, str):
        raise Refused(400, f"{where} must have a datatype, such as INT64, FP32 or BYTES.")
    size = _object(entry, "parameters", where).get("binary_data_size")
    if size is not None:
        if type(size) is not int or size < 0:
            raise Refused(400, f"{where} has binary_data_size {size!r:.40}; it must be a number of bytes.")
        if "data" in entry:
            raise Refused(400, f"{where} has data and binary_data_size; send one of them.")
        if size > len(raw):
            raise Refused(400, f"{where} should have {size} bytes behind the JSON, but {len(raw)} are left.")
        return decode_raw(raw[:size], name, datatype, shape, where), size
    if not isinstance(entry.get("data"), list):
        raise Refused(400, f"{where} has no data; send a list of values, or raw bytes with binary_data_size.")
    return InferTensor(name, datatype, tuple(shape), _array(entry["data"], datatype, shape, where)), 0


def _array(data: list[Any], datatype: str, shape: list[int], where: str) -> NDArray[Any]:
    """Values out of JSON, flat or nested as the shape, as an array of that shape."""
    dtype, size = numpy_dtype(datatype, where), check_shape(shape, where)
    if data and isinstance(data[0], list):
        data = _flattened(data, where)
    allowed, what = _ALLOWED[dtype.kind]
    if not allowed.issuperset(map(type, data)):
        raise Refused(400, f"{where} is {datatype}, and not all its data are {what}.")
    if len(data) != size:
        raise Refused(400, f"{where} has {len(data)} values; shape {shape} takes {size}.")
    if dtype.hasobject:
        array = np.empty(size, dtype=np.object_)
        array[:] = [value.encode("utf-8", "surrogatepass") for value in data]
    else:
        try:
            with np.errstate(over="ignore"):
                array = np.array(data, dtype=dtype)
        except OverflowError:
            bounds = np.iinfo(dtype)
            wrong = next(value for value in data if not bounds.min <= value <= bounds.max)
            raise Refused(400, f"{where} holds {wrong}, which is no {datatype}.") from None
    return array.reshape(shape)


_ALLOWED: Mapping[str, tuple[frozenset[type], str]] = {
    "b": (frozenset({bool}), "Booleans"),
    "i": (frozenset({int}), "integers"),
    "u": (frozenset({int}), "integers"),
    "f": (frozenset({int, float}), "numbers"),
    "O": (frozenset({str}), "texts"),
}


def _flattened(data: list[Any], where: str) -> list[Any]:
    """The entries of nested lists, in order."""
    depth = 0
    while any(isinstance(value, list) for value in data):
        if not all(isinstance(value, list) for value in data):
            raise Refused(400, f"{where} has lists among its data in some places and values in others.")
        depth += 1
        if depth > 8:
            raise Refused(400, f"{where} has lists within lists within lists; at most 8 dimensions make sense here.")
        data = [entry for value in data for entry in value]
    return data


def _outputs(entries: list[Any], parameters: Mapping[str, Any]) -> tuple[tuple[str, ...], frozenset[str] | None]:
    everything = parameters.get("binary_data_output") is True
    names: list[str] = []
    raw: set[str] = set()
    for number, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise Refused(400, f"Output {number} must be an object with a name.")
        given = _object(entry, "parameters", f"Output '{name[:80]}'")
        if "classification" in given:
            raise Refused(400, f"Output '{name[:80]}' asks for a classification, which this model does not make.")
        if name not in names:
            names.append(name)
        if given.get("binary_data", everything) is True:
            raw.add(name)
    return tuple(names), None if everything and not names else frozenset(raw)


def encode_response(response: InferResponse, raw: frozenset[str] | None) -> tuple[bytes, int | None]:
    """The body, and where its JSON ends if raw bytes follow."""
    outputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for tensor in response.outputs:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if raw is None or tensor.name in raw:
            tail.append(encode_raw(tensor.data))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        elif tensor.data.dtype.hasobject:
            entry["data"] = [value.decode("utf-8", "replace") for value in tensor.data.reshape(-1)]
        else:
            entry["data"] = np.ascontiguousarray(tensor.data).reshape(-1)
        outputs.append(entry)
    document: dict[str, Any] = {
        "model_name": response.model,
        "model_version": response.version,
        "outputs": outputs,
    }
    if response.id is not None:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = response.parameters
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return (head, None) if not tail else (b"".join([head, *tail]), len(head))


def encode_metadata(metadata: ModelMetadata) -> dict[str, Any]:
    def tensors(found: Sequence[Any]) -> list[dict[str, Any]]:
        return [{"name": one.name, "datatype": one.datatype, "shape": list(one.shape)} for one in found]

    return {
        "name": metadata.name,
        "versions": list(metadata.versions),
        "platform": metadata.platform,
        "inputs": tensors(metadata.inputs),
        "outputs": tensors(metadata.outputs),
    }


def _list(found: Mapping[str, Any], name: str) -> list[Any]:
    value = found.get(name)
    if not isinstance(value, list):
        raise Refused(400, f"The request must have '{name}', a list of tensors; it is {_kind(value)}.")
    if len(value) > MOST_TENSORS:
        raise Refused(400, f"The request has {len(value)} {name}; at most {MOST_TENSORS} make sense.")
    return value


def _object(found: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = found.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refused(400, f"{where} has {name} that are {_kind(value)}; they must be an object.")
    return value


def _kind(value: Any) -> str:
    return {
        type(None): "missing",
        bool: "a Boolean",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }[type(value)]
