"""Serving: scores from a store and a global block alone."""

from limaml.serving.predictor import Predictor, Scores

__all__ = ["Predictor", "Scores"]
