"""LiMAML beside DIN: no embedding has seen the labels that it is judged by, not through a history either."""

from __future__ import annotations

import pytest
import torch
from rival_data import small_config, small_problem

from limaml.evaluate.rivals.history import with_history
from limaml.evaluate.rivals.history_methods import block_with_history
from limaml.evaluate.rivals.limaml_history import HistoryMetaLearner
from limaml.meta.blocks import MetaMLP
from limaml.meta.losses import Losses
from limaml.meta.model import MetaModel


@pytest.mark.parametrize("tasks", [("user",), ("user", "shop")])
@pytest.mark.parametrize("query", ["cross_fit", "time_cut"])
def test_query_labels_do_not_reach_the_query_logits(query: str, tasks: tuple[str, ...]) -> None:
    """The logits of a batch's query rows are the same bits whatever the labels of these rows are."""
    config = small_config(train={"query": query})
    found = []
    for corrupt in (False, True):
        problem = small_problem(tasks=tasks)
        torch.manual_seed(0)
        losses = Losses(problem.losses)
        dims = dict.fromkeys(tasks, 3)
        block, pasts = block_with_history(problem, config, "attention", losses, dims)
        model = MetaModel(block, {task: MetaMLP([], 3) for task in tasks})
        model.losses = losses
        data = with_history(problem.data)
        learner = HistoryMetaLearner(model, data, problem.split.train, config.train).looking_back(block, pasts)
        batch = learner.batches(torch.Generator().manual_seed(0))[0]
        rows = batch.batch.query.rows
        if corrupt:  # what the labels were when the others' embeddings were adapted is asked below
            data.labels[rows] = 1 - torch.nan_to_num(data.labels[rows])
        learner.role(learner.own)
        z = model.adapt(data, batch.task, batch.batch.tasks, batch.batch.support)
        learner.role(learner.across if query == "cross_fit" else learner.own)
        held = {o: learner._others[o, batch.side].__getitem__ for o in tasks if o != batch.task}
        logits = model.scored(data, batch.task, batch.batch.tasks, batch.batch.query, held).logits(z)
        found.append(logits.detach())
        if not corrupt:
            losses_of = learner._row_losses(batch).detach()
            expected = losses.loss(logits, data.labels[rows], data.weights[rows]).detach()
            torch.testing.assert_close(losses_of, expected, rtol=0, atol=0)
            assert all(read.past is past for read, past in zip(block.reads, pasts, strict=True))
    if query == "cross_fit":
        assert found[0].equal(found[1])


@pytest.mark.parametrize("side", [True, False])
def test_histories_stay_on_their_side_of_the_coin(side: bool) -> None:
    problem, config = small_problem(), small_config()
    losses = Losses(problem.losses)
    block, pasts = block_with_history(problem, config, "attention", losses, {"user": 3})
    model = MetaModel(block, {"user": MetaMLP([], 3)})
    learner = HistoryMetaLearner(model, with_history(problem.data), problem.split.train, config.train)
    learner.looking_back(block, pasts)
    batches = [b for b in learner.batches(torch.Generator().manual_seed(1)) if b.side == side]
    assert batches
    for batch in batches:
        support, query = batch.batch.support, batch.batch.query
        for rows, past in ((support.rows, learner.own[0]), (query.rows, learner.across[0])):
            before, owner = past.flat(rows)
            assert not bool(torch.isin(before, query.rows).any())
            if past is learner.own[0]:
                assert bool((problem.data.time[before] < problem.data.time[rows[owner]]).all())
