"""Reductions beside the computation of weight gradients, over a slow link (needs root: network namespaces)."""

from __future__ import annotations

from pathlib import Path

from launch import measured_overlap


def test_reductions_over_a_slow_link_begin_early(tmp_path: Path) -> None:
    """What that saves depends on the machine's mood: docs/performance.md has it measured, this has the order."""
    found = measured_overlap(tmp_path, "--rate", "500mbit", "--rows", "64", "--plot", str(tmp_path / "overlap.png"))
    assert found["apart"]["first_reduction_s"] < found["apart"]["last_layer_s"]
    assert found["together"]["first_reduction_s"] > found["together"]["last_layer_s"]
    assert found["together"]["waited_s"] > 0.05  # 8.5 MB at 500 Mbit/s take 0.14 s: the link is slow indeed
    assert (tmp_path / "overlap.png").stat().st_size > 10_000
