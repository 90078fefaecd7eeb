"""A file system that is full, for real: a small tmpfs (needs root)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from gfrnn.training.heartbeat import Heartbeat
from launch import SMALL, start_training, train


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 10 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_disk_full_at_a_checkpoint(small_disk: Path):
    flags = [*SMALL, "--max-updates", "200", "--hidden-size", "64", "--checkpoint-every", "20", "--keep-last", "50"]
    status, _, err = train(small_disk / "run", flags)
    assert status == 2, err
    line = one_line(err)
    assert "No space left on device" in line
    assert "free space" in line
    # what was saved before is whole: with room made, the same command goes on
    latest = (small_disk / "run/checkpoints/latest").read_text()
    assert (small_disk / "run/checkpoints" / latest / "trainer.json").exists()
    for path in sorted((small_disk / "run/checkpoints").glob("step-*"))[:-1]:
        subprocess.run(["rm", "-r", str(path)], check=True)
    status, _, err = train(small_disk / "run", [*flags[:-1], "1", "--max-updates", "40"])
    assert status == 0, err
    assert f"resumed at update {int(latest.removeprefix('step-'))}" in err


def test_disk_full_with_two_processes(small_disk: Path):
    flags = [*SMALL, "--max-updates", "200", "--hidden-size", "64", "--checkpoint-every", "20", "--keep-last", "50"]
    process = start_training(small_disk / "run", flags, processes=2, stage="z2", launcher=True)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "No space left on device" in one_line(err)


def test_disk_full_where_the_corpus_is_kept(small_disk: Path, tmp_path: Path):
    (small_disk / "filler").write_bytes(bytes(10_000_000))
    status, _, err = train(tmp_path / "run", [*SMALL, "--data-dir", str(small_disk / "data"), "--max-updates", "5"])
    assert status == 2, err
    assert "No space left on device" in one_line(err)


def test_a_rank_can_still_say_where_it_is(small_disk: Path, monkeypatch: pytest.MonkeyPatch):
    """Or slurm/supervise.py would take it for dead, and its node for broken."""
    monkeypatch.setenv("GFRNN_CONTROL", str(small_disk))
    monkeypatch.setenv("GFRNN_BEAT_SECONDS", "1000")
    heart = Heartbeat()
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(20_000_000))
    heart.step = 8
    heart.end(OSError(28, "No space left on device"))
    record = json.loads((small_disk / "rank-00000.json").read_text())
    assert (record["step"], record["ended"]["kind"]) == (8, "user")
