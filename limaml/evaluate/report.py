"""The report of a comparison: one HTML file that opens offline, losses first.

The page is a list of sections, each a pure function of the results to HTML; pictures are `Picture`s made of plotly
figures, so other comparisons can add their own through `extra`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template

import yaml

from limaml.errors import require
from limaml.evaluate.bootstrap import ALL
from limaml.evaluate.embedding_map import EmbeddingMap
from limaml.evaluate.figures import Curve, Style, method_name, method_styles
from limaml.evaluate.pictures import PROTOCOLS, Panel, Picture, comparison_pictures, group_name, short_name
from limaml.evaluate.predictions import Predictions
from limaml.evaluate.summary import Delta, Summary
from limaml.evaluate.table import METRIC_NAMES, table_sections

__all__ = ["headlines", "losses", "render_report", "write_report"]


def write_report(
    path: str | Path,
    summary: Summary,
    predictions: Sequence[Predictions] = (),
    *,
    curves: Sequence[Curve] = (),
    embedding_map: EmbeddingMap | None = None,
    notes: Sequence[str] = (),
    config: Mapping[str, object] | None = None,
    environment: Mapping[str, object] | None = None,
    command: str | None = None,
    title: str | None = None,
    extra: Sequence[Picture] = (),
) -> None:
    """Write the report to `path`; the folder is made if need be. The file appears complete or not at all.

    Whatever is not given is left out: without `predictions` the picture over activity, without `curves` the learning
    curves, and so on. `notes` are sentences that say what was chosen; `config` and `environment` are printed as they
    are; `command` makes the report again. Raises `MissingExtra` without plotly.
    """
    pictures = [*comparison_pictures(summary, predictions, curves=curves, embedding_map=embedding_map), *extra]
    text = render_report(
        summary, pictures, notes=notes, config=config, environment=environment, command=command, title=title
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)


def render_report(
    summary: Summary,
    pictures: Sequence[Picture],
    *,
    notes: Sequence[str] = (),
    config: Mapping[str, object] | None = None,
    environment: Mapping[str, object] | None = None,
    command: str | None = None,
    title: str | None = None,
) -> str:
    """The report as HTML."""
    plotly = require("plotly.offline", "report")
    datasets = list(dict.fromkeys(dataset for dataset, _ in summary.groups()))
    title = title or f"Personalisation on {', '.join(datasets)}"
    methods = list(dict.fromkeys(run.method for run in summary.runs))
    protocols = list(dict.fromkeys(run.protocol for run in summary.runs))
    seeds = len({run.seed for run in summary.runs})
    lead = f"{_count(len(methods), 'method')}, {_count(len(protocols), 'protocol')}, {_count(seeds, 'seed')}."
    sections = [
        _losses_section(summary),
        _headline_section(summary),
        _table_section(summary),
        _bucket_section(summary),
        *(_picture_section(picture, f"picture{number}") for number, picture in enumerate(pictures)),
        _notes_section(notes),
        _reproduce_section(command, config, environment),
        _words_section(summary),
    ]
    return _resource("report_page.html").substitute(
        title=html.escape(title),
        lead=html.escape(lead),
        style=_resource("report_page.css").template,
        script=_resource("report_page.js").template,
        plotly=plotly.get_plotlyjs(),
        body="\n".join(section for section in sections if section),
        version=html.escape(_own_version()),
    )


def losses(summary: Summary) -> list[Delta]:
    """The differences in which a method is significantly worse than a baseline: over all tasks first."""
    worse = [delta for delta in summary.deltas if delta.verdict == "worse"]
    return sorted(worse, key=lambda d: (d.bucket != ALL, d.method in summary.baselines))


def headlines(summary: Summary) -> list[str]:
    """One sentence per protocol and method, over all tasks: where it stands on its first two metrics."""
    sentences = []
    for dataset, protocol in summary.groups():
        for method in summary.methods(dataset, protocol):
            against = [b for m, b in summary.pairs(dataset, protocol) if m == method]
            parts = []
            for metric in summary.metrics(dataset)[:2]:
                found = summary.interval(dataset, protocol, method, ALL, metric)
                deltas = [(b, summary.delta(dataset, protocol, method, b, ALL, metric)) for b in against]
                gains = [_headline_gain(b, d) for b, d in deltas if d is not None]
                if found is not None and not math.isnan(found.value):
                    parts.append(f"{METRIC_NAMES[metric]} {found.value:.4f}, {' and '.join(gains)}")
            if parts and against and method not in summary.baselines:
                sentences.append(
                    f"{method_name(method)}, {group_name(summary, dataset, protocol)}: {'; '.join(parts)}."
                )
    return sentences


def _headline_gain(baseline: str, delta: Delta) -> str:
    known = not math.isnan(delta.low)
    doubt = "" if delta.verdict != "unclear" else " (its interval includes zero)" if known else " (no interval)"
    return f"{_number(delta.delta)} on {short_name(baseline)}{doubt}"


def _losses_section(summary: Summary) -> str:
    known = [d for d in summary.deltas if not math.isnan(d.low)]
    worse = losses(summary)
    if not summary.deltas:
        return ""
    if not known:
        return _box(
            "",
            "Nothing here is significant",
            "<p>No difference has an interval: the tasks are too few, or the metrics undefined. Read the numbers below as "
            "anecdotes.</p>",
        )
    chance = (
        f"{len(known):,} differences were tested, each at the {summary.level:.0%} level; if no method differed from any "
        f"other, about {(1 - summary.level) * len(known) / 2:.0f} would still come out as worse by chance."
    )
    if not worse:
        return _box(
            "good",
            "No method is significantly worse than a baseline anywhere",
            f'<p>Not over all tasks, and in no activity bucket. <span class="small">{html.escape(chance)}</span></p>',
        )
    where: dict[tuple[str, str, str, str], list[Delta]] = {}
    for delta in worse:
        where.setdefault((delta.dataset, delta.protocol, delta.method, delta.baseline), []).append(delta)
    items = []
    for (dataset, protocol, method, baseline), deltas in where.items():
        by_metric = {d.metric: [e for e in deltas if e.metric == d.metric] for d in deltas}
        listed = "; ".join(_loss_text(found) for found in by_metric.values())
        items.append(
            f"<li><strong>{html.escape(method_name(method))}</strong> against {html.escape(method_name(baseline))}, "
            f"{html.escape(group_name(summary, dataset, protocol))}: {html.escape(listed)}.</li>"
        )
    return _box(
        "bad",
        "Who loses, and where",
        f'<ul>{"".join(items)}</ul><p class="small">{html.escape(chance)} q1 holds the least active quarter of the tasks, '
        "q4 the most active.</p>",
    )


def _loss_text(deltas: Sequence[Delta]) -> str:
    """One metric's significant losses, over all tasks first: the first with its interval, the others by bucket."""
    first, *others = deltas
    also = ", ".join(d.bucket for d in others)
    where = "over all tasks" if first.bucket == ALL else f"in {first.bucket}"
    return f"{METRIC_NAMES[first.metric]} {_interval_text(first)} {where}" + (f", also in {also}" if also else "")


