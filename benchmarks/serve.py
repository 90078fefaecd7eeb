"""What a step of inference takes, and what the server makes of it: in one run, alternating, on this machine.

    python benchmarks/serve.py --json serve.json             # gf-lstm-5x700, weights as initialised

Steps: the model in torch, as it is and by torch.compile, and exported, through the runtime's own rows (state carried,
no sampling). The floor is the time in which the weights' bytes can be read, at the fastest rate of several ways to read
as many bytes, measured between the steps. Clients: the real server (export/serve.py) and as many connections as said,
each asking for one completion after another over HTTP, on the same cores; "one at a time" is a server with one row.
Characters are those generated; latency is that of a whole request, and of streams also that of each character.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from gfrnn.config import model_sizes, preset
from gfrnn.nn import LanguageModel, build_language_model
from gfrnn.runs import versions
from gfrnn_onnx.names import Metadata
from gfrnn_onnx.precision import Precision
from gfrnn_onnx.runner import Rows, Step
from gfrnn_onnx.step import build_step, save_step

BATCHES = (1, 8, 64, 256)
CLIENTS = (1, 8, 64)
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8", "int4")
ROOT = Path(__file__).parent.parent
PROMPT = "It was a bright cold day"


def export(model: LanguageModel, precision: Precision, folder: Path) -> Path:
    path = folder / f"{precision}.onnx"
    made = build_step(model, precision=precision)
    metadata = Metadata("text", "bytes", dataclasses.asdict(model.settings), precision=precision, run_id="benchmark")
    save_step(made, metadata, path)
    return path


# Steps ------------------------------------------------------------------------------------------------------


def read_rate(size: int) -> float:
    """Bytes a second, the fastest way to read `size` bytes, everything on all threads."""
    values = torch.ones(size // 4)
    rows = values[: len(values) // 4096 * 4096].view(-1, 4096)
    vector = torch.ones(4096)
    ways: list[Callable[[], Any]] = [values.sum, values.max, lambda: torch.mv(rows, vector)]
    best = float("inf")
    for way in ways:
        way()
        for _ in range(5):
            begin = time.perf_counter()
            way()
            best = min(best, time.perf_counter() - begin)
    return size / best


def in_torch(model: LanguageModel, batch: int, compiled: bool) -> Callable[[], Any]:
    symbols = torch.randint(0, 256, (1, batch))
    run = torch.compile(model, dynamic=False) if compiled else model
    state = [model.zero_state(batch)]

    @torch.no_grad()
    def step() -> None:
        _, state[0] = run(symbols, state[0])

    return step


def in_onnx(step: Step, batch: int) -> Callable[[], Any]:
    rows = Rows(step, batch)
    rows.symbols[:] = np.random.default_rng(0).integers(0, 256, batch)
    return lambda: rows.run(batch)


def measure_steps(model: LanguageModel, folder: Path, repeats: int, compiled: bool) -> dict[str, Any]:
    """Median, least and spread of a step's seconds, by batch and way; the ways alternate."""
    weights = 4 * model_sizes(model.settings).train_flops // 6  # those that a step multiplies
    loaded = {name: Step(export(model, name, folder), "cpu") for name in PRECISIONS}
    found: dict[str, Any] = {"bytes": {name: step.path.stat().st_size for name, step in loaded.items()}}
    for batch in BATCHES:
        ways = {"torch": in_torch(model, batch, False)}
        if compiled:
            ways["torch.compile"] = in_torch(model, batch, True)
        ways |= {f"ONNX Runtime {name}": in_onnx(step, batch) for name, step in loaded.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        shares: dict[str, list[float]] = {name: [] for name in ways}
        floors = []
        for repeat in range(-1, repeats):
            floor = weights / read_rate(weights)  # the machine's memory has its moods: compared within a round
            floors.append(floor)
            for name, way in ways.items():
                way()
                each = []
                for _ in range(1 if batch > 8 else 5):
                    begin = time.perf_counter()
                    way()
                    each.append(time.perf_counter() - begin)
                if repeat >= 0:
                    seconds[name] += each
                    shares[name].append(floor / statistics.median(each))
        found[str(batch)] = {"floor_fp32_s": statistics.median(floors)} | {
            name: {
                "median_s": statistics.median(each),
                "least_s": min(each),
                "spread": (max(each) - min(each)) / statistics.median(each),
                "characters_per_second": batch / statistics.median(each),
                "floor_share": statistics.median(shares[name]),
            }
            for name, each in seconds.items()
        }
        show_steps(batch, found[str(batch)])
    return found


def show_steps(batch: int, found: dict[str, Any]) -> None:
    table = Table(title=f"a step of {batch} row{'s' * (batch > 1)}; fp32's floor {found['floor_fp32_s'] * 1e3:.2f} ms")
    for column in ("", "median ms", "least ms", "±", "characters/s", "x fp32", "floor / step"):
        table.add_column(column, justify="right" if column else "left")
    fp32 = found["ONNX Runtime fp32"]["median_s"]
    for name, each in found.items():
        if isinstance(each, dict):
            table.add_row(
                name,
                f"{each['median_s'] * 1e3:.2f}",
                f"{each['least_s'] * 1e3:.2f}",
                f"{each['spread']:.0%}",
                f"{each['characters_per_second']:,.0f}",
                f"{fp32 / each['median_s']:.2f}",
                f"{each['floor_share']:.2f}",
            )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


# The server -------------------------------------------------------------------------------------------------


class Server:
    """export/serve.py with a model, until the block ends."""

    def __init__(self, model: Path, rows: int):
        self.command = [sys.executable, str(ROOT / "export/serve.py"), str(model), "--port", "0", "--rows", str(rows)]

    def __enter__(self) -> int:
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if "http://" in line:
                return int(line.split("http://")[1].split(":")[1].split()[0].strip("/ ,;"))
        raise RuntimeError("".join(said))

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


async def client(port: int, stream: bool, characters: int, until: float, seed: int) -> list[tuple[float, ...]]:
    """One connection, one request after another: (begin, end, characters, seconds between its characters ...)."""
    found = []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        seed += 1000
        body = json.dumps({"prompt": PROMPT, "max_tokens": characters, "seed": seed, "stream": stream}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        begin = time.perf_counter()
        writer.write(f"{head}\r\n\r\n".encode() + body)
        status = await reader.readline()
        assert b" 200 " in status, status
        size, gaps, last = None, [], None
        while (line := await reader.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length:"):
                size = int(line.split(b":")[1])
        if size is not None:
            await reader.readexactly(size)
        else:
            while (length := int(await reader.readline(), 16)) > 0:
                await reader.readexactly(length + 2)
                now = time.perf_counter()
                if last is not None:
                    gaps.append(now - last)
                last = now
            await reader.readline()
        found.append((begin, time.perf_counter(), characters, *gaps))
    writer.close()
    return found


def clients(port: int, count: int, stream: bool, characters: int, seconds: float) -> dict[str, float]:
    """Figures of `count` clients that ask for `seconds` seconds; of that time which all of them were busy."""

    async def all_of_them() -> list[list[tuple[float, ...]]]:
        until = time.perf_counter() + seconds
        return await asyncio.gather(*(client(port, stream, characters, until, k) for k in range(count)))

    found = asyncio.run(all_of_them())
    # between the last client's first character and the first client's last request's end every row was in use
    begin, end = max(each[0][0] for each in found), min(each[-1][1] for each in found)
    requests = [request for each in found for request in each]
    made = sum(r[2] * max(0.0, min(end, r[1]) - max(begin, r[0])) / (r[1] - r[0]) for r in requests)
    latency = [r[1] - r[0] for r in requests]
    gaps = [gap for r in requests for gap in r[3:]]
    return {
        "requests": len(requests),
        "characters_per_second": made / (end - begin),
        **{f"request_p{p}_s": float(np.percentile(latency, p)) for p in (50, 99)},
        **{f"character_p{p}_s": float(np.percentile(gaps, p)) for p in (50, 99) if gaps},
    }


def measure_server(model: Path, characters: int, seconds: float) -> dict[str, Any]:
    """By clients and whether they stream; each beside the raw rate of as many rows, measured right before."""
    found: dict[str, Any] = {}
    with Server(model, max(CLIENTS)) as port:
        clients(port, 2, True, 8, 0.5)
        for count in CLIENTS:
            for stream in (False, True):
                raw = raw_rate(model, count)
                each = clients(port, count, stream, characters, seconds)
                found[f"{count}, {'streamed' if stream else 'whole'}"] = each | {
                    "raw_characters_per_second": raw,
                    "share_of_raw": each["characters_per_second"] / raw,
                }
    with Server(model, 1) as port:
        found["8, one at a time"] = clients(port, 8, False, characters, seconds)
    return found


def raw_rate(model: Path, count: int) -> float:
    """Characters a second of the runtime's rows alone, in a process of its own."""
    code = f"""
import sys, time; sys.path.insert(0, {str(ROOT / "export")!r})
from gfrnn_onnx.runner import Rows, Step
rows = Rows(Step({str(model)!r}), {count})
seconds = []
for _ in range(40):
    begin = time.perf_counter(); rows.run({count}); seconds.append(time.perf_counter() - begin)
print({count} / sorted(seconds)[20])
"""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def show_server(precision: str, found: dict[str, Any]) -> None:
    table = Table(title=f"the server, {precision}")
    for column in ("clients", "characters/s", "of raw", "request p50 s", "p99 s", "character p50 ms", "p99 ms"):
        table.add_column(column, justify="right" if column != "clients" else "left")
    for name, each in found.items():
        per_character = [f"{each[k] * 1e3:.1f}" if k in each else "" for k in ("character_p50_s", "character_p99_s")]
        table.add_row(
            name,
            f"{each['characters_per_second']:,.0f}",
            f"{each['share_of_raw']:.2f}" if "share_of_raw" in each else "",
            f"{each['request_p50_s']:.2f}",
            f"{each['request_p99_s']:.2f}",
            *per_character,
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gf-lstm-5x700")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=15, help="of each number of clients")
    parser.add_argument("--characters", type=int, default=128, help="of a completion")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: a minute a batch size")
    parser.add_argument("--no-steps", action="store_true")
    parser.add_argument("--no-server", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = build_language_model(preset(args.preset).model, "fp32", 0).eval()
    results: dict[str, Any] = {
        "about": {
            "preset": args.preset,
            "parameters": sum(p.numel() for p in model.parameters()),
            "machine": f"{len(os.sched_getaffinity(0))} cores",
            "versions": versions() | {"onnxruntime": __import__("onnxruntime").__version__},
            "date": time.strftime("%Y-%m-%d"),
        }
    }
    with tempfile.TemporaryDirectory() as folder:
        if not args.no_steps:
            results["steps"] = measure_steps(model, Path(folder), args.repeats, not args.no_compile)
        if not args.no_server:
            for precision in ("fp32", "int8"):
                found = measure_server(export(model, precision, Path(folder)), args.characters, args.seconds)
                results[f"server_{precision}"] = found
                show_server(precision, found)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
