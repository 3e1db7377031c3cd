"""Interactions: read, joined, described by a schema, checked, and encoded."""

from limaml.interactions.catalog import DataSet
from limaml.interactions.check import CheckReport, Dropped, Finding, check, clean
from limaml.interactions.encode import Encoder
from limaml.interactions.index import index_interactions
from limaml.interactions.infer import Inferred, infer_schema
from limaml.interactions.join import Joined, join_tables
from limaml.interactions.keys import join_key, split_key, task_keys
from limaml.interactions.log import Appended, InteractionLog
from limaml.interactions.negatives import NegativeSample, sample_negatives
from limaml.interactions.prepare import Prepared, prepare
from limaml.interactions.readers import read_table
from limaml.interactions.schema import Feature, Label, Schema, Task
from limaml.interactions.synthetic import Synthetic, make_interactions

__all__ = [
    "Appended",
    "CheckReport",
    "DataSet",
    "Dropped",
    "Encoder",
    "Feature",
    "Finding",
    "Inferred",
    "InteractionLog",
    "Joined",
    "Label",
    "NegativeSample",
    "Prepared",
    "Schema",
    "Synthetic",
    "Task",
    "check",
    "clean",
    "index_interactions",
    "infer_schema",
    "join_key",
    "join_tables",
    "make_interactions",
    "prepare",
    "read_table",
    "sample_negatives",
    "split_key",
    "task_keys",
]
