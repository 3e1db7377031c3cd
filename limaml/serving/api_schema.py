"""What /openapi.json says: the bodies that are taken and given, the refusals, and which operations want a token."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

__all__ = ["FAILURES", "HEALTH", "Metadata", "Ready", "ScoreRequest", "ScoreResponse", "describe"]

Scalar = StrictBool | StrictInt | StrictFloat | StrictStr | None
Row = dict[str, Scalar | list[Scalar]]

EXAMPLE: Any = {"task": {"user_id": 42}, "candidates": [{"item_id": 7}, {"item_id": 8}]}


class ScoreRequest(BaseModel):
    """Either `rows`, each with its task's key and its features, or one `task` and its `candidates`."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    rows: list[Row] | None = Field(default=None, description="Column → value, of each row to score.")
    task: Row | None = Field(default=None, description="Column → value, of what is the same for all candidates.")
    candidates: list[Row] | None = Field(default=None, description="Column → value, of each candidate of the task.")
    version: str | None = Field(default=None, description="A version to score with; the current one if left out.")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="sample, seed, scale, logit_sd: docs/exploration.md."
    )


class ScoreResponse(BaseModel):
    """Scores in the order of the rows, all from one version."""

    model: str
    version: str
    scores: dict[str, list[float | None]] = Field(description="Label → a probability, or a value, for each row.")
    logits: dict[str, list[float | None]]
    known: list[bool] = Field(description="Whether the store knew all tasks of the row; if not, it is scored cold.")
    store: str | None = Field(default=None, description="'down' if the store did not answer, and all rows are cold.")
    sampled: bool | None = Field(default=None, description="Whether the scores are of a draw (parameter 'sample').")
    logit_sd: dict[str, list[float | None]] | None = Field(
        default=None, description="How sure each logit is (parameter 'logit_sd')."
    )


class Failure(BaseModel):
    error: str = Field(description="What is wrong, where, and what to do.")


class Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class Metadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class Ready(BaseModel):
    name: str
    ready: bool


FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": text}
    for status, text in {
        400: "The request cannot be scored; says what and where.",
        401: "The bearer token is missing or wrong.",
        404: "There is no such model or version.",
        408: "The body did not arrive in time.",
        413: "The body is too long.",
        415: "The body is packed in a way that is not known.",
        503: "Too many requests wait, or the store does not answer.",
        504: "Not answered in time.",
    }.items()
}
HEALTH: dict[int | str, dict[str, Any]] = {503: {"description": "Not yet, or no longer."}}


class InputTensor(BaseModel):
    name: str = Field(description="A column of the model.")
    datatype: str = Field(description="BOOL, UINT8 … UINT64, INT8 … INT64, FP16, FP32, FP64 or BYTES.")
    shape: list[int] = Field(description="[rows], [1] for one value for all rows, or [rows, width] for lists.")
    data: list[Any] = Field(description="The values, flat or nested.")


class WantedOutput(BaseModel):
    name: str


class InferBody(BaseModel):
    """JSON. Tensors may follow it as raw bytes (`binary_data_size`, `Inference-Header-Content-Length`)."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "inputs": [
                        {"name": "user_id", "datatype": "INT64", "shape": [1], "data": [42]},
                        {"name": "item_id", "datatype": "INT64", "shape": [2], "data": [7, 8]},
                    ]
                }
            ]
        },
    )

    inputs: list[InputTensor]
    outputs: list[WantedOutput] = Field(default_factory=list, description="The usual ones if left out.")
    id: str | None = Field(default=None, description="Comes back with the answer.")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="nan_is_missing; sample, seed, scale, logit_sd: docs/exploration.md."
    )


class OutputTensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    data: list[Any]


class InferAnswer(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]
    parameters: dict[str, Any] | None = Field(default=None, description="store: 'down'; sampled: true.")


def describe(api: FastAPI, *, open_paths: Collection[str] | None) -> None:
    """Make the OpenAPI document of `api`, with `infer`, which is answered before FastAPI is asked.

    Where `open_paths` is not None, all other paths want a bearer token.
    """
    protocol = APIRouter(tags=["Open Inference Protocol"])
    declared: dict[str, Any] = {"methods": ["POST"], "response_model": InferAnswer, "responses": FAILURES}

    def infer(model: str, asked: InferBody) -> None:
        """Score rows with the version that is current."""

    def infer_version(model: str, version: str, asked: InferBody) -> None:
        """Score rows with one version; it is loaded then."""

    protocol.add_api_route("/v2/models/{model}/infer", infer, **declared)
    protocol.add_api_route("/v2/models/{model}/versions/{version}/infer", infer_version, **declared)
    document = get_openapi(
        title=api.title,
        version=api.version,
        description=api.description,
        routes=[*api.routes, *protocol.routes],
    )
    document["components"]["schemas"].pop("HTTPValidationError")
    document["components"]["schemas"].pop("ValidationError")
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; here such a request is a 400
    if open_paths is not None:
        document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for operation in operations.values() if path not in open_paths else ():
                operation["security"] = [{"bearer": []}]
    api.openapi = lambda: document  # type: ignore[method-assign]  # as FastAPI has documents extended