def _headline_section(summary: Summary) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in headlines(summary))
    return f"<h2>In short</h2><ul>{items}</ul>" if items else ""


def _table_section(summary: Summary) -> str:
    parts = [
        "<h2>Results</h2>",
        '<p class="sentence">Means over seeds, over all tasks. Beneath each method stands its difference to each baseline, '
        f"± half of the {summary.level:.0%} interval; ✓ better and ✗ worse mark intervals that exclude zero. ↑ more is "
        "better, ↓ less is better.</p>",
    ]
    for section in table_sections(summary):
        head = "".join(f"<th scope='col'>{html.escape(c)}</th>" for c in ("method", *section.columns))
        rows = []
        for row in section.rows:
            name = short_name(row.method) if row.baseline is None else f"− {short_name(row.baseline)}"
            cells = "".join(
                f"<td class='{verdict if row.baseline else ''}'>{html.escape(_hold(cell))}</td>"
                for cell, verdict in zip(row.cells, row.verdicts, strict=True)
            )
            kind = "method" if row.baseline is None else "gain"
            rows.append(f"<tr class='{kind}'><th scope='row'>{html.escape(name)}</th>{cells}</tr>")
        parts.append(
            f"<h3>{html.escape(section.title)}</h3><div class='scroll'><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
        remarks = [f"{section.protocol}: {PROTOCOLS[section.protocol]}."] if section.protocol in PROTOCOLS else []
        remarks += [section.remark] if section.remark else []
        if remarks:
            parts.append(f"<p class='small'>{html.escape(' '.join(remarks))}</p>")
    return "\n".join(parts)


def _picture_section(picture: Picture, key: str) -> str:
    styles = method_styles(picture.methods)
    legend = "".join(f"<span>{_swatch(style)}{html.escape(style.name)}</span>" for style in styles.values())
    parts = [f"<h2>{html.escape(picture.title)}</h2>", f"<p class='sentence'>{html.escape(picture.sentence)}</p>"]
    if legend:
        parts.append(f"<div class='legend'>{legend}</div>")
    for group in dict.fromkeys(panel.group for panel in picture.panels):
        if group:
            parts.append(f"<h3>{html.escape(group)}</h3>")
        parts.append(f"<div class='panels{' wide' if picture.wide else ''}'>")
        for number, panel in enumerate(picture.panels):
            if panel.group == group:
                parts.append(_panel(panel, f"{key}-{number}", picture, bool(legend)))
        parts.append("</div>")
    return "\n".join(parts)


def _panel(panel: Panel, key: str, picture: Picture, page_has_legend: bool) -> str:
    figure = type(panel.figure)(panel.figure)
    if page_has_legend:
        figure.update_layout(showlegend=False)
    # "<" inside a string would let a task id end the script element
    data = figure.to_json().replace("<", "\\u003c")
    label = html.escape(", ".join(part for part in (picture.title, panel.group, panel.title) if part), quote=True)
    caption = f"<figcaption>{html.escape(panel.caption)}</figcaption>" if panel.caption else ""
    return (
        f"<figure><h4>{html.escape(panel.title)}</h4>"
        f"<div class='plot' role='img' aria-label=\"{label}\" data-figure='{key}'></div>"
        "<noscript><p>This picture needs JavaScript.</p></noscript>"
        f"{caption}<script type='application/json' id='{key}'>{data}</script></figure>"
    )


def _bucket_section(summary: Summary) -> str:
    rows = []
    for delta in summary.deltas:
        if delta.bucket != ALL and not math.isnan(delta.delta):
            cells = (
                delta.dataset, delta.protocol, short_name(delta.method), short_name(delta.baseline), delta.bucket,
                METRIC_NAMES[delta.metric],
            )  # fmt: skip
            text = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            rows.append(f"<tr>{text}<td class='{delta.verdict}'>{_interval_text(delta)} {delta.verdict}</td></tr>")
    if not rows:
        return ""
    names = ("dataset", "protocol", "method", "baseline", "bucket", "metric", "difference (interval)")
    head = "".join(f"<th scope='col'>{name}</th>" for name in names)
    return (
        f"<details><summary>All {len(rows)} differences by activity bucket, as numbers</summary><div class='scroll'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _notes_section(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"<h2>What was chosen</h2><ul>{items}</ul>" if items else ""


def _reproduce_section(
    command: str | None, config: Mapping[str, object] | None, environment: Mapping[str, object] | None
) -> str:
    parts = []
    if command:
        parts.append(f"<p>This makes the report again:</p><pre>{html.escape(command)}</pre>")
    if environment:
        rows = "".join(
            f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(str(_plain(value)))}</dd>"
            for key, value in environment.items()
        )
        parts.append(f"<h3>Environment</h3><dl>{rows}</dl>")
    if config:
        text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=100)
        parts.append(f"<details><summary>The resolved config</summary><pre>{html.escape(text)}</pre></details>")
    return "<h2>How to reproduce</h2>" + "\n".join(parts) if parts else ""


