"""Judging methods against each other: metrics, intervals, tables and the report."""

from limaml.evaluate.activity import ActivityCurve, activity_curve
from limaml.evaluate.bootstrap import METRICS, Interval, Replicates, bootstrap
from limaml.evaluate.embedding_map import EmbeddingMap
from limaml.evaluate.figures import Curve
from limaml.evaluate.metrics import (
    auc,
    calibration,
    gauc,
    log_loss,
    mae,
    normalised_entropy,
    r2,
    reliability,
    rmse,
    task_auc,
)
from limaml.evaluate.pictures import Panel, Picture
from limaml.evaluate.predictions import Predictions, quartiles
from limaml.evaluate.report import write_report
from limaml.evaluate.summary import BASELINES, Delta, Run, Summary, summarise, write_metrics
from limaml.evaluate.table import format_table, rich_table

__all__ = [
    "BASELINES",
    "METRICS",
    "ActivityCurve",
    "Curve",
    "Delta",
    "EmbeddingMap",
    "Interval",
    "Panel",
    "Picture",
    "Predictions",
    "Replicates",
    "Run",
    "Summary",
    "activity_curve",
    "auc",
    "bootstrap",
    "calibration",
    "format_table",
    "gauc",
    "log_loss",
    "mae",
    "normalised_entropy",
    "quartiles",
    "r2",
    "reliability",
    "rich_table",
    "rmse",
    "summarise",
    "task_auc",
    "write_metrics",
    "write_report",
]
