"""benchmarks/ablations.py: what is trained with what off, and a real small study through the command."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ablations
from gfrnn.cli import parse
from gfrnn.config import Settings, UserError, preset, sizes
from launch import ROOT, environment, warm_python

SMALL = [
    "--num-layers",
    "2",
    "--hidden-size",
    "12",
    "--rows",
    "4",
    "--steps",
    "10",
    "--no-mlflow",
    "--valid-every",
    "2",
]


SCRIPT = ROOT / "benchmarks/ablations.py"


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, SCRIPT, *words]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=280, check=False)


def settings_of(name: str, flags: list[str]) -> dict[str, Settings]:
    found, _ = ablations.ablations_of(name, flags)
    return {each: parse(Settings, [*flags, *own], default=preset(name)) for each, own in found.items()}


def test_each_ablation_turns_its_trick_off_and_nothing_else() -> None:
    flags = ["--embedding-size", "8", "--dropout", "0.1", "--weight-dropout", "0.2", "--reset-every", "30"]
    found = settings_of("demo", flags)
    whole = found["whole"]
    assert not found["no layer norm"].model.layer_norm
    assert found["no locked dropout"].model.dropout == 0 < found["no locked dropout"].model.weight_dropout
    assert found["no averaging"].optimization.average == "none"
    assert found["one-hot input"].model.embedding_size == 0
    assert found["with input-gate cap"].model.cap_input_gate
    assert found["no feedback"].model.feedback == "none"
    assert found["every gate 1"].model.feedback == "full"
    half = found["half segments"].batch
    assert half.steps == whole.batch.steps // 2
    assert half.steps * half.rows == whole.batch.steps * whole.batch.rows
    assert half.steps * half.reset_every == whole.batch.steps * whole.batch.reset_every
    stack = found["no feedback, as many parameters"]
    assert sizes(stack).total == pytest.approx(sizes(whole).total, rel=0.02)
    assert sizes(found["no feedback"]).total < 0.9 * sizes(whole).total
    for name, settings in found.items():
        assert settings.run == whole.run, name
        assert settings.data == whole.data, name


def test_what_a_recipe_has_not_is_left_out_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ablations.ABLATIONS, "no magic", lambda s: ["--no-magic"])
    found, missing = ablations.ablations_of("demo", [])
    assert missing["no magic"] == "this version of gfrnn has no --no-magic"
    assert missing["no locked dropout"] == missing["one-hot input"] == "the recipe does without it"
    assert parse(Settings, found["with an embedding of 64"], default=preset("demo")).model.embedding_size == 64
    assert not found.keys() & missing.keys()
    _, missing = ablations.ablations_of("demo", ["--embedding-size", "8", "--cap-input-gate"])
    assert missing["with an embedding of 64"] == missing["with input-gate cap"] == "the recipe has it, or cannot"
    for without_feedback in ("lstm-3x191", "mrnn-1x679"):
        _, missing = ablations.ablations_of(without_feedback, [])
        assert missing["every gate 1"] == missing["no feedback"] == "the recipe does without it"
    with pytest.raises(UserError, match="--seed is this script's own"):
        ablations.ablations_of("demo", ["--seed=3"])
    with pytest.raises(UserError, match="is a model of programs"):
        ablations.ablations_of("programs-demo", [])


def test_a_study_is_run_resumed_and_reported(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    own = ["--updates", "4", "--bytes", "400", "--streams", "2", "--rates", "1e-4", "1e-2", "--seeds", "2"]
    flags = [*own, "--only", "no feedback", "--", *SMALL, "--data-dir", str(tmp_path / "data")]
    done = command("run", folder, *flags)
    assert done.returncode == 0, done.stderr
    runs = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert runs == ["no-feedback-seed-0", "no-feedback-seed-1", "whole-seed-0", "whole-seed-1"]
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.*-*.json")}
    chosen = folder / "whole-seed-1.test-dynamic-0.0001.json"
    other = folder / "whole-seed-1.test-dynamic-0.01.json"
    assert chosen.exists() != other.exists()  # only what validation text chose is tried on test text

    (torn := folder / "whole-seed-1.test.json").unlink()
    again = warm_python(SCRIPT, "run", folder, *flags)
    assert again.returncode == 0, again.stderr
    assert torn.exists()
    assert {path: path.stat().st_mtime_ns for path in files} == files
    plan = json.loads((folder / "ablations.json").read_text())
    assert plan.pop("averages") is True
    (folder / "ablations.json").write_text(json.dumps(plan))  # as it was before there was a choice
    wrong = warm_python(SCRIPT, "run", folder, "--no-averages", *flags)
    assert wrong.returncode == 2
    assert "was begun with averages True, not False" in wrong.stderr.splitlines()[-1]
    wrong = warm_python(SCRIPT, "run", folder, "--updates", "5", *flags[2:])
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith(f"error: {folder} was begun with updates 4, not 5")

    (tmp_path / "all.json").write_text('{"another": 1}')
    names = {name: tmp_path / f"all.{name}" for name in ("markdown", "csv", "json")}
    said = warm_python(
        SCRIPT, "report", folder, *(word for name, path in names.items() for word in (f"--{name}", path))
    )
    assert said.returncode == 0, said.stderr
    merged = json.loads(names["json"].read_text())
    assert merged.pop("another") == 1
    ((title, found),) = merged.items()
    assert title.startswith("demo, 4 updates --num-layers 2")
    whole, ablated = found["ablations"]
    assert (whole["ablation"], ablated["ablation"], ablated["seeds"]) == ("whole", "no feedback", 2)
    assert ablated["parameters"] < whole["parameters"]

    def bpc(run: str, what: str) -> float:
        return float(json.loads((folder / f"{run}.{what}.json").read_text())["bpc"])

    gaps = [bpc(f"no-feedback-seed-{seed}", "test") - bpc(f"whole-seed-{seed}", "test") for seed in (0, 1)]
    assert ablated["test_difference_mean"] == pytest.approx(sum(gaps) / 2)
    assert (ablated["test_difference_least"], ablated["test_difference_most"]) == (min(gaps), max(gaps))
    by_rate = {rate: bpc("whole-seed-0", f"valid-dynamic-{rate:g}") for rate in (1e-4, 1e-2)}
    first = found["runs"]["whole"][0]
    assert first["dynamic_learning_rate"] == min(by_rate, key=lambda rate: by_rate[rate])
    assert first["step"] == 4
    lines = names["markdown"].read_text().splitlines()
    assert lines[3].startswith("| no feedback | 2 |")
    assert f"{ablated['test']:.4f}" in lines[3]
    with names["csv"].open(newline="") as file:
        assert float(list(csv.DictReader(file))[1]["test"]) == pytest.approx(ablated["test"])


def test_weights_may_be_scored_without_their_averages(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    own = ["--updates", "4", "--bytes", "400", "--streams", "2", "--only", "no averaging", "--rates"]
    flags = ["--", *SMALL, "--data-dir", str(tmp_path / "data")]
    assert warm_python(SCRIPT, "run", folder, *own, *flags).returncode == 0
    shutil.copytree(folder / "whole-seed-0", tmp_path / "raw/whole-seed-0")
    done = warm_python(SCRIPT, "run", tmp_path / "raw", "--no-averages", *own, *flags)
    assert done.returncode == 0, done.stderr
    assert "no averaging is left out: weights are scored without" in done.stderr
    bpc = {name: ablations.read_bpc(tmp_path / f"{name}-seed-0.test.json") for name in ("raw/whole", "study/whole")}
    assert bpc["raw/whole"] == ablations.read_bpc(folder / "no-averaging-seed-0.test.json") != bpc["study/whole"]


def test_what_fails_does_not_end_the_study(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    own = ["--updates", "4", "--bytes", "400", "--streams", "2", "--only", "no layer norm"]
    more = ["--warmup-updates", "0", "--learning-rate", "3e37", "--data-dir", str(tmp_path / "data")]
    done = warm_python(SCRIPT, "run", folder, *own, "--", *SMALL, *more)
    assert done.returncode == 3
    assert "whole-seed-0, no-layer-norm-seed-0 failed" in done.stderr.splitlines()[-1]
    (tmp_path / "spoilt.json").write_text('{"bpc": null, "failed": "the loss is not finite"}')
    assert ablations.read_bpc(tmp_path / "spoilt.json") == float("inf")  # a rate that is never chosen


def test_report_of_nothing(tmp_path: Path) -> None:
    done = warm_python(SCRIPT, "report", tmp_path)
    assert done.returncode == 2
    assert "has no ablations.json in it" in done.stderr
