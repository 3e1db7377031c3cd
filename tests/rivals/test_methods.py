"""Every compared method on every kind of problem: what it gives, and that it never looks at what it is judged by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rival_data import small_config, small_problem

from limaml.evaluate.baselines import PlainLearner, PlainModel
from limaml.evaluate.methods import DESCRIPTIONS, METHODS, fit_method
from limaml.evaluate.tune import SPACE
from limaml.meta.build import build_global_block
from limaml.meta.losses import Losses

KINDS = [("warm", 1, ("user",)), ("new_tasks", 2, ("user", "shop"))]


def test_every_method_is_described_and_has_a_space() -> None:
    assert set(DESCRIPTIONS) == set(METHODS) == set(SPACE)
    shared = set(SPACE["base"])
    for method, space in SPACE.items():
        assert len(set(space) - shared) <= 3, method
        assert not space or shared <= set(space), method


@pytest.mark.parametrize(("protocol", "heads", "tasks"), KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_test_labels_are_never_read(method: str, protocol: str, heads: int, tasks: tuple[str, ...]) -> None:
    """Predictions are finite, one per test row and head, and the same bits whatever the test labels and weights are."""
    found = []
    for corrupt in (False, True):
        problem = small_problem(protocol, heads=heads, tasks=tasks)
        if corrupt:
            labels, weights, test = problem.data.labels.clone(), problem.data.weights.clone(), problem.split.test
            labels[test], weights[test] = 1 - labels[test], 7.0
            problem = replace(problem, data=replace(problem.data, labels=labels, weights=weights))
        fitted = fit_method(method, problem, small_config(), seed=0, epochs=2)
        rows = problem.split.test.nonzero().flatten()
        assert fitted.rows.equal(rows)
        assert fitted.outputs.shape == (len(rows), heads)
        assert not fitted.outputs.requires_grad
        assert bool(fitted.outputs.isfinite().all())
        found.append(fitted.outputs)
    assert found[0].equal(found[1])


@pytest.mark.parametrize("method", METHODS)
def test_without_features_there_is_still_who_and_how_it_went(method: str) -> None:
    problem = small_problem()
    bare = replace(problem.data, sides={side: {} for side in problem.data.sides})
    bare = replace(bare, index={**bare.index, "row": torch.zeros(len(bare), dtype=torch.int64)})
    fitted = fit_method(method, replace(problem, data=bare, specs=()), small_config(), seed=0, epochs=1)
    assert bool(fitted.outputs.isfinite().all())
    members = bare.index["user"][fitted.rows]
    spread = max(float(fitted.outputs[members == m].std(correction=0).max()) for m in torch.unique(members).tolist())
    assert spread < 1e-5  # nothing tells a member's test rows apart
    told_apart = float(fitted.outputs.std(correction=0)) > 1e-5
    chose_nothing = fitted.chosen.get("steps") == 0 or fitted.chosen.get("penalty of intercepts", 0.0) > 1e6
    assert told_apart == (method not in ("base", "popularity") and not chose_nothing)


@pytest.mark.parametrize("method", METHODS)
def test_epochs_are_found_on_validation_rows(method: str) -> None:
    fitted = fit_method(method, small_problem("new_tasks", valid=True), small_config(), seed=0)
    losses = [epoch.valid_loss for epoch in fitted.history.epochs]
    assert all(loss is not None and 0 < loss < 10 for loss in losses)
    assert 1 <= fitted.history.best <= len(losses)


def test_plain_validation_has_the_log_odds_of_sampled_rows() -> None:
    problem, config = small_problem("new_tasks", valid=True), small_config()
    data = replace(problem.data, offset=torch.linspace(0.5, 4, len(problem.data)))
    assert data.offset is not None
    assert problem.validation is not None
    model = PlainModel(build_global_block(problem.specs, config.model, {}, 1), Losses(problem.losses), {})
    learner = PlainLearner(model, data, problem.split.train, config.train, problem.validation)
    rows = problem.validation.test.nonzero().flatten()
    shifted = learner.predict(rows) + data.offset[rows, None]
    expected = model.losses.loss(shifted, data.labels[rows], data.weights[rows]).sum() / data.labelled_weight(rows)
    assert learner.validate() == pytest.approx(float(expected), rel=1e-5)
