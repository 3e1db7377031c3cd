"""A warm start gives the global block what an ordinary model has learned, and says what it could not use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limaml.errors import ModelError
from limaml.meta.blocks import InteractionMLP, MetaMLP
from limaml.meta.model import MetaModel
from limaml.meta.warm import warm_start
from limaml.types import FeatureKind, Features, FeatureSpec

DIM = 3


class Ordinary(nn.Module):
    """A model as people have them; with `dim` it reads a meta embedding beside its features."""

    def __init__(self, dim: int = 0, *, first: bool = False, hidden: int = 8) -> None:
        super().__init__()
        self.dim, self.put_first = dim, first
        self.item = nn.Embedding(5, 4)
        self.net = nn.Sequential(nn.Linear(5 + dim, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, features: Features) -> Tensor:
        x = [self.item(features["item"]), features["r"]]
        if self.dim:
            x = [features["user_embedding"], *x] if self.put_first else [*x, features["user_embedding"]]
        logits: Tensor = self.net(torch.cat(x, 1)) * self.scale
        return logits


def personalised(block: nn.Module) -> MetaModel:
    return MetaModel(block, {"user": MetaMLP((), DIM)})


def features(z: float = 0.0) -> Features:
    return {
        "item": torch.arange(5),
        "r": torch.linspace(-1, 1, 5)[:, None],
        "user_embedding": torch.full((5, DIM), z),
    }


@pytest.mark.parametrize("first", [False, True])
def test_a_grown_layer_starts_at_the_old_model(first: bool) -> None:
    torch.manual_seed(0)
    trained, block = Ordinary(), Ordinary(DIM, first=first)
    trained.scale.fill_(2.0)
    fresh = block.net[0].weight.detach().clone()
    model = personalised(block)
    result = warm_start(model, trained, new_columns="first" if first else "last")
    assert result.grown == ("net.0.weight",)
    assert set(result.loaded) == {"item.weight", "net.0.bias", "net.2.weight", "net.2.bias", "scale"}
    assert not result.missing and not result.unexpected and not result.mismatched
    assert torch.allclose(block(features()), trained(features()), atol=1e-6)  # a meta embedding of zeros adds nothing
    new = slice(0, DIM) if first else slice(5, None)
    assert torch.allclose(block.net[0].weight[:, new], 0.1 * fresh[:, new])
    assert not torch.allclose(block(features(1.0)), block(features()), atol=1e-4)  # and others can adapt
    assert torch.equal(trained(features()), trained(features()))


def test_the_trained_model_is_copied_not_shared() -> None:
    trained, block = Ordinary(), Ordinary(DIM)
    warm_start(personalised(block), trained)
    before = trained.item.weight.detach().clone()
    with torch.no_grad():
        block.item.weight.add_(1.0)
    assert torch.equal(trained.item.weight, before)


def test_whatever_does_not_fit_is_said() -> None:
    torch.manual_seed(0)
    block = Ordinary(DIM)
    weights = {name: value.clone() for name, value in Ordinary().state_dict().items()}
    weights["head.weight"] = torch.zeros(2)
    del weights["net.2.bias"]
    weights["item.weight"] = torch.zeros(7, 4)
    before = block.item.weight.detach().clone()
    result = warm_start(personalised(block), weights)
    assert result.unexpected == ("head.weight",)
    assert result.missing == ("net.2.bias",)
    assert result.mismatched == {"item.weight": ((5, 4), (7, 4))}
    assert torch.equal(block.item.weight, before)
    for said in ("head.weight", "net.2.bias", "item.weight ([5, 4] here, [7, 4] there)", "net.0.weight"):
        assert said in str(result)


def test_columns_that_no_meta_embedding_explains_are_not_guessed() -> None:
    result = warm_start(personalised(Ordinary(DIM + 1)), Ordinary())
    assert result.grown == ()
    assert result.mismatched == {"net.0.weight": ((8, 5 + DIM + 1), (8, 5))}


@pytest.mark.parametrize("prefix", ["module.", "global_block.", "module.global_block.", "_orig_mod."])
def test_names_of_wrappers_are_understood(prefix: str) -> None:
    trained = Ordinary()
    weights = {prefix + name: value for name, value in trained.state_dict().items()}
    weights["wide.weight"] = torch.zeros(1)
    result = warm_start(personalised(Ordinary(DIM)), weights)
    assert len(result.loaded) == 5 and len(result.grown) == 1
    assert result.unexpected == ("wide.weight",)


def test_blocks_that_ship_take_their_own_weights() -> None:
    specs = (FeatureSpec("item", FeatureKind.CATEGORICAL, "row", 5), FeatureSpec("r", FeatureKind.NUMERIC, "row", 1))
    torch.manual_seed(0)
    trained = InteractionMLP(specs, {})
    block = InteractionMLP(specs, {"user_embedding": DIM})
    result = warm_start(personalised(block), trained)
    assert set(result.loaded) == set(trained.state_dict())
    assert set(result.missing) == {"deep_of.0.weight", "factor_of.0.weight", "wide_of.0.weight"}
    assert torch.allclose(block(features()), trained(features()), atol=1e-6)


def test_nothing_that_fits_is_an_error() -> None:
    with pytest.raises(ModelError, match="Nothing of the trained weights fits the global block Ordinary"):
        warm_start(personalised(Ordinary(DIM)), {"a": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"\[8, 8\] here, \[9, 9\] there"):
        warm_start(personalised(Ordinary(DIM)), {"net.0.weight": torch.zeros(9, 9)})
