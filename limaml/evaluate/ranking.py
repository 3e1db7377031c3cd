"""How well a member's choices rank among all candidates: NDCG@k, recall@k and MRR, per member, with ties by expectation.

All candidates are ranked, never a sample of them: sampled metrics can order methods wrongly (Krichene and Rendle, KDD 2020).
Candidates with equal scores have no order, so a metric is its mean over all orders of them (McSherry and Najork, ECIR 2008):
a method that gives everything one score gets what chance gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from limaml.errors import DataError
from limaml.evaluate.predictions import Floats, Ints
from limaml.interactions.past import Bools

__all__ = ["CUTOFFS", "RANKING_METRICS", "Ranked", "rank_tasks"]

CUTOFFS = (10, 20, 50)
"""Lengths of the list that a member is shown."""

RANKING_METRICS = ("ndcg_10", "recall_10", "mrr", "ndcg_20", "recall_20", "ndcg_50", "recall_50")
"""Names of the metrics of `rank_tasks` with the default cut-offs; of all of them more is better."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """How one method ranked the candidates of each member of one (dataset, protocol, seed).

    `task` `[tasks]` are integers; `support` `[tasks]` counts the positives of each member's support; `positives` `[tasks]`
    those that were to be found; `values` maps a metric to `[tasks]`, NaN where it is undefined.
    """

    dataset: str
    protocol: str
    seed: int
    method: str
    task: Ints
    support: Ints
    positives: Ints
    values: Mapping[str, Floats]


def rank_tasks(scores: Floats, chosen: Bools, masked: Bools, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, Floats]:
    """Metrics of each member, `[tasks]`, from `scores`, `chosen` and `masked`, all `[tasks, candidates]`.

    `masked` candidates are left out of a member's list (its support), `chosen` ones are the positives. With P positives:

        recall@k = positives among the first k / P
        NDCG@k   = Σ over positives at rank r ≤ k of 1 / log2(r + 1), divided by what the best order has
        MRR      = 1 / rank of the first positive

    each in expectation over the orders of candidates that tie. A member without a positive that is not masked is NaN in
    all of them. Raises `DataError` for scores that are not numbers.
    """
    if not scores.shape == chosen.shape == masked.shape or scores.ndim != 2:
        raise DataError(
            f"Scores {list(scores.shape)}, choices {list(chosen.shape)} and masks {list(masked.shape)} must be tables of "
            "one shape, [tasks, candidates]."
        )
    bad = np.isnan(scores) & ~masked
    if bad.any():
        task, place = (int(at[0]) for at in np.nonzero(bad))
        raise DataError(
            f"{int(bad.sum()):,} scores are not numbers, the first that of candidate {place} for task {task} (both count "
            "from 0). The model has diverged, or was given values that are not numbers."
        )
    names = [f"{metric}_{k}" for k in cutoffs for metric in ("ndcg", "recall")] + ["mrr"]
    values = {name: np.full(len(scores), np.nan) for name in names}
    # discounts[r]: what positives at all of the first r ranks gain
    discounts = np.r_[0.0, np.cumsum(1.0 / np.log2(np.arange(2, scores.shape[1] + 2)))]
    for task in range(len(scores)):
        kept = ~masked[task]
        above, tied, hits = _groups(scores[task, kept], chosen[task, kept])
        wanted = int(hits.sum())
        if not wanted:
            continue
        share = hits / tied
        for k in cutoffs:
            first, last = np.minimum(above, k), np.minimum(above + tied, k)
            values[f"recall_{k}"][task] = share @ (last - first) / wanted
            best = discounts[min(k, wanted)]
            values[f"ndcg_{k}"][task] = share @ (discounts[last] - discounts[first]) / best
        values["mrr"][task] = _reciprocal(int(above[0]), int(tied[0]), int(hits[0]))
    return values


def _groups(scores: Floats, chosen: Bools) -> tuple[Ints, Ints, Ints]:
    """For each score that positives have, the highest first: how many candidates score higher, how many the same, and how
    many of those are positives."""
    ordered = np.sort(scores)
    found, hits = np.unique(scores[chosen], return_counts=True)
    upto = np.searchsorted(ordered, found, "right")
    tied = upto - np.searchsorted(ordered, found, "left")
    return (len(ordered) - upto)[::-1], tied[::-1], hits[::-1].astype(np.int64)


def _reciprocal(above: int, tied: int, hits: int) -> float:
    """The mean of 1 / rank of the first of `hits` positives, in random order among `tied` candidates below `above` others."""
    places = np.arange(tied - hits + 1)  # how many of the others precede the first positive
    later = np.cumprod(np.r_[1.0, 1.0 - hits / (tied - places[:-1])])  # P(at least so many do)
    exactly = later * hits / (tied - places)
    return float(exactly @ (1.0 / (above + 1.0 + places)))
