"""`python -m benchmarks.recursive`: what it costs to refresh without the interactions of the past.

Newton can take its posterior as the next prior and forget the rows it came from. Here members on whom nothing was trained
(those of `benchmarks.uncertainty`) get their first 40 rows in parts of 1, 5 or 20, and their later rows are scored after
each part, once with embeddings updated recursively and once with embeddings adapted anew on all rows so far. The
differences are averaged over members, with 95 % intervals from a bootstrap over them. Writes
`benchmarks/results/recursive.json` and `docs/recursive.md`. About a minute on one thread.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.uncertainty import LATER, LEAST, ROOT, TASK, World, trained
from limaml.evaluate.metrics import auc
from limaml.meta import Posterior
from limaml.tasks import TaskRows

PARTS = (1, 5, 20)
CHECKED = (5, 10, 20, 40)  # rows known when the later rows are scored


def embed(world: World, low: int, high: int, before: Posterior | None = None) -> Posterior:
    """Every member's posterior after the rows `low` … `high` of each, on top of `before`."""
    rank = world.rank
    rows = TaskRows.of(world.data.index[TASK], len(world.group), world.members(2) & (rank >= low) & (rank < high))
    return world.model.embed(world.data, TASK, rows, uncertainty=True, before=before)


def judged(world: World, posterior: Posterior) -> tuple[Tensor, Tensor]:
    """Log loss and AUC of each measured member's later rows, `[members]`; AUC is NaN with one class only."""
    rows = (world.members(2) & (world.rank >= LATER)).nonzero().flatten()
    logits = world.model.predict(world.data, rows, {TASK: posterior.mean})[:, 0].double()
    label = world.data.labels[rows, 0].double()
    owner = torch.unique(world.data.index[TASK][rows], return_inverse=True)[1]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, label, reduction="none")
    members = int(owner.max()) + 1
    mean = torch.zeros(members, dtype=torch.float64).index_add(0, owner, loss) / torch.bincount(owner)
    ranked = [auc(label[owner == one].numpy(), logits[owner == one].numpy()) for one in range(members)]
    return mean, torch.tensor(ranked, dtype=torch.float64)


def interval(values: Tensor, draws: int = 2000) -> list[float]:
    """Mean over members, and the 95 % interval of a bootstrap over them."""
    values = values[values.isfinite()]
    chosen = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[chosen].mean(1)
    return [float(values.mean()), float(means.quantile(0.025)), float(means.quantile(0.975))]


def measured(world: World) -> list[dict[str, Any]]:
    anew = {known: judged(world, embed(world, 0, known)) for known in (0, *CHECKED)}
    found = []
    for size in PARTS:
        posterior: Posterior | None = None
        for high in range(size, LATER + 1, size):
            posterior = embed(world, high - size, high, posterior)
            if high in CHECKED:
                loss, ranked = judged(world, posterior)
                found.append(
                    {
                        "part": size,
                        "known": high,
                        "log_loss": interval(anew[high][0])[0],
                        "auc": interval(anew[high][1])[0],
                        "log_loss_change": interval(loss - anew[high][0]),
                        "auc_change": interval(ranked - anew[high][1]),
                        "cold_log_loss": interval(anew[0][0])[0],
                        "cold_auc": interval(anew[0][1])[0],
                    }
                )
    return found


def page(results: Mapping[str, Any]) -> str:
    """`docs/recursive.md`, from what the JSON holds."""

    def change(values: list[float]) -> str:
        return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*values)

    first = results["found"][0]
    lines = [
        "# Refreshing without the past",
        "",
        f"*Made by `{results['command']}` from `benchmarks/results/recursive.json`; do not edit.*",
        "",
        "Newton's posterior after some rows can be the prior of the next ones: `model.embed(data, task, new_rows, "
        "uncertainty=True, before=posterior)` needs no earlier row, and keeps `dim·(dim+1)/2` numbers a task beside the embedding "
        "(in a store: `limaml embed --uncertainty`, then `limaml.embeddings.update(store, name, trained, new_rows)`). "
        "Where logits are linear in z and labels are Gaussian that is exact. Here it is not: a row's slope and "
        "curvature stay where they were taken, around an embedding that knew less, and what is learned is never forgotten. So:",
        "",
        f"{results['source']}, like = rating ≥ 4, {results['members']:,} members; solver `newton` with default settings, trained on "
        f"half of them. Measured on {results['measured']} members with at least {LEAST} rows whom nothing was fitted on: their first "
        f"k rows come in parts, their rows from the {LATER + 1}st on are scored. Log loss and AUC are means over members; changes are "
        f"recursive − adapted anew on all k rows, with 95 % intervals over members. Cold: {first['cold_log_loss']:.4f} and "
        f"{first['cold_auc']:.4f}. {results['date']}.",
        "",
        "| rows a part | k | log loss, anew | change | AUC, anew | change |",
        "|---|---|---|---|---|---|",
        *(
            f"| {e['part']} | {e['known']} | {e['log_loss']:.4f} | {change(e['log_loss_change'])} | {e['auc']:.4f} | "
            f"{change(e['auc_change'])} |"
            for e in results["found"]
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recursive", description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder like MovieLens-1M's (default: MovieLens-100K, fetched)")
    parser.add_argument("--members", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/recursive.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/recursive.md")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    world = trained(chosen.data, chosen.members, chosen.seed)
    own = torch.unique(world.data.index[TASK][world.members(2)])
    results = {
        "command": f"python -m benchmarks.recursive{' --data …/' + chosen.data.name if chosen.data else ''}",
        "source": world.source,
        "members": len(world.group),
        "measured": len(own),
        "date": datetime.date.today().isoformat(),
        "found": measured(world),
    }
    chosen.out.write_text(json.dumps(results, indent=1) + "\n")
    chosen.page.write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
