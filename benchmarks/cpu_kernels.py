"""What a training step gains by the C kernels of nn/cpu_kernels.c, beside the same step in torch's operators.

    python benchmarks/cpu_kernels.py --json cpu_kernels.json
    python benchmarks/cpu_kernels.py --threads 1 --models demo:32x50 gru-3x228:100x100

One process: forward and backward of both alternate, medians of --repeats rounds after one; no optimizer.
"""

from __future__ import annotations

import argparse
import statistics
import time
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
from gfrnn.nn import cpu_kernels
from gfrnn.nn.build import build_language_model
from gfrnn.runs import versions, write_json
from gfrnn.training.flops import gemm_peak

MODELS = ["demo:32x50", "demo:128x50", "lstm-3x191:100x100", "gf-lstm-3x140:100x100", "gf-lstm-5x700:64x50"]


def without() -> AbstractContextManager[Any]:
    return mock.patch.object(cpu_kernels, "usable", return_value=False)


def measure(name: str, rows: int, steps: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step with and without the kernels, and (longest - shortest) / median of each."""
    model = build_language_model(preset(name).model, "fp32", seed=0)
    symbols_TB = torch.randint(model.settings.vocab_size, (steps, rows))

    def step() -> float:
        start = time.perf_counter()
        logits, _ = model(symbols_TB)
        cross_entropy(logits.flatten(0, 1), symbols_TB.flatten()).backward()
        model.zero_grad()
        return time.perf_counter() - start

    taken: dict[str, list[float]] = {"kernels": [], "torch": []}
    for round_ in range(1 + repeats):
        for way, times in taken.items():
            with without() if way == "torch" else nullcontext():
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
    if cpu_kernels.library() is None:
        raise UserError("the kernels were not built: install a C compiler and the package again")
    torch.set_num_threads(args.threads)
    cli.keep_freed_memory()
    peak = gemm_peak(torch.device("cpu"), torch.float32)
    caption = f"{args.threads} threads, products at {peak / 1e9:.0f} GFLOP/s"
    table = Table(title="Forward and backward, ms", caption=caption)
    for column in ("model", "rows x steps", "kernels", "±", "torch's operators", "±", "gain", "characters/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    results = []
    for given in args.models:
        name, _, sizes = given.partition(":")
        rows, _, steps = sizes.partition("x")
        if not (rows.isdigit() and steps.isdigit()):
            raise UserError(f"{given} must be PRESET:ROWSxSTEPS, as demo:32x50")
        found = measure(name, int(rows), int(steps), args.repeats)
        results.append({"model": name, "rows": int(rows), "steps": int(steps), **found})
        table.add_row(
            *[name, f"{rows} x {steps}"],
            *[f"{1e3 * found['kernels']:.0f}", f"{found['kernels_spread']:.0%}"],
            *[f"{1e3 * found['torch']:.0f}", f"{found['torch_spread']:.0%}"],
            *[f"{found['torch'] / found['kernels']:.2f}", f"{int(rows) * int(steps) / found['kernels']:,.0f}"],
        )
    Console(width=120).print(table)
    if args.json is not None:
        about = {"versions": versions(), "threads": args.threads, "gemm_peak": peak, "date": time.strftime("%Y-%m-%d")}
        write_json(args.json, {"about": about, "results": results})


if __name__ == "__main__":
    main()
