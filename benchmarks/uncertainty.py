"""`python -m benchmarks.uncertainty`: are the logits' standard deviations right, on members that nothing was fitted on?

Members are dealt into three groups: a model is trained on one half; the scale is found on a quarter; on the other quarter
everything is measured. Of each measured member the first k rows are the support, and the rows from the 41st on are *later*
rows. Writes `benchmarks/results/uncertainty.json`, `docs/uncertainty.md` and a picture. About a minute on one thread.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limaml.config import parse_config
from limaml.interactions import Encoder, catalog, index_interactions, prepare
from limaml.meta import MetaLearner, MetaModel, Posterior, build_meta_model, calibrate, fit, logit_sd
from limaml.tasks import Split, TaskRows
from limaml.types import Interactions

ROOT = Path(__file__).resolve().parents[1]
TASK = "user_id"
SUPPORTS = (0, 5, 10, 20, 40)
LATER = max(SUPPORTS)  # rows from here on are later rows
LEAST = 2 * LATER  # rows of a measured member
LEVELS = (0.5, 0.8, 0.95)
DRAWS = 40


@dataclass(frozen=True)
class World:
    """A trained model, its rows, and which group each member is of: 0 trained on, 1 for the scale, 2 measured."""

    model: MetaModel
    data: Interactions
    group: Tensor  # (members,)
    rank: Tensor  # (rows,): how many rows of its member are older
    source: str
    epochs: int

    def members(self, group: int) -> Tensor:
        """Mask of the rows of a group's members that have rows enough, `[rows]`."""
        size = torch.bincount(self.data.index[TASK], minlength=len(self.group))
        return ((self.group == group) & (size >= LEAST))[self.data.index[TASK]]

    def embed(self, support: Tensor) -> Posterior:
        return self.model.embed(
            self.data, TASK, TaskRows.of(self.data.index[TASK], len(self.group), support), uncertainty=True
        )


