"""The page at /docs: the operations of an OpenAPI document, each with what it takes and a command that asks it.

It is one file without a script that loads nothing from anywhere, so that it works where there is no internet.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from string import Template
from typing import Any
from urllib.parse import quote

from limaml.serving.columns import Lookup
from limaml.serving.versions import Loaded
from limaml.types import ROW, FeatureKind

__all__ = ["Examples", "address_of", "docs_page", "examples_of"]

Document = Mapping[str, Any]

_HOST = re.compile(r"[A-Za-z0-9.\-_]+(?::\d+)?|\[[0-9A-Fa-f:.]+\](?::\d+)?")
_VALUES: Mapping[str, Any] = {"INT64": 1, "FP64": 0.5, "BYTES": "a"}


@dataclass(frozen=True)
class Examples:
    """What the commands ask for: values of the parameters in paths, and a body by path; the document's own where
    there is none."""

    parameters: Mapping[str, str]
    bodies: Mapping[str, Any] = field(default_factory=dict)


def examples_of(model: str, loaded: Loaded) -> Examples:
    """Examples that the version that is served can answer: its columns, with values that are made up."""
    scorer = loaded.scorer
    of_rows = {lookup.feature.column: _value(lookup) for lookup in scorer.lookups.on(ROW)}
    first, *others = scorer.schema.tasks
    task = {column: 42 for column in first.columns if column not in of_rows}
    row = {column: 7 for other in others for column in other.columns if column not in task} | of_rows
    inputs = [
        {"name": tensor.name, "datatype": tensor.datatype, "shape": [1, *tensor.shape[1:]], "data": [value]}
        for tensor in loaded.tensors.inputs
        if (value := _tensor_value(tensor.datatype, {**task, **row}.get(tensor.name))) is not None
    ]
    bodies: dict[str, Any] = {
        "/v1/score": {"task": task, "candidates": [row]} if task else {"rows": [row]},
        "/v2/models/{model}/infer": {"inputs": inputs},
        "/v2/models/{model}/versions/{version}/infer": {"inputs": inputs},
    }
    return Examples({"model": model, "version": loaded.version}, bodies)


def _value(lookup: Lookup) -> Any:
    if lookup.feature.kind is FeatureKind.VECTOR:
        return [0.5] * lookup.codec.size
    return 0.5 if lookup.feature.kind is FeatureKind.NUMERIC else _VALUES[lookup.datatype]


def _tensor_value(datatype: str, value: Any) -> Any:
    """As the tensor's JSON has it: BYTES are texts."""
    return str(value) if datatype == "BYTES" and value is not None else value


def address_of(scope: MutableMapping[str, Any]) -> str:
    """The address under which a server was asked, as the request says it."""
    given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    if not _HOST.fullmatch(given):
        name, port = scope.get("server") or ("localhost", None)
        name = f"[{name}]" if ":" in name else name
        given = name if port is None else f"{name}:{port}"
    return f"{scope.get('scheme', 'http')}://{given}{scope.get('root_path', '')}"


def docs_page(document: Document, address: str, examples: Examples) -> str:
    """HTML of an OpenAPI document whose operations are at `address`."""
    contents, sections = list[str](), dict[str, list[str]]()
    guarded = False
    for number, (path, method, operation) in enumerate(_operations(document)):
        title, shown = f'<span class="method">{method.upper()}</span> ', escape(path)
        contents.append(f'<li><code>{title}<a href="#o{number}">{shown}</a></code></li>')
        section = sections.setdefault(", ".join(operation.get("tags", ["other"])), [])
        section.append(f'<section id="o{number}">\n<h3>{title}{shown}</h3>')
        section.extend(_operation(document, address, examples, path, method, operation))
        section.append("</section>")
        guarded |= bool(operation.get("security"))
    lines = [line for tag, section in sections.items() for line in (f"<h2>{escape(tag)}</h2>", *section)]
    page = Template(files("limaml.serving").joinpath("docs_page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(document["info"]["title"]),
        lead=escape(document["info"].get("description", "")),
        token=" The commands take the server's token from the variable <code>TOKEN</code>." if guarded else "",
        contents="\n".join(contents),
        body="\n".join(lines),
    )


def _operations(document: Document) -> Iterator[tuple[str, str, Document]]:
    """(path, method, operation), those of a tag together, in the order in which the tags come."""
    found = [(path, method, one) for path, methods in document["paths"].items() for method, one in methods.items()]
    tags = list(dict.fromkeys(tuple(one.get("tags", ())) for _, _, one in found))
    yield from sorted(found, key=lambda each: tags.index(tuple(each[2].get("tags", ()))))


def _operation(
    document: Document, address: str, examples: Examples, path: str, method: str, operation: Document
) -> Iterator[str]:
    if "description" in operation:
        yield f"<p>{escape(operation['description'])}</p>"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    rows = [
        (one["name"], f"{_kind(document, one['schema'])}, in the {one['in']}", one.get("description", ""))
        for one in operation.get("parameters", ())
    ]
    if body is not None:
        rows += _fields(document, body["schema"])
    if rows:
        yield _table(("input", "type", ""), rows)
    example = None
    if body is not None:
        schema = _resolved(document, body["schema"])
        example = examples.bodies.get(path, next(iter(schema.get("examples", ())), {}))
    yield f"<pre>{escape(_curl(address, path, method, operation, examples.parameters, example))}</pre>"
    answers = [(status, one["description"]) for status, one in sorted(operation["responses"].items())]
    yield f"<details><summary>Answers</summary>{_table(('status', ''), answers)}</details>"


def _curl(address: str, path: str, method: str, operation: Document, parameters: Mapping[str, str], body: Any) -> str:
    for name, value in parameters.items():
        path = path.replace("{" + name + "}", quote(value, safe=""))
    parts = [f"curl {shlex.quote(address + path)}"]
    if method not in ("get", "post") or (method == "post" and body is None):
        parts[0] += f" -X {method.upper()}"
    if operation.get("security"):
        parts.append('-H "authorization: Bearer $TOKEN"')
    if body is not None:
        parts += ["-H 'content-type: application/json'", f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"]
    return " \\\n    ".join(parts)


def _fields(document: Document, schema: Document, prefix: str = "") -> list[tuple[str, str, str]]:
    """(name, type, what it is) of the fields of an object, and of the objects in its lists."""
    schema, rows = _resolved(document, schema), list[tuple[str, str, str]]()
    for name, given in schema.get("properties", {}).items():
        needed = "" if name in schema.get("required", ()) else ", optional"
        rows.append((prefix + name, _kind(document, given) + needed, given.get("description", "")))
        inner = given.get("items", {})
        if "$ref" in inner:
            rows += _fields(document, inner, f"{prefix}{name}[].")
    return rows


def _kind(document: Document, schema: Document) -> str:
    """A schema in a few words."""
    schema = _resolved(document, schema)
    if "anyOf" in schema:
        kinds = dict.fromkeys(_kind(document, one) for one in schema["anyOf"])
        return " or ".join(kind for kind in kinds if kind != "null" or len(kinds) > 2)
    if schema.get("type") == "array":
        return f"list of {_kind(document, schema['items'])}"
    return str(schema.get("type", "any"))


def _resolved(document: Document, schema: Document) -> Document:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["<table>", "<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for first, *others in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in others)
        lines.append(f"<tr><td><code>{escape(first)}</code></td>{cells}</tr>")
    return "\n".join([*lines, "</table>"])
