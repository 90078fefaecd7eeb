"""A study in MLflow: one run a measurement, from whose tags alone the measurement and its sweep are made again.

Parameters and metrics are there to be looked at, sorted and plotted. No artifacts: their paths do not travel.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfrnn.cli import say
from gfrnn.config import UserError
from gfrnn.scaling.folder import FORM, Result, result_from, result_to
from gfrnn.scaling.records import Machine, Measurement, Timed
from gfrnn.training.mlflow_sender import connect, sqlite_file, tracking_uri, without_password

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_FORM, _ID, _PIECE, _PIECES = "gfrnn.study.form", "gfrnn.study.id", "gfrnn.study.result.", "gfrnn.study.pieces"
_REPORT = "gfrnn.study.report"
_TAG_LENGTH = 5000  # characters; some stores take 8000, others fewer
_PAGE = 1000  # runs


class Store:
    """An experiment of an MLflow store, which is made with the first measurement.

    Args:
        folder: of the study: without MLFLOW_TRACKING_URI in the environment the store is mlflow.db beside it.
    """

    def __init__(self, folder: Path, experiment: str) -> None:
        if not experiment.strip():
            raise UserError("--experiment is empty; give a name")
        self.folder, self.experiment = folder, experiment
        self.uri = tracking_uri(folder)
        self.shown = without_password(self.uri)

    def send(self, results: Sequence[Result]) -> str:
        """Makes a run of each result that has none; "" or what failed, in words."""
        if not results:
            return ""
        from gfrnn.training.tracking import quieten, reason

        quieten()
        try:
            client, experiment_id = connect(self.uri, self.folder, self.experiment)
            there = {
                run.data.tags[_ID]: run.info.status for run in _runs(client, experiment_id) if _ID in run.data.tags
            }
            for result in results:
                if there.get(result.id) != "FINISHED":
                    _log(client, experiment_id, result, self.folder.absolute().name)
        except Exception as error:  # every kind of store raises errors of its own
            return reason(error)
        return ""


def log(
    uri: str, experiment: str, measurement: Measurement, sweep: Sequence[Timed] = (), *, folder: Path = Path(".")
) -> str:
    """Makes a run of a measurement; returns its id. Raises the store's own errors.

    folder: beside which a store without artifacts of its own would keep them.
    """
    from gfrnn.training.tracking import quieten

    quieten()
    client, experiment_id = connect(uri, folder, experiment)
    return _log(client, experiment_id, Result(measurement, tuple(sweep)), folder.absolute().name)


def read(uri: str, experiment: str) -> tuple[list[Measurement], list[tuple[Machine, Timed]]]:
    """All measurements of an experiment, the oldest first, and the collectives timed beside them.

    Runs that are not of a study, or of a form that this version does not know, are left out, and said to be. Raises
    UserError if the experiment is not there, or has no measurement.
    """
    where = without_password(uri)
    runs = [run for run in runs_of(uri, experiment)[1] if _REPORT not in run.data.tags]
    results = [result for run in runs if (result := _result(run.data.tags)) is not None]
    if not results:
        raise UserError(f"no run of experiment {experiment} at {where} is a measurement of a study")
    if len(results) < len(runs):
        others = len(runs) - len(results)
        say(f"note: {others} of {len(runs)} runs of {experiment} are not measurements of this version: left out")
    results = list({result.id: result for result in results}.values())  # two may have sent the same
    sweeps = [(result.measurement.machine, timed) for result in results for timed in result.sweep]
    return [result.measurement for result in results], sweeps


def runs_of(uri: str, experiment: str) -> tuple[MlflowClient, list[Any]]:
    """A store's client, and all runs of an experiment there, the oldest first. Raises UserError if it is not there."""
    from gfrnn.training.tracking import quieten, reason

    quieten()
    from mlflow.tracking import MlflowClient

    where = without_password(uri)
    database = sqlite_file(uri)
    if database is not None and not database.exists():  # a client would make one
        raise UserError(f"there is no MLflow database at {where}; name the one that the runs were logged to")
    try:
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        runs = _runs(client, found.experiment_id) if found is not None else []
    except Exception as error:  # every kind of store raises errors of its own
        raise UserError(f"MLflow at {where} cannot be read: {reason(error)}") from error
    if found is None:
        raise UserError(f"MLflow at {where} has no experiment {experiment}; name the one that the runs were logged to")
    return client, runs


