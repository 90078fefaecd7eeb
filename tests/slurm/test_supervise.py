"""The supervisor's own command line. What it does on a cluster: tests/systems/test_slurm.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("earlier", "goes_on"), [(0, True), (1, True), (2, False)])
def test_job_that_takes_its_node_down_each_time_ends(tmp_path: Path, earlier: int, goes_on: bool) -> None:
    """Its supervisor dies with the node, and SLURM starts it again; what ended it is noted by the next start."""
    job = tmp_path / ".job-7"
    control = job / str(earlier + 1)
    control.mkdir(parents=True)
    ends = [{"restart": n, "step": 0, "cause": "failed", "why": "", "status": 1, "nodes": []} for n in range(earlier)]
    (job / "ends.jsonl").write_text("".join(json.dumps(end) + "\n" for end in ends))
    environment = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(earlier + 1), "GFRNN_CONTROL": str(control)}
    environment |= {"GFRNN_NODES": "node1", "GFRNN_PER_NODE": "1", "PATH": os.environ["PATH"]}
    begun = tmp_path / "begun"
    # what preflight finds ends this start: a user's mistake is not tried again
    (control / "preflight.json").write_text(json.dumps({"problems": [{"what": "none", "broken": False}]}))
    command = [sys.executable, ROOT / "slurm/supervise.py", "--output-dir", tmp_path]
    command += ["--preflight", "sh", "-c", f"touch {begun}; exit 1", "--training", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert "SLURM ended restart" in done.stdout
    assert begun.exists() is goes_on, done.stdout + done.stderr
    assert ("given up: failed 3 times before the first checkpoint" in done.stdout) is not goes_on
    assert done.returncode != 0
