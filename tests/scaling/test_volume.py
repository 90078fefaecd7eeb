"""What an update sends: the theory by hand, and against what real training under DeepSpeed sends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gfrnn.config import CommunicationSettings, OptimizerSettings, Settings
from gfrnn.scaling.volume import predicted, sent
from launch import ROOT, environment

PARAMETERS = [300_000, 200_000, 1_000]  # the last so small that stage 3 keeps it whole
P = sum(PARAMETERS)


@pytest.mark.parametrize(
    ("zero", "more", "messages"),
    [
        ({"stage": 0}, {}, {"all_reduce": 4 * P}),
        ({"stage": 1}, {}, {"all_reduce": 4 * P, "all_gather": 4 * P}),
        ({"stage": 2}, {}, {"all_reduce": 3 * 4 * P, "all_gather": 4 * P}),
        ({"stage": 2, "use_multi_rank_bucket_allreduce": False}, {}, {"reduce": 3 * 4 * P, "all_gather": 4 * P}),
        ({"stage": 3}, {}, {"reduce_scatter": 3 * 4 * P, "all_gather": 3 * 4 * 500_000 + 4 * 1_000}),
        ({"stage": 0}, {"communication_data_type": "bf16"}, {"all_reduce": 2 * P}),
        ({"stage": 1}, {"communication_data_type": "bf16"}, {"all_reduce": 2 * P, "all_gather": 4 * P}),
        ({"stage": 2}, {"bf16": {"enabled": True}}, {"all_reduce": 3 * 2 * P, "all_gather": 2 * P}),
    ],
)
def test_theory(zero: dict[str, Any], more: dict[str, Any], messages: dict[str, int]) -> None:
    config = {"zero_optimization": zero, "gradient_accumulation_steps": 3, **more}
    assert predicted(config, PARAMETERS) == messages


@pytest.mark.parametrize(
    ("optimizer", "sending", "messages"),
    [
        ("adam", {"compression": "powersgd", "compression_rank": 3}, {"all_reduce": 4 * (3 * (100 + 50) + 7 + 2 * 4)}),
        ("adam", {"compression": "topk", "compression_share": 0.1}, {"all_gather": 2 * 8 * 502}),
        ("adam", {"compression": "local", "local_updates": 6}, {"all_reduce": 4 * 3 * 5015 // 6}),
        ("rmsprop", {"compression": "local", "local_updates": 4}, {"all_reduce": 4 * 4 * 5015 // 4}),
    ],
)
def test_theory_of_compression(optimizer: Any, sending: dict[str, Any], messages: dict[str, int]) -> None:
    """A matrix that is worth it, a vector, and a matrix that is sent as it is; 2 processes."""
    config = {"zero_optimization": {"stage": 0}, "gradient_accumulation_steps": 3}
    settings = Settings(
        communication=CommunicationSettings(**sending), optimization=OptimizerSettings(optimizer=optimizer)
    )
    shapes = [(100, 50), (7,), (2, 4)]
    assert predicted(config, [5000, 7, 8], settings, shapes=shapes, world_size=2) == messages
    assert predicted(config, [5000, 7, 8], Settings()) == {"all_reduce": 4 * 5015}


def test_what_a_process_sends() -> None:
    assert sent({"all_reduce": 100}, 4) == 150
    assert sent({"reduce_scatter": 100, "all_gather": 100}, 4) == 150
    assert sent({"all_reduce": 100, "all_gather": 100}, 1) == 0


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (3, 2)])
def test_theory_is_what_is_sent(processes: int, accumulation: int, tmp_path: Path) -> None:
    """Within 0.5 % under every config: padding, the gradient's norm and the loss are left out of it."""
    where = tmp_path / "volume.json"
    flags = ["--processes", str(processes), "--accumulation", str(accumulation), "--json", where]
    command = [sys.executable, ROOT / "benchmarks/volume.py", *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(where.read_text())["results"]
    assert len(results) == 13
    for name, found in results.items():
        assert set(found["predicted"]) <= set(found["counted"]), name
        for kind, size in found["counted"].items():
            allowed = 0.005 * sum(found["counted"].values())
            assert size == pytest.approx(found["predicted"].get(kind, 0), abs=allowed), (name, kind)
