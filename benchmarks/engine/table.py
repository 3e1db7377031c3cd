"""The results as a page of Markdown, made from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["TARGETS", "page"]

Entry = dict[str, Any]

TARGETS: dict[tuple[str, bool], dict[str, tuple[float, float, float]]] = {
    ("generate", True): {"small": (30, 4, 5), "large": (15, 6, 5)},
    ("generate", False): {"small": (10, 4, 5), "large": (10, 4, 5)},
    ("train", True): {"small": (30, 8, 3), "large": (15, 8, 3)},
}
"""(work, capped) → size → times the fastest loop, times the best vmap, vmap's memory over limaml's. K = 3."""

PEAK_TARGET = {"generate": 0.75, "train": 0.45}

OURS, UNSHARED = "limaml", "limaml, rows not shared"


def page(results: dict[str, Any]) -> str:
    """The whole page. `results` is what `benchmarks/results/engine.json` holds."""
    machine, entries = results["machine"], results["cases"]
    peak = results["gemm_peak_flops"]
    lines = [
        "# The adaptation engine against its peers",
        "",
        "*Made by `" + results["command"] + "` from `benchmarks/results/engine.json`; do not edit.*",
        "",
        f"Machine: {machine['cpu']}, {results['threads']} thread{'s' if results['threads'] > 1 else ''} of {machine['cores']}, "
        f"{machine['memory_gib']:.0f} GiB. {results['date']}. "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + f". Matrix products, float32, best seen: {peak / 1e9:.0f} GFLOP/s.",
        "",
        f"Work: {results['source']}. Every contender is given the same tasks, and its result was checked against limaml's "
        f"(largest relative difference {max(e['relative_error'] for e in entries):.0e}). `generate`: the meta embeddings. "
        "`train`: value and second-order gradient of the query loss by all parameters; a task's rows fall to support and query "
        "in turn. K: inner steps. Times are medians of interleaved runs.",
        "",
        "* Loop peers take one task at a time; they run every "
        f"{results['plan']['every']}th task in the order of support sizes, which has the same distribution.",
        "* vmap is given as many tasks at once as fit an estimated 3 GiB (*in flight*), and where supports are uncapped the padded "
        "one runs one chunk, padded to the longest support of the batch.",
        "* *rows not shared*: each row is encoded by itself, so that arithmetic is comparable; *of peak* is the share of the "
        "machine's matrix-multiply peak, counting the products that are left.",
        "* Memory: the process's peak resident size above what it was before, each contender in a process of its own, on one "
        "thread, at K = 3.",
    ]
    if results["missing"]:
        lines += ["", *(f"* {sentence}" for sentence in results["missing"])]
    lines += ["", "## Against the targets (K = 3)", "", *_targets(entries, peak)]
    if results.get("profile"):
        lines += ["", "## Where limaml's time goes (K = 3)", "", *_profile(results["profile"], entries, peak)]
    for (cap, size, work), group in _grouped(entries, "cap", "size", "work"):
        support = "uncapped" if cap is None else f"support ≤ {cap}"
        lines += ["", f"## {work}, {support}, {size}", "", *_contenders(group, peak)]
    if results["scaling"]:
        lines += ["", "## How limaml's time grows (generate, K = 3)", "", *_scaling(results["scaling"])]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), _row("---" for _ in cells)]


def _grouped(entries: Sequence[Entry], *keys: str) -> list[tuple[tuple[Any, ...], list[Entry]]]:
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[key] for key in keys), []).append(entry)
    return list(groups.items())


def _best(group: Sequence[Entry], kind: str) -> Entry | None:
    return max((e for e in group if e["kind"] == kind), key=lambda e: e["tasks_per_second"], default=None)


def _named(group: Sequence[Entry], name: str) -> Entry:
    return next(e for e in group if e["contender"] == name)


def _ratio(ours: Entry, other: Entry | None, target: float | None) -> str:
    if other is None:
        return "–"
    ratio = ours["tasks_per_second"] / other["tasks_per_second"]
    met = "" if target is None else f" ({'✓' if ratio >= target else '✗'} {target:g})"
    return f"{ratio:.1f}×{met}, {other['contender']}"


def _memory(ours: Entry, group: Sequence[Entry], target: float | None) -> str:
    """vmap's peak over ours, for the fastest vmap."""
    other = _best(group, "vmap")
    if other is None or not other["peak_bytes"] or not ours["peak_bytes"]:
        return "–"
    ratio = other["peak_bytes"] / ours["peak_bytes"]
    met = "" if target is None else f" ({'✓' if ratio >= target else '✗'} {target:g})"
    return f"1/{ratio:.1f}{met}"


def _share(entry: Entry, peak: float) -> float:
    return float(entry["flops"] / entry["seconds"] / peak)


