"""Sampled negatives: what may be drawn, how often, and the offset that makes up for it."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limaml.errors import ConfigError, DataError
from limaml.interactions.negatives import NegativeSample, sample_negatives
from limaml.interactions.past import past_of

Event = tuple[int, int, int]  # task, item, time


def table(events: list[Event]) -> pl.DataFrame:
    return pl.DataFrame(events, schema={"user": pl.Int64, "item": pl.Int64, "time": pl.Int64}, orient="row")


class Oracle:
    """The docstring of `sample_negatives`, read literally, one positive at a time."""

    def __init__(self, events: list[Event], timed: bool, exclude_seen: bool) -> None:
        self.events = events if timed else [(u, i, 0) for u, i, _ in events]
        self.timed, self.exclude_seen = timed, exclude_seen

    def known(self, t: int) -> set[int]:
        return {i for _, i, when in self.events if when <= t}

    def eligible(self, u: int, t: int) -> set[int]:
        seen = {i for v, i, when in self.events if v == u and (when <= t if self.exclude_seen else when == t)}
        return self.known(t) - seen

    def q(self, event: Event, j: int, popularity: float) -> float:
        _, i, t = event
        earlier = [item for _, item, when in self.events if when < t or not self.timed]
        if not self.timed:
            earlier.remove(i)  # its own
        n = len(self.known(t))
        return (1 - popularity) / n + popularity * (1 + earlier.count(j)) / (n + len(earlier))

    def expected_copies(self, event: Event, j: int, popularity: float, asked: int) -> float:
        rows = self.eligible(event[0], event[2])
        share = self.q(event, j, popularity) / sum(self.q(event, e, popularity) for e in rows)
        return min(asked, len(rows)) * share


events_of = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 5)), min_size=1, max_size=25)


@settings(max_examples=80)
@given(
    events=events_of,
    asked=st.integers(1, 5),
    popularity=st.sampled_from([0.0, 0.3, 1.0]),
    exclude_seen=st.booleans(),
    timed=st.booleans(),
    seed=st.integers(0, 5),
)
def test_the_sample_is_what_the_docstring_says(
    events: list[Event], asked: int, popularity: float, exclude_seen: bool, timed: bool, seed: int
) -> None:
    def draw(rows: list[Event]) -> NegativeSample:
        return sample_negatives(
            table(rows),
            task="user",
            row="item",
            time="time" if timed else None,
            per_positive=asked,
            popularity=popularity,
            seed=seed,
            exclude_seen=exclude_seen,
            row_columns=[],
        )

    sample = draw(events)
    assert draw(events[::-1]).frame.equals(sample.frame)

    oracle = Oracle(events, timed, exclude_seen)
    rows = sample.frame.rows()
    groups: list[list[tuple[int, ...]]] = []
    for line in rows:
        if line[3] == 1:
            groups.append([])
        groups[-1].append(line)
    assert sorted(group[0][:3] for group in groups) == sorted(events)
    missing = bare = short = 0
    for (u, i, t, _, offset), *negatives in groups:
        event = (u, i, t if timed else 0)
        rows_to_draw = oracle.eligible(u, event[2])
        assert len(negatives) == min(asked, len(rows_to_draw))
        missing += asked - len(negatives)
        short += len(negatives) < asked
        bare += not negatives
        items = [line[1] for line in negatives]
        assert set(items) <= rows_to_draw
        if popularity == 0:
            assert len(set(items)) == len(items)
        assert all(line[0] == u and line[2] == t for line in negatives)
        if not rows_to_draw:
            assert offset == 0.0
            continue
        for j, found in [(i, offset), *((line[1], line[4]) for line in negatives)]:
            assert np.isclose(found, -np.log(oracle.expected_copies(event, j, popularity, asked)))
    assert (missing, short, bare) == tuple(sample.counts[k] for k in ("missing", "short", "bare"))
    later = sum(
        any(v == u and j == item and when > t for v, item, when in oracle.events)
        for (u, _, t, *_), *negatives in groups
        for _, j, *_ in negatives
    )
    assert sample.counts["chosen_later"] == (later if timed else 0)


@pytest.mark.parametrize("popularity", [0.0, 0.5, 1.0])
def test_every_row_is_drawn_as_often_as_its_offset_says(popularity: float) -> None:
    generator = np.random.default_rng(1)
    past_items = [*range(12), *np.minimum(generator.geometric(0.25, 300) - 1, 11)]
    history = [(10**6 + n, int(item), n) for n, item in enumerate(past_items)]
    moment = [(u, int(generator.integers(0, 12)), 1000) for u in range(3000)]
    sample = sample_negatives(
        table(history + moment), task="user", row="item", time="time", per_positive=3, popularity=popularity
    ).frame
    drawn = sample.filter(pl.col("label") == 0, pl.col("time") == 1000)["item"]
    oracle = Oracle([*history, (-1, 0, 1000)], True, True)
    known = sorted(oracle.known(1000))
    q = {j: oracle.q((-1, 0, 1000), j, popularity) for j in known}
    for j in known:
        copies = sum(3 * q[j] / (1 - q[i]) for _, i, _ in moment if i != j)
        assert abs((drawn == j).sum() - copies) < 5 * np.sqrt(copies)


@pytest.mark.parametrize("popularity", [0.0, 0.6, 1.0])
def test_the_offset_recovers_the_log_odds_of_the_population(popularity: float) -> None:
    """Each task chooses one of J rows with known probabilities p; in the population every task is exposed to every
    row once, so the true log-odds of row j are log p_j / (1 − p_j). A model with one logit per row is fitted."""
    generator = np.random.default_rng(2)
    p = generator.dirichlet(np.full(25, 0.8)) * 0.9 + 0.1 / 25
    choices = generator.choice(25, 30_000, p=p)
    burn_in = [(10**6 + j, j, 0) for j in range(25)]  # every row is known from the start
    events = burn_in + [(u, int(j), 1 + u) for u, j in enumerate(choices)]
    sample = sample_negatives(
        table(events), task="user", row="item", time="time", per_positive=4, popularity=popularity, seed=3
    ).frame.filter(pl.col("user") < 10**6)
    y, offset, item = (sample[c].to_numpy() for c in ("label", "offset", "item"))

    def fit(offset: np.ndarray) -> np.ndarray:
        logit = np.zeros(25)
        for _ in range(40):
            predicted = 1 / (1 + np.exp(-(logit[item] + offset)))
            slope = np.bincount(item, predicted * (1 - predicted), 25)
            logit += np.clip(np.bincount(item, y - predicted, 25) / slope, -2, 2)
        return logit

    truth = np.log(p / (1 - p))
    positives, negatives = np.bincount(item[y == 1], minlength=25), np.bincount(item[y == 0], minlength=25)
    error = (fit(offset) - truth) / np.sqrt(1 / positives + 1 / negatives)
    assert np.abs(error).max() < 4.0
    assert np.sqrt((error**2).mean()) < 1.4
    uncorrected = fit(np.zeros_like(offset)) - truth
    assert uncorrected.mean() > 1.0  # the test can tell: without the offset positives look too frequent


def test_a_shared_coefficient_is_that_of_the_full_population() -> None:
    """With seen rows left out and several choices per task: the sample's fit equals the fit to all exposures."""
    generator = np.random.default_rng(4)
    x = generator.normal(size=40)
    events = [(10**6 + j, j, 0) for j in range(40)]
    for u in range(1500):
        taste = generator.gumbel(size=40) + 0.8 * x
        events += [(u, int(j), 1 + n) for n, j in enumerate(np.argsort(-taste)[:4])]

    def fit(per_positive: int, popularity: float) -> np.ndarray:
        sample = sample_negatives(
            table(events),
            task="user",
            row="item",
            time="time",
            per_positive=per_positive,
            popularity=popularity,
            exclude_seen=True,
        ).frame.filter(pl.col("user") < 10**6)
        y, offset = sample["label"].to_numpy(), sample["offset"].to_numpy()
        design = np.column_stack([np.ones(len(y)), x[sample["item"].to_numpy()]])
        weights = np.array([-3.0, 0.0])
        for _ in range(30):
            predicted = 1 / (1 + np.exp(-(design @ weights + offset)))
            hessian = design.T @ (design * (predicted * (1 - predicted))[:, None])
            weights = weights + np.linalg.solve(hessian, design.T @ (y - predicted))
        if per_positive == 1000:
            assert not offset.any()  # nothing was left out, nothing is to be made up for
        return weights

    full = fit(1000, 0.0)
    for popularity in (0.0, 0.7):
        assert np.abs(fit(5, popularity) - full).max() < 0.06


