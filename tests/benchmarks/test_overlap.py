"""benchmarks/overlap.py: reductions are asked for while later layers' gradients are still to be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import measured_overlap


@pytest.mark.parametrize(
    "engine", [["ddp"], ["deepspeed", "--stage", "1"], ["deepspeed", "--stage", "2"]], ids="-".join
)
def test_reductions_begin_before_the_last_layer(tmp_path: Path, engine: list[str]) -> None:
    found = measured_overlap(tmp_path, "--rate", "0", "--engine", *engine)
    assert found["apart"]["first_reduction_s"] < found["apart"]["last_layer_s"]
    assert found["together"]["first_reduction_s"] > found["together"]["last_layer_s"]
