"""History blocks against loops over rows."""

from __future__ import annotations

import pytest
import torch
from rival_data import small_config, small_problem
from torch import Tensor, nn

from limaml.evaluate.rivals.encoding import RowEncoder, outcomes
from limaml.evaluate.rivals.history import Attention, Mean
from limaml.evaluate.rivals.history_methods import block_with_history
from limaml.meta.losses import Losses
from limaml.types import Interactions


def about(encoder: RowEncoder, data: Interactions, row: int) -> Tensor:
    """What a row is about, feature by feature."""
    vector = torch.zeros(encoder.width)
    for spec, embed in zip(encoder.specs, encoder.embed, strict=True):
        entry = int(data.index[spec.side][row])
        vector = vector + embed(data.sides[spec.side][spec.name][entry : entry + 1])[0]
    for side, known in encoder.known.items():
        entry = int(data.index[side][row])
        vector = vector + encoder.ids[side].weight[entry + 1 if bool(known[entry]) else 0]
    return vector


def mean_by_loop(block: Mean, losses: Losses, rows: Tensor) -> Tensor:
    found = []
    data, past = block.past.data, block.past
    for row in rows.tolist():
        before = past.flat(torch.tensor([row]))[0].tolist()
        y = outcomes(losses, data.labels, data.weights)
        share = 1 / (len(before) + float(torch.exp(block.log_count)))
        vectors = [about(block.rows, data, other) for other in before]
        none = torch.zeros(block.rows.width)
        sums = [sum(vectors, none)]
        for head in range(losses.heads):
            sums.append(sum((y[o, head] * v for o, v in zip(before, vectors, strict=True)), none))
        went = sum((y[o] for o in before), torch.zeros(losses.heads))
        counted = torch.log1p(torch.tensor([float(len(before))])) / 4
        found.append(torch.cat([*(s * share for s in sums), went * share, counted]))
    return block.out(torch.stack(found))


def attention_by_loop(block: Attention, losses: Losses, rows: Tensor) -> Tensor:
    data = block.past.data
    y = outcomes(losses, data.labels, data.weights)
    found = []
    for row in rows.tolist():
        before = block.past.flat(torch.tensor([row]))[0].tolist()
        target = about(block.rows, data, row)
        total = torch.zeros((1 + losses.heads) * block.rows.width + losses.heads)
        for age, other in enumerate(reversed(before)):
            seen = about(block.rows, data, other)
            hidden = block.of_target(target) + block.of_past(seen) + block.of_product(target * seen)
            hidden = hidden + block.of_outcome(y[other]) + block.of_age.weight[age]
            weight = block.weight(nn.functional.silu(hidden))
            total = total + weight * torch.cat([seen, *(went * seen for went in y[other]), y[other]])
        found.append(total / (len(before) + float(torch.exp(block.log_count))))
    return mean_by_loop(block, losses, rows) + block.attended(torch.stack(found))


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("tasks", [("user",), ("user", "shop")])
@pytest.mark.parametrize("reading", ["mean", "attention"])
def test_history_vectors_are_those_of_a_loop(reading: str, heads: int, tasks: tuple[str, ...]) -> None:
    problem = small_problem(heads=heads, tasks=tasks)
    losses = Losses(problem.losses)
    losses.standardise(problem.data.labels, problem.data.weights)
    torch.manual_seed(heads)
    block, _ = block_with_history(problem, small_config(), reading, losses, {})  # type: ignore[arg-type]
    block.eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
    rows = torch.arange(0, len(problem.data), 3)
    for read in block.reads:
        assert isinstance(read, Mean)
        expected = (
            attention_by_loop(read, losses, rows) if isinstance(read, Attention) else mean_by_loop(read, losses, rows)
        )
        torch.testing.assert_close(read(rows), expected, rtol=1e-4, atol=1e-5)
