"""`limaml plan`: what it takes, before it is built."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from limaml.cli.console import amount, console, heading, say
from limaml.cli.durations import seconds_of
from limaml.errors import ConfigError
from limaml.evaluate.calibrate import calibrate
from limaml.evaluate.plan import Demand, Item, Prices, UnitCosts, plan

__all__ = ["plan_command"]


def plan_command(
    *,
    members: Annotated[float | None, Parameter(help="Tasks to personalise for, such as 1e9.")] = None,
    interactions_per_day: Annotated[float | None, Parameter(help="All members' together, such as 5e9.")] = None,
    dim: Annotated[int, Parameter(help="Size of the meta embedding.")] = 16,
    dtype: Annotated[Literal["float32", "float16", "int8"], Parameter(help="How vectors are stored.")] = "float32",
    store: Annotated[Literal["lmdb", "redis"], Parameter(help="Where embeddings are served from.")] = "lmdb",
    copies: Annotated[int, Parameter(help="Of the store: primary and replicas, or one a server.")] = 1,
    versions: Annotated[int, Parameter(help="Versions that the store holds at once.")] = 2,
    history_days: Annotated[float, Parameter(help="Days that the log keeps.")] = 90.0,
    max_support: Annotated[int, Parameter(help="Most recent interactions a member is adapted on.")] = 512,
    spread: Annotated[
        float, Parameter(help="How unequal members are: standard deviation of log(interactions a day).")
    ] = 1.1,
    refresh: Annotated[str, Parameter(help="How often embeddings are refreshed, such as 15m.")] = "15m",
    full_every: Annotated[str, Parameter(help="How often a new model regenerates all, such as 7d.")] = "7d",
    full_within: Annotated[str, Parameter(help="How long that may take.")] = "4h",
    requests_per_second: Annotated[float, Parameter(help="Online requests; 0: serving is left out.")] = 0.0,
    candidates: Annotated[int, Parameter(help="Rows of a request.")] = 100,
    machine_cores: Annotated[int, Parameter(help="Cores of a machine.")] = 16,
    machine_gib: Annotated[float, Parameter(help="Memory of a machine.")] = 64.0,
    busy: Annotated[float, Parameter(help="Share of a core that is planned with; the rest is for peaks.")] = 0.6,
    core_hour: Annotated[float, Parameter(help="Price of a core-hour.")] = Prices.core_hour,
    memory_gib_month: Annotated[float, Parameter(help="Price of a GiB of memory a month.")] = Prices.memory_gib_month,
    disk_gib_month: Annotated[float, Parameter(help="Price of a GiB of disk a month.")] = Prices.disk_gib_month,
    network_gib: Annotated[float, Parameter(help="Price of a GiB over the network.")] = Prices.network_gib,
    costs: Annotated[Path, Parameter(help="File of unit costs.")] = Path("limaml-costs.json"),
    calibrate_here: Annotated[
        bool,
        Parameter(
            name="--calibrate", negative="", help="Measure the unit costs on this machine first: one to two minutes."
        ),
    ] = False,
    solver: Annotated[
        Literal["newton", "gradient"], Parameter(help="Whose adaptation --calibrate measures.")
    ] = "newton",
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print the plan as JSON.")] = False,
) -> None:
    """Plan machines, core-hours, bytes, network and money.

    Unit costs of one core are measured once, on a machine of the kind you will use; the rest is arithmetic, printed with its
    numbers (docs/plan.md writes the model down).

    `limaml plan --calibrate` measures; then
    `limaml plan --members 1e9 --interactions-per-day 5e9 --dim 64 --refresh 15m --store redis --copies 2`
    """
    if calibrate_here:
        heading("Measuring unit costs of one core")
        dims = sorted({16, 32, 64, 128, dim})
        found = calibrate(dims, solver=solver, progress=lambda what: say([f"{what} …"]))
        costs.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
        say([f"{costs} holds them."])
        if members is None and interactions_per_day is None:
            _show_costs(found)
            return
    if members is None or interactions_per_day is None:
        raise ConfigError("Say how many: limaml plan --members 1e6 --interactions-per-day 5e6.")
    known = _read(costs)
    values = dict(locals())
    asked = {field.name: values[field.name] for field in fields(Demand)}
    asked |= {
        name: seconds_of(values[name], "--" + name.replace("_", "-"))
        for name in ("refresh", "full_every", "full_within")
    }
    prices = Prices(core_hour, memory_gib_month, disk_gib_month, network_gib)
    planned = plan(Demand(**asked), known, prices)
    if as_json:
        console.print_json(json.dumps({"costs": known.model_dump(mode="json"), "plan": planned.as_json()}))
        return
    heading(f"{members:,.0f} members, {interactions_per_day:,.0f} interactions a day, refreshed every {refresh}")
    say([f"Unit costs of {known.machine}, one core, {known.date}, solver {known.solver}."])
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("from")
    for item in planned.items:
        table.add_row(item.name, _shown(item), _unit(item), escape(item.how))
    console.print(table)


def _shown(item: Item) -> str:
    if item.unit.startswith("bytes"):
        return amount(item.value)
    return f"{item.value:,.0f}" if item.value >= 100 or item.value == int(item.value) else f"{item.value:,.3g}"


def _unit(item: Item) -> str:
    return item.unit.removeprefix("bytes").strip()


def _read(path: Path) -> UnitCosts:
    if not path.exists():
        raise ConfigError(
            f"There are no unit costs in {path}. Measure them on a machine of the kind you will use: limaml plan --calibrate "
            f"--costs {path}"
        )
    try:
        return UnitCosts.model_validate_json(path.read_text(encoding="utf-8"))
    except (pydantic.ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is no file of unit costs ({str(error).splitlines()[0]}). Write it again: limaml plan --calibrate --costs {path}"
        ) from error


def _show_costs(found: UnitCosts) -> None:
    say(
        [
            f"Into the log {found.ingest_rows:,.0f} rows/s, {found.log_bytes:.1f} bytes each; out of it, joined and encoded, "
            f"{found.read_rows:,.0f} rows/s.",
            *(
                f"Adapting a task of {one.dim} numbers: {one.per_task * 1e6:,.1f} µs and {one.per_row * 1e6:,.2f} µs a row."
                for one in found.adapt
            ),
            f"Published {found.put_tasks:,.0f} embeddings/s; a refresh {found.refresh_run * 1e3:,.0f} ms and, beside adapting, "
            f"{found.refresh_task * 1e6:,.0f} µs a task; a request of {found.request_rows} rows {found.request * 1e6:,.0f} µs.",
        ]
    )
    console.print("\nNext: limaml plan --members 1e6 --interactions-per-day 5e6", markup=False, highlight=False)
