"""One global block on 100 rows of one member, by torch and by onnxruntime, one thread: `python -m benchmarks.runtime`.

`forward` is the block as a whole on encoded features. `cut` is what the server does with a block that is cut, once the
rows' ids are known to it: gather their parts, add the member's, score.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from limaml.meta import CrossNetwork, InteractionMLP
from limaml.meta.blocks import add_parts
from limaml.meta.scorer import gather_parts
from limaml.serving.onnx import OnnxBlock, export_block, random_inputs
from limaml.types import CutBlock, FeatureKind, Features, FeatureSpec

SPECS = (
    FeatureSpec("item_id", FeatureKind.CATEGORICAL, "row", 10_000),
    FeatureSpec("genres", FeatureKind.TOKENS, "row", 32, 8),
    FeatureSpec("year", FeatureKind.NUMERIC, "row", 1),
    FeatureSpec("age", FeatureKind.CATEGORICAL, "user_id", 10),
)
DIM, CALLS = 32, 2000


class Plain(nn.Module):
    """Look up, concatenate, MLP: as somebody brings it."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.age = nn.Embedding(10_000, 32), nn.Embedding(10, 8)
        self.mlp = nn.Sequential(
            nn.Linear(32 + 8 + 1 + DIM, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, features: Features) -> Tensor:
        x = [self.item(features["item_id"]), self.age(features["age"]), features["year"], features["user_id_embedding"]]
        logits: Tensor = self.mlp(torch.cat(x, 1))
        return logits


def cut_of(block: CutBlock, inputs: Features) -> Callable[[], Tensor]:
    rows = ("item_id", "genres", "year")
    known = block.encode({name: inputs[name] for name in rows})
    z, age = inputs["user_id_embedding"][:1], inputs["age"][:1]
    place, own = torch.arange(len(inputs["item_id"])), torch.zeros(len(inputs["item_id"]), dtype=torch.int64)

    def score() -> Tensor:
        member = add_parts(block.condition({"user_id_embedding": z}), block.encode({"age": age}))
        return block.score(add_parts(gather_parts(known, place), gather_parts(member, own)))

    return score


def microseconds(call: Callable[[], object]) -> tuple[float, float]:
    for _ in range(50):
        call()
    taken = []
    for _ in range(CALLS):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken)) * 1e6, float(np.quantile(taken, 0.99)) * 1e6


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    embeddings = {"user_id_embedding": DIM}
    blocks = {
        "InteractionMLP 64-32": InteractionMLP(SPECS, embeddings, hidden=(64, 32)),
        "InteractionMLP 256-128": InteractionMLP(SPECS, embeddings, hidden=(256, 128)),
        "CrossNetwork 64-32": CrossNetwork(SPECS, embeddings),
        "MLP 128-64, not cut": Plain(),
    }
    print(f"{'block':24} {'rows':>5}  µs at p50 (p99): torch forward, torch cut, onnxruntime; seconds to export")
    for name, block in blocks.items():
        block.eval()
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            done = export_block(block, SPECS, {"user_id": DIM}, Path(folder) / "block.onnx")
            took = time.perf_counter() - begun
            onnx = OnnxBlock(done.path)
            for rows in (1, 100, 1000):
                inputs = random_inputs(SPECS, {"user_id": DIM}, rows, torch.float32)
                ways = [lambda block=block, inputs=inputs: block(inputs)]
                ways += [cut_of(block, inputs)] if isinstance(block, CutBlock) else []
                ways += [lambda onnx=onnx, inputs=inputs: onnx(inputs)]
                told = [f"{p50:6.0f} ({p99:6.0f})" for p50, p99 in map(microseconds, ways)]
                if len(told) == 2:
                    told.insert(1, " " * 15)
                print(f"{name:24} {rows:5}  {'  '.join(told)}  {took:4.1f}", flush=True)


if __name__ == "__main__":
    main()
