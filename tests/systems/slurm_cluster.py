"""A real SLURM on this machine, for tests: nodes are namespaces of processes (or networks), jobs are sbatch's."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import ROOT, environment

SCRIPT = Path(__file__).parent / "cluster/slurm-cluster"

# Limits of slurm/supervise.py, for tests that wait for them.
QUICK = {"GFRNN_BEAT_SECONDS": "1", "GFRNN_SILENT_SECONDS": "6", "GFRNN_STALLED_SECONDS": "12"}


class Cluster:
    """Runs while it is entered. isolate: pid, or net, whose nodes have links that can be cut."""

    def __init__(self, folder: Path, isolate: str):
        self.folder, self.isolate = folder, isolate

    def __enter__(self) -> Cluster:
        self("up", "-n", "2", "-c", "4", "-g", "2", "-i", self.isolate)
        return self

    def __exit__(self, *_: object) -> None:
        self("down")

    def __call__(self, what: str, *arguments: str) -> str:
        """A command of the cluster script: `in` NODE CMD, kill-node NODE, cut NODE ..."""
        command = [SCRIPT, what, self.folder, *arguments]
        # files, not pipes: what is started in the background keeps them open
        log = self.folder.parent / "cluster.log"
        with log.open("w") as f:
            done = subprocess.run(command, stdout=f, stderr=f, check=False, timeout=120)
        assert done.returncode == 0, log.read_text()
        return log.read_text()

    def client(self, *command: str | Path, **extra: str) -> str:
        """A command of SLURM's, to its end: what it prints."""
        where = [str(SCRIPT), "exec", str(self.folder)]
        ours = {"DS_ACCELERATOR": "cpu", "GFRNN_PYTHON": sys.executable, "GFRNN_HOME": str(ROOT)}
        env = environment(**{**ours, **QUICK, **extra})
        done = subprocess.run([*where, *map(str, command)], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sbatch(self, folder: Path, *arguments: str | Path, **extra: str) -> Job:
        """Submits a batch script; what it prints goes to FOLDER/out (of an array FOLDER/out-N)."""
        array = any(str(argument).startswith("--array") for argument in arguments)
        output = folder / ("out-%a" if array else "out")
        said = self.client("sbatch", "--parsable", "--output", output, *arguments, **extra)
        return Job(self, said.strip(), output)

    def wait_for_nodes(self) -> None:
        """Until both are up and idle; to sinfo's -t a node that a job is still leaving is idle too."""
        wait(lambda: self.client("sinfo", "-h", "-p", "batch", "-o", "%t %D").strip() == "idle 2", 90)


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, number: str, output: Path):
        self.cluster, self.number, self._output = cluster, number, output

    def shown(self) -> dict[str, str]:
        return dict(re.findall(r"(\S+?)=(\S*)", self.cluster.client("scontrol", "show", "job", self.number)))

    @property
    def state(self) -> str:
        return self.shown()["JobState"]

    def output(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def wait(self, seconds: float = 300) -> str:
        """Until it has ended for good: its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        wait(lambda: self.state in ended, seconds, lambda: f"{self.shown()}\n{self.output()}")
        return self.state

    def ends(self, run: Path) -> list[dict[str, Any]]:
        """How each of its starts (or those of an array's task) ended."""
        (path,) = run.glob(".job-*/ends.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def rank(self, run: Path, rank: int, restart: int = 0) -> dict[str, Any]:
        """What a rank said of itself last."""
        found: dict[str, Any] = json.loads((run / f".job-{self.number}/{restart}/rank-{rank:05d}.json").read_text())
        return found

    def environment_of(self, run: Path, rank: int) -> dict[str, str]:
        """A rank's environment, seen from within its node."""
        record = self.rank(run, rank)
        said = self.cluster("in", record["node"], "cat", f"/proc/{record['pid']}/environ")
        return dict(line.partition("=")[::2] for line in said.split("\0"))

    def signal_rank(self, run: Path, rank: int, number: signal.Signals, restart: int = 0) -> dict[str, Any]:
        """Signals a rank from within its node."""
        record = self.rank(run, rank, restart)
        self.cluster("in", record["node"], "kill", f"-{number.value}", str(record["pid"]))
        return record


def wait(until: Callable[[], bool], seconds: float, otherwise: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.3)


def lines(run: Path) -> int:
    """Of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


CLUSTER = ("slurmctld", "slurmd", "munged", "srun", "unshare", "nsenter")


def needs_root_and(*programs: str) -> None:
    """Skips the test where it is not run as root or a program is missing; with GFRNN_CI set, as in CI, fails it."""
    absent = [program for program in programs if shutil.which(program) is None]
    if absent or os.geteuid() != 0:
        why = f"this needs {', '.join(absent) or 'root'}"
        assert not os.environ.get("GFRNN_CI"), why
        pytest.skip(why)
