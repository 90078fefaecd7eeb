"""What a rank leaves behind for slurm/supervise.py, however it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gfrnn.training.heartbeat import Heartbeat
from launch import environment

END = """
import ctypes, os, signal, sys
from gfrnn.training.heartbeat import Heartbeat
heart = Heartbeat()
heart.step = 7
heart.at("backward")
heart.beat()
if sys.argv[1] == "abort":
    os.abort()
elif sys.argv[1] == "segfault":
    ctypes.string_at(0)
elif sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif sys.argv[1] == "error":
    heart.end(RuntimeError("CUDA error:\\n" + "é" * 5000))
"""


def left_by(folder: Path, how: str) -> tuple[int, dict[str, Any], str]:
    """Its status, last heartbeat and crash file."""
    env = environment(GFRNN_CONTROL=str(folder), RANK="3")
    status = subprocess.run([sys.executable, "-c", END, how], env=env, capture_output=True).returncode
    return status, json.loads((folder / "rank-00003.json").read_text()), (folder / "rank-00003.crash").read_text()


@pytest.mark.parametrize(
    ("how", "number", "crash"),
    [
        ("abort", signal.SIGABRT, "Fatal Python error: Aborted"),
        ("segfault", signal.SIGSEGV, "Fatal Python error: Segmentation fault"),
        ("kill", signal.SIGKILL, ""),
    ],
)
def test_a_crash_is_told_from_a_kill(how: str, number: signal.Signals, crash: str, tmp_path: Path) -> None:
    status, record, said = left_by(tmp_path, how)
    assert status == -number
    assert (record["rank"], record["step"], record["phase"], record["ended"]) == (3, 7, "backward", None)
    assert said.partition("\n")[0] == crash


def test_an_error_is_said(tmp_path: Path) -> None:
    status, record, _ = left_by(tmp_path, "error")
    assert status == 0
    assert record["ended"]["kind"] == "error"
    assert record["ended"]["reason"].startswith("CUDA error: éé")


def test_it_beats_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFRNN_CONTROL", str(tmp_path))
    monkeypatch.setenv("GFRNN_BEAT_SECONDS", "0.05")
    heart = Heartbeat()
    deadline = time.monotonic() + 60
    while json.loads((tmp_path / "rank-00000.json").read_text())["beats"] < 5:
        assert time.monotonic() < deadline
    heart.end(None)
    assert json.loads((tmp_path / "rank-00000.json").read_text())["ended"] == {"kind": "finished", "reason": ""}
