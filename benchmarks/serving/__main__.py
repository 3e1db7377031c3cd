"""`python -m benchmarks.serving`: what an online request costs, beside a server that answers a constant and beside MLflow.

One server process on one core, the load from another process: one member and 100 candidate rows a request, 32-d embeddings,
a million members in LMDB. Saturated: as many requests as are answered, over a few connections. At half of that load: latency
from the moment a request was due, less the bare forward of the global block on the same rows. Writes
`benchmarks/results/serving.json` and `docs/serving-benchmark.md`. About five minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serving.load import Load, Measured, drive
from benchmarks.serving.peers import MLFLOW, mlflow_command, mlflow_environment, mlflow_message
from benchmarks.serving.processes import Ports, cpu_seconds, numbers_of, said_ports, waiting_for
from benchmarks.serving.workload import World, bare_forward, grpc_message, http_message, make_world
from limaml.evaluate.machine import processor_name

ROOT = Path(__file__).resolve().parents[2]
CONNECTIONS = 8
SERVER_CORE, LOAD_CORE = 0, 1
TARGET = 0.6
"""Share of the constant server's requests."""
BATCHES = (1, 4, 16)
"""Requests whose rows the bare forward takes at once."""


def answered(port: int, message: bytes) -> bytes:
    """The body of one answer over HTTP."""
    import socket

    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(message)
        found = b""
        while b"\r\n\r\n" not in found:
            found += connection.recv(65536)
        head, _, body = found.partition(b"\r\n\r\n")
        if b" 200 " not in head[:20]:
            raise RuntimeError(f"The server refused the benchmark's request: {found.decode('utf-8', 'replace')}")
        at = head.lower().index(b"\r\ncontent-length:") + 17
        length = int(head[at:].split(b"\r", 1)[0])
        while len(body) < length:
            body += connection.recv(65536)
        return body


def answered_grpc(port: int, message: bytes) -> bytes:
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        found: bytes = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(message, timeout=10)
        return found


def saturated(kind: str, port: int, messages: list[bytes], seconds: float) -> Measured:
    return drive(Load(kind, port, messages, seconds, CONNECTIONS, None, core=LOAD_CORE))


def spent(kind: str, ours: Ports, other: Ports, messages: list[bytes], seconds: float) -> dict[str, float]:
    """Where a saturated server's time goes, in µs a request: processor time, the constant server's, and the stages that the
    server's own metrics tell (of wall time, which other processes have a part in); and how many requests a batch has."""
    before, begun = numbers_of(ours.http), cpu_seconds(ours.process)
    run = saturated(kind, getattr(ours, kind), messages, seconds)
    cpu, after = cpu_seconds(ours.process) - begun, numbers_of(ours.http)
    begun = cpu_seconds(other.process)
    least = saturated(kind, getattr(other, kind), messages, seconds)
    found = {
        "processor": 1e6 * cpu / run.requests,
        "constant_processor": 1e6 * (cpu_seconds(other.process) - begun) / least.requests,
    }

    def more(name: str) -> float:
        return after[name] - before[name]

    found["requests_in_a_batch"] = more("limaml_batch_requests_sum") / more("limaml_batch_requests_count")
    for stage in ("decode", "look_up", "forward"):
        found[stage] = 1e6 * more(f'limaml_stage_seconds_sum{{stage="{stage}"}}') / run.requests
    return found


def at_rate(kind: str, port: int, messages: list[bytes], seconds: float, rate: float) -> Measured:
    return drive(Load(kind, port, messages, seconds, 64, rate, core=LOAD_CORE))


def serve_command(world: World) -> list[str]:
    start = "from limaml.cli import main; main()"
    return ["-c", start, "serve", "--store", str(world.store), "--port", "0", "--grpc-port", "0"]


