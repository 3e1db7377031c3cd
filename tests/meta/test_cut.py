"""Cut blocks: any way to deal out the features gives what the whole block gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limaml.errors import ModelError
from limaml.meta import CrossNetwork, InteractionMLP
from limaml.meta.blocks import add_parts
from limaml.meta.cut import ConcatMLP
from limaml.types import CutBlock, FeatureKind, FeatureSpec, LayeredBlock, Parts

SPECS = (
    FeatureSpec("item", FeatureKind.CATEGORICAL, "row", 9),
    FeatureSpec("genres", FeatureKind.TOKENS, "row", 7, 3),
    FeatureSpec("age", FeatureKind.NUMERIC, "member", 2),
)
DIMS = {"member_embedding": 4, "item_embedding": 3}


def features(n: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(n)
    return {
        "item": torch.randint(0, 9, (n,), generator=made),
        "genres": torch.randint(0, 7, (n, 3), generator=made),
        "age": torch.randn(n, 2, generator=made, dtype=torch.float64),
        "member_embedding": torch.randn(n, 4, generator=made, dtype=torch.float64),
        "item_embedding": torch.randn(n, 3, generator=made, dtype=torch.float64),
    }


class Usual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(9, 5)
        self.mlp = nn.Sequential(nn.Linear(5 + 2 + 4 + 3, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [self.item(features["item"]), features["age"], features["member_embedding"], features["item_embedding"]]
        logits: torch.Tensor = self.mlp(torch.cat(parts, 1))
        return logits


def blocks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    usual = Usual()
    return {
        "interaction": InteractionMLP(SPECS, DIMS, heads=2, embedding_dim=4, hidden=(8, 6), factors=3).double(),
        "cross": CrossNetwork(SPECS, DIMS, heads=2, embedding_dim=4, layers=2, hidden=(8,)).double(),
        "cross, no layers": CrossNetwork(SPECS, DIMS, heads=2, embedding_dim=4, layers=0, hidden=(8,)).double(),
        "concat": ConcatMLP({"item": usual.item, "age": 2, **DIMS}, usual.mlp).double(),
    }


@settings(max_examples=25)
@given(st.integers(0, 6), st.lists(st.integers(0, 2), min_size=5, max_size=5), st.sampled_from(sorted(blocks())))
def test_parts_add_up_to_the_whole(n: int, dealt: list[int], which: str) -> None:
    block = blocks()[which]
    assert isinstance(block, CutBlock)
    given_features = features(n)
    whole = block(given_features)
    total: Parts | None = None
    for hand in range(3):
        names = [name for name, to in zip(given_features, dealt, strict=True) if to == hand]
        for method, wanted in ((block.encode, False), (block.condition, True)):
            portion = {name: given_features[name] for name in names if (name in DIMS) == wanted}
            if portion:
                total = method(portion) if total is None else add_parts(total, method(portion))
    assert total is not None
    torch.testing.assert_close(block.score(total), whole, atol=1e-12, rtol=1e-10)
    if isinstance(block, LayeredBlock):
        slot, bias, layers = block.stack()
        hidden, rest = total[slot], block.rest(total)
        assert hidden is not None
        for layer in (*layers,):
            hidden = layer(hidden if bias is None else hidden + bias)
            bias = None
        torch.testing.assert_close(hidden if rest is None else hidden + rest, whole, atol=1e-12, rtol=1e-10)


def test_the_usual_block_is_cut_with_the_same_parameters() -> None:
    usual = Usual().double()
    cut = ConcatMLP({"item": usual.item, "age": 2, **DIMS}, usual.mlp)
    torch.testing.assert_close(cut(features(5)), usual(features(5)))
    assert {id(p) for p in cut.parameters()} == {id(p) for p in usual.parameters()}


def test_what_cannot_be_cut_is_said() -> None:
    usual = Usual()
    with pytest.raises(ModelError, match=r"inputs are 7 wide together \(item 5, age 2\).*takes 14"):
        ConcatMLP({"item": usual.item, "age": 2}, usual.mlp)
    with pytest.raises(ModelError, match="must start with a Linear"):
        ConcatMLP({"age": 2}, nn.Sequential(nn.ReLU()))
    with pytest.raises(ModelError, match=r"'item' \(ReLU\).*attribute 'dim'"):
        ConcatMLP({"item": nn.ReLU(), "age": 2}, usual.mlp)
