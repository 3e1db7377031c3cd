"""The tables of docs/log.md, training.md, scale.md and plan.md, made from the result files: `python -m benchmarks.scale --part page`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale.measure import RESULTS, ROOT

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
Size = dict[str, Any]


def ingest(sizes: Sequence[Size]) -> list[str]:
    rows = [
        "| tasks | rows | rows a second | of polars' scan and write, by the clock | by processor time | processor time a million rows | peak memory, polars' |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in sizes:
        shares = [f"{share:.0%}" for share in sorted(one["shares"])]
        spread = "one run" if len(shares) == 1 else f"{shares[0]} to {shares[-1]} in {len(shares)} runs"
        cpu = min(run["cpu_s"] for run in one["ours"]) / one["rows"] * 1e6
        rows.append(
            f"| {one['tasks']:,} | {one['rows']:,} | {one['rows_per_s'] / 1e6:.2f} M | {one['share']:.0%} ({spread}) "
            f"| {one['cpu_share']:.0%} | {cpu:.2f} s | {one['peak_gib']:.2f} GiB, {one['peak_gib_polars']:.2f} |"
        )
    return [made_by("ingest", sizes), "", *rows]


def train(sizes: Sequence[Size]) -> list[str]:
    rows = [
        "| tasks in the log | rows | survey, s | rows a second | epoch on | epoch, s | tasks a second | of it training | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {one['tasks']:,} | {one['rows']:,} | {one['survey_s']:.0f} | {one['survey_rows'] / one['survey_s'] / 1e6:.2f} M "
        f"| {one['trained']:,.0f} tasks | {one['epoch_s']:.0f} | {one['tasks_per_s']:,.0f} | {one['share_training']:.0%} "
        f"| {one['peak_gib']:.2f} GiB |"
        for one in sizes
    ]
    return [made_by("train", sizes), "", *rows]


def generate(sizes: Sequence[Size]) -> list[str]:
    lines = [made_by("generate", sizes)]
    for one in sizes:
        runs = one["runs"]
        head = [f"{run['engine']}, {run['workers']}" for run in runs]
        named = " ".join(dict.fromkeys(f"{run['engine']}:{run['workers']}" for run in runs))
        command = f"--tasks {one['tasks']} --runs {named}{'' if 'refresh' in one else ' --no-refresh'}"
        lines += [
            "",
            f"{one['embedded']:,} members, {one['rows']:,} interactions, {one['buckets']} buckets (`{command}`):",
            "",
            "| engine, workers | " + " | ".join(head) + " |",
            "|---|" + "---|" * len(runs),
            _line("from start to end, s", runs, lambda run: f"{run['seconds']:,.1f}"),
            _line("until the first job begins, s", runs, lambda run: f"{run['starting_s']:.1f}"),
            _line("from then on, s", runs, lambda run: f"{run['working_s']:,.1f}"),
            _line("members a second from then on", runs, lambda run: f"{run['tasks'] / run['working_s']:,.0f}"),
            _line("of the jobs' time in the engine", runs, lambda run: f"{run['in_engine']:.1%}"),
            _line("most memory of a process, GiB", runs, lambda run: f"{run['workers_peak_gib']:.2f}"),
            "",
        ]
        for engine, found in one["two_against_one"].items():
            lines.append(
                f"* Two workers against one, {engine}: {found['working_s']:.2f} times as fast once they work, "
                f"{found['seconds']:.2f} times from start to end."
            )
        for workers, found in one["ray_against_local"].items():
            lines.append(
                f"* Ray against local, {workers} worker{'s' if int(workers) > 1 else ''}: {found['working_s']:.2f} of its time "
                f"once it works, {found['seconds']:.2f} from start to end."
            )
        lines.append(
            f"* Published: {one['publish']['bytes'] / 1e6:,.0f} MB in {one['publish']['seconds']:.1f} s, "
            f"{one['publish']['peak_gib']:.2f} GiB."
        )
        if "refresh" in one:
            done = one["refresh"]
            lines.append(
                f"* Refreshed after one member in a hundred acted: {done['tasks']:,} members in {done['seconds']:.1f} s, "
                f"{done['seconds'] / runs[0]['spent']['all']:.1%} of the jobs' time in a generation, and the next such refresh of "
                f"the same process in {done['warm_seconds']:.1f} s; making the windows from the log, once, took {done['windows_s']:.0f} s. {done['peak_gib']:.2f} GiB, with the pages of the windows."
            )
    return lines


def plan(sizes: Sequence[Size]) -> list[str]:
    costs = sizes[0]["costs"]
    lines = [
        f"*Made by `python -m benchmarks.scale --part plan` on {costs['machine']}, {costs['date']}. Seconds of one core.*",
        "",
        "| members | what | planned | measured | planned ÷ measured |",
        "|---|---|---|---|---|",
    ]
    for one in sizes:
        for name, found in one["lines"].items():
            planned, measured = found["planned"], found["measured"]
            lines.append(f"| {one['tasks']:,} | {name} | {planned:,.2f} | {measured:,.2f} | {planned / measured:.2f} |")
    return lines


PAGES: dict[str, tuple[str, Callable[[Sequence[Size]], list[str]]]] = {
    "ingest": ("docs/log.md", ingest),
    "train": ("docs/training.md", train),
    "generate": ("docs/scale.md", generate),
    "plan": ("docs/plan.md", plan),
}


def made_by(part: str, sizes: Sequence[Size]) -> str:
    where = dict.fromkeys(f"{one['machine']}, {one['cores']} cores, {one['date']}" for one in sizes)
    asked = " ".join(str(one["tasks"]) for one in sizes)
    return f"*Made by `python -m benchmarks.scale --part {part} --tasks {asked}` on {'; '.join(where)}.*"


def with_table(page: str, lines: Sequence[str]) -> str:
    """`page` with `lines` between the marks."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"The page has no place for the table: put {BEGIN} and {END} there.")
    return "\n".join([before + BEGIN, *lines, END + after])


def _line(name: str, runs: Sequence[Size], shown: Callable[[Size], str]) -> str:
    return f"| {name} | " + " | ".join(shown(run) for run in runs) + " |"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale --part page", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT, help="the folder that has docs/")
    given = parser.parse_args(arguments)
    for part, (name, table) in PAGES.items():
        file, page = given.results / f"{part}.json", given.docs / name
        if file.exists():
            sizes = json.loads(file.read_text(encoding="utf-8"))["sizes"]
            page.write_text(with_table(page.read_text(encoding="utf-8"), table(sizes)), encoding="utf-8")
            print(f"Written: {page}")