def test_columns_of_the_row_come_from_the_row_and_the_rest_from_the_positive() -> None:
    start = datetime(2024, 1, 1)
    positives = pl.DataFrame(
        {
            "kind": ["m", "m", "m", "g"],
            "user": ["a", "b", "a", "a"],
            "age": [30, 40, 30, 30],
            "item": ["x", "y", "z", "x"],
            "category": ["c1", "c2", "c3", "c1"],
            "tags": [["p"], ["q"], ["r", "s"], ["p"]],
            "price": [1.0, 2.0, 3.0, 9.0],
            "device": ["tv", "app", "app", "web"],
            "time": [start + timedelta(days=d) for d in (0, 1, 2, 3)],
        }
    )
    sample = sample_negatives(positives, task=["kind", "user"], row="item", time="time", per_positive=9)
    of_row = positives.group_by("item").agg(pl.col("category", "tags").first())
    negatives = sample.frame.filter(pl.col("label") == 0)
    assert sorted(negatives["item"]) == ["x", "y", "y", "z"]
    assert negatives.select("item", "category", "tags").equals(
        negatives.select("item").join(of_row, on="item", how="left", maintain_order="left")
    )
    last = negatives.filter(pl.col("kind") == "g")
    assert last.height == 2  # task (g, a) has seen x alone
    assert set(last["device"]) == {"web"}
    assert set(last["price"]) == {9.0}  # varies for x, so it is context
    assert set(last["time"]) == {start + timedelta(days=3)}
    assert sample.frame.columns == [*positives.columns, "label", "offset"]
    assert any("['item', 'category', 'tags']" in note for note in sample.notes)

    priced = sample_negatives(
        positives, task="user", row="item", time="time", per_positive=9, row_columns=["price"], exclude_seen=False
    ).frame
    drawn = {(u, i): (price, category) for u, i, price, category in priced.filter(pl.col("label") == 0).select(
        "user", "item", "price", "category").rows() if u == "b"}  # fmt: skip
    assert drawn == {("b", "x"): (1.0, "c2")}  # the price that x had by then


