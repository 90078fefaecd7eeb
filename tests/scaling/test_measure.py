"""Real studies by the command line: what is measured adds up, and what happens to a study does not end it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from gfrnn.scaling import phases
from gfrnn.scaling.exposed import exposed, shared, united, without
from gfrnn.scaling.folder import Result, StudyFolder
from gfrnn.scaling.grid import How, prepared
from gfrnn.scaling.group import reason
from gfrnn.scaling.measure import Own, _trained, combined
from gfrnn.scaling.phases import Stopwatch
from gfrnn.scaling.records import PARTS, Machine, Measurement, Point, Products
from gfrnn.scaling.store import read
from gfrnn.scaling.sweep import KINDS
from launch import ROOT, environment, script, warm_script

GRID = ["--presets", "demo", "--rows", "8", "--steps", "10"]
HOW = ["--warm-up", "1", "--updates", "3", "--repeats", "2", "--sweep-seconds", "0.4", "--network", "here"]


def measured(study: Path) -> list[Measurement]:
    """By its folder, in order; all points must be done."""
    folder = StudyFolder(study).read()
    results = [folder.result(point) for point in folder.points]
    return [result.measurement for result in results if result is not None]


def stamps(study: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in study.glob("points/*/measurement.json")}


@pytest.fixture
def where(tmp_path: Path, mlflow_tables: Path) -> Path:
    """A new study's folder; MLflow's database lies beside it."""
    shutil.copy(mlflow_tables, tmp_path / "mlflow.db")
    return tmp_path / "s"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two configs on one and two processes."""
    where = tmp_path_factory.mktemp("study") / "s"
    flags = [*GRID, *HOW, "--ds-configs", "z2", "z3", "--world-sizes", "1", "2"]
    done = script("study", "run", where, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 of 4 points are done, 0 of them failed\n")
    assert "ms an update" in done.stderr
    return where


def test_parts_add_up_to_the_step(study: Path) -> None:
    for found in measured(study):
        assert not found.failed
        assert found.updates == 6
        assert set(found.parts) == set(PARTS)
        assert all(seconds >= 0 for seconds in found.parts.values())
        assert found.step_seconds_low <= found.step_seconds <= found.step_seconds_high
        total = sum(found.parts.values())
        assert total > 0.5 * found.step_seconds_low  # a mean, which one slow update may carry far above
        busy = sum(found.busy_seconds) / len(found.busy_seconds)
        assert len(found.busy_seconds) == found.point.world_size
        assert busy + found.parts["communication"] == pytest.approx(total)
        assert found.characters == 80
        assert found.parameters == 1_223_049
        assert 1e9 < found.peak_flops < 1e13
        assert found.mfu > 0
        assert found.joules is None
        assert found.config == json.loads((ROOT / f"ds_configs/{found.point.ds_config}.json").read_text())
        rows = [each.rows for each in found.products]
        assert rows == sorted({*rows, found.point.rows // found.point.world_size})
        assert (found.machine.device, found.machine.threads, found.machine.network) == ("cpu", 1, "here")


def test_parts_are_what_they_are_called(study: Path) -> None:
    """By the clock, in most of the points: a pause of the machine may be most of one point's updates."""

    def usual(share: Callable[[Measurement], float]) -> float:
        return statistics.median(share(found) for found in measured(study))

    def own(found: Measurement) -> Products:
        (one,) = (each for each in found.products if each.rows == found.point.rows // found.point.world_size)
        return one

    # an update is forward and backward through time
    assert usual(lambda f: (f.parts["forward"] + f.parts["backward"]) / statistics.fmean(f.busy_seconds)) > 0.4
    assert usual(lambda f: f.parts["other"] / sum(f.parts.values())) < 0.5
    # ten time steps' products are a good part of forward and backward, and not all of them
    for part in ("forward", "backward"):
        shares = [10 * getattr(own(found), part) / found.parts[part] for found in measured(study)]
        assert max(shares) > 0.02
        assert min(shares) < 2
    assert usual(lambda f: f.products[-1].forward / own(f).forward) > 1
    assert usual(lambda f: f.mfu) < 1


def test_one_process_hardly_waits_and_two_do(study: Path) -> None:
    """The least of each, as a busy machine can only add to them."""
    alone, two = ([found for found in measured(study) if found.point.world_size == size] for size in (1, 2))
    assert min(found.parts["communication"] / sum(found.parts.values()) for found in alone) < 0.3
    least = [min(found.parts["communication"] for found in each) for each in (alone, two)]
    assert least[0] < least[1]


def test_what_is_sent_is_what_theory_says(study: Path) -> None:
    for found in measured(study):
        if found.point.world_size == 1:
            continue
        total = sum(found.bytes.values())
        for kind, size in found.bytes.items():
            assert size == pytest.approx(found.predicted_bytes.get(kind, 0), abs=0.02 * total), found.point.name
        assert set(found.calls) == set(found.bytes)
        assert all(calls >= 1 for calls in found.calls.values())


def test_memory_is_near_the_formula(study: Path) -> None:
    for found in measured(study):
        assert 0.5 < found.memory_bytes / found.predicted_memory_bytes < 1.5, found.point.name


def test_collectives_on_their_own(study: Path) -> None:
    folder = StudyFolder(study).read()
    for point in folder.points:
        result = folder.result(point)
        assert result is not None
        if point.world_size == 1:
            assert result.sweep == ()
            continue
        assert {timed.kind for timed in result.sweep} == set(KINDS)
        for kind in KINDS:
            own = [timed for timed in result.sweep if timed.kind == kind]
            assert own[0].bytes == 1024
            assert all(timed.seconds > 0 and (timed.world_size, timed.nodes) == (2, 1) for timed in own)
            assert [timed.bytes for timed in own] == [1024 * 4**power for power in range(len(own))]


def test_mlflow_has_all_of_it(study: Path) -> None:
    measurements, sweep = read(f"sqlite:///{study.parent}/mlflow.db", "gfrnn-study")
    assert measurements == measured(study)
    assert len(sweep) == sum(len(result.sweep) for result in results(study))


def results(study: Path) -> Iterator[Any]:
    folder = StudyFolder(study).read()
    return (folder.result(point) for point in folder.points)


def test_a_plan_by_what_was_measured(study: Path, tmp_path: Path) -> None:
    where = tmp_path / "plan.json"
    flags = [*GRID, "--ds-configs", "z2", "--world-sizes", "1", "4", "--measured", study, "--json", where]
    done = warm_script("study", "plan", *flags)
    assert done.returncode == 0, done.stderr
    alone, four = json.loads(where.read_text())
    for planned, processes, nearest in ((alone, 1, 1), (four, 4, 2)):
        speeds = [
            found.flops / nearest / statistics.fmean(found.busy_seconds)
            for found in measured(study)
            if found.point.world_size == nearest and not found.failed
        ]
        speed = planned["flops"] / planned["step_seconds"] / processes
        assert speed == pytest.approx(statistics.median(speeds))


def test_a_second_run_measures_nothing_and_new_flags_add_points(study: Path) -> None:
    before = stamps(study)
    done = warm_script("study", "run", study)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 of 4 points are done")
    assert stamps(study) == before
    done = warm_script("study", "run", study, *GRID, "--world-sizes", "1", "2", "--memory", "0.01")
    assert done.stdout.startswith("6 of 6 points are done, 2 of them failed\n"), done.stderr
    assert {name: stamp for name, stamp in stamps(study).items() if name in before} == before
    *_, large = measured(study)
    assert large.machine == measured(study)[0].machine
    assert large.failed.startswith("does not fit: a process would take ")
    assert large.failed.endswith("MB it may; --memory says otherwise")
    measurements, _ = read(f"sqlite:///{study.parent}/mlflow.db", "gfrnn-study")
    assert measurements == measured(study)


def start(study: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "src/study.py"), "run", str(study), *flags]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks(process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    """The processes of the point that is measured now, once they are there and have a group."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(psutil.Error):  # one has just ended
            found = [child for child in psutil.Process(process.pid).children() if "measure" in child.cmdline()]
            if len(found) == count and all(child.net_connections() for child in found):
                return found
        time.sleep(0.05)
    raise AssertionError(process.communicate())


def test_killed_in_the_middle_it_goes_on(where: Path) -> None:
    """And what it started does not live on; a process that is killed is a result, which --again measures anew."""
    flags = [*GRID, *HOW, "--world-sizes", "1", "2", "--sweep-seconds", "0"]
    process = start(where, *flags)
    deadline = time.monotonic() + 120
    while len(stamps(where)) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    orphans = ranks(process, 2)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(orphans, timeout=60)
    assert not alive
    before = stamps(where)
    assert len(before) == 1

    process = start(where)
    ranks(process, 2)[1].kill()
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert out.startswith("2 of 2 points are done, 1 of them failed")
    assert {name: stamps(where)[name] for name in before} == before
    assert measured(where)[1].failed == "rank 1 was killed: out of memory?"

    done = warm_script("study", "run", where, "--again", "--launcher", "deepspeed")
    assert done.stdout.startswith("2 of 2 points are done, 0 of them failed"), done.stderr
    assert {name: stamps(where)[name] for name in before} == before
    assert measured(where)[1].point.world_size == 2
    # a failed result was one as well: MLflow keeps both
    measurements, _ = read(f"sqlite:///{where.parent}/mlflow.db", "gfrnn-study")
    assert [bool(each.failed) for each in measurements] == [False, True, False]


def test_failures_do_not_end_a_study(where: Path) -> None:
    """A text that is too short for a point, as its process finds out; the next one is measured."""
    text = where.parent / "text"
    text.write_bytes(b"All work and no play. " * 100)
    flags = ["--presets", "demo", "--rows", "4", "--steps", "600", "10", *HOW, "--sweep-seconds", "0"]
    done = warm_script("study", "run", where, *flags, "--corpus-file", text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 of 2 points are done, 1 of them failed")
    short, good = measured(where)
    assert "too short for 4 rows x 600 steps" in short.failed
    assert "\n" not in short.failed
    assert not good.failed


def test_a_point_that_takes_too_long(where: Path) -> None:
    done = warm_script("study", "run", where, *GRID, *HOW, "--limit", "0.02")
    assert done.returncode == 0, done.stderr
    assert measured(where)[0].failed == "took more than 0.02 minutes"


def test_what_others_started_is_collected(where: Path) -> None:
    """As slurm/measure.sbatch does: processes with variables of their own, then what came of them."""
    warm_script("study", "run", where, *GRID, *HOW, "--world-sizes", "1", "2", "--slurm", "--dry-run")
    alone = warm_script("study", "measure", where, "1")
    assert alone.returncode == 0, alone.stderr
    wrong = warm_script("study", "measure", where, "2")  # one process, where the point is for two
    assert wrong.returncode == 2
    said = where.parent / "said"
    said.write_text(wrong.stderr)
    for number, status in (("1", "0"), ("2", "2")):
        done = warm_script(
            "study", "collect", where, number, "--status", status, "--said", said, "--experiment", "theirs"
        )
        assert done.returncode == 0, done.stderr
    good, bad = measured(where)
    assert not good.failed
    assert bad.failed == f"{bad.point.name} is for 2 processes, these are 1"
    assert read(f"sqlite:///{where.parent}/mlflow.db", "theirs")[0] == [good, bad]


def test_the_limit_holds_whoever_starts_a_point(where: Path) -> None:
    warm_script("study", "run", where, *GRID, "--limit", "0.001", "--slurm", "--dry-run")
    late = warm_script("study", "measure", where, "1")
    assert late.returncode == 3
    assert late.stderr.splitlines()[-1] == "failed: took more than 0.001 minutes"
    said = where.parent / "said"
    said.write_text(late.stderr)
    done = warm_script("study", "collect", where, "1", "--status", "3", "--said", said)
    assert done.returncode == 0, done.stderr
    assert measured(where)[0].failed == "took more than 0.001 minutes"


def test_submitting_sends_what_did_not_arrive(where: Path) -> None:
    """And a dry run of --again shows what would be measured anew, and leaves it."""
    study = StudyFolder(where)
    study.begin([Point("demo")], How())
    failed = Measurement(study.point(1), Machine("cpu", 1), failed="no memory")
    study.write(Result(failed))
    done = warm_script("study", "run", where, "--again", "--slurm", "--dry-run")
    assert done.stdout.startswith("sbatch --parsable --array=1 --nodes=1 "), done.stderr
    done = warm_script("study", "run", where, "--slurm", "--dry-run")
    assert done.stdout == ""
    done = warm_script("study", "run", where, "--slurm")
    assert done.returncode == 0, done.stderr
    assert read(f"sqlite:///{where.parent}/mlflow.db", "gfrnn-study")[0] == [failed]


def test_a_study_begins_when_it_is_submitted(where: Path) -> None:
    """Not with a dry run, whose mistakes may be mended."""
    sbatch = where.parent / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 17\n")
    sbatch.chmod(0o755)
    env = environment(PATH=f"{where.parent}:{os.environ['PATH']}")
    dry = warm_script("study", "run", where, *GRID, "--world-sizes", "1", "2", "--updates", "3", "--slurm", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    done = warm_script("study", "run", where, *GRID, "--updates", "4", "--slurm", env=env)
    assert done.stdout == "study 17\n", done.stderr
    study = StudyFolder(where).read()
    assert ([point.world_size for point in study.points], study.how.updates) == ([1], 4)
    done = warm_script("study", "run", where, *GRID, "--updates", "3", "--slurm", env=env)
    assert done.returncode == 2
    assert "is measured with --updates 4, not 3; take another folder" in done.stderr


# ------------------------------------------------------------------------------------------- what is computed of it


@pytest.mark.parametrize(
    ("world_size", "compression", "scale"), [(2, "none", 8), (2, "bf16", 8), (1, "none", None), (2, "topk", None)]
)
def test_the_noise_scale_is_looked_at_when_all_is_timed(world_size: int, compression: str, scale: float | None) -> None:
    point = Point("demo", world_size=world_size, rows=8, steps=10, compression=compression)
    settings, _ = prepared(point, How(train_updates=50), Path("s"))
    assert settings.run.noise_scale == 0
    weight = torch.ones(3, requires_grad=True)
    trainer: Any = types.SimpleNamespace(
        settings=settings,
        world_size=world_size,
        position=types.SimpleNamespace(step=48),
        shards=types.SimpleNamespace(parameters={"weight": weight}),
        noise=None,
        parts=None,
        score=lambda: {"bpc": 2.0},
    )

    def update() -> Any:
        weight.sum().backward()
        if trainer.parts is not None:
            trainer.parts.take(4, 2.0)
            weighted, parts = trainer.parts.shared(torch.device("cpu")).tolist()
            assert (weighted, parts) == (pytest.approx(3.0), 1)
            trainer.noise.see(4 * weighted, 2, 8, 1.0)  # a spread of 4, a signal of 0.5
        trainer.position.step += 1
        return types.SimpleNamespace(stop=None)

    trainer.update = update
    assert _trained(trainer, 50) == {"bpc": 2.0, "noise_scale": scale and pytest.approx(scale), "trained_updates": 50}
    assert trainer.position.step == 50


def test_why_a_group_failed() -> None:
    lost, own = "failed: another process is gone", "error: out of memory (x); take a smaller model"
    assert reason([3, -9], [lost, ""]) == "rank 1 was killed: out of memory?"
    assert reason([2, 3], [own, f"rank 1: {lost}"]) == "out of memory (x); take a smaller model"
    assert reason([3, 2], [lost, f"rank 1: {own}"]) == "out of memory (x); take a smaller model"
    assert reason([1], ["Traceback\n  line\nKeyError: 'x'\n"]) == "KeyError: 'x'"
    assert reason([3, None], [lost, ""]) == lost
    assert reason([None, 7], ["", ""]) == "rank 1 ended with status 7"
    assert reason([-signal.SIGSEGV], ["noise"]) == "rank 0 was ended by SIGSEGV"


def test_the_slowest_process_is_the_steps_time() -> None:
    def own(*seconds: float, waited: float) -> Own:
        parts = dict.fromkeys(PARTS, 0.0) | {"communication": waited, "backward": sum(seconds) - waited}
        return Own(list(seconds), parts, peak_flops=[1.0, 3.0, 2.0], memory=int(waited), joules=waited)

    found = combined([own(1, 2, 3, waited=1), own(3, 1, 2, waited=3)])  # slowest: 3, 2, 3
    assert (found["step_seconds_low"], found["step_seconds"], found["step_seconds_high"]) == (2.5, 3, 3)
    assert found["parts"]["communication"] == pytest.approx(4 / 6)
    assert sum(found["parts"].values()) == pytest.approx(2)
    assert found["busy_seconds"] == pytest.approx((5 / 3, 1))
    assert (found["peak_flops"], found["memory_bytes"]) == (4, 3)
    assert found["joules"] == pytest.approx(4 / 3)
    first, second = own(1, waited=0), own(1, waited=0)
    first.products = [Products(8, 1, 5), Products(16, 9, 9), Products(8, 2, 6), Products(8, 9, 9)]
    second.products = [Products(8, 4, 8)]
    assert combined([first, second])["products"] == (Products(8, 3, 7),)  # 16 rows: one alone got so far
    # local updates: both take 8 and 12 seconds for four, in the last of which the one waits for the other
    found = combined([own(1, 1, 1, 5, 1, 1, 1, 9, waited=0), own(2, 2, 2, 2, 3, 3, 3, 3, waited=0)], together=4)
    assert (found["step_seconds_low"], found["step_seconds"], found["step_seconds_high"]) == (2.25, 2.5, 2.75)
    one = combined([own(1, waited=0)])
    assert one["step_seconds_low"] == one["step_seconds_high"] == 1


def test_parts_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """What collectives take is in none of the phases that they are called in."""
    clock, watch = [100.0], types.SimpleNamespace(blocked=0.0)
    monkeypatch.setattr(phases, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def work(seconds: float) -> None:
        clock[0] += seconds

    stopwatch = Stopwatch(watch, settle=lambda: work(0.01))  # type: ignore[arg-type]

    def update() -> None:
        for _ in range(2):  # micro-batches
            with stopwatch.phase("forward"):
                work(0.03)
            with stopwatch.phase("backward"):
                work(0.05)
                work(0.04)
                watch.blocked += 0.04
        with stopwatch.phase("agree"):
            work(0.02)
            watch.blocked += 0.02

    for _ in range(2):  # of each update its own
        parts = stopwatch.timed(update)
        assert parts == pytest.approx(
            {"forward": 0.08, "backward": 0.12, "optimizer": 0, "communication": 0.1, "other": 0.01}
        )


class Range(NamedTuple):
    start: float
    end: float


class Kind(NamedTuple):
    name: str


class Event(NamedTuple):
    """As torch's profiler has them."""

    name: str
    device_type: Kind
    time_range: Range


def test_collectives_that_nothing_hides() -> None:
    def event(name: str, device: str, begin: float, end: float) -> Event:
        return Event(name, Kind(device), Range(1e6 * begin, 1e6 * end))

    assert united([(3, 4), (0, 2), (1, 2.5)]) == [(0, 2.5), (3, 4)]
    assert without([(0, 10)], [(-1, 1), (2, 3), (9, 12)]) == [(1, 2), (3, 9)]
    assert shared([(0, 2), (5, 6)], [(1, 5.5)]) == 1.5
    trace = [
        event("forward", "CPU", 0, 4),
        event("backward", "CPU", 4, 10),
        event("forward", "CUDA", 0, 4),  # a phase's mark on the device is no work
        event("gemm", "CUDA", 0, 3),
        event("ncclDevKernel_AllGather", "CUDA", 2, 4),  # 1 s alone
        event("gemm", "CUDA", 4, 8),
        event("ncclDevKernel_AllReduce", "CUDA", 5, 7),  # hidden
        event("ncclDevKernel_AllReduce", "CUDA", 7.5, 11),  # 2 s alone in backward, 1 s after it
        event("aten::mm", "CPU", 0, 11),
    ]
    found = exposed(trace, ("forward", "backward", "optimizer"))
    assert found == pytest.approx({"forward": 1, "backward": 2, "optimizer": 0, "other": 1})
    own = Own([1.0, 1.0], dict.fromkeys(PARTS, 0.0) | {"backward": 1.0, "forward": 0.6, "other": 0.4})
    own.uncover({"backward": 0.25, "forward": 0.5, "other": 0.0})
    assert own.parts == pytest.approx(
        {"forward": 0, "backward": 0.5, "communication": 1.1, "optimizer": 0, "other": 0.4}
    )


def test_json_is_for_other_programs_too(study: Path) -> None:
    path = next(study.glob("points/*z2-1x2*/measurement.json"))
    values = json.loads(path.read_text())
    assert values["measurement"]["point"]["world_size"] == 2
    assert os.path.basename(path.parent) == "demo-z2-1x2-rows8-steps10-fp32"
