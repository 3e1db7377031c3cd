"""What is to be measured, in which order: a list of goals, each of which knows the units it still lacks.

Breadth first, so that a run that is cut short is still a page: every set with the main methods and seed 0, then their other
seeds; rivals, replay, ablations and implicit feedback with their first seed; then the further seeds of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from benchmarks.evidence.ablations import Variant, variants_of
from benchmarks.evidence.sets import Table
from benchmarks.evidence.units import Cache, Runnable, Unit, trial_unit, unit_of
from limaml.evaluate.methods import METHODS
from limaml.evaluate.tune import SPACE, Trial, propose

__all__ = ["MAIN", "PROTOCOLS", "Chosen", "Goal", "Judging", "Plan", "Scale", "goals_of", "rivals", "turn"]

MAIN = ("base", "wide_and_deep", "limaml_gradient", "limaml_newton")
PROTOCOLS = ("warm", "new_tasks")


@dataclass(frozen=True)
class Scale:
    """How much is spent: the same for every method. By default about 23 hours of processor time."""

    trials: int = 2  # settings tried per method and set, the defaults first
    seeds: int = 5
    ablation_seeds: int = 2
    ablation_sets: tuple[str, ...] = ("ml-100k", "amazon-hin")
    ablation_methods: tuple[str, ...] = ("limaml_newton", "limaml_gradient")
    implicit_seeds: int = 2
    replay_seeds: int = 2
    replicates: int = 2000
    sets: Mapping[str, int] = field(default_factory=dict)  # part → how many of its sets, the first ones; else all

    def of_part(self, tables: Sequence[Table], part: str) -> list[Table]:
        """Those of the tables that take part."""
        return [table for table in tables if part in table.which.parts][: self.sets.get(part)]


@dataclass(frozen=True)
class Chosen:
    """The settings of a method that validation rows liked best, and what it tried."""

    method: str
    settings: Mapping[str, Any]
    loss: float  # mean over the protocols
    losses: Mapping[str, float]  # protocol → validation loss
    epochs: Mapping[str, int]
    trials: tuple[Trial, ...]


def rivals() -> tuple[str, ...]:
    """Methods that are compared beside the main ones: all that can be tuned."""
    return tuple(m for m in METHODS if m not in MAIN and m in SPACE)


@lru_cache(maxsize=4096)
def _proposal(method: str, losses: tuple[float | None, ...], trials: int) -> tuple[tuple[str, Any], ...]:
    earlier: list[Trial] = []
    for place, loss in enumerate(losses):
        settings = dict(_proposal(method, losses[:place], trials))
        earlier.append(Trial(method, settings, loss, {}))
    return tuple(propose(method, earlier, trials).items())


def _tried(
    table: Table, method: str, settings: Mapping[str, Any], cache: Cache, protocols: Sequence[str]
) -> tuple[Trial, Mapping[str, float]] | list[Unit]:
    """A finished trial with its loss per protocol, or the units that are still to run for it."""
    units = [trial_unit(table, protocol, method, settings) for protocol in protocols]
    results = [cache.get(unit.key) for unit in units]
    missing = [unit for unit, result in zip(units, results, strict=True) if result is None]
    if missing:
        return missing
    found = [result for result in results if result is not None]
    errors = [result["error"] for result in found if "error" in result]
    if errors:
        return Trial(method, settings, None, {}, errors[0]), {}
    losses = {p: min(result["valid_loss"]) for p, result in zip(protocols, found, strict=True)}
    epochs = {p: result["epochs"] for p, result in zip(protocols, found, strict=True)}
    return Trial(method, settings, sum(losses.values()) / len(losses), epochs), losses


def search(
    table: Table, method: str, trials: int, cache: Cache, fixed: Mapping[str, Any] | None = None
) -> Chosen | list[Unit]:
    """What validation chose for a method out of `trials` settings, or the units to run next. With `fixed` settings these
    alone are tried: only the number of epochs is found. `Chosen.loss` is infinite where every trial failed."""
    tried: list[tuple[Trial, Mapping[str, float]]] = []
    for _ in range(trials if fixed is None and SPACE[method] else 1):
        so_far = tuple(trial.loss for trial, _ in tried)
        settings = dict(fixed) if fixed is not None else dict(_proposal(method, so_far, trials))
        found = _tried(table, method, settings, cache, PROTOCOLS)
        if isinstance(found, list):
            return found
        tried.append(found)
    done = tuple(trial for trial, _ in tried)
    good = [(trial, losses) for trial, losses in tried if trial.loss is not None]
    if not good:
        return Chosen(method, {}, float("inf"), {}, {}, done)
    best, losses = min(good, key=lambda one: one[0].loss or 0.0)
    assert best.loss is not None
    return Chosen(method, best.settings, best.loss, losses, best.epochs, done)


@dataclass
class Goal:
    """Something that needs units. `finished` is remembered, so that a goal is asked no more than it has to be.

    `part` and `first` say when its turn comes: every part's first seed before any part's further seeds, but for `main`.
    """

    part: str = field(default="main", kw_only=True)
    first: bool = field(default=True, kw_only=True)
    finished: bool = field(default=False, init=False)

    def units(self, cache: Cache) -> Sequence[Runnable]:
        """All units that can be named by now and have no result yet."""
        raise NotImplementedError

    def open_units(self, cache: Cache) -> list[Runnable]:
        if self.finished:
            return []
        found = [unit for unit in self.units(cache) if cache.get(unit.key) is None]
        self.finished = not found
        return found


@dataclass
class Judging(Goal):
    """A method on a set, searched and then tested with some seeds; or a variant of one, upon what was chosen for it."""

    table: Table
    method: str
    seeds: range
    trials: int
    variant: Variant | None = None

    def chosen(self, cache: Cache) -> Chosen | list[Unit]:
        """What validation chose; for a variant: its base's choice, changed, with epochs of its own."""
        found = search(self.table, self.method, self.trials, cache)
        if self.variant is None or isinstance(found, list):
            return found
        settings = {**found.settings, **self.variant.settings}
        table = self.table.with_item_tasks() if self.variant.item_tasks else self.table
        return search(table, self.method, 1, cache, fixed=settings)

    def tests(self, chosen: Chosen) -> list[Unit]:
        """The units that judge what was chosen."""
        table = self.table.with_item_tasks() if self.variant is not None and self.variant.item_tasks else self.table
        readings = () if self.variant is None else self.variant.readings
        return [
            unit_of(table, protocol, self.method, seed, chosen.settings, chosen.epochs[protocol], readings)
            for protocol in PROTOCOLS
            if protocol in chosen.epochs
            for seed in self.seeds
        ]

    def units(self, cache: Cache) -> list[Unit]:
        chosen = self.chosen(cache)
        return chosen if isinstance(chosen, list) else self.tests(chosen)


