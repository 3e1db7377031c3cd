"""Tasks: whose rows are whose, how they are split, the batches that training draws, and what of them is in memory together."""

from limaml.tasks.batches import TaskBatch, cross_fit, task_batches, time_cut
from limaml.tasks.bucket_windows import BucketWindows, Window
from limaml.tasks.split import Split, check_no_leak, split_by_new_tasks, split_by_task_order, split_by_time
from limaml.tasks.windows import TaskRows, flat_ranges

__all__ = [
    "BucketWindows",
    "Split",
    "TaskBatch",
    "TaskRows",
    "Window",
    "check_no_leak",
    "cross_fit",
    "flat_ranges",
    "split_by_new_tasks",
    "split_by_task_order",
    "split_by_time",
    "task_batches",
    "time_cut",
]
