"""The uncertainty benchmark at toy size: its yardsticks give the nominal coverage where the truth is drawn from the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import limaml
from benchmarks.uncertainty import LEVELS, TASK, World, _coverage, _places, measured, page, picture
from limaml.config import ModelConfig
from limaml.meta import build_meta_model
from limaml.tasks import TaskRows
from limaml.types import LossKind


def world(tasks: int) -> World:
    """Members with about 100 rows each (some have one) and a model as it starts, its embeddings made to matter; nothing is learned."""
    made = limaml.make_interactions(tasks=tasks, items=200, mean_rows=100, spread=0.0, seed=0)
    joined = limaml.join_tables(made.interactions, {TASK: made.users, "item_id": made.items})
    schema = limaml.infer_schema(
        joined.frame, task=TASK, row="item_id", time="timestamp", label="click",
        task_columns=joined.columns[TASK], row_columns=joined.columns["item_id"],
    ).schema  # fmt: skip
    encoder = limaml.Encoder.fit(joined.frame, schema)
    data = encoder.encode(joined.frame)
    torch.manual_seed(0)
    config = ModelConfig(embedding_dim=4, hidden=(8,), dim=3, factors=3)
    model = build_meta_model(encoder.specs, [TASK], [LossKind.BINARY], config, limaml.Adaptation(max_support=None))
    with torch.no_grad():
        for parameter in model.global_block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    grouped = TaskRows.of(data.index[TASK], tasks)
    rank = torch.empty(len(data), dtype=torch.int64)
    rank[grouped.rows] = torch.arange(len(data)) - torch.repeat_interleave(grouped.offset[:-1], grouped.size)
    return World(model, data, torch.arange(tasks) % 3, rank, "toy rows", 1)


def test_the_yardstick_is_true_where_labels_come_from_the_posterior() -> None:
    toy = world(600)
    posterior = toy.embed(toy.rank < 5)
    rows = (toy.rank >= 40).nonzero().flatten()
    generator = torch.Generator().manual_seed(7)
    logits = toy.model.predict(toy.data, rows, {TASK: posterior.sample(1.0, generator)})[:, 0].double()
    label = (torch.rand(len(rows), generator=generator) < torch.sigmoid(logits)).double()
    for found, level in zip(_coverage(_places(toy, rows, posterior, label, 1.0)), LEVELS, strict=True):
        assert found == pytest.approx(level, abs=0.06)
    assert _coverage(_places(toy, rows, posterior, label, 0.0))[1] < 0.7


def test_everything_is_measured_and_printed() -> None:
    toy = world(60)
    results = {"command": "toy", "source": "toy", "order": "", "members": 60, "date": "today", "seconds": 0.0}
    results |= measured(replace(toy))
    assert 1 / 64 <= results["scale"] <= 64
    assert [entry["support"] for entry in results["supports"]] == [0, 5, 10, 20, 40]
    for entry in results["supports"]:
        assert 15 <= entry["members"] <= 20 and 25 <= entry["rows"] / entry["members"] <= 35
        assert all(0 <= share <= 1 for share in entry["moved_coverage"] + entry["likes_coverage"]["none"])
    sd = [entry["sd"] for entry in results["supports"]]
    assert sd == sorted(sd, reverse=True)  # who is known better is less uncertain
    text = page(results)
    assert text.count("\n| ") == 5 + 5 + 5 + 2 * 3 and "nan" not in text
    pytest.importorskip("plotly", reason="the picture needs plotly (pip install 'limaml[report]')")
    assert len(picture(results).data) == 2 + 3 * 5
