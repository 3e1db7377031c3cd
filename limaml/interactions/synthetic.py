"""Interactions with a known answer: who would do what with which probability is known, not guessed.

Everything follows from one low-rank logistic model, so that a learner can be judged against the truth: how close its
probabilities are, how much there is to gain by adapting to each task, and what nobody could predict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from limaml.errors import ConfigError

__all__ = ["Synthetic", "Truth", "make_interactions"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LabelKind = Literal["click", "rating", "click_apply"]

START = 1_700_000_000  # seconds since 1970 of the first possible interaction
SEGMENTS = 6  # of tasks
CATEGORIES = 8  # of items
QUADRATURE = 24  # points per label: the integrand is smooth
_TAKEN = ("item_id", "timestamp", "click", "apply", "rating", "segment")
_RANGES: Mapping[str, tuple[float, float | None]] = {
    "spread": (0.0, 3.0),
    "predictable": (0.0, 1.0),
    "strength": (0.0, None),
    "task_bias": (0.0, None),
    "drift": (0.0, 1.0),
    "noise": (0.0, None),
}  # what is not named is 1 or more


@dataclass(frozen=True)
class Truth:
    """What the interactions were made from. Heads are in the order of `Synthetic.labels`.

    `expected` is the best possible prediction: the probability of each label (for ratings: the expected rating).
    `from_features` is the best that can be said from the features alone, the tasks' own vectors and biases unknown:
    what a perfect model without personalisation reaches. `scores` has, for each label, `<label>/best/…` and
    `<label>/from_features/…` with `auc` and `log_loss` (ratings: `rmse`), measured on the rows.
    """

    task_vectors: Mapping[str, Floats]  # task type → [tasks, dim], before any drift
    task_biases: Mapping[str, Floats]  # task type → [tasks]
    item_vectors: Floats  # [items, dim]
    item_biases: Floats  # [items]
    logits: Floats  # [rows, heads]; for ratings, the expected rating
    expected: Floats  # [rows, heads]
    from_features: Floats  # [rows, heads]
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Synthetic:
    """Tables as a user would bring them, and the truth behind them.

    `interactions` is in order of time: a column for each task type, `item_id`, `timestamp` (seconds since 1970), and
    the labels. `users` describes the first task type, `task_features` every one; `items` the items.
    """

    interactions: pl.DataFrame
    users: pl.DataFrame
    items: pl.DataFrame
    task_features: Mapping[str, pl.DataFrame]
    labels: tuple[str, ...]
    truth: Truth


def make_interactions(
    *,
    tasks: int | Mapping[str, int] = 200,
    items: int = 300,
    dim: int = 4,
    mean_rows: float = 40.0,
    spread: float = 1.0,
    predictable: float = 0.4,
    strength: float = 2.0,
    task_bias: float = 0.7,
    drift: float = 0.0,
    label: LabelKind = "click",
    noise: float = 1.0,
    seed: int = 0,
) -> Synthetic:
    """Draw tasks, items and interactions from

        logit = −0.5 + item bias + Σ over task types (task bias + strength · ⟨task vector, item vector⟩ / √dim).

    A task's vector has mean 0 and variance 1 per dimension; the share `predictable` of that variance is a linear
    function of the task's features (`segment` and `signal_0` …), the rest is the task's own, and only its interactions
    tell. Its bias has standard deviation `task_bias` and is its own, too. Items have features (`category`, `quality`)
    that tell half of what they are; the other half hangs on their id.

    `tasks` is the number of users, or task type → number for several (`{"user_id": 200, "site_id": 20}`): the first
    type has the number of rows below, each row's other ids are drawn with Zipf's law. Rows per task are log-normal with
    mean about `mean_rows` and log-standard deviation `spread`, at least 1; a fiftieth of the tasks (at least one) have
    exactly 1. With `drift` (0 … 1) the vectors of the first type turn during the whole period by drift · 90° towards
    new ones that nothing predicts.

    `label`: `click` is 0 or 1; `rating` is 3 + logit + a normal error of standard deviation `noise`; `click_apply` has
    two labels, `click` and `apply`, where `apply` can only follow a click.

    The same arguments give the same data. Raises `ConfigError` for sizes and shares out of range.
    """
    counts = {"user_id": tasks} if isinstance(tasks, int) else dict(tasks)
    numbers = {"items": items, "dim": dim, "mean_rows": mean_rows, "spread": spread, "predictable": predictable}
    numbers |= {"strength": strength, "task_bias": task_bias, "drift": drift, "noise": noise}
    _check(counts, numbers, label)
    generator = np.random.default_rng(seed)
    first = next(iter(counts))

    sides = {name: _task_side(generator, count, dim, predictable, task_bias) for name, count in counts.items()}
    item_table, item_vectors, item_biases = _items(generator, items, dim)
    index = {first: _heavy_tailed(generator, counts[first], mean_rows, spread)}
    rows = len(index[first])
    time = np.sort(generator.choice(max(4 * rows, 10), rows, replace=False))  # distinct: the order is never in doubt
    index[first] = generator.permutation(index[first])
    index |= {name: _zipf(generator, count, rows) for name, count in counts.items() if name != first}
    item = _zipf(generator, items, rows)

    angle = drift * np.pi / 2 * (time / max(time[-1], 1))
    heads = 2 if label == "click_apply" else 1
    mean = np.repeat(-0.5 + item_biases[item][:, None], heads, axis=1)
    known, covariance = mean.copy(), np.zeros((rows, heads, heads))
    # a second label has tastes of its own: other coordinates of the same vectors
    loads = np.stack([np.roll(item_vectors, h, axis=1)[item] for h in range(heads)], axis=1)  # (rows, heads, dim)
    loads *= strength / np.sqrt(dim)
    for name, side in sides.items():
        of, turn = index[name], np.sin(angle) if name == first else np.zeros(rows)
        stay = np.sqrt(1.0 - turn**2)
        vectors = stay[:, None] * side.vectors[of] + turn[:, None] * side.fresh[of]
        mean += side.biases[of][:, None] + np.einsum("nhd,nd->nh", loads, vectors)
        known += stay[:, None] * np.einsum("nhd,nd->nh", loads, side.predicted[of])
        own = 1.0 - predictable * stay**2
        covariance += task_bias**2 + own[:, None, None] * np.einsum("nhd,nkd->nhk", loads, loads)

    labels, values = _labels(generator, label, mean, noise)
    expected = _expected(label, mean)
    from_features = _over_the_unknown(label, known, covariance)
    interactions = pl.DataFrame(
        {
            **index,
            "item_id": item,
            "timestamp": START + 60 * time,
            **dict(zip(labels, values, strict=True)),
        }
    )
    truth = Truth(
        task_vectors={name: side.vectors for name, side in sides.items()},
        task_biases={name: side.biases for name, side in sides.items()},
        item_vectors=item_vectors,
        item_biases=item_biases,
        logits=mean,
        expected=expected,
        from_features=from_features,
        scores=_scores(labels, values, {"best": expected, "from_features": from_features}, label),
    )
    features = {name: side.features.rename({"id": name}) for name, side in sides.items()}
    return Synthetic(interactions, features[first], item_table, features, labels, truth)


@dataclass(frozen=True)
class _Side:
    features: pl.DataFrame
    vectors: Floats  # [tasks, dim]
    predicted: Floats  # [tasks, dim]: what the features say of them
    fresh: Floats  # [tasks, dim]: what they turn to
    biases: Floats  # [tasks]


def _task_side(generator: np.random.Generator, count: int, dim: int, predictable: float, task_bias: float) -> _Side:
    segment = generator.integers(0, SEGMENTS, count)
    signals = generator.normal(size=(count, dim))
    rotation = np.linalg.qr(generator.normal(size=(dim, dim)))[0]
    # two halves of variance 1/2 each: a rotation keeps the signals' variance, segments have random centres
    told = np.sqrt(0.5) * (signals @ rotation + _centres(generator, SEGMENTS, dim)[segment])
    predicted = np.sqrt(predictable) * told
    vectors = predicted + np.sqrt(1.0 - predictable) * generator.normal(size=(count, dim))
    features = pl.DataFrame(
        {
            "id": np.arange(count),
            "segment": [f"segment {n}" for n in segment],
            **{f"signal_{d}": signals[:, d] for d in range(dim)},
        },
        schema_overrides={"segment": pl.String},
    )
    biases = task_bias * generator.normal(size=count)
    return _Side(features, vectors, predicted, generator.normal(size=(count, dim)), biases)


def _items(generator: np.random.Generator, count: int, dim: int) -> tuple[pl.DataFrame, Floats, Floats]:
    category = generator.integers(0, CATEGORIES, count)
    quality = generator.normal(size=count)
    centres = _centres(generator, CATEGORIES, dim)
    vectors = np.sqrt(0.5) * (centres[category] + generator.normal(size=(count, dim)))
    biases = 0.4 * (quality + generator.normal(size=count))
    table = pl.DataFrame(
        {"item_id": np.arange(count), "category": [f"category {n}" for n in category], "quality": quality},
        schema_overrides={"category": pl.String},
    )
    return table, vectors, biases


def _centres(generator: np.random.Generator, count: int, dim: int) -> Floats:
    """Random centres `[count, dim]`, scaled so that each dimension has mean 0 and variance 1 over them."""
    centres = generator.normal(size=(count, dim))
    return np.asarray((centres - centres.mean(axis=0)) / centres.std(axis=0))


def _heavy_tailed(generator: np.random.Generator, count: int, mean_rows: float, spread: float) -> Ints:
    """The task of each row, tasks in order."""
    rows = np.exp(np.log(mean_rows) - spread**2 / 2 + spread * generator.normal(size=count))
    rows = np.maximum(1, np.rint(rows)).astype(np.int64)
    rows[generator.choice(count, max(1, count // 50), replace=False)] = 1
    return np.repeat(np.arange(count), rows)


def _zipf(generator: np.random.Generator, count: int, rows: int) -> Ints:
    popularity = (1.0 + np.arange(count)) ** -0.8
    drawn = generator.choice(count, rows, p=popularity / popularity.sum())
    return np.asarray(generator.permutation(count)[drawn])  # so that an id does not tell how popular it is


def _labels(
    generator: np.random.Generator, label: LabelKind, logits: Floats, noise: float
) -> tuple[tuple[str, ...], list[NDArray[np.generic]]]:
    """The names of the labels, and each one's value for every row."""
    if label == "rating":
        return ("rating",), [3.0 + logits[:, 0] + noise * generator.normal(size=len(logits))]
    click, *apply = (generator.random(logits.shape) < _sigmoid(logits)).T
    if label == "click":
        return ("click",), [click.astype(np.int8)]
    return ("click", "apply"), [click.astype(np.int8), (click & apply[0]).astype(np.int8)]


