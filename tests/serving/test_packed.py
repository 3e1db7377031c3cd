"""The packed block is the shipped block: to rounding in float64, however features are dealt out and rows come together."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limaml.meta.blocks import CrossNetwork, InteractionMLP, add_parts
from limaml.serving.packed import PackedInteraction
from limaml.types import CutBlock, FeatureKind, Features, FeatureSpec, Parts


@st.composite
def blocks(draw: st.DrawFn) -> tuple[InteractionMLP, Features, Features]:
    """A block with weights of every size, and features and embeddings of some rows."""
    kinds = draw(st.lists(st.sampled_from(list(FeatureKind)), min_size=1, max_size=5))
    specs, rows = [], draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    features: Features = {}
    for place, kind in enumerate(kinds):
        name = f"f{place}"
        length = 3 if kind in (FeatureKind.TOKENS, FeatureKind.SEQUENCE) else 1
        size = draw(st.integers(1, 3)) if kind is FeatureKind.VECTOR else 1 if kind is FeatureKind.NUMERIC else 7
        specs.append(FeatureSpec(name, kind, "row", size, length))
        if specs[-1].is_id:
            features[name] = torch.randint(size, (rows, length) if length > 1 else (rows,))
        else:
            features[name] = 3 * torch.randn(rows, size, dtype=torch.float64)
    dims = {f"t{i}_embedding": draw(st.integers(1, 4)) for i in range(draw(st.integers(1, 2)))}
    hidden = draw(st.sampled_from([(5,), (6, 4), (4, 3, 2)]))
    block = InteractionMLP(specs, dims, heads=draw(st.integers(1, 3)), embedding_dim=3, hidden=hidden, factors=2)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    embeddings: Features = {name: torch.randn(rows, dim, dtype=torch.float64) for name, dim in dims.items()}
    return block.double().eval(), features, embeddings


@settings(max_examples=80)
@given(blocks(), st.data())
def test_it_scores_as_the_block_does(made: tuple[InteractionMLP, Features, Features], data: st.DataObject) -> None:
    block, features, embeddings = made
    packed = PackedInteraction.of(block)
    assert packed is not None and isinstance(packed, CutBlock)
    with torch.inference_mode():
        wanted = block({**features, **embeddings})
        parts: Parts = (None,)
        left = dict(features)
        while left:  # dealt out in pieces, as those of rows, of tasks and of a cache are
            some = data.draw(st.sets(st.sampled_from(sorted(left)), min_size=1))
            parts = add_parts(parts, packed.encode({name: left.pop(name) for name in sorted(some)}))
        for name in data.draw(st.permutations(sorted(embeddings))):
            parts = add_parts(parts, packed.condition({name: embeddings[name]}))
        found = packed.score(parts)
        together = packed.score(add_parts(packed.encode(features), packed.condition(embeddings)))
    scale = 1 + float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 * scale**2)
    torch.testing.assert_close(together, wanted, rtol=0, atol=1e-10 * scale**2)


def test_another_block_is_not_packed() -> None:
    class Mine(InteractionMLP):
        def score(self, parts: Parts) -> Tensor:
            return super().score(parts) + 1

    spec, dims = [FeatureSpec("f", FeatureKind.NUMERIC, "row", 1)], {"t_embedding": 2}
    assert PackedInteraction.of(InteractionMLP(spec, dims)) is not None
    assert PackedInteraction.of(Mine(spec, dims)) is None
    assert PackedInteraction.of(CrossNetwork(spec, dims)) is None
    changed = InteractionMLP(spec, dims)
    changed.mlp[0] = nn.ReLU()
    assert PackedInteraction.of(changed) is None
