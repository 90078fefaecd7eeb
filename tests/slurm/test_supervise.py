"""The supervisor's own command line. What it does on a cluster: tests/systems/test_slurm.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import supervise
from launch import ROOT
from supervise import split, usable_nodes


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


SINFO = """
a1 idle (null) gpu:a100:8(S:0-1)
a2 mix (null) gpu:a100-sxm4-80gb:8,nvme:1
v1 idle (null) gpu:v100:8(S:0-1)
r1 resv (null) gpu:a100:8
d1 drained (null) gpu:a100:8
"""


@pytest.mark.parametrize(
    ("shown", "nodes"),
    [
        ({}, {"a1", "a2", "v1"}),
        ({"TresPerNode": "gres/gpu:8"}, {"a1", "a2", "v1"}),
        ({"TresPerNode": "gres/gpu:a100:8"}, {"a1"}),
        ({"TresPerNode": "gres:gpu:v100:2"}, {"v1"}),
        ({"TresPerTask": "cpu=4,gres/gpu:a100-sxm4-80gb=1"}, {"a2"}),
        ({"TresPerJob": "gres/gpu:v100:16"}, {"v1"}),
        ({"TresPerNode": "gres/gpu:8,gres/nvme:1"}, {"a2"}),
        ({"TresPerNode": "gres/gpu:h100:8"}, set()),
        ({"TresPerNode": "gres/gpu:a100:8", "Reservation": "(null)"}, {"a1"}),
        ({"TresPerNode": "gres/gpu:a100:8", "Reservation": "ours"}, {"a1", "r1"}),
    ],
)
def test_nodes_like_another(shown: dict[str, str], nodes: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "slurm", lambda *_: (0, SINFO.strip()))
    assert usable_nodes(shown) == nodes