def _words_section(summary: Summary) -> str:
    words = {
        "task": "one thing the model is adapted to: a member, an item, a pair of both.",
        "support, query": "a task's earlier rows, which its model is adapted with; and its later rows, which it is judged on.",
        "q1 … q4": "quarters of the tasks by number of support rows. Tasks with equally many share a quarter, so quarters "
        "can be unequal.",
        "AUC": "the chance that a random positive row is scored above a random negative one, across all tasks.",
        "GAUC": "the same within each task, averaged with the tasks' numbers of query rows as weights, over the tasks that "
        "have both kinds of rows: how well each member's own list is sorted.",
        "log loss": "the mean of −log of the probability that was given to what happened, in nats.",
        "NE": "normalised entropy: log loss divided by that of always predicting the average. Below 1 is better than that.",
        "RMSE, MAE, R²": "root of the mean squared error; mean absolute error; the share of the labels' variance explained.",
        "interval": f"where the number lies in {summary.level:.0%} of {summary.replicates:,} repetitions with tasks drawn "
        "anew, with replacement, from those at hand. Differences are paired: both methods on the same draw.",
    }
    binary = {"AUC", "GAUC", "log loss", "NE"}
    kinds = {str(loss) for loss in summary.losses.values()}
    kept = {
        word: meaning
        for word, meaning in words.items()
        if not (word in binary and "binary" not in kinds) and not (word.startswith("RMSE") and "squared" not in kinds)
    }
    rows = "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(meaning)}</dd>" for word, meaning in kept.items())
    return f"<h2>Words</h2><dl>{rows}</dl>"


