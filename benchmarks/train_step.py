"""A training step of ours beside what one would use instead: in one process, alternating, on this machine.

    python benchmarks/train_step.py --json step.json --plot step.png           # gf-lstm-5x700, 64 rows x 50 steps
    python benchmarks/train_step.py --device cuda --rows 512

Peers (peers.py): the preset with unit gates from all layers and from the own one, fp32 and bf16; a loop over pairs of
layers under autograd; and LSTM stacks with as many layers and about as many weights as the first, fed dense input of
their own width: ours, torch.nn.LSTM in fp32 and wholly in bf16, on CUDA also flashrnn. FLOP are counted by formula, 6 a
multiplied weight and character; look-ups of one-hot symbols count nothing. A step is forward and backward; Adam is
timed apart, as it is the same for all. Peak memory is that of a step beyond the imports, each peer in a process of its
own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gfrnn.cli import keep_freed_memory
from gfrnn.config import model_sizes, preset
from gfrnn.nn import GatedFeedbackRNN
from gfrnn.runs import versions
from gfrnn.training.flops import gemm_peak
from gfrnn.training.memory import peak_resident, resident
from peers import FlashLSTM, Peer, gated_feedback, pair_loop, stack, stack_size

PARTS = ("forward", "backward", "optimizer")
CAPTION = (
    "step: forward and backward; ±: (longest - shortest) / median; act.: memory beside weights, gradients and Adam"
)


def builders(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Peer]]:
    """Every peer by name, not made yet."""
    model = preset(args.preset).model
    where = (args.rows, args.steps, device)
    layers, hidden = model.num_layers, stack_size(model_sizes(model).train_flops // 6, model.num_layers)
    found: dict[str, Callable[[], Peer]] = {}

    def add(name: str, make: Callable[[str], Peer]) -> None:
        found[name] = lambda: make(name)

    for gates in ("all", "own"):
        settings = dataclasses.replace(model, unit_gates=gates)
        for dtype in ("fp32", "bf16"):
            name = f"{args.preset}, {gates} layers' unit gates, {dtype}"
            add(name, lambda name, s=settings, d=dtype: gated_feedback(name, s, d, *where))
            if args.recompute:
                again = {"recompute": args.recompute}
                name += f", recompute {args.recompute}"
                add(name, lambda name, s=settings, d=dtype, k=again: gated_feedback(name, s, d, *where, **k))

    def our_stack(dtype: torch.dtype | None) -> GatedFeedbackRNN:
        return GatedFeedbackRNN(hidden, hidden, layers, feedback="none", compute_dtype=dtype)

    add(f"our stack, {layers}x{hidden}, fp32", lambda name: stack(name, our_stack(None), *where, torch.float32))
    add(
        f"our stack, {layers}x{hidden}, bf16",
        lambda name: stack(name, our_stack(torch.bfloat16), *where, torch.float32),
    )
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        add(
            f"torch.nn.LSTM, {layers}x{hidden}, {label}",
            lambda name, d=dtype: stack(name, torch.nn.LSTM(hidden, hidden, layers), *where, d),
        )
    if not args.no_loop:
        add("loop over pairs, autograd, fp32", lambda name: pair_loop(model, *where))
    if device.type == "cuda":
        add(
            f"flashrnn, {layers}x{hidden}, bf16",
            lambda name: stack(name, FlashLSTM(hidden, layers), *where, torch.bfloat16),
        )
    return found


def timed_step(peer: Peer, device: torch.device) -> dict[str, float]:
    """Seconds of each part of one step."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begin = now()
    loss = peer.loss()
    forward = now()
    loss.backward()
    backward = now()
    peer.optimizer.step()
    optimizer = now()
    peer.optimizer.zero_grad()
    return {"forward": forward - begin, "backward": backward - forward, "optimizer": optimizer - backward}


def memory(build: Callable[[], Peer], device: torch.device) -> dict[str, int]:
    """Bytes that two steps took at most, and what forward and backward took beside weights and gradients."""

    def most() -> int:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return peak_resident()

    def now() -> int:
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()

    torch.nn.LSTM(8, 8).to(device)(torch.zeros(2, 2, 8, device=device))[0].sum().backward()  # loads what is loaded late
    start = now()
    peer = build()
    built = now()
    peer.loss().backward()
    gradients = sum(p.numel() * p.element_size() for p in peer.module.parameters())
    activations = most() - built - gradients
    peer.optimizer.step()
    peer.optimizer.zero_grad()
    timed_step(peer, device)
    return {"peak_bytes": most() - start, "activation_bytes": activations}


def in_own_process(name: str) -> dict[str, int]:
    """Memory of one peer, in a new process with the same flags."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found: dict[str, int] = json.loads(done.stdout)
    return found


def measure(made: dict[str, Peer], repeats: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Seconds of every repeat, by peer and part. The peers alternate; the first round is not counted."""
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in made}
    for repeat in range(-1, repeats):
        for name, peer in made.items():
            step = timed_step(peer, device)
            if repeat >= 0:
                for part in PARTS:
                    seconds[name][part].append(step[part])
    return seconds


