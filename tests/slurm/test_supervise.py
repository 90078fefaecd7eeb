"""The supervisor's own command line. What it does on a cluster: tests/systems/test_slurm.py."""

from __future__ import annotations

from supervise import split


def test_commands_keep_flags_of_their_own() -> None:
    parts = [["--output-dir", "r"], ["srun", "--output-dir", "r", "x"], ["srun", "y", "--training", "z"]]
    assert split([*parts[0], "--preflight", *parts[1], "--training", *parts[2]]) == parts
