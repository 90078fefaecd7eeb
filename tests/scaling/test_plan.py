"""The grid of a study and what it would take: fast, without torch, and in one line where it contradicts itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gfrnn.config import UserError, preset
from gfrnn.scaling.folder import Result, StudyFolder
from gfrnn.scaling.grid import Grid, How, expand, prepared
from gfrnn.scaling.main import PlanCommand
from gfrnn.scaling.plan import Peak, Planned, training_flags
from gfrnn.scaling.records import Machine, Measurement, Point
from launch import ROOT, environment, script, script_at_once

DEMO = {"presets": ("demo",)}


def points(**flags: Any) -> list[Point]:
    return expand(Grid(**{**DEMO, **flags}), How())


def refused(**flags: Any) -> str:
    with pytest.raises(UserError) as caught:
        points(**flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_combination_once_in_order() -> None:
    found = points(ds_configs=("z0", "z2", "z0"), world_sizes=(1, 2), dtypes=("fp32", "bf16"))
    assert len(found) == 8
    assert found[:4] == [
        Point("demo", "z0", world_size, rows=32, steps=50, dtype=dtype)
        for world_size in (1, 2)
        for dtype in ("fp32", "bf16")
    ]
    assert {point.ds_config for point in found[4:]} == {"z2"}
    assert len({point.name for point in found}) == 8


def test_strong_and_weak() -> None:
    def rows(**flags: Any) -> list[tuple[int, int]]:
        return [(point.world_size, point.rows) for point in points(world_sizes=(1, 2, 4), **flags)]

    assert rows(rows=(8, 16)) == [(1, 8), (1, 16), (2, 8), (2, 16), (4, 8), (4, 16)]
    assert rows(scaling="weak", rows_per_process=(4,)) == [(1, 4), (2, 8), (4, 16)]
    assert rows(scaling="both", rows=(8,), rows_per_process=(4,)) == [(1, 8), (1, 4), (2, 8), (4, 8), (4, 16)]


def test_processes_are_spread_evenly_on_nodes() -> None:
    found = points(world_sizes=(1, 2, 4), nodes=(1, 2))
    assert [(point.nodes, point.world_size) for point in found] == [(1, 1), (1, 2), (1, 4), (2, 2), (2, 4)]
    assert "fewer processes than nodes" in refused(world_sizes=(1, 2), nodes=(2,))
    assert "--world-sizes 3 on --nodes 2: no equal share" in refused(world_sizes=(3,), nodes=(2,))
    assert "--node-size is -1" in refused(node_size=-1)
    most = "--world-sizes 16 on --nodes 1 3: more than --node-size 8 on each; take more nodes"
    assert most in refused(world_sizes=(8, 16), nodes=(1, 3), node_size=8)


def test_contradictions_are_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}')
    assert "nothing is left in the grid" in refused(world_sizes=())
    assert "nothing is left in the grid" in refused(compressions=())
    assert "8 processes cannot share --rows 4" in refused(world_sizes=(8,), rows=(4,))
    assert "needs --rows-per-process" in refused(scaling="weak")
    assert "has no effect on --scaling strong" in refused(rows_per_process=(4,))
    assert "has no effect on --scaling weak" in refused(scaling="weak", rows_per_process=(4,), rows=(3,))
    assert "did you mean demo" in refused(presets=("demmo",))
    assert "a model of programs" in refused(presets=("programs-demo",))
    assert "there are z0, z1, z2, z2_offload, z3" in refused(ds_configs=("z9",))
    assert "offload_optimizer needs stage 1 or higher" in refused(ds_configs=(str(bad),))
    assert "nope.json: No such file" in refused(ds_configs=("nope.json",))
    assert "--compressions gzip is unknown" in refused(compressions=("gzip",))
    assert "--world-sizes has 0" in refused(world_sizes=(0,))
    assert "--steps is" in refused(steps=(2**40,))


def test_a_point_is_settings_and_a_config(tmp_path: Path) -> None:
    config = tmp_path / "mine.json"
    config.write_text('{"zero_optimization": {"stage": 1}, "communication_data_type": "fp16"}')
    (point,) = points(ds_configs=("z2",), compressions=("bf16",), world_sizes=(2,), steps=(7,), rows=(6,))
    settings, resolved = prepared(point, How(corpus="text8"), tmp_path)
    assert (settings.batch.rows, settings.batch.steps, settings.data.corpus) == (6, 7, "text8")
    assert settings.model == preset("demo").model
    assert not settings.run.mlflow
    assert resolved["communication_data_type"] == "bf16"
    assert (resolved["zero_optimization"]["stage"], resolved["train_micro_batch_size_per_gpu"]) == (2, 3)
    (own,) = points(ds_configs=(str(config),))
    assert prepared(own, How(), tmp_path)[1]["communication_data_type"] == "fp16"
    assert "says communication_data_type itself" in refused(ds_configs=(str(config),), compressions=("bf16",))
    config.unlink()
    assert prepared(own, How(), tmp_path, {"zero_optimization": {"stage": 3}})[1]["zero_optimization"]["stage"] == 3


def test_plan_of_what_fits_and_what_does_not(tmp_path: Path) -> None:
    flags = ["--presets", "demo", "gf-lstm-5x700", "--world-sizes", "1", "2", "--rows", "16", "--steps", "20"]
    flags += ["--memory", "0.5", "--gflops", "10", "--json", str(tmp_path / "plan.json")]
    done = script("study", "plan", *flags, "--points", tmp_path / "points.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert [bool(row["refused"]) for row in rows] == [False, False, True, True]
    assert "2 of 4 points can be run" in done.stdout
    assert "gf-lstm-5x700-z0-1x1-rows16-steps20-fp32 does not fit: a process would take" in done.stderr
    alone, shared = rows[:2]
    assert alone["step_seconds"] == pytest.approx(alone["flops"] / 10e9)
    assert shared["step_seconds"] == pytest.approx(alone["step_seconds"] / 2)
    # lines that train these points, as slurm/study.sbatch reads them
    lines = (tmp_path / "points.txt").read_text().splitlines()
    assert len(lines) == 2
    words = lines[1].partition("#")[0].split()
    dry = script("train", *words, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "ZeRO stage 0" in dry.stdout
    assert "--corpus" not in words  # the preset's
    more = ["--train-updates", "5000", "--corpus", "text8"]
    done = script("study", "plan", *flags, *more, "--points", tmp_path / "points.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    longer = json.loads((tmp_path / "plan.json").read_text())[0]
    assert longer["seconds"] == pytest.approx(20 + 5000 * longer["step_seconds"])
    for line in (tmp_path / "points.txt").read_text().splitlines():
        assert "--corpus text8" in line


def test_points_as_trainings_say_their_compression() -> None:
    several = points(world_sizes=(2,), compressions=("none", "powersgd", "topk", "local"))
    lines = training_flags([planned(point) for point in several], How()).splitlines()
    said = [line.partition(" --compression ")[2].partition(" ")[0] for line in lines]
    assert said == ["", "powersgd", "topk", "local"]
    (point,) = points(compressions=("bf16",))
    with pytest.raises(UserError, match=r"leave it out, and put communication_data_type bf16 into a config of your"):
        training_flags([planned(point)], How())


def planned(point: Point) -> Planned:
    return Planned(point, memory_bytes=1, room_bytes=2, flops=1, step_seconds=1, seconds=1)


def test_a_cpus_peak_is_of_a_process_threads_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def peak(device: torch.device, dtype: torch.dtype) -> float:
        threads.append(torch.get_num_threads())
        return 8e9

    monkeypatch.setattr("gfrnn.training.flops.gemm_peak", peak)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    threads: list[int] = []
    before = torch.get_num_threads()
    try:
        for own, per_node, share in ((1, 1, 1), (1, 4, 1), (1, 8, 1 / 2), (2, 4, 1 / 2), (8, 1, 1), (8, 2, 1 / 2)):
            found = Peak(0, None, own).of(Point(world_size=2 * per_node, nodes=2))
            assert found == pytest.approx(8e9 / 2 * share)
            assert threads.pop() == min(own, 4)
    finally:
        torch.set_num_threads(before)


def test_the_rate_that_was_measured_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr("gfrnn.training.flops.gemm_peak", lambda device, dtype: 8e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2)))

    def notes(gflops: float, *world_sizes: int) -> list[str]:
        PlanCommand(Grid(presets=("demo",), world_sizes=world_sizes, rows=(8,)), memory=8.0, gflops=gflops)()
        return capsys.readouterr().err.splitlines()

    (rate,) = notes(0, 1, 2)
    assert rate.startswith("note: the times rest on 4 GFLOP/s in fp32 a process, half of what large products reach")
    assert notes(0, 1, 8) == [
        rate,
        "note: points have up to 8 processes a node, and this machine 2 cores: their times are those of processes that "
        "share them",
    ]
    assert notes(10, 1, 8) == []


def test_what_processes_reach_beside_as_many_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = StudyFolder(tmp_path / "s")
    reached = {Point(world_size=1): 40, Point(world_size=2, nodes=2): 42, Point(world_size=8): 10}
    study.begin(list(reached), How(threads=2))
    for point, gflops in reached.items():
        busy = (1 / gflops,) * point.world_size
        found = Measurement(point, Machine("cpu", 2), flops=10**9 * point.world_size, busy_seconds=busy)
        study.write(Result(found))
    peak = Peak(0, study, threads=2)
    expected = {(1, 1): 41, (2, 1): 41, (4, 1): 10, (16, 2): 10, (16, 1): 10, (4, 4): 41}
    assert {key: peak.of(Point(world_size=key[0], nodes=key[1])) / 1e9 for key in expected} == pytest.approx(expected)
    monkeypatch.setattr(Peak, "_measured", lambda self, dtype: 6e9)
    assert Peak(0, study, threads=1).of(Point()) == 3e9  # other threads say nothing


def test_answers_at_once() -> None:
    for flags, status in (
        (["--help"], 0),
        (["plan", "--help"], 0),
        (["run", "--help"], 0),
        ([], 2),
        (["plan", "--presets", "demmo"], 2),
        (["run", "/nowhere/study", "--scaling", "weak"], 2),
        (["run", str(ROOT / "LICENSE")], 2),
        (["run", "/nowhere/study", "--", "--partition=gpu"], 2),
        (["run", "/nowhere/study", "--updates", "0"], 2),
        (["measure", "/nowhere/study", "1"], 2),
    ):
        done = script_at_once("study", *flags)
        assert done.returncode == status, done.stderr
        assert status == 0 or (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1), done.stderr


def test_the_installed_program_is_the_same() -> None:
    command = [sys.executable, "-m", "gfrnn.scaling.main", "plan", "--help"]
    env = environment(PYTHONPATH=os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert "--world-sizes" in done.stdout
    assert 'gfrnn-study = "gfrnn.scaling.main:main"' in (ROOT / "pyproject.toml").read_text()


def test_a_node_takes_so_many_processes() -> None:
    found = points(world_sizes=(8, 16, 32), nodes=(1, 2, 4), node_size=8)
    assert [(point.world_size, point.nodes) for point in found] == [(8, 1), (8, 2), (16, 2), (8, 4), (16, 4), (32, 4)]


def test_arrays_for_each_shape_of_job(tmp_path: Path) -> None:
    flags = ["--presets", "demo", "--world-sizes", "1", "2", "4", "--nodes", "1", "2", "--slurm", "--dry-run"]
    done = script("study", "run", tmp_path / "s", *flags, "--", "--partition=gpu", "--gpus-per-task=1")
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in done.stdout.splitlines()]
    assert [call[2:5] for call in calls] == [
        ["--array=1", "--nodes=1", "--ntasks-per-node=1"],
        ["--array=2", "--nodes=1", "--ntasks-per-node=2"],
        ["--array=3", "--nodes=1", "--ntasks-per-node=4"],
        ["--array=4", "--nodes=2", "--ntasks-per-node=1"],
        ["--array=5", "--nodes=2", "--ntasks-per-node=2"],
    ]
    for call in calls:
        assert call[5:8] == ["--time=40", "--partition=gpu", "--gpus-per-task=1"]
        assert call[8:] == [str(ROOT / "slurm/measure.sbatch"), str(tmp_path / "s"), "gfrnn-study"]
