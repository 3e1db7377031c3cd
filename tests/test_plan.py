"""The plan: its expectations against draws, its arithmetic by hand, and unit costs that this machine measures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limaml.cli.durations import seconds_of
from limaml.cli.main import main
from limaml.errors import ConfigError
from limaml.evaluate.calibrate import calibrate
from limaml.evaluate.plan import AdaptCost, Demand, Prices, UnitCosts, plan, support_of, touched

COSTS = UnitCosts(
    machine="made up",
    cores=2,
    date="2026-01-01",
    solver="newton",
    adapt=(AdaptCost(dim=16, per_task=1e-4, per_row=1e-6), AdaptCost(dim=64, per_task=4e-4, per_row=4e-6)),
    ingest_rows=1e6,
    read_rows=5e5,
    log_bytes=10.0,
    put_tasks=1e5,
    refresh_run=0.5,
    refresh_task=5e-5,
    request=1e-3,
    request_rows=100,
)
EVEN = Demand(1000, 10_000, spread=0.0, history_days=10.0, max_support=50, refresh=86_400.0)


def test_expectations_agree_with_draws() -> None:
    rng = np.random.default_rng(0)
    mean, spread = 3.0, 1.1
    rate = mean * np.exp(spread * rng.normal(size=400_000) - spread**2 / 2)
    rows = rng.poisson(rate)
    assert touched(400_000, 400_000 * mean, spread) == pytest.approx((rows > 0).sum(), rel=0.01)
    assert support_of(mean, spread, 5) == pytest.approx(np.minimum(rate, 5).mean(), rel=0.01)
    by_events = (rate * np.minimum(rate, 5)).sum() / rate.sum()
    assert support_of(mean, spread, 5, by_events=True) == pytest.approx(by_events, rel=0.01)


@given(st.floats(1, 1e9), st.floats(0.001, 1e10), st.floats(0, 2))
def test_no_more_members_are_touched_than_there_are_or_than_acted(members: float, events: float, spread: float) -> None:
    found = touched(members, events, spread)
    assert 0 < found <= min(members, events) * (1 + 1e-9)
    assert touched(members, 2 * events, spread) >= found


def test_the_arithmetic_by_hand() -> None:
    """100 rows a member, of which the newest 50 are adapted on; each is touched with probability 1 − e⁻¹⁰ a day."""
    found = plan(EVEN, COSTS, Prices(1.0, 0.0, 0.0, 0.0))
    each = 1e-4 + 50 * 1e-6
    assert found["rows kept"] == 100_000
    assert found["support of a member"] == pytest.approx(50)
    assert found["full generation"] * 3600 == pytest.approx(100_000 / 5e5 + 1000 * each + 1000 / 1e5)
    acted = 1000 * (1 - math.exp(-10))
    assert found["touched members"] == pytest.approx(acted)
    assert found["refresh"] * 3600 == pytest.approx(0.5 + acted * (each + 50 / 5e5 + 5e-5))
    assert found["log"] == 1_000_000
    assert found["money"] == pytest.approx(found["core-hours"])
    assert found["core-hours"] == pytest.approx(
        30 * (found["ingest"] + found["refresh"] + found["full generation"] / 7)
    )


@given(st.integers(1, 512), st.floats(0, 1000))
def test_costs_between_measured_sizes(dim: int, rows: float) -> None:
    found = COSTS.adapt_seconds(dim, rows)
    assert found > 0
    assert COSTS.adapt_seconds(dim + 1, rows) >= found
    assert COSTS.adapt_seconds(16, rows) == pytest.approx(1e-4 + rows * 1e-6)
    assert COSTS.adapt_seconds(64, rows) == pytest.approx(4e-4 + rows * 4e-6)
    assert COSTS.adapt_seconds(32, rows) == pytest.approx(2e-4 + rows * 2e-6)


def test_what_grows_with_what() -> None:
    costs = COSTS.model_copy(update={"refresh_run": 0.0})  # the one thing that does not grow
    base = plan(replace(EVEN, requests_per_second=10.0), costs)
    twice = plan(replace(EVEN, members=2000, interactions_per_day=20_000, requests_per_second=20.0), costs)
    for name in ("ingest", "full generation", "refresh", "store", "log", "serving", "network", "core-hours"):
        assert twice[name] == pytest.approx(2 * base[name]), name
    small = plan(replace(EVEN, dtype="int8", store="redis"), COSTS)
    assert small["store"] < plan(replace(EVEN, store="redis"), COSTS)["store"]
    assert small["machines, store"] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"members": 0}, "--members is 0"),
        ({"refresh": math.inf}, "--refresh is inf"),
        ({"dtype": "float64"}, "--dtype is 'float64'"),
        ({"store": "disk"}, "--store is 'disk'"),
        ({"busy": 1.5}, "--busy is 1.5"),
        ({"requests_per_second": -1}, "--requests-per-second is -1"),
    ],
)
def test_a_demand_that_cannot_be(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(replace(EVEN, **change), COSTS)  # type: ignore[arg-type]


def test_times() -> None:
    assert [seconds_of(text, "--refresh") for text in ("15m", "1.5 h", "30s", "7d", "2w")] == [
        900,
        5400,
        30,
        604_800,
        1_209_600,
    ]
    with pytest.raises(ConfigError, match="--refresh is '15'; write a number and s, m, h, d or w"):
        seconds_of("15", "--refresh")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "costs.json"
    path.write_text(COSTS.model_dump_json())
    asked = ["plan", "--members", "1e6", "--interactions-per-day", "5e6", "--costs", str(path)]
    main(asked)
    told = capsys.readouterr().out
    assert "1,000,000 members" in told
    assert "E[min(rows, 512)], 450.0 rows on average" in told
    main([*asked, "--json", "--dim", "64"])
    assert json.loads(capsys.readouterr().out)["plan"][0]["name"] == "rows kept"


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "There are no unit costs in"), ("{}", "is no file of unit costs"), ("", "is no file of unit costs")],
)
def test_no_unit_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str) -> None:
    path = tmp_path / "costs.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit):
        main(["plan", "--members", "1e6", "--interactions-per-day", "5e6", "--costs", str(path)])
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_a_machine_measures_its_costs() -> None:
    told: list[str] = []
    found = calibrate((4,), repetitions=1, tasks=32, progress=told.append)
    assert UnitCosts.model_validate_json(found.model_dump_json()) == found
    assert [one.dim for one in found.adapt] == [4]
    assert told == ["the log", "adaptation, 4 numbers", "the store", "a refresh", "a request"]
    assert found.request_rows == 100
