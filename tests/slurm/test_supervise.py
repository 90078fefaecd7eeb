"""The supervisor's own command line. What it does on a cluster: tests/systems/test_slurm.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from launch import ROOT
from supervise import split


def test_commands_keep_flags_of_their_own() -> None:
    parts = [["--output-dir", "r"], ["srun", "--output-dir", "r", "x"], ["srun", "y", "--training", "z"]]
    assert split([*parts[0], "--preflight", *parts[1], "--training", *parts[2]]) == parts


def test_its_python_is_any(tmp_path: Path) -> None:
    """It runs on the host where training is in a container: with the standard library alone."""
    command = [sys.executable, "-E", "-S", ROOT / "slurm/supervise.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--silent SILENT" in done.stdout