def measured(world: World, seconds: float, rounds: int) -> dict[str, Any]:
    """limaml and the constant server over HTTP and gRPC, round by round in turn."""
    forward = {batch: bare_forward(world, batch) for batch in BATCHES}
    messages = {
        "http": [http_message(a, "score") for a in world.asked],
        "grpc": [grpc_message(a, "score") for a in world.asked],
    }
    found: dict[str, Any] = {
        "forward_ms": 1e3 * forward[1],
        "forward_ms_in_batches": {str(batch): 1e3 * seconds for batch, seconds in forward.items()},
    }
    with said_ports(serve_command(world), SERVER_CORE) as ours:
        size = len(answered(ours.http, messages["http"][0])), len(answered_grpc(ours.grpc, messages["grpc"][0]))
        constant = ["-m", "benchmarks.serving.constant", "--bytes", str(size[0]), "--grpc-bytes", str(size[1])]
        with said_ports(constant, SERVER_CORE) as other:
            for kind in ("http", "grpc"):
                mine, least = (getattr(ports, kind) for ports in (ours, other))
                for port in (mine, least):
                    saturated(kind, port, messages[kind], 2)  # caches and connections are warm
                rates: dict[str, list[float]] = {"limaml": [], "constant": []}
                failed = 0
                for _ in range(rounds):
                    for name, port in (("limaml", mine), ("constant", least)):
                        run = saturated(kind, port, messages[kind], seconds)
                        rates[name].append(run.rate)
                        failed += run.failed
                half = at_rate(kind, mine, messages[kind], 2 * seconds, median(rates["limaml"]) / 2)
                floor = at_rate(kind, least, messages[kind], 2 * seconds, median(rates["limaml"]) / 2)
                found[kind] = {
                    "request_bytes": len(messages[kind][0]),
                    "answer_bytes": size[kind == "grpc"],
                    "limaml": median(rates["limaml"]),
                    "constant": median(rates["constant"]),
                    "share": median(a / b for a, b in zip(rates["limaml"], rates["constant"], strict=True)),
                    "spent_us": spent(kind, ours, other, messages[kind], seconds / 2),
                    "failed": failed + half.failed,
                    "half_load": half.rate,
                    "p50_ms": 1e3 * half.quantile(0.5),
                    "p99_ms": 1e3 * half.quantile(0.99),
                    "constant_p50_ms": 1e3 * floor.quantile(0.5),
                    "constant_p99_ms": 1e3 * floor.quantile(0.99),
                }
    return found


def beside_mlflow(world: World, folder: Path, environment: Path | None, seconds: float) -> dict[str, Any]:
    binary = mlflow_environment(environment or folder / "mlflow")
    port = 18_000 + os.getpid() % 10_000
    command = mlflow_command(binary, folder / "mlflow-model", world.store, port)
    messages = [mlflow_message(a) for a in world.asked]
    with waiting_for(command, SERVER_CORE, f"http://127.0.0.1:{port}/ping"):
        answered(port, messages[0])
        saturated("http", port, messages, 2)
        run = saturated("http", port, messages, seconds)
        half = at_rate("http", port, messages, seconds, run.rate / 2)
    return {
        "version": MLFLOW,
        "rate": run.rate,
        "failed": run.failed + half.failed,
        "p50_ms": 1e3 * half.quantile(0.5),
        "p99_ms": 1e3 * half.quantile(0.99),
    }


