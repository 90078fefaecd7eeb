"""benchmarks/gates.py: what a run has recorded of its gates, as a table, a picture and correlations."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gates
from gfrnn.config import Settings, UserError, preset
from gfrnn.runs import RunFolder
from launch import ROOT, environment, warm_python

TAUS = np.array([2.0, 30.0, 7.0])


def run_of(path: Path, validations: int = 3, settings: Settings | None = None, **without: Any) -> Path:
    """A run folder as training writes it, whose gates grow with the timescale of the layer that they come from."""
    run = RunFolder(path)
    run.create(settings or preset("demo"), {}, "0" * 32)
    run.append_metrics({"step": 1, "epoch": 0.1, "train_bpc": 7.0})
    for n in range(1, validations + 1):
        line = {"step": 10 * n, "epoch": 0.1 * n, "valid_bpc": 6.0 / n}
        gate_LL = 0.5 + 0.01 * TAUS[:, None] - 0.001 * n - 0.0001 * TAUS[None, :]
        found = {"mean_gates": gate_LL.tolist(), "timescales": TAUS.tolist()}
        run.append_metrics({**line, **{key: value for key, value in found.items() if not without}})
    return path


SCRIPT = ROOT / "benchmarks/gates.py"


def test_a_picture_a_table_and_correlations(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "a [1]"), run_of(tmp_path / "b", validations=2)]
    importlib.import_module("matplotlib.font_manager")  # it makes a cache once, and says so where that takes long
    command = [sys.executable, SCRIPT, *runs, "--output", tmp_path / "gates.png", "--json", tmp_path / "gates.json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "gates.json").read_text())
    assert [run["steps"] for run in found["runs"]] == [[10, 20, 30], [10, 20]]
    assert found["runs"][0]["gates"][0][1][0] == pytest.approx(0.5 + 0.3 - 0.001 - 0.0002)  # from layer 2 to layer 1
    said = {(each["run"], each["validations"]): each for each in found["spearman"]}
    assert [each["from"]["points"] for each in said.values()] == [9, 27, 9, 18, 18, 45]
    for each in said.values():  # ties among timescales, none among gates
        assert each["from"]["value"] > 0.9
        assert -0.5 < each["to"]["value"] < 0
        assert each["ratio"]["value"] > 0.5
    assert "a [1]" in done.stdout
    assert "0.799" in done.stdout
    with Image.open(tmp_path / "gates.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[1] == 15 * 150
    assert len(np.unique(pixels)) > 50
    for row in np.array_split(pixels, 2):  # a run each, in all five places
        assert all(part.std() > 5 for part in np.array_split(row, 5, axis=1))


def test_correlations_of_hardly_anything_are_none() -> None:
    few = gates.correlation(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    constant = gates.correlation(np.array([1.0, 2.0, 3.0]), np.ones(3))
    assert (few, constant) == (gates.Correlation(None, 2), gates.Correlation(None, 3))
    assert gates.correlation(np.arange(4.0), np.exp(-np.arange(4.0))) == gates.Correlation(-1.0, 4)


def test_a_single_validation_is_drawn_too(tmp_path: Path) -> None:
    history = gates.read(run_of(tmp_path / "run", validations=1))
    gates.draw([history], tmp_path / "gates.svg")
    assert "<svg" in (tmp_path / "gates.svg").read_text()


def test_what_has_no_gates_is_refused(tmp_path: Path) -> None:
    demo = preset("demo")
    stack = dataclasses.replace(demo, model=dataclasses.replace(demo.model, feedback="none"))
    for run, said in (
        (tmp_path / "none", "config.json is missing"),
        (run_of(tmp_path / "stack", settings=stack), "has no global gates"),
        (run_of(tmp_path / "young", validations=0), "has no validation yet"),
        (run_of(tmp_path / "without", without=True), "was trained without --gates"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            gates.read(run)
        assert "\n" not in str(caught.value)
    done = warm_python(SCRIPT, tmp_path / "young", "--output", tmp_path / "gates.png")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert not (tmp_path / "gates.png").exists()
    done = warm_python(SCRIPT, run_of(tmp_path / "good"), "--output", tmp_path / "gates.txt")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "ends in .png" in done.stderr
