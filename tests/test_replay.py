"""A replay lets nothing of the future in, goes on where it was killed, and shows what refreshing is worth where tastes turn."""

from __future__ import annotations

import json
from dataclasses import replace as replaced
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import limaml
from limaml.errors import ConfigError, DataError
from limaml.evaluate.compare import JobProgress
from limaml.evaluate.replay import replay, walk
from limaml.evaluate.replay_first import first_training, of_family, with_item_tasks
from limaml.evaluate.replay_past import Timeline, View
from limaml.evaluate.replay_periods import Periods, choose_periods, equal_parts
from limaml.evaluate.replay_policies import POLICIES, Personalised, Trained, make_policy
from limaml.interactions import Schema, index_interactions
from limaml.interactions.codecs import Scaling
from limaml.tasks import TaskRows

QUICK = ["model.embedding_dim=4", "model.hidden=[8]", "model.dim=4", "model.factors=4", "train.epochs=1"]
PLAIN = Schema.model_validate({"tasks": ["user_id"], "labels": ["click"], "time": "time", "row": "item_id"})


def made(tasks: int = 40) -> tuple[pl.DataFrame, Schema]:
    """Clicks of members that join all the time, of items that appear all the time, and features of both."""
    data = limaml.make_interactions(tasks=tasks, items=30, mean_rows=12, seed=1)
    frame = data.interactions.with_columns(pl.int_range(pl.len()).alias("place"))
    late = pl.col("user_id") >= 0.7 * tasks
    later = pl.col("item_id") >= 24
    frame = frame.filter((pl.col("place") > 0.6 * pl.len()) | ~(late | later)).drop("place")
    joined = limaml.join_tables(frame, {"user_id": data.users, "item_id": data.items})
    schema = limaml.infer_schema(
        joined.frame, task="user_id", row="item_id", time="timestamp", label="click",
        task_columns=joined.columns["user_id"], row_columns=joined.columns["item_id"],
    ).schema  # fmt: skip
    return joined.frame, schema


def clock(times: list[int], tasks: int = 2) -> limaml.types.Interactions:
    frame = pl.DataFrame({"time": sorted(times), "click": 0.0}).with_row_index("n")
    frame = frame.with_columns(user_id=pl.col("n") % tasks, item_id=pl.col("n"))
    return index_interactions(frame, PLAIN)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 40), min_size=6, max_size=60), st.integers(1, 6), st.integers(1, 12))
