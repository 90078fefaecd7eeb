"""A study in a real MLflow store: what comes out is what went in."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from gfrnn.config import UserError
from gfrnn.scaling.folder import Result, StudyFolder
from gfrnn.scaling.grid import How
from gfrnn.scaling.records import PARTS, Machine, Measurement, Point, Products, Timed
from gfrnn.scaling.store import Store, log, read, tags
from gfrnn.training.mlflow_sender import connect


@pytest.fixture
def uri(tmp_path: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a store in which there is nothing."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(mlflow_tables, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def measurement(seed: int = 0, ranks: int = 3, **changes: Any) -> Measurement:
    """Of numbers that do not survive rounding."""
    draw = random.Random(seed).random
    point = Point("demo", "/a folder/with ds configs/z 2.json", ranks, compression="bf16")
    found = Measurement(
        point,
        Machine("NVIDIA H100 80GB HBM3", 4, "10 gbit, \u00fcber Kreuz", "2.13.0+cu130", "0.19.8"),
        updates=30,
        step_seconds=draw() / 3,
        step_seconds_low=draw() / 4,
        step_seconds_high=draw(),
        parts={name: draw() * 1e-7 for name in PARTS},
        busy_seconds=tuple(draw() for _ in range(ranks)),
        calls={"all_reduce": 7, "all_gather": 3},
        bytes={"all_reduce": 2**53 + 1, "all_gather": 1},
        predicted_bytes={"all_reduce": 10**18 + 1},
        memory_bytes=2**40 + 1,
        predicted_memory_bytes=2**41 + 1,
        characters=10**6,
        flops=3 * 10**18 + 1,
        peak_flops=draw() * 1e15,
        products=tuple(Products(rows, draw() / 7, draw() / 3) for rows in (1, 5, 64)),
        parameters=57_900_001,
        joules=draw() * 1000,
        noise_scale=draw(),
        bpc=draw(),
        trained_updates=3,
        config={"zero_optimization": {"stage": 2, "overlap_comm": True}, "communication_data_type": "bf16"},
    )
    return dataclasses.replace(found, **changes)


SWEEP = [Timed("all_reduce", 4**power, 3, 1, random.Random(power).random()) for power in range(5, 13)]


def test_all_of_it_comes_back(uri: str) -> None:
    many = measurement(1, ranks=2000)  # more than a tag holds
    alone = measurement(2, ranks=1, joules=None, noise_scale=None, bpc=None)
    failed = Measurement(Point(), Machine("", 1), failed="does not fit: " + "x" * 9000)
    for each, sweep in ((many, SWEEP), (alone, []), (failed, [])):
        log(uri, "scaling", each, sweep)
    assert read(uri, "scaling") == ([many, alone, failed], [(many.machine, timed) for timed in SWEEP])


def test_figures_are_there_to_be_looked_at(uri: str) -> None:
    from mlflow.tracking import MlflowClient

    one = measurement()
    run = MlflowClient(uri).get_run(log(uri, "scaling", one, SWEEP))
    assert run.info.status == "FINISHED"
    assert run.data.params["world_size"] == "3"
    assert run.data.params["network"] == one.machine.network
    assert run.data.metrics["step_seconds"] == one.step_seconds
    assert run.data.metrics["parts.communication"] == one.parts["communication"]
    assert run.data.metrics["busy_seconds.most"] == max(one.busy_seconds)
    assert run.data.metrics["mfu"] == one.mfu
    assert all(len(value) <= 5000 for value in run.data.tags.values())


def test_other_runs_are_left_out_and_said_to_be(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow.tracking import MlflowClient

    one = measurement()
    log(uri, "scaling", one)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("scaling")
    assert experiment is not None
    client.create_run(experiment.experiment_id, tags={"preset": "demo"})
    older = tags(Result(measurement(1)), "s") | {"gfrnn.study.form": "0"}
    client.create_run(experiment.experiment_id, tags=older)
    broken = tags(Result(measurement(2)), "s") | {"gfrnn.study.result.0": "{"}
    client.create_run(experiment.experiment_id, tags=broken)
    deleted = log(uri, "scaling", measurement(3))
    client.delete_run(deleted)
    assert read(uri, "scaling") == ([one], [])
    assert capsys.readouterr().err.startswith("note: 3 of 4 runs of scaling are not measurements of this version")


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match="there is no MLflow database"):
        read(uri, "scaling")
    assert not (tmp_path / "mlflow.db").exists()
    log(uri, "scaling", measurement())
    with pytest.raises(UserError, match="has no experiment other"):
        read(uri, "other")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    client.create_run(client.create_experiment("trainings"))
    with pytest.raises(UserError, match=r"no run of experiment trainings .* is a measurement of a study"):
        read(uri, "trainings")
    with pytest.raises(UserError, match="cannot be read: "):
        read("http://127.0.0.1:9", "scaling")


def test_sent_once_however_often(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into mlflow.db beside the study; a run that was begun and not finished is completed; one that failed to arrive
    arrives later."""
    results = [Result(measurement(seed), tuple(SWEEP)) for seed in range(3)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert Store(tmp_path / "study", "scaling").send(results) != ""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    store = Store(tmp_path / "study", "scaling")
    assert store.uri == uri
    assert store.send(results[:2]) == ""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("scaling")
    assert experiment is not None
    client.create_run(experiment.experiment_id, tags=tags(results[2], "study"))  # and then it was killed
    for _ in range(2):
        assert store.send(results) == ""
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(run.data.metrics["updates"] == 30 for run in runs)
    client.create_run(experiment.experiment_id, tags=tags(results[0], "study"))  # another process had the same idea
    assert read(uri, "scaling")[0] == [result.measurement for result in results]


def test_an_experiment_that_another_makes_meanwhile(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    made = MlflowClient(uri).create_experiment("scaling")
    look = MlflowClient.get_experiment_by_name
    looks: list[str] = []

    def blind_at_first(self: MlflowClient, name: str) -> Any:
        looks.append(name)
        return look(self, name) if len(looks) > 1 else None

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", blind_at_first)
    assert connect(uri, tmp_path, "scaling")[1] == made
    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", lambda self, name: None)
    with pytest.raises(MlflowException, match="already exists"):
        connect(uri, tmp_path, "scaling")


def test_a_study_that_has_not_begun_is_made_anew(tmp_path: Path) -> None:
    one, two = Point("demo"), Point("demo", world_size=2)
    study = StudyFolder(tmp_path / "s")
    study.begin([one, two], How(updates=3))
    study.begin([], How())  # as it is
    assert (study.points, study.how) == ([one, two], How(updates=3))
    study.begin([], How(updates=4))
    assert (study.points, study.how) == ([one, two], How(updates=4))
    with pytest.raises(UserError, match="--train-updates is 5; 38 are made for the timing alone"):
        study.begin([], How(train_updates=5))
    study.begin([two], How(repeats=2))
    again = StudyFolder(tmp_path / "s").read()
    assert (again.points, again.how) == ([two], How(repeats=2))
    study.note_submitted()
    with pytest.raises(UserError, match="is measured with --updates 10, not 3"):
        study.begin([one], How(updates=3))
    study.begin([one], How())
    assert (study.points, study.how) == ([two, one], How(repeats=2))


def test_a_folder_gives_back_what_was_written(tmp_path: Path) -> None:
    one = Result(measurement(), tuple(SWEEP))
    study = StudyFolder(tmp_path / "s")
    study.begin([one.measurement.point], How(updates=3, corpus_file=Path("text")))
    assert study.result(one.measurement.point) is None
    study.write(one)
    again = StudyFolder(tmp_path / "s").read()
    assert again.points == [one.measurement.point]
    assert again.how == How(updates=3, corpus_file=Path("text").absolute())
    assert again.result(again.point(1)) == one
    again.begin([Point("demo")], How())  # points are added, as they are measured here
    assert StudyFolder(tmp_path / "s").read().points == [one.measurement.point, Point("demo")]
    with pytest.raises(UserError, match="is measured with --updates 3, not 4; take another folder"):
        again.begin([], How(updates=4, corpus_file=Path("text")))
    with pytest.raises(UserError, match="has no point 3"):
        again.point(3)
