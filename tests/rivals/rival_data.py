"""A small problem for every method: ragged members, ties in time, missing labels, weights, items nobody trained on."""

from __future__ import annotations

from dataclasses import replace

import torch

from limaml.config import Config, parse_config
from limaml.evaluate.problem import Problem
from limaml.tasks import Split, split_by_new_tasks, split_by_task_order
from limaml.types import ROW, FeatureKind, FeatureSpec, Interactions, LossKind

MEMBERS, ITEMS = 14, 9
SPECS = (
    FeatureSpec("age", FeatureKind.CATEGORICAL, "user", 6),
    FeatureSpec("item", FeatureKind.CATEGORICAL, ROW, ITEMS + 2),
    FeatureSpec("genres", FeatureKind.TOKENS, ROW, 5, 3),
    FeatureSpec("price", FeatureKind.NUMERIC, ROW, 1),
)


def small_data(seed: int = 0, rows: int = 160, heads: int = 1, unit: str = "integer") -> Interactions:
    """Some members have one row, one has most; times tie; a second task type `shop` has no features."""
    g = torch.Generator().manual_seed(seed)
    member = torch.multinomial(torch.arange(1, MEMBERS + 1).float() ** 2, rows, replacement=True, generator=g)
    item = torch.randint(0, ITEMS, (rows,), generator=g)
    taste, kind = torch.randn(MEMBERS, 2, generator=g), torch.randn(ITEMS, 2, generator=g)
    logit = (taste[member] * kind[item]).sum(1, keepdim=True) + 0.3 * torch.randn(rows, heads, generator=g)
    labels = (logit > 0).float()
    if heads > 1:
        labels[:, 1] = 3 + 2 * logit[:, 1]  # a squared head, far from standard units
        labels[torch.rand(rows, generator=g) < 0.2, 1] = torch.nan
    labels[torch.rand(rows, generator=g) < 0.05, 0] = torch.nan
    return Interactions(
        sides={
            "user": {"age": torch.randint(0, 6, (MEMBERS,), generator=g)},
            "shop": {},
            ROW: {
                "item": torch.arange(ITEMS) + 2,
                "genres": torch.randint(0, 5, (ITEMS, 3), generator=g),
                "price": torch.randn(ITEMS, 1, generator=g),
            },
        },
        index={"user": member, "shop": torch.randint(0, 4, (rows,), generator=g), ROW: item},
        ids={"user": [f"u{i}" for i in range(MEMBERS)], "shop": [f"s{i}" for i in range(4)]},
        labels=labels,
        weights=0.5 + torch.rand(rows, generator=g),
        time=torch.sort(torch.randint(0, rows // 2, (rows,), generator=g)).values,
        time_unit=unit,
    )


def small_problem(
    protocol: str = "warm", *, heads: int = 1, tasks: tuple[str, ...] = ("user",), seed: int = 0, valid: bool = False
) -> Problem:
    data = small_data(seed, heads=heads)
    losses = (LossKind.BINARY, LossKind.SQUARED)[:heads]

    def split(among: torch.Tensor | None) -> Split:
        if protocol == "warm":
            return split_by_task_order(data, "user", share=0.25, among=among)
        return split_by_new_tasks(data, "user", seed=0, share=0.3, among=among)

    whole = split(None)
    problem = Problem(data, SPECS, losses, tasks, whole)
    return replace(problem, validation=split(whole.train)) if valid else problem


def small_config(**sections: dict[str, object]) -> Config:
    """Two epochs of small blocks."""
    values: dict[str, dict[str, object]] = {
        "model": {"embedding_dim": 3, "hidden": (6, 4), "factors": 2, "dim": 3, "meta_hidden": (4,)},
        "train": {"epochs": 2, "patience": 2, "rows_per_batch": 60},
        "rival": {"history": 5, "hidden": 4},
    }
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return parse_config(values)
