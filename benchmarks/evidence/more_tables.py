"""The page's further sections: rivals, ablations, replay, cost, and what was tuned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.evidence.bar import HISTORY
from benchmarks.evidence.markdown import head, row, signed
from benchmarks.evidence.replays import delta_of, value_of
from benchmarks.evidence.results import HALVES, METRICS, Entry
from limaml.evaluate.bootstrap import ALL
from limaml.evaluate.summary import LOWER_IS_BETTER

__all__ = ["sections", "shown"]

Results = Mapping[str, Entry]
Delta = Sequence[float | None]
ADDED = ("limaml_history", "history_attention")


def sections(results: Results, pictures: Sequence[str]) -> list[tuple[str, Iterable[str]]]:
    """Title → lines; a section without lines is left out."""
    compared = {name: result for name, result in results.items() if result["protocols"]}
    return [
        ("Against stronger baselines", _rivals(compared)),
        ("Ablations", _ablations(compared)),
        ("Replay: freshness, and what it costs", _replay(results, pictures)),
        ("Implicit feedback: all candidates ranked", _implicit(results)),
        ("What a training costs", _cost(compared)),
        ("What was tuned", _tuned(compared)),
        ("How to make it again", _again()),
    ]


def shown(found: Delta | None, metric: str = "auc") -> str:
    """A difference with its interval and a mark for what it means."""
    if found is None or found[0] is None:
        return "–"
    delta, low, high = found[0], found[1], found[2]
    if low is None or high is None:
        return f"{signed(delta)} (no interval)"
    sure = low > 0 or high < 0
    good = (delta < 0) == (metric in LOWER_IS_BETTER)
    return f"{signed(delta)} [{signed(low)}, {signed(high)}] {('✓' if good else '✗') if sure else '·'}"


def _rivals(results: Results) -> Iterable[str]:
    names: dict[str, None] = {}
    for result in results.values():
        for judged in result["protocols"].values():
            names |= dict.fromkeys(judged["methods"])
    others = [m for m in names if m not in ("base", "wide_and_deep", "limaml_gradient", "limaml_newton")]
    if not others:
        return
    yield (
        "Each is searched with the same budget and tested with the same seeds. AUC, then (LiMAML − it) in AUC: ✓ where LiMAML is "
        "better with an interval above zero, ✗ where it is worse. *less active half*: the same among the half of the members with "
        "fewer support rows."
    )
    for protocol in ("warm", "new_tasks"):
        there = {n: r for n, r in results.items() if protocol in r["protocols"]}
        yield ""
        yield from head(f"`{protocol}`", *there)
        for method in others:
            cells = [_beside(result, protocol, method, ALL) for result in there.values()]
            if any(cell != "–" for cell in cells):
                yield row(f"`{method}`", *cells)
                if method in HISTORY:
                    half = [_beside(result, protocol, method, HALVES[0]) for result in there.values()]
                    yield row(f"`{method}`, less active half", *half)
    if any(ADDED[0] in judged["methods"] for result in results.values() for judged in result["protocols"].values()):
        yield ""
        yield "A meta block beside an attention over the history, against the same attention without it (AUC):"
        yield ""
        yield from head("set", "`warm`", "`new_tasks`")
        for name, result in results.items():
            found = [
                result["protocols"]
                .get(p, {})
                .get("deltas", {})
                .get(ADDED[0], {})
                .get(ADDED[1], {})
                .get(ALL, {})
                .get("auc")
                for p in ("warm", "new_tasks")
            ]
            yield row(name, *(shown(delta) for delta in found))


def _beside(result: Entry, protocol: str, method: str, bucket: str) -> str:
    judged = result["protocols"][protocol]
    if method not in judged["methods"]:
        return "–"
    value = judged["methods"][method]["metrics"][bucket]["auc"][0]
    delta = judged["deltas"].get(result["picked"], {}).get(method, {}).get(bucket, {}).get("auc")
    return f"{'–' if value is None else f'{value:.4f}'}; {shown(delta)}"


def _ablations(results: Results) -> Iterable[str]:
    there = {name: _changing(result.get("ablations", ())) for name, result in results.items()}
    there = {name: entries for name, entries in there.items() if entries}
    if not there:
        return
    yield (
        "One thing changed at a time, upon the settings that validation chose; the number of epochs is found anew. Differences to "
        "the unchanged method on the same seeds, AUC and log loss: ✓ better, ✗ worse. A zero without width is the unchanged method "
        "itself, or what comes to the same (rates by step and by layer, where one layer is adapted). *Stored as* and *uncertainty* "
        "read the same trained models in another way."
    )
    for name, entries in there.items():
        yield ""
        yield f"**{results[name]['set']['title']}**"
        yield ""
        columns = [f"`{p}` {text}" for p in ("warm", "new_tasks") for text in ("AUC", "log loss")]
        yield from head("what", "solver", "variant", *columns, "CPU s")
        for entry in sorted(entries, key=lambda e: (e["topic"], e["method"])):
            cells = [
                shown(entry["protocols"].get(protocol, {}).get(metric, {}).get("delta"), metric)
                for protocol in ("warm", "new_tasks")
                for metric in ("auc", "log_loss")
            ]
            cost = f"{entry['cpu_seconds']:.0f}" if "cpu_seconds" in entry else ""
            yield row(entry["topic"], entry["method"].removeprefix("limaml_"), entry["label"], *cells, cost)


def _changing(entries: Sequence[Entry]) -> list[Entry]:
    """Those of topics in which more than the unchanged method was measured."""
    topics = {(e["topic"], e["method"]) for e in entries if any(_differs(p) for p in e["protocols"].values())}
    return [e for e in entries if (e["topic"], e["method"]) in topics]


def _differs(protocol: Mapping[str, Any]) -> bool:
    """Whether a variant differs from the unchanged method."""
    return any(found["delta"][:3] != [0, 0, 0] for found in protocol.values())


def _replay(results: Results, pictures: Sequence[str]) -> Iterable[str]:
    there = {name: result["replay"] for name, result in results.items() if "replay" in result}
    if not there:
        return
    yield (
        "The past is trained on; then each period is served with what was known before it, and taken in. All policies begin with "
        "the same first training of their family, with default settings. *Cost*: processor seconds after the first training, as a "
        "share of those of wide-and-deep IDs retrained each period. LiMAML takes new rows in without the old ones, a Newton step upon what "
        "was known ([recursive.md](recursive.md)); what streams does so many times a period."
    )
    for name, result in there.items():
        yield ""
        periods = result["periods"]
        yield (
            f"**{results[name]['set']['title']}**: {result['train_rows']:,} rows of the past, {len(periods)} periods of about "
            f"{result['period_length']}, {result['seeds']} seed{'s' if result['seeds'] > 1 else ''}."
        )
        if f"results-age-{name}.svg" in pictures:
            yield from ("", f"![Quality by age of the embeddings on {name}](results-age-{name}.svg)")
        yield ""
        yield from head(
            "policy", "AUC", "GAUC", "log loss", "AUC − `limaml_never`", "AUC − wide-and-deep retrained", "cost"
        )
        for policy in result["policies"]:
            values = [value_of(result, policy, metric) for metric in METRICS]
            cost = _share(result["cost_ratio"].get(policy))
            deltas = [delta_of(result, policy, other, "auc") for other in ("limaml_never", "wide_and_deep_retrained")]
            yield row(
                f"`{policy}`", *("–" if v is None else f"{v:.4f}" for v in values), *(shown(d) for d in deltas), cost
            )
        yield from _slices(result)
    rated = {name: result["by_rate"] for name, result in there.items() if "by_rate" in result}
    if rated:
        yield ""
        yield "**How often to refresh** members and items: AUC − wide-and-deep retrained, and the cost, by refreshes in each period."
        yield ""
        numbers = sorted({rate["refreshes"] for rates in rated.values() for rate in rates})
        yield from head("set", *map(str, numbers))
        for name, rates in rated.items():
            by_number = {
                rate["refreshes"]: f"{shown(tuple(rate['auc']))}, {_share(rate['cost_ratio'])}" for rate in rates
            }
            yield row(results[name]["set"]["title"], *(by_number.get(number, "–") for number in numbers))


def _share(ratio: float | None) -> str:
    return "–" if ratio is None else "0" if ratio == 0 else f"1/{1 / ratio:.0f}" if ratio < 0.5 else f"{ratio:.2f}"


def _slices(result: Entry) -> Iterable[str]:
    """Where it matters most: members and items that came during the replay."""
    wanted = {
        "replay_new_tasks": "new members",
        "replay_known_tasks": "known members",
        "replay_new_rows": "new items",
        "replay_least_active": "less active half",
    }
    protocols = [p for p in wanted if any(v["protocol"] == p for v in result["values"])]
    if not protocols:
        return
    yield ""
    yield from head("AUC", *(wanted[p] for p in protocols))
    for policy in result["policies"]:
        values = [value_of(result, policy, "auc", p) for p in protocols]
        yield row(f"`{policy}`", *("–" if v is None else f"{v:.4f}" for v in values))


def _implicit(results: Results) -> Iterable[str]:
    there = {name: result for name, result in results.items() if "implicit" in result}
    if not there:
        return
    negatives = next(iter(there.values()))["implicit"]["negatives"]
    yield (
        f"What members chose (the label's rule) is all that is known; {negatives} negatives are sampled for each choice, uniformly "
        "among what was known then. Each member's later choices are looked for among all items, those of the support left out. "
        "Default settings, epochs by validation. NDCG@10 / recall@20 / MRR, then the difference in NDCG@10 of `limaml_newton`."
    )
    for protocol in ("warm", "new_tasks"):
        own = {
            n: r["implicit"]["protocols"][protocol] for n, r in there.items() if protocol in r["implicit"]["protocols"]
        }
        if not own:
            continue
        methods = dict.fromkeys(m for judged in own.values() for m in judged["methods"])
        yield ""
        yield from head(f"`{protocol}`", *own)
        for method in methods:
            cells = []
            for judged in own.values():
                found = judged["methods"].get(method)
                values = [] if found is None else [v[0] for v in found["metrics"].values()]
                delta = judged["deltas"].get("limaml_newton", {}).get(method, {}).get("ndcg_10")
                text = " / ".join("–" if v is None else f"{v:.4f}" for v in values) or "–"
                cells.append(text if delta is None else f"{text}; {shown(delta)}")
            yield row(f"`{method}`", *cells)


def _cost(results: Results) -> Iterable[str]:
    methods: dict[str, None] = {}
    for result in results.values():
        for judged in result["protocols"].values():
            methods |= dict.fromkeys(judged["methods"])
    yield "Processor seconds to train on all training rows and to score the test, `warm`, one thread, with the settings chosen (epochs in brackets)."
    yield ""
    yield from head("method", *results)
    for method in methods:
        cells = []
        for result in results.values():
            found = result["protocols"].get("warm", {}).get("methods", {}).get(method)
            cells.append(f"{found['cpu_seconds']:.0f} ({found['epochs']})" if found else "–")
        yield row(f"`{method}`", *cells)


def _tuned(results: Results) -> Iterable[str]:
    yield (
        "The settings that validation chose, per method and set, out of the trials that were made; *default*: the first trial, "
        "which changes nothing, was the best. Loss: mean over both protocols on validation rows."
    )
    yield ""
    yield from head("set", "method", "trials", "loss, default", "loss, chosen", "settings")
    for name, result in results.items():
        for method, chosen in result["chosen"].items():
            trials = chosen["trials"]
            failed = sum(t["loss"] is None for t in trials)
            made = f"{len(trials)}" + (f" ({failed} failed)" if failed else "")
            values = (
                ", ".join(f"{k.partition('.')[2]} {_short(v)}" for k, v in chosen["settings"].items()) or "*default*"
            )
            yield row(name, f"`{method}`", made, _loss(trials[0]["loss"]), _loss(chosen["loss"]), values)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _again() -> Iterable[str]:
    yield "```"
    yield "make results                                        # all of it, from LIMAML_DATA=DIR; may be killed, and goes on"
    yield "python -m benchmarks.evidence --data DIR --quick    # in small: about 20 minutes on 2 cores"
    yield "python -m benchmarks.evidence --data DIR --part main --sets ml-100k    # the first tables, one set"
    yield "python -m benchmarks.evidence --data DIR --part replay                 # the replay"
    yield "python -m benchmarks.evidence --data DIR --part implicit               # choices ranked"
    yield "python -m benchmarks.evidence --data DIR --part ablations              # the ablations"
    yield "python -m benchmarks.evidence --page                # this page, from the result files"
    yield "```"
    yield ""
    yield (
        "`DIR` holds a folder per set with `interactions.parquet` (and `users.parquet`, `items.parquet`). Another set is a folder "
        "with a `set.yaml` in it, of the form of `benchmarks/evidence/sets.yaml`."
    )