_ORDER = ("main", "rivals", "replay", "ablations", "implicit")


def turn(goal: Goal) -> tuple[bool, int, bool]:
    """What goals are sorted by."""
    return not goal.first and goal.part != "main", _ORDER.index(goal.part), not goal.first


@dataclass(frozen=True)
class Plan:
    """All goals of a run, in order."""

    goals: Sequence[Goal]

    def open_units(self, cache: Cache) -> Iterator[Runnable]:
        """Units that can be run now, the most wanted first; none twice."""
        seen: set[str] = set()
        for goal in self.goals:
            for unit in goal.open_units(cache):
                if unit.key not in seen:
                    seen.add(unit.key)
                    yield unit


def goals_of(
    tables: Sequence[Table], scale: Scale, parts: Sequence[str], methods: Sequence[str] | None = None
) -> list[Judging]:
    """The goals of the parts main, rivals and ablations. `methods` leaves all others out."""

    def wanted(names: Sequence[str]) -> list[str]:
        return [m for m in names if methods is None or m in methods]

    goals: list[Judging] = []
    for part, names in (("main", wanted(MAIN)), ("rivals", wanted(rivals()))):
        if part not in parts:
            continue
        mine = scale.of_part(tables, part)
        for seeds in (range(1), range(1, scale.seeds)):
            goals += [
                Judging(table, method, seeds, scale.trials, part=part, first=seeds.start == 0)
                for table in mine
                for method in names
                if len(seeds)
            ]
    if "ablations" in parts:
        mine = [t for t in scale.of_part(tables, "ablations") if t.which.name in scale.ablation_sets]
        goals += [
            Judging(table, variant.method, range(scale.ablation_seeds), scale.trials, variant, part="ablations")
            for table in mine
            for variant in variants_of(table)
            if variant.method in wanted(scale.ablation_methods)
        ]
    return goals