def _swatch(style: Style) -> str:
    """A short piece of the method's line with its marker, as inline SVG."""
    dashes = {"dot": "2 3", "dash": "6 3", "dashdot": "6 3 2 3", "longdash": "9 4", "longdashdot": "9 3 2 3"}
    shapes = {
        "circle": "<circle cx='17' cy='7' r='4.5'/>",
        "square": "<rect x='12.5' y='2.5' width='9' height='9'/>",
        "triangle-up": "<path d='M17 1.5 22.5 11.5 11.5 11.5Z'/>",
        "diamond": "<path d='M17 1 23 7 17 13 11 7Z'/>",
        "cross": "<path d='M15 2h4v3h3v4h-3v3h-4v-3h-3v-4h3Z'/>",
        "x": "<path d='M13 1 17 5 21 1 23 3 19 7 23 11 21 13 17 9 13 13 11 11 15 7 11 3Z'/>",
        "star": "<path d='M17 1 18.6 5.2 23 5.4 19.5 8.2 20.7 12.6 17 10.1 13.3 12.6 14.5 8.2 11 5.4 15.4 5.2Z'/>",
        "hexagon": "<path d='M17 1.5 22 4.3 22 9.7 17 12.5 12 9.7 12 4.3Z'/>",
    }
    dash = f" stroke-dasharray='{dashes[style.dash]}'" if style.dash in dashes else ""
    return (
        f"<svg width='34' height='14' aria-hidden='true' fill='{style.colour}' stroke='{style.colour}'>"
        f"<path d='M0 7H34' stroke-width='2'{dash} fill='none'/><g stroke='none'>{shapes[style.symbol]}</g></svg>"
    )


def _interval_text(delta: Delta) -> str:
    if math.isnan(delta.low):
        return f"{_number(delta.delta)} (no interval)"
    return f"{_number(delta.delta)} ({_number(delta.low)} to {_number(delta.high)})"


def _number(value: float) -> str:
    """With a sign, and a minus that is as wide as the plus."""
    return f"{value:+.4f}".replace("-", "−")


def _hold(cell: str) -> str:
    """A cell of the table with real minus signs, that breaks only in front of its ±."""
    head, _, tail = cell.replace("-", "−").partition(" ")
    return f"{head} {tail.replace(' ', chr(160))}".strip()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _box(kind: str, title: str, body: str) -> str:
    return f"<section class='box {kind}'><h2>{html.escape(title)}</h2>{body}</section>"


def _plain(value: object) -> object:
    """`value` in the types that YAML has; what it does not know is written as text."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(value)


def _resource(name: str) -> Template:
    return Template(files("limaml.evaluate").joinpath(name).read_text("utf-8"))


def _own_version() -> str:
    try:
        return version("limaml")
    except PackageNotFoundError:
        return "(not installed)"
