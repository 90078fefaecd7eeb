"""Reductions beside the computation of weight gradients, over a slow link (needs root: network namespaces)."""

from __future__ import annotations

from pathlib import Path

from launch import measured_overlap


def test_reductions_over_a_slow_link_are_hidden(tmp_path: Path) -> None:
    found = measured_overlap(
        tmp_path, "--rate", "500mbit", "--rows", "192", "--steps", "50", "--plot", str(tmp_path / "overlap.png")
    )
    assert found["apart"]["waited_s"] < 0.9 * found["together"]["waited_s"]
    assert (tmp_path / "overlap.png").stat().st_size > 10_000
