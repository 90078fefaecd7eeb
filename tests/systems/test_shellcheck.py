"""Every shell script of the project, as shellcheck reads it."""

from __future__ import annotations

import subprocess

from launch import ROOT


def test_every_script_passes_shellcheck() -> None:
    scripts = [
        *(ROOT / "slurm").glob("*.sbatch"),
        *(ROOT / "slurm").glob("*.sh"),
        ROOT / "tests/systems/cluster/slurm-cluster",
    ]
    assert len(scripts) >= 10
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
