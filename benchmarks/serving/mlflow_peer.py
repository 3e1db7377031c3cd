"""The same block and the same store behind MLflow's scoring server, as a model from code: `peers.py` saves and serves it
in an environment of MLflow's own."""

from __future__ import annotations

from typing import Any

import mlflow
import mlflow.pyfunc


class Scorer(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Scores of a data frame that has the columns of a request."""

    def load_context(self, context: Any) -> None:
        import torch

        import limaml

        torch.set_num_threads(1)
        self.predictor = limaml.Predictor(limaml.open_store(context.model_config["store"]), "model")

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow reads hints as a schema
        import polars as pl

        frame = pl.DataFrame({name: model_input[name].to_numpy() for name in model_input.columns})
        return self.predictor.score(frame).predictions[:, 0]


mlflow.models.set_model(Scorer())
