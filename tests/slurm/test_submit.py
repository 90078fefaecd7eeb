"""What submit.py would have sbatch do. What becomes of it on a cluster: tests/systems/test_slurm.py."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gfrnn.config import preset
from gfrnn.runs import RunFolder
from launch import ROOT, environment
from submit import processes


def submit(
    *arguments: str | Path, cwd: Path = ROOT, program: Path = ROOT / "slurm/submit.py", **extra: str
) -> subprocess.CompletedProcess[str]:
    command: list[Any] = [sys.executable, "-I", program, *arguments]
    env = environment(**{"GFRNN_PYTHON": sys.executable, **extra})
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def calls(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if "sbatch --parsable" in line]


def test_one_run_with_its_script(tmp_path: Path) -> None:
    flags = ["--nodes=2-4", "--gpus-per-node", "8", "--dry-run", "--", "--preset", "gf-lstm-5x700"]
    done = submit("train", *flags, "--output-dir", "runs/a b", cwd=tmp_path)
    train = "slurm/train.sbatch --preset gf-lstm-5x700 --output-dir 'runs/a b'"
    assert calls(done) == [f"sbatch --parsable --nodes=2-4 --gpus-per-node 8 {train}"]
    assert (ROOT / "slurm/train.sbatch").read_text().rstrip() in done.stdout


def test_a_study_has_its_points_and_a_limit(tmp_path: Path) -> None:
    points = tmp_path / "points.txt"
    points.write_text("# rows\n--rows 8 --output-dir 'a b'\n\n   --rows 16 # sixteen\n")
    (call,) = calls(submit("study", "--points", points, "--at-once", "1", "--dry-run", "--", "--max-updates", "9"))
    assert call == f"sbatch --parsable --array=1-2%1 slurm/study.sbatch {points} --max-updates 9"


def test_a_chain_waits_for_its_training() -> None:
    flags = ["-p", "gpu", "--account=us", "--nodes=4", "--after=--gpus=1", "--export-flags", "--precision int8"]
    train, evaluate, export = calls(submit("chain", *flags, "--dry-run", "--", "--output-dir", "runs/x/"))
    assert train == "train=$(sbatch --parsable -p gpu --account=us --nodes=4 slurm/train.sbatch --output-dir runs/x/)"
    after = (
        "sbatch --parsable --partition=gpu --account=us --gpus=1 --dependency=afterok:$train --kill-on-invalid-dep=yes"
    )
    assert evaluate == f"{after} slurm/evaluate.sbatch runs/x --json runs/x.json"
    assert export == f"{after} slurm/export.sbatch runs/x --output runs/x.onnx --precision int8"


def test_what_the_site_file_sets_is_shown(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text("echo a module is loaded\nexport SBATCH_PARTITION=gpu\n")
    done = submit("train", "--dry-run", GFRNN_SITE=str(site))
    assert done.stdout.splitlines()[0] == "# SBATCH_PARTITION=gpu"
    assert "a module is loaded" in done.stderr


def test_dry_run_among_the_trainings_flags_is_the_submissions() -> None:
    (call,) = calls(submit("train", "--", "--rows", "8", "--dry-run"))
    assert call.endswith("slurm/train.sbatch --rows 8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--dry-run", "--", "--rows", "1O"], "error: Error parsing --rows: "),
        (["train", "--dry-run", "--", "--roes", "10"], "did you mean --rows"),
        (["study", "--points", "no/such", "--dry-run"], "error: --points no/such: No such file or directory"),
        (["study", "--points", "/dev/null", "--dry-run"], "error: --points /dev/null: it has no point"),
        (["chain", "--dry-run", "--", "--rows", "8"], "error: a chain needs --output-dir after --"),
        (["study", "--dry-run"], "--points"),
    ],
)
def test_what_cannot_work_is_not_submitted(arguments: list[str], said: str) -> None:
    done = submit(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("sbatch", "variables", "count"),
    [
        ("", {}, 1),
        ("--nodes=4", {}, 4),
        ("-N 2-4 --gpus-per-node 8", {}, 16),
        ("-N2 --gpus-per-node=a100:4", {}, 8),
        ("--nodes=2 --gres=gpu:a100:4,nvme:1", {}, 8),
        ("--nodes=2 --gpus=16", {}, 16),
        ("--nodes=2 --gres=nvme:3", {}, 2),
        ("--nodes=2", {"SBATCH_GPUS_PER_NODE": "8"}, 16),
        ("--nodes=2 --gpus-per-node=8", {"GFRNN_PROCESSES_PER_NODE": "4"}, 8),
        ("--nodes=2 --ntasks-per-node=2 --gpus-per-node=8", {"GFRNN_PROCESSES_PER_NODE": "4"}, 4),
        ("--nodes=2 --ntasks-per-node=1 --gpus-per-node=8", {}, 16),
        ("--ntasks=6", {}, 6),
        ("-N 3 -n 6", {}, 6),
        ("-N 3 -n 3 --gpus-per-node=2", {}, 6),
    ],
)
def test_processes_are_those_that_the_job_will_have(sbatch: str, variables: dict[str, str], count: int) -> None:
    """As processes_per_node of launch.sh has it."""
    assert processes(sbatch.split(), variables) == count


@pytest.mark.parametrize(
    ("nodes", "flags", "said"),
    [
        ("2", "--compression topk --deepspeed ds_configs/z0.json", ""),
        ("1", "--compression topk --deepspeed ds_configs/z0.json", "is for several processes, and this is one"),
        ("2", "--compression topk", "ds_configs/z2.json: --compression topk is for stage 0"),
        ("4", "--rows 3", "4 processes cannot share --rows 3"),
    ],
)
def test_flags_are_looked_at_as_they_will_be_there(nodes: str, flags: str, said: str) -> None:
    done = submit("train", f"--nodes={nodes}", "--dry-run", "--", *flags.split())
    assert (done.returncode, said in done.stderr) == (2 if said else 0, True), done.stderr


def test_a_point_that_cannot_work_is_named(tmp_path: Path) -> None:
    points = tmp_path / "points.txt"
    points.write_text("--rows 8\n--rows x\n")
    done = submit("study", "--points", points, "--dry-run")
    assert (done.returncode, "error: point 2: Error parsing --rows" in done.stderr) == (2, True)


def test_points_without_a_folder_have_new_ones(tmp_path: Path) -> None:
    """Whatever is in the preset's."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    for name in ("src", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    there = RunFolder(tmp_path / "runs/demo")
    there.create(preset("demo"), {}, "0123456789abcdef")
    there.append_metrics({"step": 1})
    points = tmp_path / "points.txt"
    points.write_text("--preset demo --seed 8\n--preset demo --seed 9\n")
    program = tmp_path / "slurm/submit.py"
    assert len(calls(submit("study", "--points", points, "--dry-run", program=program))) == 1
    assert len(calls(submit("train", "--dry-run", "--", "--preset", "demo", "--seed", "8", program=program))) == 1
    points.write_text("--preset demo --seed 8\n--preset demo --seed 9 --output-dir runs/demo\n")
    done = submit("study", "--points", points, "--dry-run", program=program)
    assert (done.returncode, "point 2: --output-dir runs/demo holds a run with" in done.stderr) == (2, True)


