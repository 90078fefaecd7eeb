"""What a training step gains by the C kernels of nn/cpu_kernels.c and, without AVX-512, by products of `mm`.

    python benchmarks/cpu_kernels.py --json cpu_kernels.json
    python benchmarks/cpu_kernels.py --threads 1 --models demo:32x50 gru-3x228:100x100

One process: forward and backward as they are, with torch's operators for the kernels, and with oneDNN's products where
AVX-512 would have them, alternate; medians of --repeats rounds after one; no optimizer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from gfrnn import cli
from gfrnn.config import UserError, preset
from gfrnn.nn import cpu_kernels, products
from gfrnn.nn.build import build_language_model
from gfrnn.runs import versions, write_json
from gfrnn.training.flops import gemm_peak

MODELS = [
    "demo:1x50",
    "demo:32x50",
    "demo:128x50",
    "lstm-3x191:100x100",
    "gf-lstm-3x140:100x100",
    "gf-lstm-3x191:100x100",
    "gf-lstm-5x700:64x10",
]
WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "ours": nullcontext,
    "torch": lambda: mock.patch.object(cpu_kernels, "usable", return_value=False),
    "onednn": lambda: mock.patch.object(products, "_AVX2", False),
}


def measure(name: str, rows: int, steps: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step in each of WAYS, and (longest - shortest) / median."""
    model = build_language_model(preset(name).model, "fp32", seed=0)
    symbols_TB = torch.randint(model.settings.vocab_size, (steps, rows))

    def step() -> float:
        start = time.perf_counter()
        logits, _ = model(symbols_TB)
        cross_entropy(logits.flatten(0, 1), symbols_TB.flatten()).backward()
        model.zero_grad()
        return time.perf_counter() - start

    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_ in range(1 + repeats):
        for way, times in taken.items():
            with WAYS[way]():
                seconds = step()
            if round_:
                times.append(seconds)
    found = {way: statistics.median(times) for way, times in taken.items()}
    spread = {f"{way}_spread": (max(times) - min(times)) / found[way] for way, times in taken.items()}
    return found | spread


def main() -> None:
    cli.run(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="PRESET:ROWSxSTEPS")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if min(args.threads, args.repeats) < 1:
        raise UserError("--threads and --repeats must be 1 or more")
    if cpu_kernels.library() is None:
        raise UserError("the kernels were not built: install a C compiler and the package again")
    torch.set_num_threads(args.threads)
    cli.keep_freed_memory()
    peak = gemm_peak(torch.device("cpu"), torch.float32)
    caption = f"{args.threads} threads, products at {peak / 1e9:.0f} GFLOP/s"
    table = Table(title="Forward and backward, ms", caption=caption)
    for column in ("model", "rows x steps", "ours", "±", "torch's operators", "±", "gain", "oneDNN", "±", "gain"):
        table.add_column(column, justify="left" if column == "model" else "right")
    results = []
    for given in args.models:
        name, _, sizes = given.partition(":")
        rows, _, steps = sizes.partition("x")
        if not (rows.isdigit() and steps.isdigit() and int(rows) * int(steps)):
            raise UserError(f"{given} must be PRESET:ROWSxSTEPS, as demo:32x50")
        found = measure(name, int(rows), int(steps), args.repeats)
        results.append({"model": name, "rows": int(rows), "steps": int(steps), **found})
        cells = [name, f"{rows} x {steps}"]
        for way in WAYS:
            cells += [f"{1e3 * found[way]:.0f}", f"{found[f'{way}_spread']:.0%}"]
            cells += [f"{found[way] / found['ours']:.2f}"] if way != "ours" else []
        table.add_row(*cells)
    Console(width=120).print(table)
    if args.json is not None:
        about = {"versions": versions(), "threads": args.threads, "gemm_peak": peak, "date": time.strftime("%Y-%m-%d")}
        write_json(args.json, {"about": about, "results": results})


if __name__ == "__main__":
    main()