def test_a_task_that_has_seen_nearly_everything_gets_what_is_left() -> None:
    events = [(1, j, 0) for j in range(300)] + [(0, j, 1) for j in range(299)]
    sample = sample_negatives(table(events), task="user", row="item", time="time", per_positive=1)
    assert set(sample.frame.filter(pl.col("user") == 0, pl.col("label") == 0)["item"]) == {299}
    popular = sample_negatives(table(events), task="user", row="item", time="time", per_positive=1, popularity=1.0)
    assert set(popular.frame.filter(pl.col("user") == 0, pl.col("label") == 0)["item"]) == {299}
    assert sample.counts["bare"] == 300  # task 1 took all that was known
    assert any("300 of them none" in note for note in sample.notes)


def test_large_catalogues_listed_in_parts() -> None:
    """More rows to list than one table holds: 5,000 rows known, all but two seen."""
    events = [(1, j, 0) for j in range(5000)] + [(0, j, 1) for j in range(4998)]
    sample = sample_negatives(table(events), task="user", row="item", time="time", per_positive=2)
    drawn = sample.frame.filter(pl.col("user") == 0, pl.col("label") == 0)["item"].to_numpy().reshape(-1, 2)
    assert (np.sort(drawn, axis=1) == [4998, 4999]).all()
    assert len(drawn) == 4998


def test_the_share_of_what_is_seen_is_nearly_the_same_by_periods() -> None:
    generator = np.random.default_rng(5)
    count = 6000
    popular = 1 / np.arange(1, 201)
    frame = pl.DataFrame(
        {
            "user": generator.integers(0, 60, count),
            "item": generator.choice(200, count, p=popular / popular.sum()),
            "time": generator.integers(0, 10**6, count),
        }
    )
    past = past_of(frame, ["user"], "item", "time", exclude_seen=True)
    exact, by_period = past.seen_share(10**9, 1), past.seen_share(0, 64)
    settled = np.arange(count) > count // 10
    assert np.abs(exact - by_period)[settled].max() < 0.03
    assert np.abs(exact - by_period).max() > 0
    assert (exact <= 1 + 1e-12).all()
    assert 0.3 < exact[settled].mean() < 0.99


def test_a_seed_is_a_sample() -> None:
    generator = np.random.default_rng(0)
    frame = pl.DataFrame({k: generator.integers(0, 40, 500) for k in ("user", "item", "time")})
    first, again, other = (
        sample_negatives(frame.sample(fraction=1, shuffle=True, seed=s), task="user", row="item", time="time", seed=n)
        for s, n in ((1, 7), (2, 7), (3, 8))
    )
    assert first.frame.equals(again.frame)
    assert not first.frame.equals(other.frame)
    assert first.counts == again.counts


def test_no_positives_give_no_sample() -> None:
    sample = sample_negatives(table([]), task="user", row="item", time="time", popularity=0.5)
    assert sample.frame.is_empty()
    assert sample.frame.columns == ["user", "item", "time", "label", "offset"]
    assert sample.counts["negatives"] == 0


def test_bad_input_is_said_all_at_once() -> None:
    frame = pl.DataFrame({"user": ["a", None], "item": [[1], [2]], "time": [1.0, float("nan")], "label": [1, 1]})
    with pytest.raises(DataError) as raised:
        sample_negatives(frame, task=["user", "kind"], row="item", time="time")
    message = str(raised.value)
    for part in (
        "'kind' is missing",
        "already have a column 'label'",
        "'item' is List",
        "'time' of the positives has 1",
    ):
        assert part in message
    assert "'user' of the positives has 1 empty values, the first in row 1" in message
    good = table([(0, 0, 0)])
    for setting in ({"per_positive": 0}, {"popularity": 1.5}, {"popularity": -0.1}, {"label": "offset"}):
        with pytest.raises(ConfigError):
            sample_negatives(good, task="user", row="item", time="time", **setting)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be different columns"):
        sample_negatives(good, task="user", row="user", time="time")