def page(results: Mapping[str, Any]) -> str:
    """`docs/serving-benchmark.md`, from what the JSON holds."""
    forward, batched = results["forward_ms"], results["forward_ms_in_batches"]
    most = max(batched, key=int)

    def mark(met: bool) -> str:
        return "✓" if met else "✗"

    lines = [
        "# What an online request costs",
        "",
        "*Made by `python -m benchmarks.serving` from `benchmarks/results/serving.json`; do not edit.*",
        "",
        f"{results['machine']}. {results['date']}. One server process on one core, the load from another process on the other core. "
        f"A request: one member and {results['rows']} candidate rows with {results['columns']} features, binary tensors; "
        f"{results['dim']}-d meta embeddings of {results['members']:,} members in LMDB, members drawn by chance. The global block "
        f"alone takes **{forward:.2f} ms** for these rows (median), so one core cannot answer more than {1e3 / forward:,.0f} requests a "
        "second without batching them.",
        "",
        "*Constant*: the same server libraries (uvicorn, grpc.aio) read the same bytes and answer a constant of the same size. "
        f"Saturated: {CONNECTIONS} connections, medians of rounds taken in turn. At half load: latency from when a request was due; "
        "*added* is what is above the bare forward. *Bound*: the share that a server would reach which spends on a request what the "
        f"constant one does, and the model's own bare forward in batches of {most}, and nothing else: no look-up, no encoding, no checks. The "
        "forward takes, per request, "
        + ", ".join(f"{1e3 * ms:.0f} µs in batches of {batch}" for batch, ms in batched.items())
        + ".",
        "",
        f"|  | requests/s, saturated | constant | share (target ≥ {TARGET:.0%}) | bound | of the bound | at half load: p50, added (≤ 1 ms) | "
        "p99, added (≤ 5 ms) | constant: p50, p99 | failed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, name in (("http", "HTTP, binary tensors"), ("grpc", "gRPC")):
        e = results[kind]
        p50, p99 = e["p50_ms"] - forward, e["p99_ms"] - forward
        bound = 1 / (1 + e["constant"] * batched[most] / 1e3)
        lines.append(
            f"| {name} | {e['limaml']:,.0f} | {e['constant']:,.0f} | {e['share']:.0%} {mark(e['share'] >= TARGET)} | "
            f"{bound:.0%} | {e['share'] / bound:.0%} | {e['p50_ms']:.2f} ms, {p50:+.2f} {mark(p50 <= 1)} | {e['p99_ms']:.2f} ms, {p99:+.2f} {mark(p99 <= 5)} | "
            f"{e['constant_p50_ms']:.2f}, {e['constant_p99_ms']:.2f} ms | {e['failed']} |"
        )
    lines += [
        "",
        "Where a saturated server's time goes, in µs a request. *Elsewhere* is what the constant server spends too (the libraries, the "
        "system's calls) and what joins a request to its batch and its answer. Stages are of wall time, processor time is the system's.",
        "",
        "|  | processor time | of it the constant server's | requests in a batch | decode and check | look-up | forward, split, count | elsewhere |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, name in (("http", "HTTP"), ("grpc", "gRPC")):
        e = results[kind]["spent_us"]
        rest = e["processor"] - e["decode"] - e["look_up"] - e["forward"]
        lines.append(
            f"| {name} | {e['processor']:,.0f} | {e['constant_processor']:,.0f} | {e['requests_in_a_batch']:.1f} | {e['decode']:.0f} | "
            f"{e['look_up']:.0f} | {e['forward']:.0f} | {rest:.0f} |"
        )
    left = {kind: 1e6 * (1 / TARGET - 1) / results[kind]["constant"] for kind in ("http", "grpc")}
    lines += [
        "",
        f"{TARGET:.0%} of the constant server would leave {left['http']:.0f} µs a request over HTTP and {left['grpc']:.0f} over gRPC beside what "
        "that one spends, for all that is done. At this size it is not arithmetic that takes the time: each of the calls into Python, numpy "
        "and torch that a batch is made of costs more between the others than repeated alone, since their code does not fit the nearest cache.",
    ]
    if "mlflow" in results:
        peer, ours = results["mlflow"], results["http"]
        lines += [
            "",
            f"The same block and store behind MLflow {peer['version']}'s scoring server (`mlflow models serve`, one worker, data frames in "
            f"JSON, `limaml.Predictor` inside): {peer['rate']:,.0f} requests/s, {peer['p50_ms']:.1f} ms at p50 and {peer['p99_ms']:.1f} ms "
            f"at p99 under half of that. `limaml serve` answers **{ours['limaml'] / peer['rate']:.1f}×** as many requests.",
        ]
    return "\n".join(lines) + "\n"


def machine() -> str:
    return f"{processor_name()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--members", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--no-mlflow", action="store_true", help="leave the peer out, which needs an environment of its own"
    )
    parser.add_argument("--mlflow", type=Path, help="where to keep MLflow's environment (default: made anew)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/serving.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/serving-benchmark.md")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        world = make_world(folder, members=chosen.members, rows=chosen.rows, dim=chosen.dim, requests=2000)
        results = {
            "machine": machine(),
            "date": datetime.date.today().isoformat(),
            "members": chosen.members,
            "rows": chosen.rows,
            "dim": chosen.dim,
            "columns": len(world.asked[0].columns),
            "publish_seconds": world.publish_seconds,
            **measured(world, chosen.seconds, chosen.rounds),
        }
        chosen.out.write_text(json.dumps(results, indent=1) + "\n")
        if not chosen.no_mlflow:
            results["mlflow"] = beside_mlflow(world, folder, chosen.mlflow, chosen.seconds)
    chosen.out.write_text(json.dumps(results, indent=1) + "\n")
    chosen.page.write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
