"""The compared methods by name: each is trained on the same rows, with the same outer loop, and judged on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limaml.config import Config
from limaml.errors import ConfigError
from limaml.evaluate.baselines import ConstantBlock, PlainLearner, PlainModel
from limaml.meta.build import build_global_block, build_meta_model
from limaml.meta.learn import MetaLearner
from limaml.meta.losses import Losses
from limaml.meta.model import MetaModel
from limaml.meta.outer import History, Progress, fit
from limaml.tasks import Split, TaskRows
from limaml.types import FeatureSpec, Interactions, LossKind

__all__ = ["METHODS", "Fitted", "Problem", "fit_method"]


@dataclass(frozen=True)
class Problem:
    """What a method is asked: learn from `split.train`, then score `split.test` with support from `split.support`.

    With a `validation` split (of the training rows) training stops early on it and the test rows are not scored.
    """

    data: Interactions
    specs: tuple[FeatureSpec, ...]
    losses: tuple[LossKind, ...]
    tasks: tuple[str, ...]
    split: Split
    validation: Split | None = None


@dataclass(frozen=True)
class Fitted:
    """Outputs for `split.test` (or the validation rows), and how training went."""

    outputs: Tensor  # [test rows, heads]: log-odds of binary heads, values of squared heads
    rows: Tensor  # [test rows] positions in the data
    history: History
    model: MetaModel | None = None
    embeddings: Mapping[str, Tensor] | None = None  # task type → [entries, dim]


def _plain(with_ids: bool) -> Callable[[Problem, Config, Callable[[Progress], None] | None], Fitted]:
    def run(problem: Problem, config: Config, progress: Callable[[Progress], None] | None) -> Fitted:
        data, split = problem.data, problem.validation or problem.split
        dims = dict.fromkeys(problem.tasks, config.model.dim) if with_ids else {}
        heads = len(problem.losses)
        empty = not problem.specs and not dims
        block = ConstantBlock(heads) if empty else build_global_block(problem.specs, config.model, dims, heads)
        ids = {task: (data.count(task), dim) for task, dim in dims.items()}
        learner = PlainLearner(
            PlainModel(block, Losses(problem.losses), ids).to(config.train.device),
            data,
            split.train,
            config.train,
            problem.validation,
        )
        history = fit(learner, config.train, progress=progress)
        learner.model.cpu()
        rows = split.test.nonzero().flatten()
        return Fitted(learner.model.losses.outputs(learner.predict(rows)), rows, history)

    return run


def _limaml(problem: Problem, config: Config, progress: Callable[[Progress], None] | None) -> Fitted:
    data, split = problem.data, problem.validation or problem.split
    model = build_meta_model(problem.specs, problem.tasks, problem.losses, config.model, config.adapt)
    model = model.to(config.train.device)
    learner = MetaLearner(model, data, split.train, config.train, problem.validation)
    history = fit(learner, config.train, progress=progress)
    model = model.cpu()
    rows = split.test.nonzero().flatten()
    embeddings = {}
    for task in model.tasks:
        grouped = TaskRows.of(data.index[task], data.count(task), split.support)
        embeddings[task] = model.embed(data, task, grouped)
    return Fitted(model.losses.outputs(model.predict(data, rows, embeddings)), rows, history, model, embeddings)


_Run = Callable[[Problem, Config, Callable[[Progress], None] | None], Fitted]

METHODS: Mapping[str, tuple[_Run, Mapping[str, Mapping[str, object]]]] = {
    "base": (_plain(with_ids=False), {}),
    "wide_and_deep": (_plain(with_ids=True), {}),
    # By gradient steps a linear meta block adapts better than a deep one (docs/decisions.md).
    "limaml_gradient": (_limaml, {"adapt": {"solver": "gradient", "steps": 3}, "model": {"meta_hidden": ()}}),
    "limaml_newton": (_limaml, {"adapt": {"solver": "newton", "steps": 2}}),
}
"""Name → (how it is trained and scored, what it sets unless `methods.<name>` of the config says otherwise)."""


def config_of(method: str, config: Config, **train: object) -> Config:
    """The config of one method: its own defaults, under what the config sets, under what `methods.<name>` of it sets."""
    check_methods([method])
    own, defaults = config.methods.get(method, {}), METHODS[method][1]
    sections: dict[str, dict[str, object]] = {}
    for name in dict.fromkeys((*defaults, *own)):
        chosen = getattr(config, name).model_fields_set if name in defaults else set()
        kept = {key: value for key, value in defaults.get(name, {}).items() if key not in chosen}
        sections[name] = {**kept, **own.get(name, {})}
    sections["train"] = {**sections.get("train", {}), **train}
    return config.model_copy(update={"methods": {**config.methods, method: sections}}).of_method(method)


def fit_method(
    method: str,
    problem: Problem,
    config: Config,
    *,
    seed: int,
    epochs: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Train one method from `seed`, for exactly `epochs` where given."""
    train: dict[str, object] = {"seed": seed}
    if epochs is not None:
        train |= {"epochs": epochs, "patience": epochs}
    torch.manual_seed(seed)
    return METHODS[method][0](problem, config_of(method, config, **train), progress)


def check_methods(methods: Sequence[str]) -> None:
    """Raise `ConfigError` for a method that does not exist."""
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"There is no method '{method}'; choose among {', '.join(METHODS)}.")
