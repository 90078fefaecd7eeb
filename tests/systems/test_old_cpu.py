"""An int8 step on a CPU older than this machine's (Debian's qemu-user): x86 without VNNI adds products in 16 bits."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exported import SMALL, language_model, save_step

from gfrnn_onnx.runner import Step
from launch import ROOT, environment

SYMBOLS = 7, 200, 31
PROGRAM = f"""
import sys
import numpy as np
from gfrnn_onnx.runner import Step
np.save(sys.argv[2], Step(sys.argv[1], "cpu")(np.array({SYMBOLS}))[0])
"""


@pytest.mark.parametrize("hidden_size", [64, 96])
def test_int8_is_the_same_without_vnni(hidden_size: int, tmp_path: Path) -> None:
    model = language_model(dataclasses.replace(SMALL, hidden_size=hidden_size), spread=1.0)
    path, logits = save_step(model, tmp_path / "step.onnx", precision="int8"), tmp_path / "logits.npy"
    python = [sys.executable, "-c", PROGRAM, path, logits]
    old = subprocess.run(
        ["qemu-x86_64", "-cpu", "Haswell", *python],
        env=environment(PYTHONPATH=str(ROOT / "export")),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert old.returncode == 0, old.stderr
    np.testing.assert_allclose(np.load(logits), Step(path, "cpu")(np.array(SYMBOLS))[0], atol=1e-5)
