"""Programs by the real commands: trained by two processes, scored, drawn, tracked, predicted, resumed, refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gfrnn.data import generate_programs
from gfrnn.nn import EncoderDecoder
from gfrnn.runs import load_model
from gfrnn.training.program_evaluation import predict
from launch import ROOT, losses, metrics, script, summary, train, validations, warm_script

_SMALL = """--preset programs-demo --num-layers 2 --hidden-size 32 --rows 32 --log-every 10
--num-programs 3000 --valid-programs 200 --nesting 1 --length 2 --valid-every 100"""
SMALL_PROGRAMS = _SMALL.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def flags(folder: Path) -> list[str]:
    return [*SMALL_PROGRAMS, "--data-dir", str(folder / "data")]


@pytest.fixture(scope="module")
def run(folder: Path, flags: list[str]) -> Path:
    """A finished run of two processes, in MLflow."""
    status, out, err = train(folder / "run", [*flags, "--max-updates", "200"], processes=2, stage="z2")
    assert status == 0, err
    assert "of test characters right" in out
    assert "--program FILE" in out
    return folder / "run"


@pytest.fixture(scope="module")
def stack(folder: Path, flags: list[str]) -> Path:
    flags = [*flags, "--feedback", "none", "--max-updates", "20", "--no-mlflow"]
    status, _, err = train(folder / "stack", flags)
    assert status == 0, err
    return folder / "stack"


def logged(run: Path) -> Any:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    found = client.get_run(json.loads((run / "mlflow.json").read_text())["run_id"])
    return found, {file.path for file in client.list_artifacts(found.info.run_id)}


def test_programs_are_learned(run: Path) -> None:
    found, lines = summary(run), [line for line in metrics(run) if "train_accuracy" in line]
    assert found["finished"]
    assert found["test_bpc"] < 0.8 * 3.58  # log2 of 12 characters
    assert found["test_accuracy"] > 0.4
    best = [line for line in metrics(run) if "valid_accuracy" in line and line["step"] == found["best_step"]]
    assert found["valid_accuracy"] == best[0]["valid_accuracy"]
    assert lines[-1]["train_accuracy"] > lines[0]["train_accuracy"]
    assert found["characters"] == lines[-1]["characters"] > 200 * 32 * 10
    assert found["sample"].count("predicted") == 5
    assert logged(run)[0].data.metrics["test_accuracy"] == found["test_accuracy"]


def test_evaluation_writes_tables_files_a_picture_and_tracks_them(run: Path, tmp_path: Path) -> None:
    names = {kind: tmp_path / f"found.{kind}" for kind in ("json", "csv", "png")}
    files = ["--json", names["json"], "--csv", names["csv"], "--heat-map", names["png"]]
    grid = ["--cell-programs", "50", "--nesting", "2", "--length", "3"]
    done = warm_script("evaluate", run, *grid, "--show", "3", *files)
    assert done.returncode == 0, done.stderr
    assert f"{run}/checkpoints/step-00000200: whole targets right, %" in done.stdout.splitlines()
    assert done.stdout.count("; predicted ") == 3
    results = json.loads(names["json"].read_text())
    assert [(cell["nesting"], cell["length"]) for cell in results["cells"]] == [
        (n, m) for n in (1, 2) for m in (1, 2, 3)
    ]
    rows = list(csv.DictReader(names["csv"].open()))
    assert [float(row["accuracy"]) for row in rows] == [cell["accuracy"] for cell in results["cells"]]
    assert {int(row["programs"]) for row in rows} == {50}
    assert names["png"].read_bytes().startswith(b"\x89PNG")
    tracked, artifacts = logged(run)
    assert tracked.data.metrics["programs/exact_nesting_2_length_3"] == results["cells"][-1]["exact"]
    assert {"programs.json", "programs.csv", "programs.png"} <= artifacts


def test_two_runs_are_compared_cell_by_cell(run: Path, stack: Path, tmp_path: Path) -> None:
    done = warm_script("evaluate", run, stack, "--cell-programs", "50", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    assert "gain of the first" in done.stdout
    for cell in json.loads((tmp_path / "found.json").read_text())["cells"]:
        assert abs(cell["accuracy_gain"] - (cell["accuracy"] - cell["other_accuracy"])) < 1e-9
        assert cell["accuracy_gain_low"] <= cell["accuracy_gain"] <= cell["accuracy_gain_high"]
    tracked, artifacts = logged(run)
    assert "programs-gain/accuracy_gain" in tracked.data.metrics
    assert "programs-gain.png" in artifacts


def test_a_prediction_is_of_the_file(run: Path, tmp_path: Path) -> None:
    found = {}
    for number, sample in enumerate(generate_programs(4, length=2, nesting=1, seed=9)):
        file = tmp_path / f"{number}.py"
        file.write_text(sample.program + "\n")
        done = warm_script("sample", run, "--program", file)
        assert done.returncode == 0, done.stderr
        found[sample.program] = done.stdout.strip()
        piped = warm_script("sample", run, "--program", "-", input=sample.program)
        assert piped.stdout == done.stdout
    model = load_model(run)[0]
    assert isinstance(model, EncoderDecoder)
    assert found == {program: predict(model, program) for program in found}
    assert len({predict(model, sample.program) for sample in generate_programs(100, length=2, nesting=1, seed=9)}) > 1


def test_a_resumed_run_is_the_run(folder: Path, flags: list[str]) -> None:
    """Also in the middle of a pass, between two checks of the curriculum, and at an end that was moved."""
    flags = [*flags, "--no-mlflow", "--log-every", "1", "--valid-every", "7", "--curriculum", "naive"]
    flags += ["--level-programs", "320"]
    whole, parts = folder / "whole", folder / "parts"
    for updates, run in ((30, whole), (12, parts), (30, parts)):
        status, _, err = train(run, [*flags, "--schedule", "constant", "--max-updates", str(updates)])
        assert status == 0, err
    assert losses(parts) == losses(whole)
    assert {step: bpc for step, bpc in validations(parts).items() if step != 12} == validations(whole)
    trainers = [json.loads((run / "checkpoints/step-00000030/trainer.json").read_text()) for run in (whole, parts)]
    assert trainers[0]["curriculum"] == trainers[1]["curriculum"]
    assert trainers[0]["curriculum"]["best_accuracy"] > 0
    assert summary(parts)["test_bpc"] == summary(whole)["test_bpc"]


def test_prepare_makes_the_programs(tmp_path: Path) -> None:
    flags = [*SMALL_PROGRAMS, "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "run"]
    done = script("train", *flags, "--prepare")
    assert done.returncode == 0, done.stderr
    assert "is ready: 3,000 training, 200 validation, 200 test programs" in done.stderr
    assert len([path for path in (tmp_path / "data/arrow").iterdir() if path.is_dir()]) == 3
    assert not (tmp_path / "run").exists()


def test_dry_run_needs_no_preset() -> None:
    done = script("train", "--task", "programs", "--deepspeed", ROOT / "ds_configs/z2.json", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "programs-gf-lstm-3x200" in done.stdout
    assert "FLOP a source character" in done.stdout
    assert "parameters                 3,663,289" in done.stdout


# ------------------------------------------------------------------------------------------------ bad input

BAD_FLAGS = {
    "nesting": (["--nesting", "11"], "--nesting is 11; programs have 1 to 10"),
    "length": (["--length", "0"], "--length is 0; programs have 1 to 15"),
    "curriculum": (["--curriculum", "blnd"], "blnd"),
    "none to learn": (["--num-programs", "20"], "--rows 32 is more than --num-programs 20"),
    "no validations": (["--curriculum", "blend", "--valid-every", "0"], "--valid-every must not be 0"),
    "small levels": (["--curriculum", "naive", "--level-programs", "9"], "--rows 32 is more than --level-programs 9"),
    "other task": (["--task", "text"], "--task text does not go with --preset programs-demo"),
    "vocabulary": (["--vocab-size", "40"], "leave it at 39"),
    "unwritable": (["--data-dir", "/proc/x"], "cannot keep programs in /proc/x"),
}


def refusal(name: str, *flags: str | Path) -> str:
    done = warm_script(name, *flags)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("making ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(("wrong", "said"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags(wrong: list[str], said: str, tmp_path: Path) -> None:
    assert said in refusal("train", *SMALL_PROGRAMS, "--output-dir", tmp_path / "run", *wrong)


def test_bad_programs(run: Path, tmp_path: Path) -> None:
    unknown, empty, binary = tmp_path / "unknown.py", tmp_path / "empty.py", tmp_path / "binary.py"
    unknown.write_text("a=3\nprint((a%4))\n")
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    assert "'%' in line 2, column 9" in refusal("sample", run, "--program", unknown)
    assert "is empty" in refusal("sample", run, "--program", empty)
    assert "is not text" in refusal("sample", run, "--program", binary)
    assert "No such file" in refusal("sample", run, "--program", tmp_path / "nowhere.py")
    assert "is a model of programs: give it one, --program FILE" in refusal("sample", run, "--prompt", "print")
    assert "--nesting is 11" in refusal("evaluate", run, "--nesting", "11")
    assert "--heat-map" in refusal("evaluate", run, "--heat-map", tmp_path / "map.gif")


def test_a_checkpoint_of_the_other_task(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    flags = [
        "--preset",
        "demo",
        "--num-layers",
        "1",
        "--hidden-size",
        "8",
        "--rows",
        "4",
        "--steps",
        "8",
        "--no-mlflow",
    ]
    status, _, err = train(text, [*flags, "--max-updates", "1", "--valid-bytes", "500", "--sample-length", "1"])
    assert status == 0, err
    assert "is a model of text; give one of programs" in refusal("evaluate", run, text)
    assert "a second run is compared on programs alone" in refusal("evaluate", text, run)
    assert "is a model of text" in refusal("sample", text, "--program", __file__)
    assert "holds a run with --task = text" in refusal("train", *SMALL_PROGRAMS, "--output-dir", text)
    start = refusal("train", *SMALL_PROGRAMS, "--output-dir", tmp_path / "new", "--start-from", text)
    assert "of another model" in start or "of text" in start


def test_a_damaged_curriculum_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy/summary.json").unlink()
    latest = (tmp_path / "copy/checkpoints/latest").read_text()
    trainer = tmp_path / "copy/checkpoints" / latest / "trainer.json"
    values = json.loads(trainer.read_text())
    del values["curriculum"]
    trainer.write_text(json.dumps(values))
    settings = json.loads((run / "config.json").read_text())["settings"]
    flags = [*SMALL_PROGRAMS, "--data-dir", settings["data"]["data_dir"], "--max-updates", "200"]
    assert "no curriculum" in refusal("train", *flags, "--output-dir", tmp_path / "copy")
