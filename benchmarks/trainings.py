"""One training through src/train.py, to its end, for the comparisons in this folder."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from gfrnn.runs import RunFolder

ROOT = Path(__file__).parents[1]


def train(launcher: str, flags: list[str], run: Path, max_updates: int) -> None:
    """Trains with these flags, which ask for `max_updates`, in a folder, unless it is finished there.

    launcher: what starts src/train.py. In a folder of other settings, or of a longer run, it ends this program.
    """
    command = [*shlex.split(launcher), str(ROOT / "src/train.py"), *flags, "--output-dir", str(run)]
    print(shlex.join(command), file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    folder = RunFolder(run)
    summary = folder.read_summary()
    if done.returncode != 0 or summary is None or not summary["finished"]:
        sys.exit(
            f"error: that training ended with status {done.returncode}; where it was stopped the same command goes on"
        )
    if folder.read_settings().run.max_updates != max_updates:
        sys.exit(f"error: {run} has a longer run already; give another --output-dir")
