"""What personalising so many members takes: core-hours, machines, bytes, network and money, from unit costs of one core.

The model is arithmetic, and all of it is here; `docs/plan.md` writes it down. Unit costs come from `calibrate.py`, which
measures them on a machine; prices are the caller's. A member's interactions a day are drawn from a log-normal distribution, as
real ones are: a few members act all the time, most seldom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from limaml.errors import ConfigError
from limaml.store.packing import value_size
from limaml.store.redis_values import estimate_bytes

__all__ = ["Demand", "Item", "Planned", "Prices", "UnitCosts", "plan", "support_of", "touched"]

DAY = 86_400.0
GIB = 2**30
MESSAGE_BYTES = 120
"""Of a request or an answer on the wire beside what it carries: frame, key, length."""


class AdaptCost(BaseModel):
    """Seconds of one core to adapt a task of `dim` numbers: `per_task + per_row · rows of its support`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    dim: int = Field(ge=1)
    per_task: float = Field(ge=0)
    per_row: float = Field(gt=0)


class UnitCosts(BaseModel):
    """What one core of a machine takes, as `calibrate` measured it. The file that `limaml plan --calibrate` writes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    machine: str
    cores: int = Field(ge=1)
    date: str
    solver: str
    adapt: tuple[AdaptCost, ...] = Field(min_length=1)
    ingest_rows: float = Field(gt=0, description="Rows a second that enter the log.")
    read_rows: float = Field(
        gt=0, description="Rows a second that are read from a bucket, joined with features and encoded."
    )
    log_bytes: float = Field(gt=0, description="Bytes on disk of a row of the log.")
    put_tasks: float = Field(gt=0, description="Tasks a second that are written to a shard and published.")
    refresh_run: float = Field(ge=0, description="Seconds of a refresh, however many tasks changed.")
    refresh_task: float = Field(ge=0, description="Seconds of a changed task, beside adapting it and reading its rows.")
    request: float = Field(gt=0, description="Seconds to look one member up and score the rows of a request.")
    request_rows: int = Field(ge=1)

    def adapt_seconds(self, dim: int, rows: float) -> float:
        """Of one core, for a task with so many support rows. Between measured sizes the logarithm of each cost is a straight
        line in that of `dim`; beyond them, the last line goes on."""
        known = sorted(self.adapt, key=lambda one: one.dim)
        return _between(known, "per_task", dim) + rows * _between(known, "per_row", dim)

    def refresh_seconds(self, dim: int, rows: float) -> float:
        """Of one core, for a changed task with so many support rows: read, adapted and upserted."""
        return self.refresh_task + rows / self.read_rows + self.adapt_seconds(dim, rows)


def _between(known: Sequence[AdaptCost], name: str, dim: int) -> float:
    values: list[float] = [max(getattr(one, name), 1e-12) for one in known]
    if len(known) == 1:
        return values[0]
    right = next((i for i, one in enumerate(known) if one.dim >= dim), len(known) - 1)
    right = max(1, right)
    a, b = known[right - 1], known[right]
    share = math.log(dim / a.dim) / math.log(b.dim / a.dim)
    return float(values[right - 1] ** (1 - share) * values[right] ** share)


@dataclass(frozen=True)
class Demand:
    """What is asked for. Times are in seconds."""

    members: float
    interactions_per_day: float
    dim: int = 16
    dtype: str = "float32"
    store: str = "lmdb"  # or "redis"
    copies: int = 1  # of the store: replicas, and the primary
    versions: int = 2  # that the store holds at once: the one that is served and the one before it or after it
    history_days: float = 90.0  # that the log keeps
    max_support: int | None = 512
    spread: float = 1.1  # standard deviation of the logarithm of a member's interactions a day
    refresh: float = 900.0
    full_every: float = 7 * DAY  # a new model, and all members again
    full_within: float = 4 * 3600.0
    requests_per_second: float = 0.0
    candidates: int = 100
    machine_cores: int = 16
    machine_gib: float = 64.0
    busy: float = 0.6  # share of a core that is planned with: the rest is for peaks


@dataclass(frozen=True)
class Prices:
    """In one currency, whichever. The defaults are round numbers near public list prices; set your own."""

    core_hour: float = 0.04
    memory_gib_month: float = 3.0
    disk_gib_month: float = 0.1
    network_gib: float = 0.01


@dataclass(frozen=True)
class Item:
    """One line of a plan. `how` is the arithmetic, with its numbers."""

    name: str
    value: float
    unit: str
    how: str


@dataclass(frozen=True)
class Planned:
    items: tuple[Item, ...]

    def __getitem__(self, name: str) -> float:
        return next(item.value for item in self.items if item.name == name)

    def as_json(self) -> list[dict[str, object]]:
        return [vars(item) for item in self.items]


def _log_normal(mean: float, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a log-normal distribution of that mean: sums over them are expectations."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    return mean * np.exp(spread * nodes - spread**2 / 2), weights / weights.sum()


def touched(members: float, interactions: float, spread: float) -> float:
    """Distinct members that `interactions` events are expected to be of: `members · E[1 − exp(−rate)]`."""
    rate, weight = _log_normal(interactions / members, spread)
    return float(members * (weight * -np.expm1(-rate)).sum())


def support_of(rows_per_member: float, spread: float, cap: int | None, *, by_events: bool = False) -> float:
    """Expected support rows of a member: `E[min(rows, cap)]`; with `by_events` of one who has just acted, who is the more likely
    the more a member acts."""
    rows, weight = _log_normal(rows_per_member, spread)
    if by_events:
        weight = weight * rows / (weight * rows).sum()
    return float((weight * np.minimum(rows, np.inf if cap is None else cap)).sum())


def plan(demand: Demand, costs: UnitCosts, prices: Prices = Prices()) -> Planned:
    """Every quantity with its arithmetic. Raises `ConfigError` for a demand that cannot be."""
    _check(demand)
    found: list[Item] = []

    def add(name: str, value: float, unit: str, how: str) -> float:
        found.append(Item(name, value, unit, how))
        return value

    d, members = demand, demand.members
    rows_kept = d.interactions_per_day * d.history_days
    mean_rows = rows_kept / members
    support = support_of(mean_rows, d.spread, d.max_support)
    acting_support = support_of(mean_rows, d.spread, d.max_support, by_events=True)
    add("rows kept", rows_kept, "rows", f"{d.interactions_per_day:,.0f} a day · {d.history_days:g} days")
    add(
        "support of a member",
        support,
        "rows",
        f"E[min(rows, {d.max_support or 'all'})], {mean_rows:,.1f} rows on average",
    )

    ingest = add(
        "ingest",
        d.interactions_per_day / costs.ingest_rows / 3600,
        "core-hours a day",
        f"{d.interactions_per_day:,.0f} rows ÷ {costs.ingest_rows:,.0f} rows/s",
    )
    each = costs.adapt_seconds(d.dim, support)
    seconds = rows_kept / costs.read_rows + members * each + members / costs.put_tasks
    full = add(
        "full generation",
        seconds / 3600,
        "core-hours each",
        f"read {rows_kept / costs.read_rows / 3600:,.1f} + adapt {members:,.0f} · {each * 1e6:,.0f} µs = "
        f"{members * each / 3600:,.1f} + publish {members / costs.put_tasks / 3600:,.1f}",
    )
    add(
        "machines, full generation",
        math.ceil(full * 3600 / d.full_within / d.busy / d.machine_cores),
        f"of {d.machine_cores} cores",
        f"{full:,.1f} core-hours within {d.full_within / 3600:g} h at {d.busy:.0%}",
    )
    per_period = d.interactions_per_day * d.refresh / DAY
    acted = add(
        "touched members",
        touched(members, per_period, d.spread),
        "a refresh",
        f"of {per_period:,.0f} interactions in {d.refresh:,.0f} s",
    )
    again = costs.refresh_seconds(d.dim, acting_support)
    refresh = add(
        "refresh",
        (costs.refresh_run + acted * again) / 3600 * DAY / d.refresh,
        "core-hours a day",
        f"{DAY / d.refresh:,.0f} times {costs.refresh_run:,.2f} s + {acted:,.0f} · {again * 1e6:,.0f} µs "
        f"({acting_support:,.0f} rows each)",
    )
    add(
        "machines, refresh",
        math.ceil((refresh + ingest) / 24 / d.busy / d.machine_cores),
        f"of {d.machine_cores} cores",
        f"{refresh + ingest:,.1f} core-hours a day at {d.busy:.0%}",
    )

    value = value_size(d.dim, d.dtype)
    keys = members * d.versions
    if d.store == "lmdb":
        held = keys * (8 + 8 + 2 + value + 16)
    else:
        held = estimate_bytes(int(keys), 17, value, 16 * max(1, int(members / 1e6)))
    store = add(
        "store",
        held * d.copies,
        "bytes",
        f"{members:,.0f} · {d.versions} versions · {held / keys:,.0f} bytes · {d.copies} copies",
    )
    log = add("log", rows_kept * costs.log_bytes, "bytes", f"{rows_kept:,.0f} rows · {costs.log_bytes:,.1f} bytes")
    usable = d.machine_gib * GIB * 0.7
    if d.store == "redis":
        add("machines, store", math.ceil(store / usable), f"of {d.machine_gib:g} GiB", "70 % of memory for values")
    serving = 0.0
    if d.requests_per_second:
        one = costs.request * d.candidates / costs.request_rows
        serving = add(
            "serving",
            d.requests_per_second * one / d.busy,
            "cores",
            f"{d.requests_per_second:,.0f} requests/s · {one * 1e6:,.0f} µs for {d.candidates} rows, at {d.busy:.0%}",
        )
        add("machines, serving", math.ceil(serving / d.machine_cores), f"of {d.machine_cores} cores", "")
    wire = value + MESSAGE_BYTES
    network = add(
        "network",
        wire * d.copies * (members * DAY / d.full_every + acted * DAY / d.refresh) + d.requests_per_second * DAY * wire,
        "bytes a day",
        f"{wire} bytes for each embedding that is published, refreshed, or looked up",
    )

    hours = (ingest + refresh + full * DAY / d.full_every + serving * 24) * 30
    add("core-hours", hours, "a month", "ingest, refresh, generation and serving, 30 days")
    memory = store / GIB if d.store == "redis" else 0.0
    disk = log / GIB + (store / GIB if d.store == "lmdb" else 0.0)
    cost = hours * prices.core_hour + memory * prices.memory_gib_month + disk * prices.disk_gib_month
    cost += network * 30 / GIB * prices.network_gib
    add(
        "money",
        cost,
        "a month",
        f"core-hour {prices.core_hour:g}, GiB-month of memory {prices.memory_gib_month:g}, of disk {prices.disk_gib_month:g}, "
        f"GiB of network {prices.network_gib:g}",
    )
    return Planned(tuple(found))


_POSITIVE: Mapping[str, str] = {
    "members": "--members",
    "interactions_per_day": "--interactions-per-day",
    "dim": "--dim",
    "refresh": "--refresh",
    "full_every": "--full-every",
    "full_within": "--full-within",
    "history_days": "--history-days",
    "machine_cores": "--machine-cores",
    "machine_gib": "--machine-gib",
    "copies": "--copies",
    "versions": "--versions",
    "candidates": "--candidates",
}


def _check(demand: Demand) -> None:
    for name, option in _POSITIVE.items():
        value = getattr(demand, name)
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{option} is {value:g}; it must be a number above 0.")
    if demand.dtype not in ("float32", "float16", "int8"):
        raise ConfigError(f"--dtype is {demand.dtype!r}; there are float32, float16 and int8.")
    if demand.store not in ("lmdb", "redis"):
        raise ConfigError(f"--store is {demand.store!r}; there are lmdb and redis.")
    if demand.requests_per_second < 0:
        raise ConfigError(f"--requests-per-second is {demand.requests_per_second:g}; it must be 0 or more.")
    if not 0 < demand.busy <= 1:
        raise ConfigError(f"--busy is {demand.busy:g}; it must be above 0 and at most 1.")
