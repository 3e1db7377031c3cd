"""Hyperparameters for every compared method: one space, one budget, the same validation rows; never a test row.

A trial is a setting of one method. Its loss is the mean, over the protocols, of the best validation loss of seed 0, just
as `compare` finds the number of epochs. Optuna proposes settings; every trial is appended to `trials.jsonl` when it is
done, so that a search that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from limaml.config import Config, parse_config
from limaml.errors import ConfigError, LimamlError, require
from limaml.evaluate.compare import Job, start_worker, work
from limaml.evaluate.methods import METHODS, check_methods
from limaml.interactions import Schema
from limaml.interactions.digest import content_digest

__all__ = ["SPACE", "Trial", "Tuned", "propose", "tune", "with_settings"]

_COMMON: dict[str, tuple[Any, ...]] = {
    "train.lr": ("log", 0.002, 0.01),
    "train.table_decay": ("log", 3.0, 300.0),
    "train.decay": ("log", 1.0, 100.0),
    "train.rows_per_batch": ("choice", (2048, 4096, 8192)),
    "model.embedding_dim": ("choice", (8, 16, 32)),
    "model.dim": ("choice", (8, 16, 32)),
    "model.dropout": ("choice", (0.0, 0.1, 0.2)),
}
_GRADIENT: dict[str, tuple[Any, ...]] = {
    "adapt.steps": ("choice", (2, 3, 5)),
    "adapt.rate": ("log", 0.05, 0.5),
    "adapt.prior_count": ("log", 1.0, 30.0),
}
_NEWTON: dict[str, tuple[Any, ...]] = {
    "adapt.steps": ("choice", (1, 2, 3)),
    "adapt.precision": ("log", 0.3, 10.0),
}

_HISTORY: dict[str, tuple[Any, ...]] = {
    "rival.history": ("choice", (20, 50, 100)),
    "rival.look_back": ("choice", ("past", "cross_fit")),
}
_HIDDEN: dict[str, tuple[Any, ...]] = {"rival.hidden": ("choice", (16, 32, 64))}

SPACE: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "popularity": {},
    "member_mean": {},
    "base": _COMMON,
    "wide_and_deep": _COMMON,
    "history_mean": {**_COMMON, **_HISTORY},
    "history_attention": {**_COMMON, **_HISTORY, **_HIDDEN},
    "set_encoder": {**_COMMON, **_HIDDEN, "adapt.prior_count": _GRADIENT["adapt.prior_count"]},
    "random_effects": _COMMON,  # penalties, rate and steps are chosen by the methods themselves, in every training
    "fine_tuned": _COMMON,
    "melu": {**_COMMON, **_GRADIENT},
    "cavia": {**_COMMON, **_GRADIENT},
    "limaml_gradient": {**_COMMON, **_GRADIENT},
    "limaml_newton": {**_COMMON, **_NEWTON},
    "limaml_history": {**_COMMON, **_NEWTON, "rival.history": _HISTORY["rival.history"]},
}
"""Method → setting → ("log", low, high) or ("choice", values). Every method has the same common part,
but those that learn all they have from counts: they have nothing to search, and are tried once."""


@dataclass(frozen=True)
class Trial:
    """One setting that was tried. `loss` is None where training failed; `error` then says why."""

    method: str
    settings: Mapping[str, Any]
    loss: float | None
    epochs: Mapping[str, int]  # protocol → best epoch
    error: str = ""


@dataclass(frozen=True)
class Tuned:
    """The best setting of each method, as overrides in a config, and all trials."""

    config: Config
    trials: tuple[Trial, ...]

    def best(self, method: str) -> Trial | None:
        done = [trial for trial in self.trials if trial.method == method and trial.loss is not None]
        return min(done, key=lambda trial: trial.loss or 0.0, default=None)


def tune(
    table: Path,
    schema: Schema,
    config: Config,
    *,
    dataset: str,
    trials: int,
    record: Path,
    workers: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int, Trial], None] | None = None,
) -> Tuned:
    """Search `trials` settings for each of `config.compare.methods` on the Parquet file `table`.

    The first trial of every method is the config as it is. `record` is the file of finished trials; what it holds of these
    methods is not run again. Runs in `workers` processes of one thread. `progress` is called with (done, total, trial).
    Raises `ConfigError` if `record` holds trials on other rows, with other features or from another config: their losses
    cannot be compared.
    """
    optuna = require("optuna", "tune")
    check_methods(config.compare.methods)
    methods = config.compare.methods
    problems = _fingerprints(table, schema, config, methods)
    finished = [trial for trial in _read(record, problems) if trial.method in methods]
    studies = {method: _study(method, finished, trials, seed) for method in methods}
    allowed = {method: trials if SPACE[method] else 1 for method in methods}
    left = {method: allowed[method] - sum(trial.method == method for trial in finished) for method in methods}
    total = sum(max(0, count) for count in left.values())
    done = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count() or 1, context, start_worker, (None,)) as pool:
        pending: dict[Future[Trial], tuple[str, Any]] = {}
        queue = [method for turn in range(trials) for method in methods if turn < left[method]]
        fresh = {method for method in methods if not any(t.method == method for t in finished)}
        try:
            while queue or pending:
                while queue and len(pending) < (workers or os.cpu_count() or 1):
                    method = queue.pop(0)
                    asked = None
                    settings: dict[str, Any] = {}
                    if method in fresh:
                        fresh.remove(method)
                    else:
                        asked = studies[method].ask()
                        settings = _suggested(asked, method)
                    arguments = (str(table), schema.model_dump_json(), dataset, _text(config, method, settings))
                    pending[pool.submit(_try, method, settings, config.compare.protocols, arguments)] = (method, asked)
                ready, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in ready:
                    method, asked = pending.pop(future)
                    trial = future.result()
                    if asked is not None:
                        state = None if trial.loss is not None else optuna.trial.TrialState.FAIL
                        studies[method].tell(asked, trial.loss, state=state)
                    finished.append(trial)
                    _append(record, trial, problems[method])
                    done += 1
                    if progress is not None:
                        progress(done, total, trial)
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise
    return Tuned(_best_config(config, methods, finished), tuple(finished))


def propose(method: str, earlier: Sequence[Trial], trials: int, seed: int = 0) -> dict[str, Any]:
    """The settings to try next for a method, after `earlier` trials out of a budget of `trials`: empty for the first trial.

    The same earlier trials always lead to the same proposal.
    """
    if not any(trial.method == method for trial in earlier):
        return {}
    return _suggested(_study(method, earlier, trials, seed).ask(), method)


def _study(method: str, earlier: Sequence[Trial], trials: int, seed: int) -> Any:
    """A study of one method that knows its `earlier` trials, those of other methods left out."""
    optuna = require("optuna", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    own = [trial for trial in earlier if trial.method == method]
    sampler = optuna.samplers.TPESampler(
        seed=seed + 1000 * len(own),  # else a resumed search would draw the same again
        n_startup_trials=max(4, trials // 3),
        multivariate=False,
        constant_liar=True,
    )
    study = optuna.create_study(sampler=sampler)
    for trial in own:
        if trial.settings and trial.loss is not None:
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(trial.settings),
                    distributions={name: _distribution(optuna, SPACE[method][name]) for name in trial.settings},
                    value=trial.loss,
                )
            )
    return study


def _suggested(asked: Any, method: str) -> dict[str, Any]:
    return {name: _suggest(asked, name, kind) for name, kind in SPACE[method].items()}


def _distribution(optuna: Any, kind: tuple[Any, ...]) -> Any:
    if kind[0] == "log":
        return optuna.distributions.FloatDistribution(kind[1], kind[2], log=True)
    return optuna.distributions.CategoricalDistribution(kind[1])


def _suggest(trial: Any, name: str, kind: tuple[Any, ...]) -> Any:
    if kind[0] == "log":
        return trial.suggest_float(name, kind[1], kind[2], log=True)
    return trial.suggest_categorical(name, kind[1])


def with_settings(config: Config, method: str, settings: Mapping[str, Any]) -> Config:
    """`config` with the settings as overrides of one method."""
    own = {name: dict(values) for name, values in config.methods.get(method, {}).items()}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        own.setdefault(section, {})[key] = value
    methods = {**config.methods, method: own} if own else config.methods
    return parse_config({**config.model_dump(exclude_unset=True), "methods": methods})


def _text(config: Config, method: str, settings: Mapping[str, Any]) -> str:
    return with_settings(config, method, settings).model_dump_json(exclude_unset=True)


def _try(
    method: str, settings: Mapping[str, Any], protocols: Sequence[str], arguments: tuple[str, str, str, str]
) -> Trial:
    losses, epochs = [], {}
    try:
        for protocol in protocols:
            answer = work(Job(protocol, method, 0), *arguments)
            losses.append(min(answer.curve.valid_metric or [float("inf")]))
            epochs[protocol] = answer.best
    except LimamlError as error:
        return Trial(method, settings, None, epochs, str(error))
    return Trial(method, settings, sum(losses) / len(losses), epochs)


def _best_config(config: Config, methods: Sequence[str], trials: Sequence[Trial]) -> Config:
    tuned = Tuned(config, tuple(trials))
    for method in methods:
        best = tuned.best(method)
        if best is not None:
            config = with_settings(config, method, best.settings)
    return config


def _fingerprints(table: Path, schema: Schema, config: Config, methods: Sequence[str]) -> dict[str, str]:
    """For each method a hash of all that its validation losses depend on beside the settings of a trial."""
    judged = config.compare.model_dump(mode="json", include={"protocols", "test_share", "validation_share"})
    shared: list[Any] = [content_digest(pl.read_parquet(table)), schema.model_dump(mode="json"), judged]
    shared.append(config.model_dump(mode="json", exclude={"compare"}))

    def digest(method: str) -> str:
        return hashlib.sha256(json.dumps([SPACE[method], *shared], sort_keys=True).encode()).hexdigest()[:16]

    return {method: digest(method) for method in methods}


def _read(record: Path, problems: Mapping[str, str]) -> list[Trial]:
    if not record.exists():
        return []
    found = []
    for line in record.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            of = values.pop("problem", None)
            trial = Trial(**values)
        except (json.JSONDecodeError, TypeError, AttributeError):
            continue  # the line that was being written when the search was killed
        if of != problems.get(trial.method, of):
            raise ConfigError(
                f"{record} holds trials on other rows, with other features or from another config, so their losses cannot "
                "be compared with those of this search. Use another folder, or remove that file."
            )
        if trial.method in METHODS:
            found.append(trial)
    return found


def _append(record: Path, trial: Trial, problem: str) -> None:
    """Add a line; one that a killed search left half written is ended first."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps({"problem": problem, **trial.__dict__}).encode() + b"\n")