def test_periods_cover_all_rows_and_part_no_moment(times: list[int], parts: int, length: int) -> None:
    time = np.sort(np.array(times, dtype=np.int64))
    cut = int(np.searchsorted(time, time[len(time) // 2]))
    made_of = [equal_parts(time, cut, parts)]
    if 0 < cut < len(time):
        data = clock([0, *times])  # one begins before all
        made_of.append(choose_periods(data, "user_id", period=str(length), start=int(time[cut]) or 1).periods)
        time_of = [time, data.time.numpy()]
    else:
        time_of = [time]
    for found, moments in zip(made_of, time_of, strict=True):
        assert found[-1].last == len(moments)
        for a, b in zip(found[:-1], found[1:], strict=True):
            assert a.last == b.first
            assert moments[a.last - 1] < moments[b.first]
        for p in found:
            assert len(p) > 0
            assert (p.start, p.end) == (moments[p.first], moments[p.last - 1])


def test_a_natural_length_is_taken_where_it_fits() -> None:
    day = 86400
    start = 1_700_006_400  # midnight
    data = clock([start + hour * 3600 for hour in range(22 * 24)])
    found = choose_periods(data, "user_id")
    assert (found.length, len(found)) == ("1 day", 11)
    assert all(p.start % day == 0 for p in found.periods)
    assert found.shown(start) == "2023-11-15 00:00"
    uneven = clock([start + int(1.002**n) for n in range(8000)])  # all in the last days
    assert choose_periods(uneven, "user_id").length == "1/11 of the rows"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": "1d"}, "numbers of unknown unit"),
        ({"period": "soon"}, "cannot be read"),
        ({"period": "3", "periods": 3}, "not both"),
        ({"periods": 0}, "at least 1 period"),
        ({"periods": 400}, "too many share one time"),
        ({"start": 0}, "nothing would be left to train on"),
        ({"start": 900}, "nothing would be left to replay"),
        ({"train_share": 1.0}, "between 0 and 1"),
    ],
)
def test_periods_that_cannot_be_cut_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_periods(clock(list(range(100))), "user_id", **arguments)  # type: ignore[arg-type]


def test_a_table_without_a_common_clock_is_refused() -> None:
    frame = pl.DataFrame({"user_id": [u for u in range(9) for _ in range(4)], "time": [*range(4)] * 9})
    frame = frame.with_columns(click=pl.lit(1.0), item_id=pl.lit(1))
    with pytest.raises(
        DataError, match="9 of 9 tasks 'user_id' begin at the same time, 0: the time column counts within"
    ):
        choose_periods(index_interactions(frame, PLAIN), "user_id")
    with pytest.raises(DataError, match="no time column"):
        Timeline.of(frame, PLAIN.model_copy(update={"time": None}))


ROWS, STEP = 200, 40
"""Training rows, and rows of each of the two periods, in the tests of what a policy may know."""

LEARNING = (
    "wide_and_deep_finetuned",
    "wide_and_deep_retrained",
    "limaml_streamed",
    "limaml_retrained",
    "limaml_items_refreshed",
)
"""Every way of taking a period in; `limaml_refreshed` does what `limaml_streamed` does, seldom."""


def served(
    frame: pl.DataFrame, schema: Schema, policy: str, trained: Trained | None = None, method: str = "limaml_newton"
) -> tuple[Trained, Tensor]:
    """The first training, and what the policy serves for the rows of two periods."""
    family, then = POLICIES[policy]
    timeline = Timeline.of(frame, schema)
    timeline, config = of_family(timeline, limaml.load_config(None, QUICK), family, method, ROWS)
    trained = trained or first_training(timeline, config, family, ROWS, None)[0]
    walker = make_policy(timeline, config, family, then)
    walker.begin(ROWS, trained)
    time = timeline.plain.time.numpy()
    cut = (equal_parts(time[: ROWS + STEP], ROWS, 1)[0], equal_parts(time[: ROWS + 2 * STEP], ROWS + STEP, 1)[0])
    return trained, walk(walker, Periods(ROWS, cut, "40 rows", None), time, 2)[0]


@pytest.mark.parametrize(
    ("policy", "method"),
    [*((policy, "limaml_newton") for policy in LEARNING), ("limaml_items_refreshed", "limaml_gradient")],
)
def test_the_future_changes_no_prediction(policy: str, method: str) -> None:
    frame, schema = made()
    frame = frame.sort("timestamp").unique("timestamp", keep="first", maintain_order=True)
    seen = ROWS + 2 * STEP
    trained, whole = served(frame, schema, policy, method=method)
    future = frame[seen:].sample(fraction=0.6, seed=1).sort("timestamp")
    future = future.with_columns(
        click=1 - pl.col("click"),
        segment=pl.lit("another").cast(frame["segment"].dtype),
        item_id=pl.col("item_id") + 99,
    )
    again, other = served(pl.concat([frame[:seen], future]), schema, policy, method=method)
    assert again.epochs == trained.epochs
    torch.testing.assert_close(whole, other, rtol=0, atol=1e-6)
    # the labels of a period, or of its last half where it is streamed, change what is served after it and not in it
    late = ROWS + (STEP // 2 if "streamed" in policy else 0)
    inside = pl.int_range(pl.len()).is_between(late, ROWS + STEP - 1)
    turned = frame.with_columns(click=pl.when(inside).then(1 - pl.col("click")).otherwise(pl.col("click")))
    _, third = served(turned, schema, policy, trained, method)
    torch.testing.assert_close(whole[:STEP], third[:STEP], rtol=0, atol=1e-6)
    assert not torch.allclose(whole[STEP:], third[STEP:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["limaml_newton", "limaml_gradient"])
def test_newton_takes_new_rows_in_without_the_old_ones(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frame, schema = made()
    timeline, config = of_family(
        Timeline.of(frame, schema), limaml.load_config(None, QUICK), "limaml_items", method, ROWS
    )
    trained = first_training(timeline, config, "limaml_items", ROWS, None)[0]
    (period,) = equal_parts(timeline.plain.time.numpy()[: ROWS + STEP], ROWS, 1)
    before = View.before

    def turned(view: View, rows: int) -> limaml.types.Interactions:
        data = before(view, rows)
        old = (torch.arange(rows) < ROWS)[:, None] & (rows > ROWS)
        return replaced(data, labels=torch.where(old, 1 - data.labels, data.labels))

    found = []
    for past in (before, turned):
        monkeypatch.setattr(View, "before", past)
        policy = make_policy(timeline, config, "limaml_items", "refresh")
        assert isinstance(policy, Personalised)
        policy.begin(ROWS, trained)
        first = policy.tables
        policy.absorb(period)
        found.append(policy.tables)
    for task in ("user_id", "item_id"):
        assert torch.equal(found[0][task], found[1][task]) == (method == "limaml_newton")
        if method == "limaml_newton":  # all rows at once say about the same
            data = before(policy.view, period.last)
            whole = policy.module.embed(data, task, TaskRows.of(data.index[task], data.count(task)))
            moved = (whole[: len(first[task])] - first[task]).norm()
            assert moved > 0.01
            assert (found[0][task] - whole)[: len(first[task])].norm() < 0.2 * moved


def test_a_task_is_served_with_the_features_it_had() -> None:
    frame = pl.DataFrame(
        {
            "user_id": [1, 1, 2, 1, 3, 3],
            "time": range(6),
            "click": 1.0,
            "item_id": 1,
            "age": [None, 20.0, 30.0, 99.0, 40.0, 98.0],
        }
    )
    features = [{"name": "age", "kind": "numeric", "side": "user_id"}]
    schema = Schema.model_validate({**PLAIN.model_dump(), "features": features})
    view = Timeline.of(frame, schema).view(3)
    (scaling,) = view.encoder.codecs.values()

    def ages(data: limaml.types.Interactions) -> list[float]:
        assert isinstance(scaling, Scaling)
        return (data.sides["user_id"]["age"][:, 0].numpy() * scaling.deviation[0] + scaling.mean[0]).round(3).tolist()

    assert ages(view.before(3)) == [20.0, 30.0]
    assert ages(view.serving(3, 6)) == [20.0, 30.0, 40.0]  # not what the served rows say of a task that was there
    assert ages(view.before(6)) == pytest.approx([99.0, 30.0, 98.0], abs=100) and ages(view.before(6))[0] > 20
    assert view.serving(3, 6).labels[3:].isnan().all()
    assert view.serving(3, 6).labels[:3].isfinite().all()


def test_items_become_tasks_with_what_describes_them() -> None:
    frame, schema = made()
    second = with_item_tasks(frame, schema)
    assert [task.name for task in second.tasks] == ["user_id", "item_id"]
    assert {f.name: f.side for f in second.features if f.side == "item_id"}.keys() == {"item_id", "category", "quality"}
    assert with_item_tasks(frame, second) == second
    with pytest.raises(ConfigError, match="--row"):
        with_item_tasks(frame, schema.model_copy(update={"row": None}))


def test_refreshing_is_worth_something_where_tastes_turn_and_a_killed_replay_goes_on(tmp_path: Path) -> None:
    data = limaml.make_interactions(
        tasks=60, items=20, dim=2, mean_rows=60, spread=0.3, strength=5, predictable=0, task_bias=0, drift=1, seed=1
    )  # by the end a member's taste is another one than at the start
    frame, table = data.interactions, tmp_path / "table.parquet"
    schema = limaml.infer_schema(frame, task="user_id", row="item_id", time="timestamp", label="click").schema
    frame.write_parquet(table)
    config = limaml.load_config(None, [*QUICK, "train.epochs=6", "train.lr=0.02", "adapt.max_support=20"])
    arguments = {"dataset": "made", "periods": 4, "workers": 1, "folder": tmp_path / "kept"}
    policies = ("limaml_never", "limaml_refreshed")
    done: list[str | None] = []

    def tell(news: JobProgress) -> None:
        done.append(news.finished)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(table, schema, config, policies=policies, progress=tell, **arguments)  # type: ignore[arg-type]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.safetensors")}
    assert len(kept) == 2
    found = replay(table, schema, config, policies=policies, **arguments)  # type: ignore[arg-type]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())

    for better in (
        found.summary.delta("made", "replay", "limaml_refreshed", "limaml_never", "all", "log_loss"),
        found.summary.delta("made", "replay_known_tasks", "limaml_refreshed", "limaml_never", "all", "log_loss"),
    ):
        assert better is not None
        assert better.high < 0
    ages = [p for p in found.by_age if (p.protocol, p.metric) == ("replay_ages_known", "log_loss")]
    assert [p.at for p in ages] == [0, 1, 2]
    assert ages[0].delta == 0 < ages[2].delta
    assert found.seconds("limaml_never") == 0 < found.seconds("limaml_refreshed")
    content = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert content["cost_ratio"] == {"limaml_never": None, "limaml_refreshed": None}
    assert sum(period["rows"] for period in content["periods"]) == frame.height - content["train_rows"]
    assert {p["policy"] for p in content["by_period"]} == set(policies)


def test_a_half_life_that_was_found_is_served_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame, schema = made()
    table = tmp_path / "table.parquet"
    frame.write_parquet(table)
    policies = ("limaml_refreshed", "limaml_items_streamed")

    def losses(half_life: float | None) -> list[float]:
        def found(_model: object, _data: object, task: str, *_: object) -> float | None:
            return half_life if task == "user_id" else None

        monkeypatch.setattr("limaml.meta.learn.find_half_life", found)
        folder = tmp_path / f"kept-{half_life}"
        done = replay(
            table,
            schema,
            limaml.load_config(None, QUICK),
            policies=policies,
            dataset="made",
            periods=3,
            workers=1,
            folder=folder,
        )
        of = [done.summary.interval("made", "replay", policy, "all", "log_loss") for policy in policies]
        return [interval.value for interval in of if interval is not None]

    alike, aged = losses(None), losses(0.5)
    assert len(alike) == len(aged) == 2
    assert all(one != other for one, other in zip(alike, aged, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policies": ["limaml_refresh"]}, "no policy 'limaml_refresh'; did you mean 'limaml_refreshed'"),
        ({"policies": []}, "at least one policy"),
        ({"method": "maml"}, "limaml_newton or limaml_gradient, not 'maml'"),
        ({"seeds": 0}, "at least 1 seed"),
        ({"policies": ["limaml_items_refreshed"]}, "--row"),
    ],
)
def test_what_cannot_be_replayed_is_refused(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    frame, schema = made()
    frame.write_parquet(tmp_path / "table.parquet")
    if "row" in message:
        schema = schema.model_copy(update={"row": None})
    with pytest.raises(ConfigError, match=message):
        replay(tmp_path / "table.parquet", schema, dataset="made", **arguments)  # type: ignore[arg-type]
