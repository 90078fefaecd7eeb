"""How far a training has to go, from what MLflow has of trainings; and the report's command line."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import MACHINE, POINTS, PRESET, measured, sweep, truth

from gfrnn.config import UserError
from gfrnn.scaling import main
from gfrnn.scaling.store import log
from gfrnn.scaling.trainings import find_target
from launch import ROOT, environment


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, mlflow_tables: Path) -> str:
    """A store with three trainings, and the measurements of a study."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(mlflow_tables, folder / "mlflow.db")
    found = f"sqlite:///{folder}/mlflow.db"
    for number, point in enumerate(POINTS):
        each = dataclasses.replace(measured(truth(), point), machine=MACHINE, flops=10**9)
        log(found, "gfrnn-study", each, sweep() if number == 0 else (), folder=folder)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(found)
    experiment = client.create_experiment("gfrnn")
    for preset, rows, bpcs in (
        (PRESET, 8, {100: 3.0, 200: 2.4, 300: 2.1}),
        (PRESET, 32, {50: 2.9, 100: 2.45, 150: 2.2}),
        ("demo", 8, {10: 1.0}),
    ):
        run = client.create_run(experiment, tags={"preset": preset}).info.run_id
        client.log_param(run, "batch.rows", rows)
        client.log_param(run, "batch.steps", 20)
        for step, bpc in bpcs.items():
            client.log_metric(run, "valid_bpc", bpc, step=step)
            client.log_metric(run, "noise_scale", 100.0 * step, step=step)
    return found


def test_the_training_with_the_fewest_characters_counts(uri: str) -> None:
    found = find_target([uri], "gfrnn", PRESET, 2.5)
    assert found.reference == (8 * 20, 200)
    assert found.critical == 30_000  # the end's
    assert find_target([uri], "gfrnn", PRESET, 2.2, critical=7.0).critical == 7.0


@pytest.mark.parametrize(
    ("experiment", "bpc", "said"),
    [
        ("gfrnn", 1.5, "--target-bpc 1.5: no training of gf-lstm-3x140 in experiment gfrnn .* the best is 2.100"),
        ("elsewhere", 2.5, "has no experiment elsewhere"),
    ],
)
def test_a_target_that_nothing_reaches(experiment: str, bpc: float, said: str, uri: str) -> None:
    with pytest.raises(UserError, match=said):
        find_target([uri], experiment, PRESET, bpc)


def report(*flags: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "src/study.py", "report", *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)


def report_here(monkeypatch: pytest.MonkeyPatch, *flags: str | Path) -> None:
    """The same command in this process, which need not import everything again."""
    monkeypatch.setattr(sys, "argv", ["study.py", "report", *map(str, flags)])
    main._main()


def test_the_report_is_made_from_mlflow_alone(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tracking-uris", uri, "--output", tmp_path / "report", "--target-bpc", "2.5", "--clusters", "laptop"]
    done = report(*flags)
    assert done.returncode == 0, done.stderr
    assert "GPUs are worth using to reach 2.5 BPC" in done.stdout
    assert done.stdout.splitlines()[-1] == f"page: {tmp_path}/report/index.html"
    report_here(monkeypatch, *flags)  # the first report is in the experiment now
    again = capsys.readouterr()
    assert again.out == done.stdout
    assert "note" not in again.err
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    study = client.get_experiment_by_name("gfrnn-study")
    runs = client.search_runs([study.experiment_id], "tags.`gfrnn.study.report` = 'yes'")
    assert len(runs) == 2
    assert "index.html" in [file.path for file in client.list_artifacts(runs[0].info.run_id)]


NO_DATABASE = ["--tracking-uris", "sqlite:////no/such.db"]


def test_a_users_error_is_a_line(tmp_path: Path) -> None:
    done = report("--output", tmp_path, *NO_DATABASE)
    assert (done.returncode, "error: there is no MLflow database at" in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (NO_DATABASE, "there is no MLflow database at"),
        (["--clusters", "no-such"], "no-such is no cluster; give a YAML file or one of dgx-a100"),
        (["--preset", "demo"], "--preset demo: no measurement in gfrnn-study is of it"),
    ],
)
def test_what_cannot_be_reported_is_said(
    flags: list[str], said: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as caught:
        report_here(monkeypatch, "--tracking-uris", uri, "--output", tmp_path, *flags)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
