"""What logging and MLflow tracking cost the demo: characters a second with tracking and without, alternating.

    python benchmarks/overhead.py --repeats 3

The steady state counts: the first third of the updates, in which the tracking process starts, is reported apart.
`overhead_share` is what the trainer itself measures: fetching batches and writing log lines, as a share of its time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(folder: Path, updates: int, tracked: bool) -> tuple[float, float, float]:
    """(characters/s in the first third, after it, overhead share)."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_gpus", "2"]
    flags = ["--deepspeed", "ds_configs/z2.json", "--preset", "demo", "--output-dir", str(folder)]
    limits = ["--max-updates", str(updates), "--valid-every", "0", "--valid-bytes", "2000", "--checkpoint-every", "0"]
    track = "--mlflow" if tracked else "--no-mlflow"
    subprocess.run([*launcher, "src/train.py", *flags, *limits, track], cwd=ROOT, check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train_bpc" in line]
    third = len(lines) // 3

    def speed(part: list[dict[str, float]]) -> float:
        return statistics.harmonic_mean([line["characters_per_second"] for line in part])

    share = statistics.median(line["overhead_share"] for line in lines[third:])
    return speed(lines[:third]), speed(lines[third:]), share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=120)
    args = parser.parse_args()
    ratios, shares = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            with_start, with_steady, share = run(Path(folder) / f"{repeat}-tracked", args.updates, True)
            without_start, without_steady, _ = run(Path(folder) / f"{repeat}-plain", args.updates, False)
            ratios.append(with_steady / without_steady)
            shares.append(share)
            print(
                f"tracked {with_start:,.0f} then {with_steady:,.0f} characters/s; "
                f"untracked {without_start:,.0f} then {without_steady:,.0f}; steady ratio {ratios[-1]:.3f}",
                flush=True,
            )
    print(
        f"median ratio {statistics.median(ratios):.3f}; data and logging {statistics.median(shares):.2%} of an update"
    )


if __name__ == "__main__":
    main()
