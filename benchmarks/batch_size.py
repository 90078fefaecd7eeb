"""What a larger batch is worth: updates to a fixed BPC against global rows, for rules that scale the learning rate.

    python benchmarks/batch_size.py runs/batch --json batch.json --plot batch.png

Each run is src/train.py, one process, ended once its validation text (every few updates) is at the target; runs that
are done are not run again. The learning rate is --learning-rate at --base-rows, and times (rows / base) to the power 0
(none), 1/2 (sqrt) or 1 (linear) elsewhere: at --base-rows all rules are one run. Of the rules the best at each batch is
fitted with S(B) = S_min (1 + B_crit / B) (McCandlish et al. 2018), and its B_crit is put beside the gradient noise
scale that runs have measured. No figure here is a time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from gfrnn.config import EXIT_FAILED, EXIT_FINISHED
from gfrnn.runs import versions

TRAIN = Path(__file__).parents[1] / "src/train.py"
RULES = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


class Found(NamedTuple):
    """Of a run."""

    rows: int
    rule: str
    learning_rate: float
    updates: int | None
    """To the target; None if it was not reached, or the loss exploded."""
    noise_scale: float | None
    """Characters: the mean of the last half."""


def run(folder: Path, rows: int, rule: str, args: argparse.Namespace) -> Found:
    """One training, to the target or --most updates."""
    rate = args.learning_rate * (rows / args.base_rows) ** RULES[rule]
    output, every = folder / f"rows{rows}-rate{rate:.3g}", max(1, round(args.every * args.base_rows**0.5 / rows**0.5))
    ended = output / "ended"
    if not ended.exists():
        flags = {
            "preset": args.preset,
            "output-dir": output,
            "rows": rows,
            "learning-rate": rate,
            "max-updates": args.most,
            "accumulation": 2,
            "noise-scale": 0.9,
            "schedule": "constant",
            "warmup-updates": 0,
            "average": "none",
            "valid-every": every,
            "valid-bytes": args.valid_bytes,
            "checkpoint-every": 0,
            "log-every": every,
            "seed": args.seed,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        process = subprocess.Popen(
            [sys.executable, TRAIN, *words, "--no-mlflow"], env=environment, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            time.sleep(0.2)
            if any(bpc <= args.target for _, bpc in validations(output)):
                process.kill()  # all that is wanted is in metrics.jsonl
                process.wait()
        if process.returncode not in (EXIT_FINISHED, EXIT_FAILED, -signal.SIGKILL):
            raise SystemExit(f"error: {output} ended with status {process.returncode}; the same command tries it again")
        ended.touch()
    reached = [step for step, bpc in validations(output) if bpc <= args.target]
    noise = [value for line in lines(output) if (value := line.get("noise_scale")) is not None]
    mean = statistics.fmean(noise[len(noise) // 2 :]) if noise else None
    return Found(rows, rule, rate, min(reached, default=None), mean)


def lines(output: Path) -> Iterator[dict[str, Any]]:
    """Of metrics.jsonl; a last one that is being written is left out."""
    path = output / "metrics.jsonl"
    for line in path.read_text().split("\n")[:-1] if path.exists() else []:
        yield json.loads(line)


def validations(output: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["valid_bpc"]) for line in lines(output) if "valid_bpc" in line]


def fit(found: Sequence[Found], steps: int) -> tuple[float, float]:
    """(S_min, B_crit in characters) of the best rule at each batch."""
    best: dict[int, int] = {}
    for each in found:
        if each.updates is not None:
            best[each.rows] = min(each.updates, best.get(each.rows, each.updates))
    batch = np.array([rows * steps for rows in best], dtype=float)
    updates = np.array(list(best.values()), dtype=float)

    def residuals(logs: Any) -> Any:
        least, critical = np.exp(logs)
        return np.log(least * (1 + critical / batch) / updates)

    least, critical = np.exp(least_squares(residuals, np.log([updates.min(), batch.mean()])).x)
    return float(least), float(critical)


def plot(found: Sequence[Found], least: float, critical: float, args: argparse.Namespace) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for rule in RULES:
        own = [each for each in found if each.rule == rule and each.updates is not None]
        axes.plot([e.rows * args.steps for e in own], [e.updates for e in own], "o-", label=f"rate scaled: {rule}")
    batch = np.geomspace(min(args.rows), max(args.rows)) * args.steps
    label = f"{least:.0f} (1 + {critical:,.0f} / B)"
    axes.plot(batch, least * (1 + critical / batch), "--", color="grey", label=label)
    axes.set(xscale="log", yscale="log", xlabel="characters an update", ylabel=f"updates to {args.target:g} BPC")
    axes.set_xticks([rows * args.steps for rows in args.rows], [f"{rows * args.steps:,}" for rows in args.rows])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(args.plot, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=50, help="segment length of the preset")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--target", type=float, default=3.2, help="validation BPC")
    parser.add_argument("--learning-rate", type=float, default=0.008)
    parser.add_argument("--base-rows", type=int, default=16)
    parser.add_argument("--most", type=int, default=800, help="updates after which a run is given up")
    parser.add_argument("--every", type=int, default=4, help="updates between validations at the base")
    parser.add_argument("--valid-bytes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    with ThreadPoolExecutor(args.at_once) as pool:
        waits = [pool.submit(run, args.folder, rows, rule, args) for rows in args.rows for rule in RULES]
        found = [each.result() for each in waits]
    least, critical = fit(found, args.steps)
    noises = [each.noise_scale for each in found if each.updates is not None and (each.noise_scale or 0) > 0]
    noise = statistics.median(noises) if noises else math.nan
    table = Table(
        title=f"Updates of {args.preset} to {args.target:g} BPC",
        caption=f"best: {least:.1f} (1 + {critical:,.0f} / B); median noise scale {noise:,.0f} characters",
    )
    for column in ("rows", "characters", *(f"{rule}" for rule in RULES), "fit", "characters to it, best"):
        table.add_column(column, justify="right")
    for rows in args.rows:
        own = {each.rule: each.updates for each in found if each.rows == rows}
        reached = [updates for updates in own.values() if updates is not None]
        expected = f"{least * (1 + critical / (rows * args.steps)):.0f}"
        total = f"{min(reached) * rows * args.steps:,}" if reached else ""
        cells = [str(own[rule] or "-") for rule in RULES]
        table.add_row(str(rows), f"{rows * args.steps:,}", *cells, expected, total)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if args.json is not None:
        names = ("preset", "target", "learning_rate", "base_rows", "seed")
        about = {name: getattr(args, name) for name in names} | {"versions": versions(), "date": time.strftime("%F")}
        fitted = {"least_updates": least, "critical_characters": critical, "noise_scale_characters": noise}
        runs = [each._asdict() for each in found]
        args.json.write_text(json.dumps({"about": about, "fit": fitted, "runs": runs}, indent=1) + "\n")
    if args.plot is not None:
        plot(found, least, critical, args)


if __name__ == "__main__":
    main()