def trained(folder: Path | None, members: int, seed: int) -> World:
    """A model with default settings, trained on half of the members; early stopping looks at the scale's quarter."""
    if folder is None:
        found = catalog.get("ml-100k")
        paths, moment, source = (found.interactions, found.task_features, found.row_features), found.time, found.title
    else:
        paths = (folder / "interactions.parquet", folder / "users.parquet", folder / "items.parquet")
        moment, source = None, f"MovieLens-1M ({folder.name})"
    prepared = prepare(
        paths[0],
        task=[TASK],
        row="item_id",
        time=moment,
        label=["rating >= 4"],
        task_features=paths[1],
        row_features=paths[2],
        max_tasks=members,
        exclude=() if moment else ("siren_fold", "orig_row"),
    )
    plain = index_interactions(prepared.frame, prepared.schema)
    count = plain.count(TASK)
    group = torch.zeros(count, dtype=torch.int64)
    dealt = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    group[dealt[count // 2 : 3 * count // 4]], group[dealt[3 * count // 4 :]] = 1, 2
    train = group[plain.index[TASK]] == 0
    encoder = Encoder.fit(prepared.frame, prepared.schema, train)
    data = encoder.encode(prepared.frame)
    grouped = TaskRows.of(data.index[TASK], count)
    rank = torch.empty(len(data), dtype=torch.int64)
    rank[grouped.rows] = torch.arange(len(data)) - torch.repeat_interleave(grouped.offset[:-1], grouped.size)
    config = parse_config({"adapt": {"max_support": None}, "train": {"seed": seed}})
    torch.manual_seed(seed)
    losses = [label.loss for label in prepared.schema.labels]
    model = build_meta_model(encoder.specs, [TASK], losses, config.model, config.adapt)
    late = rank >= grouped.size[data.index[TASK]] // 2
    watched = group[data.index[TASK]] == 1
    validation = Split("new_tasks", TASK, train, train | (watched & ~late), watched & late)
    history = fit(MetaLearner(model, data, train, config.train, validation), config.train)
    return World(model, data, group, rank, source, history.best)


def measured(world: World) -> dict[str, Any]:
    """The scale of the second group, and what becomes of it on the third."""
    own = world.members(1)
    # The scale is found on supports of all sizes at once: a member's size is drawn by its position.
    size = torch.tensor(SUPPORTS)[torch.arange(len(world.group)) % len(SUPPORTS)][world.data.index[TASK]]
    none = torch.zeros_like(own)
    judged = own & (world.rank >= LATER)
    scale = calibrate(world.model, world.data, Split("scale", TASK, none, own & (world.rank < size), judged))
    entries, pooled = [], []
    for support in SUPPORTS:
        entry, rows = _one_support(world, support, scale)
        entries.append(entry)
        pooled.append(rows)
    rows = {name: torch.cat([part[name] for part in pooled]) for name in pooled[0]}
    return {"scale": scale, "supports": entries, "quantiles": _by_sd(rows)}


def _one_support(world: World, support: int, scale: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model, data = world.model, world.data
    own = world.members(2)
    later = own & (world.rank >= LATER)
    judged = later & (world.rank % 2 == 0)  # in neither support
    rows = judged.nonzero().flatten()
    short = world.embed(own & (world.rank < support))
    long = world.embed(own & ((world.rank < support) | (later & ~judged)))
    logits, after = (model.predict(data, rows, {TASK: p.mean})[:, 0].double() for p in (short, long))
    sd, sd_after = (scale * logit_sd(model, data, rows, {TASK: p})[:, 0].double() for p in (short, long))
    label = data.labels[rows, 0].double()
    # What is known later is a part of what is unknown now: Var(later − now) = sd² − sd_later².
    moved, expected = after - logits, (sd**2 - sd_after**2).clamp(min=1e-12).sqrt()
    likes = {
        name: _coverage(_places(world, rows, short, label, factor))
        for name, factor in (("scaled", scale), ("none", 0.0))
    }
    best = calibrate(model, data, Split("held out", TASK, judged & ~judged, own & (world.rank < support), later))
    entry = {
        "support": support,
        "rows": len(rows),
        "members": int(torch.unique(data.index[TASK][rows]).numel()),
        "sd": float(sd.mean()),
        "sd_low_high": [float(sd.quantile(0.1)), float(sd.quantile(0.9))],
        "moved": float(moved.square().mean().sqrt()),
        "expected": float(expected.square().mean().sqrt()),
        "moved_coverage": _coverage(torch.special.ndtr(moved / expected)),
        "likes_coverage": likes,
        "best_scale": best,
    }
    return entry, {"logits": logits, "sd": sd, "label": label}


def _places(world: World, rows: Tensor, posterior: Posterior, label: Tensor, scale: float) -> Tensor:
    """Where each member's number of liked later rows lies in its predicted distribution, 0 … 1, `[members]`.

    The distribution: draws of z; for each, the number of likes is about normal.
    """
    owner = torch.unique(world.data.index[TASK][rows], return_inverse=True)[1]
    generator, draws = torch.Generator().manual_seed(0), DRAWS if scale else 1

    def per_member(values: Tensor) -> Tensor:
        return values.new_zeros(int(owner.max()) + 1).index_add(0, owner, values)

    place = torch.zeros(int(owner.max()) + 1, dtype=torch.float64)
    for _ in range(draws):
        z = posterior.sample(scale, generator)
        p = torch.sigmoid(world.model.predict(world.data, rows, {TASK: z})[:, 0].double())
        place += torch.special.ndtr((per_member(label) - per_member(p)) / per_member(p * (1 - p)).sqrt()) / draws
    return place


def _coverage(places: Tensor) -> list[float]:
    """Share of the places that lie in the central interval of each level."""
    return [float(((places - 0.5).abs() <= level / 2).double().mean()) for level in LEVELS]


def _by_sd(rows: Mapping[str, Tensor], parts: int = 5) -> list[dict[str, float]]:
    """Fifths of the rows by sd: what was predicted, what came, and the log loss without and with the sd in it."""
    found = []
    for part in torch.tensor_split(rows["sd"].argsort(), parts):
        logits, sd, label = (rows[name][part] for name in ("logits", "sd", "label"))
        wider = logits / torch.sqrt(1 + math.pi / 8 * sd**2)  # E σ(ℓ), ℓ ~ N(logits, sd²), to a good approximation
        found.append(
            {
                "sd": float(sd.mean()),
                "predicted": float(torch.sigmoid(logits).mean()),
                "liked": float(label.mean()),
                "log_loss": float(_log_loss(logits, label)),
                "log_loss_averaged": float(_log_loss(wider, label)),
            }
        )
    return found


def _log_loss(logits: Tensor, label: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, label)


# ---- the page and the picture -------------------------------------------------------------------------------------------


def page(results: Mapping[str, Any]) -> str:
    """`docs/uncertainty.md`, from what the JSON holds."""
    supports, members = results["supports"], results["supports"][0]["members"]

    def row(*cells: object) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    def shares(values: list[float]) -> str:
        return " / ".join(f"{value:.0%}" for value in values)

    lines = [
        "# Are the standard deviations right?",
        "",
        f"*Made by `{results['command']}` from `benchmarks/results/uncertainty.json`; do not edit. How to use them: "
        "[exploration.md](exploration.md).*",
        "",
        f"{results['source']}, like = rating ≥ 4, {results['members']:,} members{results['order']}. A model with default settings "
        f"(solver `newton`) was trained on half of the members. On a quarter, `calibrate` found the scale "
        f"**{results['scale']:.2f}**: the model's own sd is right to {abs(results['scale'] - 1):.0%}. Everything below is of the "
        f"last quarter, {members} members with at least {LEAST} rows, which neither the model nor the scale has seen. Support: a "
        f"member's first k rows. Later rows: from the {LATER + 1}st on. All sd are scaled. {results['date']}, "
        f"{results['seconds']:.0f} s.",
        "",
        "## Against what a long history says",
        "",
        "Half of a member's later rows are added to the support; on the other half, the logit moves. A right sd says how far: its "
        "variance falls by as much as the logit's move has. *Within* are the shares of moves inside the central 50 %, 80 % and "
        "95 % interval. *Best scale*: what `calibrate` finds on these members themselves, for this k.",
        "",
        row("k", "sd (10 % … 90 %)", "moved, expected", "moved, found", "within 50 / 80 / 95 %", "best scale"),
        row(*["---"] * 6),
        *(
            row(
                e["support"],
                f"{e['sd']:.2f} ({e['sd_low_high'][0]:.2f} … {e['sd_low_high'][1]:.2f})",
                f"{e['expected']:.3f}",
                f"{e['moved']:.3f}",
                shares(e["moved_coverage"]),
                f"{e['best_scale']:.2f}",
            )
            for e in supports
        ),
        "",
        "## Against the labels alone",
        "",
        "How many of a member's later rows are liked? The predicted distribution of that number, with the member's z drawn from its "
        "posterior, against the same without uncertainty (coin tosses with probability σ(mean)). Shares of members whose number "
        "lies in the central interval.",
        "",
        row("k", "with the sd: 50 / 80 / 95 %", "without: 50 / 80 / 95 %"),
        row(*["---"] * 3),
        *(
            row(e["support"], shares(e["likes_coverage"]["scaled"]), shares(e["likes_coverage"]["none"]))
            for e in supports
        ),
        "",
        "![Coverage](uncertainty.png)",
        "",
        "## Probabilities: leave them alone",
        "",
        "All k together, later rows in fifths by sd. σ(mean) is what the outer loop trains to be right on average; averaging σ over "
        "the sd corrects it a second time. Where the last column is the larger one that makes predictions worse: the sd is for "
        "exploring and for intervals, not for the prediction of one row.",
        "",
        row("sd", "predicted", "liked", "log loss of σ(mean)", "log loss of the average of σ"),
        row(*["---"] * 5),
        *(
            row(
                f"{q['sd']:.2f}",
                f"{q['predicted']:.3f}",
                f"{q['liked']:.3f}",
                f"{q['log_loss']:.4f}",
                f"{q['log_loss_averaged']:.4f}",
            )
            for q in results["quantiles"]
        ),
    ]
    return "\n".join(lines) + "\n"


def picture(results: Mapping[str, Any]) -> Any:
    """Nominal against found coverage, for moves of the logit and for numbers of likes."""
    from plotly.subplots import make_subplots

    titles = ("the logit's move, when more is known", "number of liked later rows")
    figure = make_subplots(cols=2, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.06)
    colours = ["#0b4f6c", "#01868b", "#4f9d69", "#d98e04", "#b3541e"]
    levels = [100 * level for level in LEVELS]
    for column in (1, 2):
        figure.add_scatter(
            x=[40, 100], y=[40, 100], mode="lines", line={"color": "#999", "dash": "dot"}, showlegend=False, col=column, row=1
        )  # fmt: skip
    for entry, colour in zip(results["supports"], colours, strict=True):
        name = f"k = {entry['support']}"
        for column, values, dash in (
            (1, entry["moved_coverage"], "solid"),
            (2, entry["likes_coverage"]["scaled"], "solid"),
            (2, entry["likes_coverage"]["none"], "dash"),
        ):
            figure.add_scatter(
                x=levels,
                y=[100 * value for value in values],
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                name=name + (", without sd" if dash == "dash" else ""),
                showlegend=column == 2,
                row=1,
                col=column,
            )
    figure.update_layout(template="plotly_white", width=980, height=430, margin={"l": 60, "r": 10, "t": 40, "b": 50})
    figure.update_xaxes(title_text="interval, %", tickvals=levels, range=[40, 100])
    figure.update_yaxes(range=[0, 103])
    figure.update_yaxes(title_text="members or rows within it, %", col=1)
    return figure


def _screenshot(html: Path, png: Path) -> bool:
    """A PNG of the page, where a browser is at hand."""
    binary = next(
        (p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None
    )
    driver = shutil.which("chromedriver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        return False
    if binary is None or driver is None:
        return False
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser.set_window_size(1000, 600)
        browser.get(html.resolve().as_uri())
        browser.find_element("css selector", ".plotly-graph-div").screenshot(str(png))
    finally:
        browser.quit()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.uncertainty", description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder with MovieLens-1M (default: MovieLens-100K, by name)")
    parser.add_argument("--members", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/uncertainty.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/uncertainty.md")
    parser.add_argument("--render", action="store_true", help="only make page and picture again, from the JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if not chosen.render:
        started = time.perf_counter()
        world = trained(chosen.data, chosen.members, chosen.seed)
        results = {
            "command": f"python -m benchmarks.uncertainty{' --data …/' + chosen.data.name if chosen.data else ''}",
            "source": world.source,
            "order": "" if chosen.data is None else ", in an order drawn by chance (the set has no times)",
            "members": len(world.group),
            "epochs": world.epochs,
            "date": datetime.date.today().isoformat(),
            **measured(world),
            "seconds": time.perf_counter() - started,
        }
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(chosen.out.read_text())
    chosen.page.write_text(page(results))
    html = chosen.out.with_suffix(".html")
    picture(results).write_html(html, include_plotlyjs=True, config={"displayModeBar": False})
    made = _screenshot(html, chosen.page.with_suffix(".png"))
    html.unlink() if made else print(f"No browser was found to make a PNG with; the picture is {html}.")
    print(page(results))


if __name__ == "__main__":
    main()
