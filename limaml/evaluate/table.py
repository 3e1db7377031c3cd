"""The results as a table: plain text for logs, `rich` for terminals, cells for the report.

Means over seeds; under each method its gain over each baseline with the half width of the interval. `✓` marks a gain
whose interval excludes zero, `✗` a loss whose interval does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from limaml.evaluate.bootstrap import ALL
from limaml.evaluate.summary import LOWER_IS_BETTER, Delta, Summary, Verdict

__all__ = [
    "METRIC_NAMES",
    "TableRow",
    "TableSection",
    "delta_text",
    "format_table",
    "rich_table",
    "table_sections",
]

METRIC_NAMES = {
    "auc": "AUC",
    "gauc": "GAUC",
    "gauc_coverage": "GAUC coverage",
    "log_loss": "log loss",
    "ne": "NE",
    "calibration": "calibration",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R²",
    "ndcg_10": "NDCG@10",
    "recall_10": "recall@10",
    "ndcg_20": "NDCG@20",
    "recall_20": "recall@20",
    "ndcg_50": "NDCG@50",
    "recall_50": "recall@50",
    "mrr": "MRR",
}

_MARKS: dict[Verdict, str] = {"better": "✓", "worse": "✗", "unclear": " "}
_STYLES: dict[Verdict, str] = {"better": "green", "worse": "bold red", "unclear": "dim"}


@dataclass(frozen=True)
class TableRow:
    """A method's means (`baseline` is None), or its gains over a baseline."""

    method: str
    baseline: str | None
    cells: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def head(self) -> str:
        return self.method if self.baseline is None else f"  − {self.baseline}"


@dataclass(frozen=True)
class TableSection:
    """The table of one (dataset, protocol)."""

    dataset: str
    protocol: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    remark: str  # on what the numbers rest; may be empty


def table_sections(summary: Summary, bucket: str = ALL) -> list[TableSection]:
    """The content of the tables, one section per (dataset, protocol)."""
    sections = []
    for dataset, protocol in summary.groups():
        metrics = summary.metrics(dataset)
        pairs = summary.pairs(dataset, protocol)
        rows: list[TableRow] = []
        for method in summary.methods(dataset, protocol):
            values = [summary.interval(dataset, protocol, method, bucket, metric) for metric in metrics]
            plain = tuple("–" if v is None or math.isnan(v.value) else f"{v.value:.4f}" for v in values)
            none: list[Verdict] = ["unclear"] * len(metrics)
            rows.append(TableRow(method, None, plain, tuple(none)))
            for baseline in [b for m, b in pairs if m == method]:
                deltas = [summary.delta(dataset, protocol, method, baseline, bucket, metric) for metric in metrics]
                cells = tuple("–" if d is None else delta_text(d) for d in deltas)
                found: list[Verdict] = ["unclear" if d is None else d.verdict for d in deltas]
                rows.append(TableRow(method, baseline, cells, tuple(found)))
        columns = tuple(f"{METRIC_NAMES[m]} {'↓' if m in LOWER_IS_BETTER else '↑'}" for m in metrics)
        title, remark = _title(summary, dataset, protocol, bucket), _coverage(summary, dataset, protocol, bucket)
        sections.append(TableSection(dataset, protocol, title, columns, tuple(rows), remark))
    return sections


def delta_text(delta: Delta) -> str:
    """`+0.0104 ±0.0031 ✓`: the difference, the half width of its interval, and the verdict."""
    if math.isnan(delta.delta):
        return "–"
    half = (delta.high - delta.low) / 2
    width = " ± ?" if math.isnan(half) else f" ±{half:.4f}"
    return f"{delta.delta:+.4f}{width} {_MARKS[delta.verdict]}".rstrip()


def format_table(summary: Summary, bucket: str = ALL) -> str:
    """The tables as plain text, with a legend."""
    blocks = []
    for section in table_sections(summary, bucket):
        lines: list[Sequence[str]] = [("method", *section.columns)]
        lines += [(row.head, *row.cells) for row in section.rows]
        widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        blocks.append(
            "\n".join(
                [
                    section.title,
                    text[0],
                    "-" * (sum(widths) + 2 * len(widths) - 2),
                    *text[1:],
                    *filter(None, [section.remark]),
                ]
            )
        )
    return "\n\n".join([*blocks, _legend(summary)])


def rich_table(summary: Summary, bucket: str = ALL) -> Group:
    """The tables for `rich.print`."""
    tables: list[Table | Text] = []
    for section in table_sections(summary, bucket):
        table = Table(
            title=section.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
        )
        table.add_column("method", no_wrap=True)
        for column in section.columns:
            table.add_column(column)
        for row in section.rows:
            if row.baseline is None:
                table.add_row(Text(row.head, "bold"), *(Text(cell, "bold") for cell in row.cells))
            else:
                cells = zip(row.cells, row.verdicts, strict=True)
                table.add_row(Text(row.head, "dim"), *(Text(_hold(cell), _STYLES[verdict]) for cell, verdict in cells))
        table.caption = section.remark or None
        table.caption_justify = "left"
        tables.append(table)
    return Group(*tables, Text(_legend(summary), "dim"))


def _hold(cell: str) -> str:
    """Keep the verdict on the line of the interval where a narrow terminal breaks the cell."""
    head, _, tail = cell.partition(" ")
    return f"{head} {tail.replace(' ', chr(160))}" if tail else cell


def _title(summary: Summary, dataset: str, protocol: str, bucket: str) -> str:
    seeds = len(summary.seeds(dataset, protocol))
    size = next(s for s in summary.buckets if (s.dataset, s.protocol, s.bucket) == (dataset, protocol, bucket))
    where = "" if bucket == ALL else f", bucket {bucket}"
    each = " per seed" if seeds > 1 else ""
    return (
        f"{dataset}, {protocol}{where} ({seeds} seed{'s' if seeds > 1 else ''}; {size.rows:,.0f} query rows of "
        f"{size.tasks:,.0f} tasks{each})"
    )


def _coverage(summary: Summary, dataset: str, protocol: str, bucket: str) -> str:
    found = [
        summary.interval(dataset, protocol, m, bucket, "gauc_coverage") for m in summary.methods(dataset, protocol)
    ]
    shares = [interval.value for interval in found if interval is not None and not math.isnan(interval.value)]
    if not shares:
        return ""
    return f"GAUC rests on {shares[0]:.1%} of the query rows: those of tasks with both kinds of labels."


def _legend(summary: Summary) -> str:
    if not summary.deltas:
        return "↑ higher is better, ↓ lower is better. Means over seeds."
    return (
        f"↑ higher is better, ↓ lower is better. Means over seeds; '− b' is the difference to b, ± half of its "
        f"{summary.level:.0%} interval (bootstrap over tasks, {summary.replicates} replicates). ✓ better, ✗ worse: the "
        "interval excludes zero."
    )