def _targets(entries: Sequence[Entry], peak: float) -> list[str]:
    lines = _head(
        [
            "case",
            "tasks/s",
            "against the fastest loop",
            "against the best vmap",
            "memory of that vmap",
            "of peak, rows not shared",
        ]
    )
    for (cap, size, work), group in _grouped([e for e in entries if e["steps"] == 3], "cap", "size", "work"):
        ours, unshared = _named(group, OURS), _named(group, UNSHARED)
        loop, vmap, memory = TARGETS.get((work, cap is not None), {}).get(size, (None, None, None))
        share = _share(unshared, peak)
        lines.append(
            _row(
                [
                    f"{work}, {'uncapped' if cap is None else f'support ≤ {cap}'}, {size}",
                    f"{ours['tasks_per_second']:,.0f}",
                    _ratio(ours, _best(group, "loop"), loop),
                    _ratio(ours, _best(group, "vmap"), vmap),
                    _memory(ours, group, memory),
                    f"{share:.0%} ({'✓' if share >= PEAK_TARGET[work] else '✗'} {PEAK_TARGET[work]:.0%})",
                ]
            )
        )
    return lines


def _profile(profiles: Sequence[Entry], entries: Sequence[Entry], peak: float) -> list[str]:
    """Shares of the time, and what would be reached if the products alone were left and ran at the machine's peak."""
    groups = list(profiles[0]["shares"])
    limits = {
        _case_name(*key): max(e["tasks_per_second"] for e in group if e["kind"] == "loop")
        for key, group in _grouped([e for e in entries if e["steps"] == 3], "cap", "size", "work")
        if any(e["kind"] == "loop" for e in group)
    }
    lines = [
        "One run under `torch.profiler`. *Limit*: limaml's matrix products alone, at the machine's peak, against the fastest "
        "loop of the table above: no way to carry out this arithmetic is further ahead of it.",
        "",
        *_head(["case", *groups, "products at peak", "limit"]),
    ]
    for entry in profiles:
        name = entry["case"].rpartition(", K = ")[0]
        least = entry["flops"] / peak
        limit = f"{entry['tasks'] / least / limits[name]:.0f}×" if name in limits else "–"
        shares = [f"{share:.0%}" for share in entry["shares"].values()]
        lines.append(_row([name, *shares, f"{least * 1e3:.1f} of {entry['seconds'] * 1e3:.1f} ms", limit]))
    return lines


def _case_name(cap: int | None, size: str, work: str) -> str:
    return f"{work}, {'uncapped' if cap is None else f'support ≤ {cap}'}, {size}"


def _contenders(group: Sequence[Entry], peak: float) -> list[str]:
    steps = sorted({entry["steps"] for entry in group})
    lines = _head(
        [
            "",
            *(f"K = {k}: tasks/s" for k in steps),
            *(f"K = {k}: limaml is" for k in steps),
            "in flight",
            "memory",
            "of peak",
        ]
    )
    for (name,), mine in _grouped(group, "contender"):
        by_steps = {entry["steps"]: entry for entry in mine}
        ours = {entry["steps"]: entry for entry in group if entry["contender"] == OURS}
        last = by_steps.get(3, mine[-1])
        lines.append(
            _row(
                [
                    name,
                    *(f"{by_steps[k]['tasks_per_second']:,.0f}" for k in steps),
                    *(f"{ours[k]['tasks_per_second'] / by_steps[k]['tasks_per_second']:.1f}×" for k in steps),
                    last["tasks_in_flight"],
                    f"{last['peak_bytes'] / 2**20:,.0f} MiB" if last["peak_bytes"] is not None else "–",
                    f"{_share(last, peak):.0%}" if last["flops"] else "–",
                ]
            )
        )
    return lines


def _scaling(entries: Sequence[Entry]) -> list[str]:
    threads = sorted({entry["threads"] for entry in entries})
    lines: list[str] = []
    for (against,), group in _grouped(entries, "against"):
        lines += [
            "",
            *_head([against, *(f"seconds, {n} thread{'s' if n > 1 else ''}" for n in threads), *_extra_heads(against)]),
        ]
        for (value,), mine in _grouped(group, "value"):
            seconds = {entry["threads"]: entry["seconds"] for entry in mine}
            lines.append(
                _row([f"{value:,}", *(f"{seconds[n]:.4f}" for n in threads), *_extra(against, mine[0], seconds)])
            )
    return lines[1:]


def _extra_heads(against: str) -> list[str]:
    if against == "meta width":
        return ["tasks × parameters", "GFLOP done"]
    return ["µs a task", "µs a row"]


def _extra(against: str, entry: Entry, seconds: dict[int, float]) -> list[str]:
    if against == "meta width":
        done = "–" if entry["flops"] is None else f"{entry['flops'] / 1e9:.2f}"
        return [f"{entry['tasks'] * entry['meta_parameters'] / 1e6:,.1f} M", done]
    first = seconds[min(seconds)]
    return [f"{first / entry['tasks'] * 1e6:.1f}", f"{first / max(1, entry['rows']) * 1e6:.2f}"]
