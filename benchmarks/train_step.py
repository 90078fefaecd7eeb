"""Characters a second of a training step (forward, backward, no optimizer) on this machine, beside the GEMM peak.

    python benchmarks/train_step.py --preset gf-lstm-5x700 --rows 64 --steps 50 --json step.json

Peers measured in the same run, alternating with ours: torch.nn.LSTM with as many layers and about as many weights (fed
a dense input of its own width), and the plain loop that defines our layer. FLOP are counted by formula: 6 a multiplied
weight and character; look-ups of one-hot symbols count nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from gfrnn.cli import keep_freed_memory
from gfrnn.config import preset, sizes
from gfrnn.nn import GatedFeedbackRNN, build_language_model
from gfrnn.training.flops import gemm_peak


def our_step(name: str, dtype: str, rows: int, steps: int, device: torch.device, *, reference: bool = False):
    """(one training step, FLOP a character)."""
    settings = preset(name)
    model = build_language_model(settings.model, dtype, 0).to(device)
    if isinstance(model.rnn, GatedFeedbackRNN):
        model.rnn.reference = reference
    symbols = torch.randint(0, settings.model.vocab_size, (steps + 1, rows), device=device)
    state = model.zero_state(rows, device)

    def step() -> None:
        logits, _ = model(symbols[:-1], state)
        F.cross_entropy(logits.flatten(0, 1), symbols[1:].flatten()).backward()
        model.zero_grad()

    return step, sizes(settings.model).train_flops


def torch_lstm_step(weights: int, layers: int, rows: int, steps: int, device: torch.device):
    """torch.nn.LSTM of about `weights` weights: 8 H^2 a layer."""
    hidden = round(math.sqrt(weights / (8 * layers)))
    rnn = torch.nn.LSTM(hidden, hidden, layers).to(device)
    x = torch.randn(steps, rows, hidden, device=device)

    def step() -> None:
        rnn(x)[0].sum().backward()
        rnn.zero_grad()

    return step, 6 * 8 * hidden * hidden * layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gf-lstm-5x700")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plain-loop", action="store_true", help="also the plain loop: many times slower")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    keep_freed_memory()  # as the trainer does
    model = preset(args.preset).model
    weights = sizes(model).train_flops // 6
    peers: dict[str, tuple[Callable[[], None], int]] = {
        f"{args.preset}, fp32": our_step(args.preset, "fp32", args.rows, args.steps, device),
        f"{args.preset}, bf16": our_step(args.preset, "bf16", args.rows, args.steps, device),
        "torch.nn.LSTM, fp32": torch_lstm_step(weights, model.num_layers, args.rows, args.steps, device),
    }
    if args.plain_loop:
        loop = our_step(args.preset, "fp32", args.rows, args.steps, device, reference=True)
        peers[f"{args.preset}, plain loop, fp32"] = loop
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for repeat in range(args.repeats + 1):  # the first is a warm-up
        for name, (step, _) in peers.items():
            begin = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    peak = gemm_peak(device, torch.float32, seconds=1.0)
    characters = args.rows * args.steps
    results = {
        name: {
            "seconds": statistics.median(times),
            "spread": (max(times) - min(times)) / statistics.median(times),
            "characters_per_second": characters / statistics.median(times),
            "gflops": peers[name][1] * characters / statistics.median(times) / 1e9,
            "share_of_fp32_peak": peers[name][1] * characters / statistics.median(times) / peak,
        }
        for name, times in seconds.items()
    }
    table = Table(title=f"{args.rows} rows x {args.steps} steps on {device}; fp32 GEMM peak {peak / 1e9:.0f} GFLOP/s")
    for column in ("", "s a step", "spread", "characters/s", "GFLOP/s", "of fp32 peak"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in results.items():
        table.add_row(
            name,
            f"{found['seconds']:.2f}",
            f"{found['spread']:.0%}",
            f"{found['characters_per_second']:,.0f}",
            f"{found['gflops']:.0f}",
            f"{found['share_of_fp32_peak']:.2f}",
        )
    Console(width=110).print(table)
    if args.json is not None:
        about = {"torch": torch.__version__, "processor": platform.processor(), "cores": len(os.sched_getaffinity(0))}
        args.json.write_text(json.dumps({"about": about, "peak_gflops": peak / 1e9, "results": results}, indent=2))


if __name__ == "__main__":
    main()
