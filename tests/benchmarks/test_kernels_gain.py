"""benchmarks/cpu_kernels.py on models of a moment."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from launch import ROOT, environment, warm_python

SCRIPT = ROOT / "benchmarks/cpu_kernels.py"


def test_all_ways_are_timed(tmp_path):
    flags = ["--repeats", "2", "--models", "demo:2x3", "gru-3x228:3x2", "--threads", "1"]
    command = [sys.executable, SCRIPT, *flags, "--json", tmp_path / "gain.json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gain.json").read_text())
    assert [(each["model"], each["rows"], each["steps"]) for each in found["results"]] == [
        ("demo", 2, 3),
        ("gru-3x228", 3, 2),
    ]
    for each in found["results"]:
        for way in ("torch", "onednn"):
            assert f"{each[way] / each['ours']:.2f}" in done.stdout
    assert found["about"]["threads"] == 1


@pytest.mark.parametrize("flags", ["--models demo", "--models demo:2xfive", "--models demo:0x3", "--repeats 0"])
def test_bad_input_is_one_line(flags):
    done = warm_python(SCRIPT, *flags.split())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
