"""`docs/results.md` and README's table, from the result files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.evidence import more_tables
from benchmarks.evidence.bar import METRIC_TEXT, Difference, differences, holm, lines, losses
from benchmarks.evidence.markdown import head, row, signed
from benchmarks.evidence.results import METRICS, Entry
from benchmarks.evidence.units import version_of
from limaml.evaluate.bootstrap import ALL
from limaml.evaluate.predictions import QUARTILES

__all__ = ["BEGIN", "END", "page", "readme_table", "write_pages"]

BEGIN, END = "<!-- evidence: begin -->", "<!-- evidence: end -->"
Results = Mapping[str, Entry]

PROTOCOL_TEXT = {
    "warm": "each member's last 20 % of rows is the test",
    "new_tasks": "20 % of the members are never trained on; the first half of each one's rows is the support, the second the test",
}


def page(results: Results, pictures: Sequence[str] = ()) -> str:
    """The whole page. `results` is set → what its file holds; `pictures` are the names of those beside the page."""
    compared = {name: result for name, result in results.items() if result["protocols"]}
    sections: list[tuple[str, Iterable[str]]] = [
        ("Where LiMAML loses", _losses(compared)),
        ("What was demanded, and whether it is met", _bar(results)),
        ("The data", _data(results)),
        ("Against wide-and-deep IDs and no personalisation", _main(compared)),
        ("By how much is known of a member", _buckets(compared, pictures)),
        *more_tables.sections(results, pictures),
    ]
    text = [*_lead(results)]
    for title, content in sections:
        found = list(content)
        if found:
            text += ["", f"## {title}", "", *found]
    return "\n".join(text) + "\n"


def _lead(results: Results) -> list[str]:
    first = next(iter(results.values()))
    elsewhere: dict[str, list[str]] = {}
    for name, result in results.items():
        for judged in result["protocols"].values():
            for device in {d for method in judged["methods"].values() for d in method.get("trained_on", [])}:
                elsewhere.setdefault(device, [])
                if name not in elsewhere[device]:
                    elsewhere[device].append(name)
    machines = sorted({f"{r['machine']['cpu']}, {r['machine']['cores']} cores" for r in results.values()})
    versions = first["versions"]
    scale = first["scale"]
    return [
        "# What it is worth: results on real data",
        "",
        "*Made by `python -m benchmarks.evidence --page` from `benchmarks/results/evidence/*.json`, which "
        "`python -m benchmarks.evidence --data DIR` measures; do not edit.*",
        "",
        f"{'; '.join(machines)}; PyTorch {versions['torch']}, limaml {versions['limaml']}; {max(r['date'] for r in results.values())}. "
        f"Every method is searched alike: {scale['trials']} setting{'s' if scale['trials'] > 1 else ''} out of one space (the defaults first), judged by the loss on "
        "validation rows of seed 0 in both protocols; then trained on all training rows for the number of epochs found there, with "
        f"{scale['seeds']} seeds, and judged once on test rows that nothing has seen. Intervals are 95 %, from {scale['replicates']:,} "
        "resamples of the members, paired: they hold the chance of which members are there; the chance in training is averaged over the "
        f"seeds. P-values come from the same resamples and cannot be below 2 / {scale['replicates'] + 1:,}. LiMAML is, on each set, the "
        "solver that the validation rows liked better."
        + "".join(f" Blocks of {', '.join(sets)} were trained on {device}." for device, sets in elsewhere.items()),
        *_earlier(results),
    ]


_PARTS = {"main": ("protocols", "trial"), "ablations": ("ablations", "trial")}
_PARTS |= {part: (part, part) for part in ("replay", "implicit")}
"""Part → what it is in a result file, and the kind whose version counts for it."""


def _earlier(results: Results) -> Iterable[str]:
    """Which parts are of an earlier version of the methods than the others."""
    old = {
        part: [
            name
            for name, result in results.items()
            if result.get(place) and result.get("measured_by", {}).get(part, 0) < version_of(kind)
        ]
        for part, (place, kind) in _PARTS.items()
    }
    told = [f"{part} ({', '.join(names)})" for part, names in old.items() if names]
    if told:
        yield ""
        yield (
            f"Measured with an earlier version of the methods, and to be measured again: {'; '.join(told)}. "
            "[decisions.md](decisions.md#training) says what has changed."
        )


def _losses(results: Results) -> Iterable[str]:
    worse = losses(results)
    compared = sum(
        len(methods) * len(METRICS)
        for result in results.values()
        for judged in result["protocols"].values()
        for methods in [[m for m in judged["deltas"].get(result["picked"], {}) if not m.startswith("limaml")]]
    )
    yield (
        f"All members; of {compared} differences to other methods, {len(worse)} are losses with an interval that excludes zero "
        "(about one in forty would be by chance alone, if nothing differed)."
    )
    if worse:
        yield ""
        yield from head("set", "protocol", "LiMAML is worse than", "metric", "difference", "p")
        order = {"warm": 0, "new_tasks": 1}
        for d in sorted(worse, key=lambda d: (order[d.protocol], d.dataset, d.other)):
            yield row(d.dataset, f"`{d.protocol}`", f"`{d.other}`", METRIC_TEXT[d.metric], interval(d), _p(d.p))
    in_buckets = [
        d
        for bucket in QUARTILES
        for protocol in ("warm", "new_tasks")
        for other in ("base", "wide_and_deep")
        for d in differences(results, protocol, other, bucket)
        if d.worse
    ]
    if in_buckets:
        said = [
            f"{d.dataset} `{d.protocol}` {d.bucket} {METRIC_TEXT[d.metric]} against `{d.other}`" for d in in_buckets
        ]
        yield ""
        yield f"By quarters of activity, against `base` and `wide_and_deep`: {'; '.join(said)}."
    ranked = [
        f"{name} `{protocol}` against `{other}` {more_tables.shown(found['ndcg_10'])}"
        for protocol in ("warm", "new_tasks")
        for name, result in results.items()
        for other, found in result.get("implicit", {})
        .get("protocols", {})
        .get(protocol, {})
        .get("deltas", {})
        .get("limaml_newton", {})
        .items()
        if not other.startswith("limaml") and (found["ndcg_10"][2] or 0) < 0
    ]
    if ranked:
        yield ""
        yield f"With implicit feedback, `limaml_newton` in NDCG@10: {'; '.join(ranked)}."


def _bar(results: Results) -> Iterable[str]:
    yield from head("demand", "met", "found")
    for line in lines(results):
        met = {True: "✓", False: "✗", None: "–"}[line.met]
        yield row(line.demand, met, line.found)


def _data(results: Results) -> Iterable[str]:
    yield from head("set", "", "rows", "members", "items", "label", "positive", "order", "features")
    for name, result in results.items():
        of = result["set"]
        sides = [f.rpartition(" (")[2].rstrip(")") for f in of["features"]]
        features = ", ".join(f"{sides.count(side)} of {_side(side)}" for side in dict.fromkeys(sides)) or "none"
        order = f"`{of['time']}`" if of["time"] else "a seeded shuffle: the set has no times"
        members = f"{of['members']:,}" + (" (sampled)" if of["capped"] else "")
        yield row(
            name,
            of["title"],
            f"{of['rows']:,}",
            members,
            f"{of['items']:,}",
            f"`{of['label']}`",
            f"{of['positive']:.0%}",
            order,
            features,
        )
    yield ""
    for protocol, text in PROTOCOL_TEXT.items():
        yield f"* `{protocol}`: {text}."


def _side(side: str) -> str:
    return "rows" if side == "row" else "members"


def _main(results: Results) -> Iterable[str]:
    for protocol in ("warm", "new_tasks"):
        yield f"**`{protocol}`** ({PROTOCOL_TEXT[protocol]}). AUC / GAUC / log loss:"
        yield ""
        methods = ("base", "wide_and_deep", "limaml_gradient", "limaml_newton")
        yield from head("set", *(f"`{m}`" for m in methods), "picked", "seeds")
        for name, result in results.items():
            judged = result["protocols"].get(protocol)
            if judged is None:
                continue
            cells = [_values(judged["methods"].get(m)) for m in methods]
            picked = (result["picked"] or "–").removeprefix("limaml_")
            yield row(name, *cells, picked, len(judged["seeds"]))
        yield ""
        for other in ("wide_and_deep", "base"):
            if found := differences(results, protocol, other):
                yield f"LiMAML − `{other}`, with 95 % intervals and p-values by Holm's correction over this table:"
                yield ""
                yield from differences_table(found)
                yield ""


def differences_table(found: Sequence[Difference]) -> Iterable[str]:
    """One line per set, a column per metric."""
    corrected = dict(zip(((d.dataset, d.metric) for d in found), holm([d.p for d in found]), strict=True))
    yield from head("set", *(METRIC_TEXT[m] for m in METRICS))
    for name in dict.fromkeys(d.dataset for d in found):
        own = {d.metric: d for d in found if d.dataset == name}
        cells = [f"{interval(own[m])} {mark(own[m])} {_p(corrected[name, m])}" if m in own else "–" for m in METRICS]
        yield row(name, *cells)


def mark(found: Difference) -> str:
    return "✓" if found.better else "✗" if found.worse else "·"


def interval(found: Difference) -> str:
    if found.low is None or found.high is None:
        return f"{signed(found.delta)} (no interval)"
    return f"{signed(found.delta)} [{signed(found.low)}, {signed(found.high)}]"


def _p(p: float | None) -> str:
    return "" if p is None else f"p {p:.3f}" if p >= 0.001 else "p < 0.001"


def _values(found: Entry | None) -> str:
    if found is None:
        return "–"
    numbers = [found["metrics"][ALL][m][0] for m in METRICS]
    return " / ".join("–" if n is None else f"{n:.4f}" for n in numbers)


def _buckets(results: Results, pictures: Sequence[str]) -> Iterable[str]:
    yield (
        "Members of each set in quarters by the number of their support rows, q1 the least active. AUC of LiMAML − "
        "`wide_and_deep` (`warm`) and − `base` (`new_tasks`); the rows of support in brackets."
    )
    for protocol, other in (("warm", "wide_and_deep"), ("new_tasks", "base")):
        picture = f"results-activity-{protocol}.svg"
        if picture in pictures:
            yield from ("", f"![AUC by activity, {protocol}]({picture})")
        yield ""
        yield from head(f"`{protocol}`, − `{other}`", *QUARTILES)
        for name, result in results.items():
            cells = []
            for bucket in QUARTILES:
                found = differences({name: result}, protocol, other, bucket, ("auc",))
                support = result["protocols"].get(protocol, {}).get("support", {}).get(bucket)
                shown = f"{interval(found[0])} {mark(found[0])}" if found else "–"
                cells.append(f"{shown} ({support[0]}–{support[1]})" if support else shown)
            if any(cell != "–" for cell in cells):
                yield row(name, *cells)


def readme_table(results: Results) -> str:
    """The headline of README: between its markers stands exactly this."""
    columns: tuple[tuple[str, str, str, str], ...] = (
        ("`warm`: AUC − wide-and-deep", "warm", "wide_and_deep", "auc"),
        ("GAUC", "warm", "wide_and_deep", "gauc"),
        ("log loss", "warm", "wide_and_deep", "log_loss"),
        ("`new_tasks`: AUC − base", "new_tasks", "base", "auc"),
    )
    scale = next(iter(results.values()))["scale"]
    sets = sum(bool(result["protocols"]) for result in results.values())
    text = [
        f"## On {sets} data sets",
        "",
        f"Every method tuned alike on validation rows, {scale['seeds']} seeds, LiMAML with the solver that validation picked; 95 % intervals",
        "over members. [docs/results.md](docs/results.md) says first where it loses; `make results` measures it all again.",
        "",
        *head("set", *(title for title, *_ in columns)),
    ]
    for name, result in results.items():
        if not result["protocols"]:
            continue
        cells = []
        for _, protocol, other, metric in columns:
            found = differences({name: result}, protocol, other, metrics=(metric,))
            cells.append(f"{interval(found[0])} {mark(found[0])}" if found else "–")
        text.append(row(result["set"]["title"], *cells))
    return "\n".join(text)


def with_table(readme: str, results: Results) -> str:
    """README with the table between its markers; without markers it is as it was."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{readme_table(results)}\n{end}{after}" if begin and end else readme


def write_pages(
    results: Results, page_path: Path, readme_path: Path | None, draw: Callable[[Results], Mapping[str, str]]
) -> list[Path]:
    """Write the page, its pictures and README's table; the paths that were written."""
    drawn = draw(results)
    written = []
    page_path.parent.mkdir(parents=True, exist_ok=True)
    for name, svg in drawn.items():
        (page_path.parent / name).write_text(svg, "utf-8")
        written.append(page_path.parent / name)
    page_path.write_text(page(results, tuple(drawn)), "utf-8")
    written.append(page_path)
    if readme_path is not None:
        readme_path.write_text(with_table(readme_path.read_text("utf-8"), results), "utf-8")
        written.append(readme_path)
    return written
