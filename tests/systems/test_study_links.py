"""A study over two hosts at two rates, small: the real thing is benchmarks/study_links.py, and docs/study.md has it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from slurm_cluster import needs_root_and

from gfrnn.scaling.page import write
from gfrnn.scaling.report import make
from gfrnn.scaling.store import read
from launch import ROOT, environment

SMALL = ["--rates", "1gbit", "100mbit", "--ds-configs", "z0", "z3", "--rows", "4"]
SMALL += ["--updates", "2", "--repeats", "2", "--sweep-seconds", "1"]


def test_a_study_over_a_cable(tmp_path: Path) -> None:
    needs_root_and("ip", "tc")
    command = [sys.executable, ROOT / "benchmarks/study_links.py", tmp_path, *SMALL, "--json", tmp_path / "found.json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["about"]["bytes_off"] < 0.02
    for residuals in found["held_out"]["a rate, from the other two"].values():
        assert len(residuals) == 3
    measurements, sweep = read(f"sqlite:///{tmp_path}/mlflow.db", "gfrnn-study")
    waits = {
        each.machine.network: each.parts["communication"]
        for each in measurements
        if each.point.world_size == 2 and each.point.ds_config == "z0"
    }
    size = 4 * measurements[0].parameters
    assert waits["100mbit"] > 0.8 * size * 8 / 100e6  # a gradient each way, at this rate
    assert waits["1gbit"] < 0.6 * waits["100mbit"]
    slow = [timed for machine, timed in sweep if machine.network == "100mbit" and timed.bytes >= 1 << 20]
    for timed in slow:
        assert timed.seconds > 0.4 * timed.bytes * 8 / 100e6  # half of it passes the cable at least
    made = make(measurements, sweep)
    page = write(made, tmp_path / "report")
    for rate in ("1gbit", "100mbit"):
        assert f"on this network ({rate}), strong scaling" in page.read_text()
