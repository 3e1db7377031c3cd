"""`POST /v1/score` and what describes a server: for people with curl, and the page at /docs.

The protocol's own `infer` is answered before any of this (`limaml.serving.http`).
"""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from limaml.serving.api_schema import FAILURES, HEALTH, Metadata, Ready, ScoreRequest, ScoreResponse, describe
from limaml.serving.docs_page import Examples, address_of, docs_page, examples_of
from limaml.serving.open_inference import encode_metadata
from limaml.serving.questions import Question, column_of_values, columns_of_rows, rows_of
from limaml.serving.service import Service
from limaml.serving.tensors import Refused

__all__ = ["OPEN", "make_api", "refused_response"]

OPEN = ("/v2/health/live", "/v2/health/ready")
"""What a load balancer asks without a token."""


def refused_response(refusal: Refused) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body that tell a refusal."""
    headers = [(b"content-type", b"application/json")]
    if refusal.retry_after is not None:
        headers.append((b"retry-after", str(max(1, round(refusal.retry_after))).encode()))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return refusal.status, headers, orjson.dumps({"error": _plain(refusal.message)})


def _plain(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _json(document: Any, status: int = 200) -> Response:
    return Response(
        orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), status_code=status, media_type="application/json"
    )


async def score(service: Service, asked: ScoreRequest) -> dict[str, Any]:
    """The answer to `POST /v1/score`."""
    together, apart = asked.rows is not None, asked.candidates is not None or asked.task is not None
    if together == apart or (apart and (asked.candidates is None or asked.task is None)):
        raise Refused(400, "Send either rows, or a task and its candidates.")
    rows = asked.rows if asked.rows is not None else asked.candidates or []
    limit = service.options.max_batch
    if len(rows) > limit:
        raise Refused(400, f"The request has {len(rows)} rows; at most {limit} are scored at once. Send them in parts.")
    async with service.using(asked.version) as loaded:
        scorer, what = loaded.scorer, "rows" if together else "candidates"
        columns = columns_of_rows(rows, scorer, what)
        for name, value in (asked.task or {}).items():
            if name in columns:
                raise Refused(400, f"'{name[:80]}' is in the task and in the candidates; say it once.")
            columns[name] = column_of_values(name, [value], scorer, f"'{name[:80]}' in task")
        if not rows:
            columns = {}
        found = rows_of(columns, limit) if columns else 0
        if found != len(rows):
            raise Refused(400, "The rows say nothing of what they are; give each its columns.")
        if not rows:
            raise Refused(400, f"There are no {what} to score.")
        answer = await service.answer(Question(columns, len(rows), asked.version, None, asked.parameters), loaded)
        labels = [label.name for label in scorer.schema.labels]
    document: dict[str, Any] = {
        "model": service.model,
        "version": answer.version,
        "scores": {label: answer.predictions[:, head].tolist() for head, label in enumerate(labels)},
        "logits": {label: answer.logits[:, head].tolist() for head, label in enumerate(labels)},
        "known": answer.known.tolist(),
    }
    if answer.store_down:
        document["store"] = "down"
    if answer.sampled:
        document["sampled"] = True
    if answer.deviations is not None:
        document["logit_sd"] = {label: answer.deviations[:, head].tolist() for head, label in enumerate(labels)}
    return document


def make_api(service: Service, *, guarded: bool = False) -> FastAPI:
    """The application behind everything but `infer`. `guarded`: all but `OPEN` is described as wanting a token."""
    api = FastAPI(
        title="limaml",
        description="Scores of a recommender that is personalised per member, out of a store of meta embeddings.",
        version="2",
        docs_url=None,
        redoc_url=None,
    )

    @api.post("/v1/score", responses=FAILURES, response_model=ScoreResponse, tags=["score"])
    async def score_rows(asked: ScoreRequest) -> Response:
        """Score rows, or one member's candidates, with the version that is current."""
        return _json(await score(service, asked))

    @api.get("/v2", tags=["Open Inference Protocol"])
    async def server_metadata() -> dict[str, Any]:
        """The server's name, and the extensions of the protocol that it knows."""
        return {"name": "limaml", "version": "2", "extensions": ["binary_tensor_data"]}

    @api.get("/v2/health/live", tags=["Open Inference Protocol"])
    async def live() -> dict[str, bool]:
        """Whether the process runs. Asked without a token."""
        return {"live": service.live}

    @api.get("/v2/health/ready", responses=HEALTH, tags=["Open Inference Protocol"])
    async def ready() -> Response:
        """Whether requests are taken; if not, the reason. Asked without a token."""
        if service.ready():
            return _json({"ready": True})
        return _json({"ready": False} | ({"reason": service.waits_for} if service.waits_for else {}), 503)

    @api.get("/v2/models/{model}", responses=FAILURES, response_model=Metadata, tags=["Open Inference Protocol"])
    async def model_metadata(model: str) -> Response:
        """Inputs and outputs of the version that is current, and the versions that can be asked for."""
        return _json(encode_metadata(await service.model_metadata(model)))

    @api.get(
        "/v2/models/{model}/versions/{version}",
        responses=FAILURES,
        response_model=Metadata,
        tags=["Open Inference Protocol"],
    )
    async def version_metadata(model: str, version: str) -> Response:
        """Inputs and outputs of one version; it is loaded then."""
        return _json(encode_metadata(await service.model_metadata(model, version)))

    def is_ready(model: str, version: str | None = None) -> Response:
        if model != service.model:
            raise Refused(404, f"There is no model {model[:100]!r} here; this server has '{service.model}'.")
        found = service.ready(model, version)
        return _json({"name": model, "ready": found}, 200 if found else 503)

    @api.get("/v2/models/{model}/ready", responses={**FAILURES, **HEALTH}, response_model=Ready,
             tags=["Open Inference Protocol"])  # fmt: skip
    async def model_ready(model: str) -> Response:
        """Whether requests for the model are taken."""
        return is_ready(model)

    @api.get("/v2/models/{model}/versions/{version}/ready", responses={**FAILURES, **HEALTH}, response_model=Ready,
             tags=["Open Inference Protocol"])  # fmt: skip
    async def version_ready(model: str, version: str) -> Response:
        """Whether a version is loaded; one that is asked for is loaded then."""
        if model == service.model:
            async with service.using(version):
                return is_ready(model, version)
        return is_ready(model, version)

    @api.get("/metrics", response_class=Response, tags=["operation"],
             responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})  # fmt: skip
    async def metrics() -> Response:
        """Numbers in the format of Prometheus."""
        body, kind = service.metrics.exposition()
        return Response(body, headers={"content-type": kind})

    @api.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        try:
            async with service.using(None) as loaded:
                examples = examples_of(service.model, loaded)
        except Refused:  # nothing is loaded yet, whose columns could be named
            examples = Examples({"model": service.model})
        page = docs_page(api.openapi(), address_of(request.scope), examples)
        return Response(page, media_type="text/html")

    @api.exception_handler(Refused)
    async def on_refused(_: Request, refusal: Refused) -> Response:
        status, headers, body = refused_response(refusal)
        return Response(body, status, {name.decode(): value.decode() for name, value in headers})

    @api.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        return await on_refused(_, Refused(400, _sentence(error)))

    @api.exception_handler(HTTPException)
    async def on_http(_: Request, error: HTTPException) -> Response:
        response = await on_refused(_, Refused(error.status_code, f"{str(error.detail).rstrip('.')}. See /docs."))
        response.headers.update(error.headers or {})
        return response

    describe(api, open_paths=OPEN if guarded else None)
    return api


def _sentence(error: RequestValidationError) -> str:
    """The first problem that pydantic found, and where."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][:5] if part != "body") or "The body"
    return _plain(f"{where[:200]}: {first['msg'].rstrip('.')}{_given(first.get('ctx'))}. See /docs.")


def _given(context: Annotated[Any, "what pydantic adds"]) -> str:
    return f" ({context['error']})" if isinstance(context, dict) and "error" in context else ""
