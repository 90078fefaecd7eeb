"""One training through src/train.py, to its end, for benchmarks to import: no program of its own."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from gfrnn.config import EXIT_FAILED, RunFailed
from gfrnn.runs import RunFolder

ROOT = Path(__file__).parents[1]
_PR_SET_PDEATHSIG = 1


def train(launcher: str, flags: list[str], run: Path, max_updates: int) -> None:
    """Trains with these flags, which ask for `max_updates`, in a folder, unless it is finished there.

    launcher: what starts src/train.py. In a folder of other settings, or of a longer run, it ends this program. Raises
    RunFailed where the training itself failed: its loss is not finite, say, and would not be another time.
    """
    command = [*shlex.split(launcher), str(ROOT / "src/train.py"), *flags, "--output-dir", str(run)]
    print(shlex.join(command), file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, preexec_fn=end_with_parent)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the terminal has told the training too: it saves a checkpoint
        process.wait()
        raise
    folder = RunFolder(run)
    summary = folder.read_summary()
    if status == EXIT_FAILED:
        raise RunFailed(f"the training in {run} failed: see above")
    if status != 0 or summary is None or not summary["finished"]:
        sys.exit(f"error: that training ended with status {status}; where it was stopped the same command goes on")
    if folder.read_settings().run.max_updates != max_updates:
        sys.exit(f"error: {run} has a longer run already; give another --output-dir")


def end_with_parent() -> None:
    """Has Linux send SIGTERM when this program is killed: a checkpoint, and the run folder is free again."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
