"""The world that online requests come to: a trained model, a store with many members, and requests made beforehand."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

import limaml
from limaml.embeddings.publish import cold_vector, dims_of
from limaml.meta import TrainedModel

__all__ = ["MODEL", "Asked", "World", "bare_forward", "grpc_message", "http_message", "make_world"]

MODEL = "model"  # the name that run folders publish under
ITEMS = 5000


@dataclass(frozen=True)
class Asked:
    """One request: one member, and rows to score."""

    member: int
    columns: Mapping[str, np.ndarray]  # [rows] each


@dataclass(frozen=True)
class World:
    store: Path
    trained: TrainedModel
    asked: Sequence[Asked]
    publish_seconds: float


def make_world(folder: Path, *, members: int, rows: int, dim: int, requests: int) -> World:
    """A model trained for an epoch on synthetic clicks, `members` random embeddings published with it, and requests of
    `rows` random items each for random members."""
    made = limaml.make_interactions(tasks=2000, items=ITEMS, seed=0)
    codes = pl.col("category").rank("dense").cast(pl.Int64)  # numbers, as features are sent that were joined beforehand
    items = made.items.with_columns(codes)
    joined = limaml.join_tables(made.interactions, {"item_id": items})
    schema = limaml.infer_schema(
        joined.frame,
        task="user_id",
        row="item_id",
        time="timestamp",
        label="click",
        row_columns=joined.columns["item_id"],
    ).schema
    config = limaml.Config(model=limaml.ModelConfig(dim=dim), train=limaml.TrainConfig(epochs=1))
    trained = limaml.train(joined.frame, schema, config).save(folder / "model")
    rng = np.random.default_rng(0)
    with limaml.open_store(folder / "store") as store:
        digest = store.put_model(folder / "model")
        ids = [str(member) for member in range(members)]
        vectors = rng.normal(size=(members, dim)).astype(np.float32)
        count, newest = np.full(members, 32), np.full(members, int(time.time()))
        begun = time.perf_counter()
        with store.publish(
            MODEL, dims=dims_of(trained), artifact=digest, extra={"time_unit": "integer"}
        ) as publication:
            for low in range(0, members, 65536):
                part = slice(low, low + 65536)
                publication.put("user_id", ids[part], vectors[part], count[part], newest[part])
            publication.put_cold("user_id", cold_vector(trained, "user_id"))
            publication.commit()
        seconds = time.perf_counter() - begun
    asked = []
    for _ in range(requests):
        chosen = items[rng.integers(0, items.height, rows).tolist()]
        columns = {name: chosen[name].to_numpy() for name in ("item_id", "category", "quality")}
        asked.append(Asked(int(rng.integers(0, members)), columns))
    return World(folder / "store", trained, asked, seconds)


@torch.no_grad()
def bare_forward(world: World, batch: int = 1, repeats: int = 300) -> float:
    """Median seconds, per request, of the global block alone on the rows of `batch` requests at once: rows that are
    encoded, and embeddings that are looked up."""
    trained, times = world.trained, []
    block = trained.model.global_block.eval()
    for first in range(0, repeats * batch, batch):
        requests = [world.asked[place % len(world.asked)] for place in range(first, first + batch)]
        rows = pl.concat([pl.DataFrame(dict(request.columns)) for request in requests])
        features = trained.encoder.encode_features(rows, "row")
        z = torch.randn(batch, trained.model.dims["user_id"] or 0)
        features["user_id_embedding"] = z.repeat_interleave(rows.height // batch, 0)
        begun = time.perf_counter()
        block(features)
        times.append((time.perf_counter() - begun) / batch)
    return float(np.median(times))


def tensors(request: Asked) -> list[tuple[str, str, list[int], bytes]]:
    """Name, datatype, shape and raw bytes of each input of the Open Inference Protocol."""
    found = [("user_id", "INT64", [1], np.int64(request.member).tobytes())]
    for name, values in request.columns.items():
        if values.dtype.kind in "iu":
            found.append((name, "INT64", [len(values)], values.astype(np.int64).tobytes()))
        elif values.dtype.kind == "f":
            found.append((name, "FP32", [len(values)], values.astype(np.float32).tobytes()))
        else:
            texts = [str(value).encode() for value in values]
            raw = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
            found.append((name, "BYTES", [len(values)], raw))
    return found


def http_message(request: Asked, output: str, path: str = f"/v2/models/{MODEL}/infer") -> bytes:
    """A whole HTTP request with binary tensors in and out."""
    inputs = [
        {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
        for name, kind, shape, raw in tensors(request)
    ]
    outputs = [{"name": output, "parameters": {"binary_data": True}}]
    header = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    body = header + b"".join(raw for *_, raw in tensors(request))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def grpc_message(request: Asked, output: str) -> bytes:
    """The same request as a serialised `ModelInferRequest`, contents raw."""
    from limaml.serving.grpc_messages import message

    found = message("inference.ModelInferRequest")(model_name=MODEL)
    for name, kind, shape, raw in tensors(request):
        found.inputs.add(name=name, datatype=kind, shape=shape)
        found.raw_input_contents.append(raw)
    found.outputs.add(name=output)
    serialised: bytes = found.SerializeToString()
    return serialised
