"""The set encoder against a loop over tasks; CAVIA against the loop engine."""

from __future__ import annotations

import torch
from rival_data import small_config, small_problem

from limaml.config import Adaptation
from limaml.evaluate.rivals.cavia import Context
from limaml.evaluate.rivals.encoding import RowEncoder, outcomes
from limaml.evaluate.rivals.history_methods import trained_entries
from limaml.evaluate.rivals.set_encoder import SetEncoder, SetEncoderModel
from limaml.meta.blocks import MetaMLP
from limaml.meta.build import build_global_block
from limaml.meta.model import MetaModel
from limaml.tasks import TaskRows


def test_the_set_encoder_is_a_mean_over_each_support() -> None:
    problem = small_problem(heads=2, tasks=("user", "shop"))
    data, split, config = problem.data, problem.split, small_config()
    known = trained_entries(data, problem.tasks, split.train)
    torch.manual_seed(0)
    encoder = SetEncoder(RowEncoder(problem.specs, "user", 3, {"shop": known["shop"]}), 2, 3, 4, 5.0, 0.0)
    other = SetEncoder(RowEncoder(problem.specs, "shop", 3, {"user": known["user"]}), 2, 3, 4, 5.0, 0.0)
    blocks = {"user": MetaMLP([problem.specs[0]], 3, embedding_dim=2, hidden=(4,)), "shop": MetaMLP([], 3)}
    block = build_global_block(problem.specs, config.model, {"user": 3, "shop": 3}, 2)
    model = SetEncoderModel(block, blocks, losses=problem.losses).with_encoders({"user": encoder, "shop": other})
    model.losses.standardise(data.labels, data.weights)
    grouped = TaskRows.of(data.index["user"], data.count("user"), split.support)
    with torch.no_grad():
        found = model.embed(data, "user", grouped)
        cold = model.cold(data, "user", torch.arange(data.count("user")))
        y = outcomes(model.losses, data.labels, torch.ones(len(data)))
        for task in range(data.count("user")):
            rows = grouped.rows[grouped.offset[task] : grouped.offset[task + 1]]
            rows = rows[data.labels[rows].isfinite().any(1)]
            if not len(rows):
                assert found[task].equal(cold[task])
                continue
            total, weight = torch.zeros(4), 0.0
            for row in rows.tolist():
                x = torch.zeros(3)
                for side in encoder.rows.sides:
                    x = x + encoder.rows.entries(data, side, data.index[side][row : row + 1])[0]
                first = encoder.of_row(x) + sum(y[row, i] * m(x) for i, m in enumerate(encoder.of_labelled))
                each = torch.nn.functional.silu(encoder.second(torch.nn.functional.silu(first)))
                total, weight = total + data.weights[row] * each, weight + float(data.weights[row])
            pooled = total / (weight + torch.exp(encoder.log_count))
            expected = cold[task] + encoder.decode(torch.cat([pooled, torch.log1p(torch.tensor([weight])) / 4]))
            torch.testing.assert_close(found[task], expected, rtol=1e-4, atol=1e-5)


def test_a_context_is_adapted_as_the_loop_does() -> None:
    problem = small_problem()
    data, config = problem.data, small_config()
    grouped = TaskRows.of(data.index["user"], data.count("user"), problem.split.support)
    found = []
    for engine in ("auto", "loop"):
        torch.manual_seed(0)
        block = build_global_block(problem.specs, config.model, {"user": 3}, 1)
        settings = Adaptation(solver="gradient", steps=3, engine=engine)
        model = MetaModel(block, {"user": Context(3)}, adaptation=settings).double()
        found.append(model.embed(data, "user", grouped))
        assert bool((model.cold(data, "user", torch.arange(3)) == 0).all())
    assert float(found[0].abs().max()) > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
