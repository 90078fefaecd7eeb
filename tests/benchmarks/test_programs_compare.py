"""benchmarks/programs_compare.py: two nets of as many parameters, trained as long, compared on the same programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import programs_compare
from gfrnn.config import UserError, sizes
from launch import ROOT, environment, warm_python

SCRIPT = ROOT / "benchmarks/programs_compare.py"
SMALL = [
    "--num-layers",
    "2",
    "--hidden-size",
    "12",
    "--rows",
    "8",
    "--num-programs",
    "200",
    "--valid-programs",
    "20",
    "--nesting",
    "1",
    "--no-mlflow",
]


def command(folder: Path, *flags: str) -> list[str | Path]:
    files = ["--output-dir", folder / "runs", "--json", folder / "found.json", "--plot", folder / "found.png"]
    return [SCRIPT, "--seeds", "1", "--programs", "20", *files, *flags]


def test_nets_are_trained_and_compared(tmp_path: Path) -> None:
    flags = ["--", *SMALL, "--max-updates", "3", "--data-dir", str(tmp_path / "data")]
    cold = [sys.executable, *command(tmp_path, *flags)]
    done = subprocess.run(cold, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(cell["nesting"], cell["length"]) for cell in found["cells"]] == [(1, 1), (1, 2)]
    assert found["nets"]["gf"]["step"] == found["nets"]["stack"]["step"] == [3]
    assert found["nets"]["gf"]["units"] == 12 < found["nets"]["stack"]["units"]
    for who, feedback in (("gf", "gated"), ("stack", "none")):
        model = json.loads((tmp_path / f"runs/{who}-seed-0/config.json").read_text())["settings"]["model"]
        assert (model["hidden_size"], model["feedback"]) == (found["nets"][who]["units"], feedback)
        parameters = json.loads((tmp_path / f"runs/{who}-seed-0/summary.json").read_text())["parameters"]
        assert parameters == found["nets"][who]["parameters"]
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert "mean gain" in done.stdout
    flags = ["--", *SMALL, "--max-updates", "2", "--data-dir", str(tmp_path / "data")]
    other = warm_python(*command(tmp_path, *flags))
    assert other.returncode == 1
    assert "has a longer run already" in other.stderr


def test_nets_have_as_many_parameters_whatever_the_flags() -> None:
    nets = programs_compare.nets_of("programs-demo", ["--num-layers", "3", "--unit", "gru", "--forget-bias", "0"])
    gf, stack = sizes(nets["gf"]).total, sizes(nets["stack"]).total
    assert abs(gf - stack) < 0.01 * gf
    assert nets["stack"].model.num_layers == 3


@pytest.mark.parametrize(
    ("preset", "flags", "said"),
    [
        ("programs-demo", ["--seed", "3"], "--seed is this script's own"),
        ("programs-demo", ["--feedback=full"], "--feedback is this script's own"),
        ("programs-lstm-3x200", [], "is no net of programs with feedback"),
        ("demo", [], "is no net of programs with feedback"),
    ],
)
def test_what_would_unmatch_them_is_refused(preset: str, flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        programs_compare.nets_of(preset, flags)


def test_the_interval_is_of_the_mean_over_seeds() -> None:
    found = programs_compare.mean_gain({"gf": [0.5, 0.6, 0.7], "stack": [0.4, 0.4, 0.4]})
    assert found.value == pytest.approx(0.2)
    assert found.high - found.value == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)  # t of 2 degrees of freedom
