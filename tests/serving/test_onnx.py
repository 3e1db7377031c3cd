"""The exported global block equals torch on inputs it was not checked on; what cannot be exported is said; a server goes on
answering while it exports."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from published import publish_small, small
from torch import Tensor, nn

import limaml
from limaml.errors import ArtifactError, ModelError
from limaml.meta import ConcatMLP, CrossNetwork, InteractionMLP
from limaml.serving import onnx
from limaml.serving.onnx import OnnxBlock, export_block, random_inputs
from limaml.serving.service import Options, Service
from limaml.serving.tensors import InferRequest, InferTensor
from limaml.serving.versions import Versions
from limaml.store.contract import Store
from limaml.types import FeatureKind, Features, FeatureSpec

SPECS = (
    FeatureSpec("item_id", FeatureKind.CATEGORICAL, "row", 50),
    FeatureSpec("price", FeatureKind.NUMERIC, "row", 1),
    FeatureSpec("tags", FeatureKind.TOKENS, "row", 20, 4),
    FeatureSpec("recent", FeatureKind.SEQUENCE, "user_id", 50, 3),
    FeatureSpec("picture", FeatureKind.VECTOR, "row", 6),
)
DIMS = {"user_id": 5, "item_id": 3}
EMBEDDINGS = {f"{task}_embedding": dim for task, dim in DIMS.items()}


class Attention(nn.Module):
    """A block of a user's own: attention of the member over the tags; reads some features only, gives logits `[n]`."""

    def __init__(self) -> None:
        super().__init__()
        self.tag = nn.Embedding(20, 5, padding_idx=0)
        self.attend = nn.MultiheadAttention(5, 1, batch_first=True)
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(6, 1)

    def forward(self, features: Features) -> Tensor:
        z = features["user_id_embedding"].unsqueeze(1)
        tags = self.tag(features["tags"])
        seen, _ = self.attend(z, tags, tags, need_weights=False)
        x = self.norm((seen + z).squeeze(1))
        logits: Tensor = self.out(torch.cat([x, features["price"]], 1)).squeeze(1)
        return logits


class Branches(nn.Module):
    """Not traceable: a Python branch on values."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(1, 1)

    def forward(self, features: Features) -> Tensor:
        logits: Tensor = self.out(features["price"])
        return logits if bool((features["price"] > 0).all()) else -logits


class Changes(nn.Module):
    """Another function after every call but the first three: the file cannot equal it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(1, 1)
        self.shift = 0.0

    def forward(self, features: Features) -> Tensor:
        self.shift += 0.5
        logits: Tensor = self.out(features["price"]) + self.shift
        return logits


def blocks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    concat = {"item_id": nn.Embedding(50, 4), "price": 1, **EMBEDDINGS}
    return {
        "interaction": InteractionMLP(SPECS, EMBEDDINGS, heads=2, dropout=0.3),
        "cross": CrossNetwork(SPECS, EMBEDDINGS, heads=1),
        "concat": ConcatMLP(concat, nn.Sequential(nn.Linear(4 + 1 + 8, 8), nn.ReLU(), nn.Linear(8, 3))),
        "own": Attention(),
    }


@pytest.mark.parametrize("name", ["interaction", "cross", "concat", "own"])
def test_equals_torch_on_rows_it_was_not_checked_on(name: str, tmp_path: Path) -> None:
    block = blocks()[name].train()
    done = export_block(block, SPECS, DIMS, tmp_path / "new" / "block.onnx", {"limaml.model": "abc"})
    assert block.training, "exporting must leave the block as it was"
    assert sorted(path.name for path in done.path.parent.iterdir()) == ["block.onnx"]
    loaded = OnnxBlock(done.path)
    assert loaded.metadata["limaml.model"] == "abc"
    block.eval()
    for rows in (0, 1, 33):
        features = random_inputs(SPECS, DIMS, rows, torch.float32, seed=100 + rows)
        with torch.no_grad():
            wanted = block(features).reshape(rows, -1) if rows else torch.zeros(0, loaded(features).shape[1])
        torch.testing.assert_close(loaded(features), wanted, rtol=1e-5, atol=1e-5)


def test_a_block_that_cannot_be_traced_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Branches cannot be exported to ONNX: .* --runtime torch"):
        export_block(Branches(), SPECS, DIMS, tmp_path / "block.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_the_file_differs_from_is_refused_with_the_input(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"differs from torch by .* in logit 0 .*The input was .*price=\[") as refusal:
        export_block(Changes(), SPECS, DIMS, tmp_path / "block.onnx")
    assert "not written" in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "block.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match="cannot be run by onnxruntime"):
        OnnxBlock(tmp_path / "block.onnx")


def test_the_version_before_answers_while_a_new_one_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: while the export is held up, and while it really runs."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'limaml[onnx]'")
    frame = small().frame.select("user_id", "item_id", "category", "quality").head(5)
    inputs = {}
    for column in frame.columns:
        text = frame[column].dtype == pl.String
        values = [value.encode() if text else value for value in frame[column].to_list()]
        inputs[column] = InferTensor.of(column, np.array(values, object if text else None))
    begun, go, threads = threading.Event(), threading.Event(), list[str]()
    export = onnx._program

    def held(block: nn.Module, sample: Features) -> Any:
        threads.append(threading.current_thread().name)
        if len(threads) > 1:  # not the one that the service starts with
            begun.set()
            assert go.wait(60)
        return export(block, sample)

    monkeypatch.setattr(onnx, "_program", held)

    async def main(store: Store, publish_next: Callable[[], str]) -> None:
        versions = Versions(store, "model", runtime="onnx", onnx_folder=tmp_path)
        service = Service(versions, Options(poll=0.01, timeout=60))
        await service.start()

        async def ask() -> tuple[str, Any]:
            answer = await service.infer(InferRequest("model", None, None, inputs))
            return answer.version, answer.outputs[0].data

        try:
            old, wanted = await ask()
            new = publish_next()
            while not begun.is_set():
                await asyncio.sleep(0.005)
            for _ in range(20):
                version, scores = await ask()
                assert version == old and np.array_equal(scores, wanted)
            assert store.current("model") == new
            go.set()
            beside = 0
            while version == old:
                assert np.array_equal(scores, wanted)
                await asyncio.sleep(0.02)  # which leaves the interpreter to the export
                version, scores = await ask()
                beside += 1
            assert version == new and beside > 1
            with limaml.Predictor(store, "model") as predictor:
                np.testing.assert_allclose(scores, predictor.score(frame).predictions[:, 0], atol=1e-5)
            assert not np.allclose(scores, wanted, atol=1e-4)
        finally:
            go.set()
            await service.drain()

    publish_small(tmp_path)
    with limaml.open_store(tmp_path / "store") as store:

        def publish_next() -> str:
            training = small("gradient").training
            trained = training.save(tmp_path / "next")
            limaml.publish(store, "model", trained, tmp_path / "next", training.data)
            return str(store.current("model"))

        asyncio.run(main(store, publish_next))
    assert len(threads) == 2 and all(name.startswith("limaml-load") for name in threads)