def test_flags_that_cannot_be_checked_are_said_not_to_be(tmp_path: Path) -> None:
    python = program_that(tmp_path / "python", "echo \"No module named 'psutil'\" >&2; exit 1")
    done = submit("train", "--dry-run", GFRNN_PYTHON=str(python))
    assert done.returncode == 0
    said = "src/train.py cannot run on this machine (No module named 'psutil'); the flags were not checked\n"
    assert done.stderr == said


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", "reaches no SLURM"),
        ("Could not establish a configuration source", "reaches no SLURM controller (above)"),
        ("invalid partition specified: gpv", "refuses the train job (above); flags of src/train.py come after --"),
    ],
)
def test_why_sbatch_fails(tmp_path: Path, said: str, meant: str) -> None:
    python = program_that(tmp_path / "python", "exit 0")
    program_that(tmp_path / "sbatch", f"echo 'sbatch: error: {said}' >&2; exit 1")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = submit("train", GFRNN_PYTHON=str(python), PATH=path)
    first, second = done.stderr.splitlines()
    assert (done.returncode, first) == (2, f"sbatch: error: {said}")
    assert second.startswith(f"error: sbatch {meant}")


def program_that(path: Path, does: str) -> Path:
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", ["train", "study", "measure", "evaluate", "export", "serve"])
def test_a_batch_script_outside_a_job_is_an_error(name: str, tmp_path: Path) -> None:
    env = {key: value for key, value in environment().items() if not key.startswith(("SLURM_", "GFRNN_"))}
    for cwd, said in ((ROOT, "this is a batch script: sbatch "), (tmp_path, ". is not a checkout of gfrnn; ")):
        command = ["bash", str(ROOT / f"slurm/{name}.sbatch")]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {said}")
        assert done.stderr.count("\n") == 1


def test_odd_lines_of_points(tmp_path: Path) -> None:
    """study.sbatch has a point's flags from here."""
    points = tmp_path / "points.txt"
    points.write_text("--a '1 #2'  \t--b \"it's\" # c\n#--none\n \t \n--c=\\$x --d ''\n--e é")
    expected = [["--a", "1 #2", "--b", "it's"], ["--c=$x", "--d", ""], ["--e", "é"]]
    assert [submit("point", points, str(n)).stdout for n in (1, 2, 3)] == ["\n".join(p) + "\n" for p in expected]
    for number in ("0", "4", ""):
        done = submit("point", points, number)
        assert done.returncode == 2
        assert f"points.txt has no point {number or 'without a number'}: sbatch --array=1-3" in done.stderr
    points.write_text("--rows 'eight\n")
    done = submit("point", points, "1")
    assert (done.returncode, "No closing quotation" in done.stderr) == (2, True)


def test_without_slurm(tmp_path: Path) -> None:
    (tmp_path / "bash").symlink_to("/bin/bash")
    (tmp_path / "env").symlink_to("/usr/bin/env")
    done = submit("train", PATH=str(tmp_path))
    assert done.returncode == 2
    assert "error: there is no sbatch here: submit from a login node" in done.stderr


@pytest.mark.parametrize("name", ["submit", "supervise", "verdicts"])
def test_python_of_login_nodes_is_old(name: str) -> None:
    ast.parse((ROOT / f"slurm/{name}.py").read_text(), feature_version=(3, 9))
