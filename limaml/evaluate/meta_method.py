"""How every method that adapts tasks is trained and scored, whatever its model and learner are."""

from __future__ import annotations

from collections.abc import Callable

from limaml.config import Config
from limaml.evaluate.problem import Fitted, Problem
from limaml.meta.learn import MetaLearner
from limaml.meta.outer import Progress, fit
from limaml.tasks import TaskRows

__all__ = ["fit_learner"]


def fit_learner(
    learner: MetaLearner, problem: Problem, config: Config, progress: Callable[[Progress], None] | None
) -> Fitted:
    """Train the learner's model, adapt every task on its support, and score the judged rows."""
    data, split = problem.data, problem.judged
    history = fit(learner, config.train, progress=progress)
    model = learner.model.cpu()
    rows = split.test.nonzero().flatten()
    embeddings = {}
    for task in model.tasks:
        embeddings[task] = model.embed(data, task, TaskRows.of(data.index[task], data.count(task), split.support))
    return Fitted(model.losses.outputs(model.predict(data, rows, embeddings)), rows, history, model, embeddings)