def log_report(uri: str, experiment: str, files: Sequence[Path]) -> str:
    """Keeps a report's files in a run of its own; returns "" or what failed, in words."""
    from gfrnn.training.tracking import quieten, reason

    quieten()
    try:
        client, experiment_id = connect(uri, files[0].parent, experiment)
        run_id = client.create_run(experiment_id, tags={_REPORT: "yes"}, run_name="report").info.run_id
        for file in files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id, "FINISHED")
    except Exception as error:  # every kind of store raises errors of its own
        return reason(error)
    return ""


def _result(tags: dict[str, str]) -> Result | None:
    """None if these are not of a measurement."""
    if tags.get(_FORM) != str(FORM):
        return None
    try:
        text = "".join(tags[f"{_PIECE}{number}"] for number in range(int(tags[_PIECES])))
        return result_from(json.loads(text))
    except (KeyError, TypeError, ValueError):  # somebody has changed them
        return None


def _runs(client: MlflowClient, experiment_id: str) -> list[Any]:
    """All of an experiment but deleted ones, the oldest first."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], max_results=_PAGE, order_by=["attributes.start_time ASC"], page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def _log(client: MlflowClient, experiment_id: str, result: Result, study: str) -> str:
    """Makes the run with its tags at once, so that there is no run that has some of them."""
    from mlflow.entities import Metric, Param

    existing = client.search_runs([experiment_id], f"tags.`{_ID}` = '{result.id}'", max_results=1)
    if existing:
        run_id = existing[0].info.run_id
    else:
        name = result.measurement.point.name
        run_id = client.create_run(experiment_id, tags=tags(result, study), run_name=name).info.run_id
    params = [Param(key, value) for key, value in _params(result.measurement).items()]
    metrics = [Metric(key, value, 0, 0) for key, value in _metrics(result.measurement).items()]
    client.log_batch(run_id, metrics=metrics, params=params)
    client.set_terminated(run_id, "FINISHED")
    return str(run_id)


def tags(result: Result, study: str) -> dict[str, str]:
    """Of a measurement's run: all that `read` needs."""
    text = json.dumps(result_to(result))
    pieces = [text[at : at + _TAG_LENGTH] for at in range(0, len(text), _TAG_LENGTH)]
    found = {_FORM: str(FORM), _ID: result.id, _PIECES: str(len(pieces)), "study": study}
    if result.measurement.failed:
        found["failed"] = result.measurement.failed[:_TAG_LENGTH]
    return found | {f"{_PIECE}{number}": piece for number, piece in enumerate(pieces)}


def _params(measurement: Measurement) -> dict[str, str]:
    named = dataclasses.asdict(measurement.point) | dataclasses.asdict(measurement.machine)
    return {key: str(value)[:500] for key, value in named.items() if value != ""}


def _metrics(measurement: Measurement) -> dict[str, float]:
    """Its figures; none of a point that failed."""
    if measurement.failed:
        return {}
    found: dict[str, float] = {}
    for field in dataclasses.fields(measurement):
        if field.name == "config":
            continue
        value = getattr(measurement, field.name)
        if isinstance(value, int | float):
            found[field.name] = float(value)
        elif isinstance(value, dict):
            found |= {f"{field.name}.{key}": float(number) for key, number in value.items()}
    busy = measurement.busy_seconds
    if busy:
        found |= {"busy_seconds.least": min(busy), "busy_seconds.most": max(busy)}
    figures = {"characters_per_second": measurement.characters_per_second}
    return found | figures | ({"mfu": measurement.mfu} if measurement.peak_flops else {})
