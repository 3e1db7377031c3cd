"""The compared methods by name: each is trained on the same rows, with the same outer loop, and judged on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from limaml.config import Config
from limaml.errors import ConfigError
from limaml.evaluate.baselines import ConstantBlock, PlainLearner, PlainModel
from limaml.evaluate.meta_method import fit_learner
from limaml.evaluate.problem import Fitted, Problem, Run
from limaml.evaluate.rivals.cavia import cavia
from limaml.evaluate.rivals.fine_tuned import fine_tuned
from limaml.evaluate.rivals.history_methods import history_method
from limaml.evaluate.rivals.limaml_history import limaml_history
from limaml.evaluate.rivals.melu import melu
from limaml.evaluate.rivals.popularity import popularity
from limaml.evaluate.rivals.random_effects import random_effects
from limaml.evaluate.rivals.set_encoder import set_encoder
from limaml.meta.build import build_global_block, build_meta_model
from limaml.meta.learn import MetaLearner
from limaml.meta.losses import Losses
from limaml.meta.outer import Progress, fit

__all__ = ["DESCRIPTIONS", "METHODS", "Fitted", "Problem", "check_methods", "config_of", "fit_method"]


def _plain(with_ids: bool) -> Run:
    def run(problem: Problem, config: Config, progress: Callable[[Progress], None] | None) -> Fitted:
        data, split = problem.data, problem.judged
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
    data, split = problem.data, problem.judged
    model = build_meta_model(problem.specs, problem.tasks, problem.losses, config.model, config.adapt)
    model = model.to(config.train.device)
    learner = MetaLearner(model, data, split.train, config.train, problem.validation)
    return fit_learner(learner, problem, config, progress)


METHODS: Mapping[str, tuple[Run, Mapping[str, Mapping[str, object]]]] = {
    "popularity": (popularity(member=False), {}),
    "member_mean": (popularity(member=True), {}),
    "base": (_plain(with_ids=False), {}),
    "wide_and_deep": (_plain(with_ids=True), {}),
    "history_mean": (history_method("mean"), {}),
    "history_attention": (history_method("attention"), {}),
    "set_encoder": (set_encoder, {}),
    "random_effects": (random_effects, {}),
    "fine_tuned": (fine_tuned, {}),
    "melu": (melu, {"adapt": {"solver": "gradient", "steps": 3}}),
    "cavia": (cavia, {"adapt": {"solver": "gradient", "steps": 3}}),
    # By gradient steps a linear meta block adapts better than a deep one (docs/decisions.md).
    "limaml_gradient": (_limaml, {"adapt": {"solver": "gradient", "steps": 3}, "model": {"meta_hidden": ()}}),
    "limaml_newton": (_limaml, {"adapt": {"solver": "newton", "steps": 2}}),
    "limaml_history": (limaml_history, {"adapt": {"solver": "newton", "steps": 2}}),
}
"""Name → (how it is trained and scored, what it sets unless `methods.<name>` of the config says otherwise)."""

DESCRIPTIONS: Mapping[str, str] = {
    "popularity": "shrunken mean label of what the row is about; no features, no network",
    "member_mean": "popularity, and each member's own shrunken mean, added in log-odds",
    "base": "the global block alone: features, no personalisation",
    "wide_and_deep": "a learned embedding and bias for each id",
    "history_mean": "the global block also reads the mean of the member's recent rows and labels (YouTube DNN)",
    "history_attention": "the global block also reads the member's recent rows and labels by attention (DIN)",
    "set_encoder": "a feed-forward set encoder of the support gives the embedding, no inner loop (CNP, CMML)",
    "random_effects": "base, frozen, and a ridge regression per member on its last hidden layer (GLMix, GDMix)",
    "fine_tuned": "base, all of it trained on by each member alone, a few steps",
    "melu": "the layers of the MLP are adapted to each member by gradient steps, first order (MeLU)",
    "cavia": "a context vector per member, adapted by gradient steps from a common start (CAVIA)",
    "limaml_gradient": "LiMAML with the paper's gradient steps on the meta block",
    "limaml_newton": "LiMAML with Newton steps in the space of the meta embedding",
    "limaml_history": "limaml_newton whose global block also reads the recent rows by attention (LiMAML beside DIN)",
}
"""Name → what it is, in a line."""


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
