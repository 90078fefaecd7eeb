"""A study on a real SLURM of two nodes: an array for each shape of job, points that fail, and what is left afterwards.

Where root or Debian's packages are missing the tests are skipped, and say so; with GFRNN_CI set that is a failure.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import CLUSTER, Cluster, needs_root_and, wait

from gfrnn.scaling.folder import StudyFolder
from gfrnn.scaling.records import Measurement
from gfrnn.scaling.store import read
from launch import ROOT, script

_HOW = "--presets demo --rows 8 --steps 10 --warm-up 1 --updates 3 --repeats 2 --sweep-seconds 0.4"
HOW = _HOW.split()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    needs_root_and(*CLUSTER)
    with tempfile.TemporaryDirectory(prefix="gfrnn-") as folder, Cluster(Path(folder) / "c", "pid") as running:
        yield running


def submit(cluster: Cluster, study: Path, *flags: str) -> list[str]:
    """Numbers of the arrays."""
    output = study.parent / "out-%A-%a"
    command = [sys.executable, ROOT / "src/study.py", "run", study, *flags, "--slurm", "--", f"--output={output}"]
    return [line.removeprefix("study ") for line in cluster.client(*command).splitlines()]


def results(study: Path) -> list[Measurement | None]:
    folder = StudyFolder(study).read()
    found = [folder.result(point) for point in folder.points]
    return [None if result is None else result.measurement for result in found]


def test_a_study_of_one_and_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    study = tmp_path / "s"
    arrays = submit(cluster, study, *HOW, "--world-sizes", "2", "4", "--nodes", "1", "2")
    assert len(arrays) == 4

    def said() -> str:
        return "\n".join(path.read_text() for path in tmp_path.glob("out-*"))

    wait(lambda: not cluster.client("squeue", "-h").strip(), 300, said)
    measured = results(study)
    for found in measured:
        assert found is not None, said()
        assert not found.failed, said()
        assert len(found.busy_seconds) == found.point.world_size
        assert sum(found.bytes.values()) == pytest.approx(sum(found.predicted_bytes.values()), rel=0.02)
    folder = StudyFolder(study).read()
    assert [(point.nodes, point.world_size) for point in folder.points] == [(1, 2), (1, 4), (2, 2), (2, 4)]
    measurements, sweep = read(f"sqlite:///{tmp_path}/mlflow.db", "gfrnn-study")
    assert sorted(each.point.name for each in measurements) == sorted(point.name for point in folder.points)
    assert {(timed.nodes, timed.world_size) for _, timed in sweep} == {(1, 2), (1, 4), (2, 2), (2, 4)}
    assert submit(cluster, study) == []  # all are done
    assert not list((study / "points").glob(".said-*"))


def test_every_array_is_tried_and_what_sbatch_refuses_is_said(cluster: Cluster, tmp_path: Path) -> None:
    study = [sys.executable, ROOT / "src/study.py", "run", tmp_path / "s", *HOW, "--world-sizes", "2", "4"]
    command = shlex.join(map(str, [*study, "--slurm", "--", "--partition=nowhere"]))
    said = cluster.client("sh", "-c", f"{command} 2>&1; echo $?").splitlines()
    assert said[-1] == "2", said
    assert sum("invalid partition" in line for line in said) == 2
    assert said[-2].startswith("error: sbatch refuses sbatch --parsable --array=1 --nodes=1 --ntasks-per-node=2 ")
    assert "; sbatch --parsable --array=2 --nodes=1 --ntasks-per-node=4 " in said[-2]


def test_a_point_that_fails_there_says_why(cluster: Cluster, tmp_path: Path) -> None:
    study = tmp_path / "s"
    (tmp_path / "text").write_bytes(b"All work and no play. " * 50)
    submit(cluster, study, *HOW, "--world-sizes", "2", "--steps", "200", "--corpus-file", str(tmp_path / "text"))
    wait(lambda: not cluster.client("squeue", "-h").strip(), 120)
    (found,) = results(study)
    assert found is not None
    assert "too short for 8 rows x 200 steps" in found.failed
    done = script("study", "run", study)
    assert done.stdout.startswith("1 of 1 points are done, 1 of them failed")