def _expected(label: LabelKind, logits: Floats) -> Floats:
    """The expected value of each label `[rows, heads]` given the logits."""
    if label == "rating":
        return np.asarray(3.0 + logits)
    return np.asarray(np.cumprod(_sigmoid(logits), axis=1))  # an apply needs its click


def _over_the_unknown(label: LabelKind, mean: Floats, covariance: Floats) -> Floats:
    """The expected value of each label where the logits are only known to be normal: Gauss-Hermite quadrature."""
    heads = mean.shape[1]
    if label == "rating":
        return _expected(label, mean)
    # the floor keeps the root of a covariance of 0 defined
    root = np.linalg.cholesky(covariance + 1e-12 * np.eye(heads))
    points, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE)
    weights = weights / weights.sum()
    total = np.zeros_like(mean)
    for node in np.ndindex(*[QUADRATURE] * heads):
        total += weights[list(node)].prod() * _expected(label, mean + root @ points[list(node)])
    return total


def _scores(
    labels: Sequence[str], values: Sequence[NDArray[np.generic]], predictions: Mapping[str, Floats], label: LabelKind
) -> dict[str, float]:
    scores = {}
    for head, (name, value) in enumerate(zip(labels, values, strict=True)):
        truth = value.astype(np.float64)
        for which, prediction in predictions.items():
            p = prediction[:, head]
            if label == "rating":
                scores[f"{name}/{which}/rmse"] = float(np.sqrt(((truth - p) ** 2).mean()))
                continue
            scores[f"{name}/{which}/auc"] = _auc(truth, p)
            scores[f"{name}/{which}/log_loss"] = float(-(truth * np.log(p) + (1 - truth) * np.log1p(-p)).mean())
    return scores


def _auc(truth: Floats, score: Floats) -> float:
    """The share of (positive, negative) pairs in the right order, ties counting half; NaN without both kinds."""
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return float("nan")
    rank = pl.Series(score).rank("average").to_numpy()
    return float((rank[truth == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


def _check(counts: Mapping[str, int], numbers: Mapping[str, float], label: str) -> None:
    problems = []
    if not counts:
        problems.append("`tasks` names no task type; give a number, or {'user_id': 200}.")
    problems += [
        f"Task type '{name}' has the name of another column; choose another." for name in counts if name in _TAKEN
    ]
    for name, number in {**{f"tasks['{name}']": n for name, n in counts.items()}, **numbers}.items():
        low, high = _RANGES.get(name, (1.0, None))
        if not (number >= low and (high is None or number <= high)):
            problems.append(
                f"`{name}` is {number}; it must be {low:g} or more{'' if high is None else f', and at most {high:g}'}."
            )
    if label not in get_args(LabelKind):
        problems.append(f"`label` is {label!r}; it is one of {', '.join(get_args(LabelKind))}.")
    if problems:
        raise ConfigError("\n".join(problems))
