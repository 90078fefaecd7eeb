"""What data loading, logging and MLflow tracking cost the demo, as a share of a training step.

    python benchmarks/overhead.py --repeats 3

Two ways. Directly: the time that the trainer itself spends on batches and log lines (`overhead_share` of its metrics),
plus the processor time of the tracking process, as a share of what the machine's cores have in that time. And as the
user sees it: characters a second with tracking and without, alternating, which is the truth but noisier than the cost.

The steady state counts: the first third of the updates, in which the tracking process starts and MLflow makes its
database, is left out of both and reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parent.parent


class Tracking:
    """Processor seconds that the tracking process of a run has used, looked at while the run goes on."""

    def __init__(self, launcher: subprocess.Popen[bytes]):
        self._launcher = psutil.Process(launcher.pid)
        self._process: psutil.Process | None = None

    def seconds(self) -> float:
        if self._process is None:
            below = self._launcher.children(recursive=True)
            self._process = next((p for p in below if "gfrnn.training.tracking" in p.cmdline()), None)
        if self._process is None:
            return 0.0
        used = self._process.cpu_times()
        return used.user + used.system + used.children_user + used.children_system


class Run(NamedTuple):
    """Of one run."""

    start_speed: float
    """Characters/s in the first third."""
    speed: float
    """After it."""
    logging: float
    """Batches and log lines, as a share of the trainer's time."""
    tracking: float
    """Processor time of the tracking process, as a share of the cores' time after the first third."""


def run(folder: Path, updates: int, tracked: bool) -> Run:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_gpus", "2"]
    flags = ["--deepspeed", "ds_configs/z2.json", "--preset", "demo", "--output-dir", str(folder)]
    limits = ["--max-updates", str(updates), "--valid-every", "0", "--valid-bytes", "2000", "--checkpoint-every", "0"]
    command = [*launcher, "src/train.py", *flags, *limits, "--mlflow" if tracked else "--no-mlflow"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tracking = Tracking(process)
    looks: list[tuple[float, float]] = []  # (time, processor seconds) while between a third and the last line
    while process.poll() is None:
        done = lines_of(folder)
        if updates / 3 <= (done[-1]["step"] if done else 0) < updates:
            looks.append((time.monotonic(), tracking.seconds()))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    lines = lines_of(folder)
    third = len(lines) // 3
    (begin, used_then), (end, used) = looks[0], looks[-1]
    cores = len(os.sched_getaffinity(0))
    return Run(
        statistics.harmonic_mean([line["characters_per_second"] for line in lines[:third]]),
        statistics.harmonic_mean([line["characters_per_second"] for line in lines[third:]]),
        statistics.median(line["overhead_share"] for line in lines[third:]),
        (used - used_then) / (end - begin) / cores,
    )


def lines_of(folder: Path) -> list[dict[str, float]]:
    """Training lines of metrics.jsonl so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line for line in map(json.loads, lines) if "train_bpc" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=120)
    args = parser.parse_args()
    with_tracking, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            tracked = run(Path(folder) / f"{repeat}-tracked", args.updates, True)
            plain = run(Path(folder) / f"{repeat}-plain", args.updates, False)
            with_tracking.append(tracked)
            ratios.append(tracked.speed / plain.speed)
            print(
                f"batches and log lines {tracked.logging:.2%}, tracking {tracked.tracking:.2%} of a step; "
                f"characters/s tracked {tracked.start_speed:,.0f} then {tracked.speed:,.0f}, "
                f"untracked {plain.start_speed:,.0f} then {plain.speed:,.0f}: ratio {ratios[-1]:.3f}",
                flush=True,
            )
    logging = statistics.median(found.logging for found in with_tracking)
    tracking = statistics.median(found.tracking for found in with_tracking)
    print(
        f"medians: batches and log lines {logging:.2%} + tracking {tracking:.2%} = {logging + tracking:.2%} of a step; "
        f"ratio of speeds {statistics.median(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