def summarize(peer: Peer, seconds: dict[str, list[float]], characters: int, peak: float) -> dict[str, Any]:
    """Figures of one peer."""
    steps = [forward + backward for forward, backward in zip(seconds["forward"], seconds["backward"], strict=True)]
    step = statistics.median(steps)
    return {
        **{f"{part}_s": statistics.median(seconds[part]) for part in PARTS},
        "step_s": step,
        "spread": (max(steps) - min(steps)) / step,
        "characters_per_second": characters / step,
        "flops": peer.flops * characters / step,
        "share_of_peak": peer.flops * characters / step / peak,
        "parameters": sum(p.numel() for p in peer.module.parameters()),
    }


def show(results: dict[str, dict[str, Any]], title: str) -> None:
    table = Table(title=title, caption=CAPTION)
    for column in (
        "",
        "forward s",
        "backward s",
        "step s",
        "±",
        "Adam s",
        "characters/s",
        "GFLOP/s",
        "of peak",
        "GB",
        "act. GB",
    ):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, found in results.items():
        table.add_row(
            name,
            *(f"{found[key]:.3g}" for key in ("forward_s", "backward_s", "step_s")),
            f"{found['spread']:.0%}",
            f"{found['optimizer_s']:.3g}",
            f"{found['characters_per_second']:,.0f}",
            f"{found['flops'] / 1e9:,.0f}",
            f"{found['share_of_peak']:.2f}",
            *(f"{found[key] / 1e9:.2f}" if key in found else "" for key in ("peak_bytes", "activation_bytes")),
        )
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def plot(results: dict[str, dict[str, Any]], peaks: dict[str, float], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    names = list(results)[::-1]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(names) + 1.4), layout="constrained")
    values = [results[name]["flops"] / 1e9 for name in names]
    ours = [not name.startswith(("torch", "loop", "flashrnn")) for name in names]
    bars = axes.barh(names, values, color=["#2f6fb0" if own else "#9aa5b1" for own in ours])
    axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=-34, color="white")
    for dtype, peak in peaks.items():
        axes.axvline(peak / 1e9, color="#444", linestyle="--", linewidth=1)
        axes.text(peak / 1e9, len(names) - 0.45, f"{dtype} GEMM ", ha="right", va="bottom", fontsize=8, color="#444")
    axes.set_xlabel("GFLOP/s of forward and backward")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.08 * max(*values, *(peak / 1e9 for peak in peaks.values())))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gf-lstm-5x700")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recompute", type=int, default=0, metavar="K", help="also ours with this setting")
    parser.add_argument("--only", metavar="TEXT", help="peers with this in their names")
    parser.add_argument(
        "--no-loop", action="store_true", help="leave the loop over pairs out: a minute a step on a CPU"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory, which takes new processes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a .png, .svg or .pdf")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    keep_freed_memory()  # as the trainer does
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, of torch.nn.LSTM too
    makers = builders(args, device)
    if args.memory_of:
        print(json.dumps(memory(makers[args.memory_of], device)))
        return
    made: dict[str, Peer] = {}
    missing = {} if device.type == "cuda" else {"flashrnn": "runs on CUDA only"}
    for name, make in makers.items():
        if args.only is None or args.only in name:
            try:
                made[name] = make()
                for _ in range(2):  # CUDA graphs are captured at the second
                    timed_step(made[name], device)
            except Exception as error:  # flashrnn builds its kernels now, and asserts what it can do
                made.pop(name, None)
                missing[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    seconds = measure(made, args.repeats, device)
    peaks = {"fp32": gemm_peak(device, torch.float32, 1.0), "bf16": gemm_peak(device, torch.bfloat16, 1.0)}
    characters = args.rows * args.steps
    results = {
        name: summarize(peer, seconds[name], characters, peaks["bf16" if "bf16" in name else "fp32"])
        for name, peer in made.items()
    }
    made.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the processes to come
    if not args.no_memory:
        for name in results:
            results[name] |= in_own_process(name)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{len(os.sched_getaffinity(0))} cores"
    title = f"{args.rows} rows x {args.steps} steps on {machine}, torch {torch.__version__}"
    peak_text = ", ".join(f"{dtype} {peak / 1e9:,.0f} GFLOP/s" for dtype, peak in peaks.items())
    show(results, f"{title}; GEMM peak {peak_text}")
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}")
    if args.json is not None:
        about = {
            **{name: getattr(args, name) for name in ("preset", "rows", "steps", "repeats", "device")},
            "machine": machine,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "date": time.strftime("%Y-%m-%d"),
        }
        args.json.write_text(
            json.dumps({"about": about, "gemm_peak": peaks, "results": results, "missing": missing}, indent=2) + "\n"
        )
    if args.plot is not None:
        plot(results, peaks, title, args.plot)


if __name__ == "__main__":
    main()
