"""The exported global block equals torch on inputs it was not checked on; what cannot be exported is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from limaml.errors import ArtifactError, ModelError
from limaml.meta import ConcatMLP, CrossNetwork, InteractionMLP
from limaml.serving.onnx import OnnxBlock, export_block, random_inputs
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
