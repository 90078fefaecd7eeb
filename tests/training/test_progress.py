"""What a person sees of a run: lines where stderr is no terminal, a bar where it is one."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from gfrnn.training.progress import TrainingProgress
from launch import environment

PROGRAM = """
from gfrnn.training.progress import TrainingProgress
with TrainingProgress(40, 30, enabled=True) as progress:
    progress.show(35, "1.235 BPC", 98765.4, 0.5)
    progress.say("validation [1/2] 1.2")
    progress.show(40, "1.200 BPC", 98765.4, 0.5)
"""


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(total=100, done=50, enabled=True) as progress:
        for step in (51, 52, 99):
            progress.show(step, "1.235 BPC", 98765.4, 0.123)
        progress.say("validation")
        progress.show(100, "1.2 BPC", 98765.4, 0.123)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("update 51/100  1.235 BPC  98,765 characters/s  MFU 12%  0:00:0")
    assert lines[1] == "validation"
    assert lines[2].startswith("update 100/100 ")  # the others came too soon after the first
    assert len(lines) == 3


def test_time_left_counts_from_where_the_run_was_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = TrainingProgress(total=10_000, done=1000, enabled=True)
    clock[0] += 100
    progress.show(1100, "1.0 BPC", 1.0, 0.1)
    assert capsys.readouterr().err.strip().endswith("2:28:20 left")


def test_only_one_process_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(total=2, done=0, enabled=False) as progress:
        progress.show(2, "1.0 BPC", 1.0, 0.1)
        progress.say("validation")
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs, env=environment(TERM="xterm")) as process:
        os.close(theirs)
        shown = b""
        while process.poll() is None or shown[-1:] == b"":
            try:
                shown += os.read(ours, 65536)
            except OSError:  # its end is closed
                break
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    assert "40/40" in text
    assert "1.200 BPC" in text
    assert "validation [1/2] 1.2" in text
    assert "\x1b[?25h" in text  # the cursor is shown again
