"""Brings MLflow up to date with a run folder: parameters, metrics, system metrics, files, and how the run ended.

RUN_DIR/mlflow.json says what has arrived. Lines carry their own time and MLflow's stores keep one of two equal points,
so sending a line twice (an answer lost on its way) changes nothing. Delete mlflow.json from a copy of a run folder, and
the copy becomes an MLflow run of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
import socket
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from gfrnn import __version__
from gfrnn.runs import RunFolder, write_json
from gfrnn.training.metrics_reader import Mark, MetricsReader, Point, numbers

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SYSTEM_EVERY = 10.0  # seconds between samples of the machine's load
METRICS_A_BATCH, PARAMS_A_BATCH, PARAM_LENGTH = 1000, 100, 6000  # MLflow's limits
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}  # of summary.json -> of MLflow


@dataclass
class Sent:
    """mlflow.json: which MLflow run is the copy, and what of the folder has arrived there."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tag of the MLflow run, by which it is found again even if the answer to its creation was lost."""
    started: float = field(default_factory=time.time)
    tracking_uri: str = ""
    experiment: str = ""
    experiment_id: str = ""
    run_id: str = ""
    marks: list[Mark] = field(default_factory=lambda: [Mark()])
    """MetricsReader's."""
    lines_sent: int = 0
    series: list[str] = field(default_factory=list)
    """Names of the metrics in those lines."""
    config_sent: str = ""
    """Checksum of the config.json whose settings are the run's parameters."""
    summary_sent: str = ""
    """Checksum of the summary.json that arrived, with all else."""
    artifacts_sent: dict[str, str] = field(default_factory=dict)
    """File name -> checksum."""

    @staticmethod
    def load(run_dir: Path) -> Sent:
        try:
            values = json.loads((run_dir / "mlflow.json").read_text())
        except FileNotFoundError:
            return Sent()
        return Sent(**{**values, "marks": [Mark(*mark) for mark in values["marks"]]})

    def save(self, run_dir: Path) -> None:
        self.lines_sent = self.marks[-1].lines
        write_json(run_dir / "mlflow.json", dataclasses.asdict(self))


class Sender:
    """Brings MLflow up to date with a run folder. Any failure raises; the next `sync` goes on from there."""

    def __init__(self, run_dir: Path, experiment: str):
        self.run_dir, self.folder = run_dir, RunFolder(run_dir)
        self.uri = tracking_uri(run_dir)
        self.sent = Sent.load(run_dir)
        self.sent.tracking_uri = without_password(self.uri)
        self.sent.experiment = experiment
        self.sent.save(run_dir)  # before anything is sent: its id must be known afterwards
        self.reader = MetricsReader(self.folder.metrics_path, self.sent.marks)
        self.system = SystemMetrics(self.sent.started)
        self.values, self.files = 0, 0  # of metrics, and artifacts, that arrived
        self._client: MlflowClient | None = None
        self._params: set[str] = set()  # those that the MLflow run has; they cannot be changed

    def sync(self, *, over: bool) -> None:
        """Sends what is new; `over`: nothing more will come, so also how the run ended."""
        if self._client is None:
            self._client = self._connect(over)
        client, run_id = self._client, self.sent.run_id
        config = _read(self.folder.config_path)
        summary = _read(self.folder.summary_path) if over else ""
        if config and self.sent.config_sent != _checksum(config):
            self._send_params(client, json.loads(config))
            self.sent.config_sent = _checksum(config)
            self.sent.save(self.run_dir)
        while (points := self.reader.read(METRICS_A_BATCH)) is not None:
            self._log(client, points)
            self.reader.commit()
            self.values += len(points)
            self.sent.series = sorted({*self.sent.series, *(point.key for point in points)})
            self.sent.save(self.run_dir)
        while points := list(islice(self.system.points, METRICS_A_BATCH)):
            self._log(client, points)
            for _ in points:
                self.system.points.popleft()
        figures = self._send_end(client, json.loads(summary) if summary else {}) if over else 0
        # last, since an artifact store may be out of reach where the server is not
        for name, text in _artifacts(config, summary):
            if self.sent.artifacts_sent.get(name) != _checksum(text):
                client.log_text(run_id, text, name)
                self.files += 1
                self.sent.artifacts_sent[name] = _checksum(text)
                self.sent.save(self.run_dir)
        if summary and self.sent.summary_sent != _checksum(summary):
            self.values += figures
            self.sent.summary_sent = _checksum(summary)
            self.sent.save(self.run_dir)

    def disconnect(self) -> None:
        """Has the next sync look for the run again: the server may have come back with another store."""
        self._client = None

    def _connect(self, over: bool) -> MlflowClient:
        name = self.sent.experiment
        client, experiment_id = connect(self.uri, self.run_dir, name)
        found = client.search_runs([experiment_id], f"tags.`gfrnn.id` = '{self.sent.id}'", max_results=1)
        run = found[0] if found else self._create(client, experiment_id)
        if run.info.run_id != self.sent.run_id:  # nothing has arrived there
            old = self.sent
            self.sent = Sent(old.id, old.started, old.tracking_uri, name, experiment_id, run.info.run_id)
            self.reader = MetricsReader(self.folder.metrics_path, self.sent.marks)
            self.sent.save(self.run_dir)
        if not over and run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        self._params = set(run.data.params)
        return client

    def _create(self, client: MlflowClient, experiment_id: str) -> Any:
        name = self.run_dir.absolute().name
        tags = {"gfrnn.id": self.sent.id, "run_folder": str(self.run_dir.absolute())}
        return client.create_run(experiment_id, start_time=int(self.sent.started * 1000), tags=tags, run_name=name)

    def _log(self, client: MlflowClient, points: list[Point]) -> None:
        from mlflow.entities import Metric

        client.log_batch(self.sent.run_id, metrics=[Metric(*point) for point in points])

    def _send_params(self, client: MlflowClient, config: dict[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        tags = {
            "mlflow.source.git.commit": config["git_commit"],
            "gfrnn.version": __version__,
            "host": socket.gethostname(),
            "preset": config["settings"]["preset"],
        }
        client.log_batch(self.sent.run_id, tags=[RunTag(key, value) for key, value in tags.items() if value])
        flat = _flatten(config["settings"])
        new = [Param(key, value[:PARAM_LENGTH]) for key, value in flat if key not in self._params]
        for first in range(0, len(new), PARAMS_A_BATCH):
            client.log_batch(self.sent.run_id, params=new[first : first + PARAMS_A_BATCH])

    def _send_end(self, client: MlflowClient, summary: dict[str, Any]) -> int:
        """How many figures the summary adds."""
        there = [path for path in (self.folder.metrics_path, self.folder.summary_path) if path.exists()]
        ended = max((path.stat().st_mtime for path in there), default=self.sent.started)
        milliseconds, step = int(ended * 1000), self.reader.cursor.last_step
        known = (*self.sent.series, "step")
        figures = [(key, value) for key, value in numbers(summary) if key not in known]
        self._log(client, [Point(key, value, milliseconds, step) for key, value in figures])
        for name in ("latest", "best"):
            if checkpoint := self.folder.named_checkpoint(name):
                client.set_tag(self.sent.run_id, f"checkpoint.{name}", str(checkpoint.absolute()))
        client.set_terminated(self.sent.run_id, STATUS[summary.get("status", "stopped")], milliseconds)
        return len(figures)


class SystemMetrics:
    """Load of this machine, as MLflow's own monitor measures it.

    That monitor itself is not used: its thread asks the server before each sample, and ends when it does not answer.
    What cannot be sent is kept, up to some hours of it. The step is the seconds since the run began.
    """

    def __init__(self, started: float):
        self.started = started
        self.points: deque[Point] = deque(maxlen=20_000)
        self._monitors = []
        for kind in ("CPU", "Disk", "Network", "GPU"):
            module = importlib.import_module(f"mlflow.system_metrics.metrics.{kind.lower()}_monitor")
            with contextlib.suppress(ImportError, RuntimeError):  # no NVML, or no GPU
                self._monitors.append(getattr(module, f"{kind}Monitor")())
        self._last = time.monotonic()  # a first CPU figure right now would be of no interval

    def sample(self) -> None:
        """Takes a sample, if one is due."""
        if time.monotonic() - self._last < SYSTEM_EVERY:
            return
        self._last = time.monotonic()
        now = time.time()
        for monitor in self._monitors:
            monitor.collect_metrics()
            for key, value in monitor.aggregate_metrics().items():
                self.points.append(Point(f"system/{key}", float(value), int(now * 1000), int(now - self.started)))
            monitor.clear_metrics()


# ------------------------------------------------------------------------------------------------------- the store


def tracking_uri(run_dir: Path) -> str:
    """MLFLOW_TRACKING_URI; else the server that the run was sent to before; else mlflow.db beside the run folder."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return os.environ["MLFLOW_TRACKING_URI"]
    before = Sent.load(run_dir).tracking_uri
    if before.startswith("http"):
        return before
    database = str(run_dir.absolute().parent / "mlflow.db")
    return "sqlite:///" + database.replace("%", "%25").replace("?", "%3F")


def connect(uri: str, run_dir: Path, experiment: str) -> tuple[MlflowClient, str]:
    """A client, and the id of the experiment of that name; makes what is not there: the database, the experiment."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    if (database := sqlite_file(uri)) is not None and not database.exists():
        _make_database(database)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        return client, str(found.experiment_id)
    try:
        return client, str(client.create_experiment(experiment, _artifact_location(uri, run_dir)))
    except MlflowException:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise
        return client, str(found.experiment_id)  # another was faster


def without_password(uri: str) -> str:
    """A URI that may be shown and kept."""
    return re.sub("//[^/@]*@", "//", uri)


def sqlite_file(uri: str) -> Path | None:
    """Of a store that is one."""
    return Path(unquote(uri.removeprefix("sqlite:///"))).absolute() if uri.startswith("sqlite:///") else None


def _make_database(path: Path) -> None:
    """MLflow's tables, all or none: a store killed while it makes them, or made twice at a time, never works again."""
    from mlflow.tracking import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/mlflow.db")
        content = (Path(folder) / "mlflow.db").read_bytes()
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    beside.write_bytes(content)
    with contextlib.suppress(FileExistsError):  # another run was faster
        os.link(beside, path)
    beside.unlink()


def _artifact_location(uri: str, run_dir: Path) -> str | None:
    """Beside the database, or beside the run for one without a folder; None: the server's own. Never ./mlruns."""
    if re.split("[:+]", uri)[0] not in ("sqlite", "postgresql", "mysql", "mssql"):
        return None
    return ((sqlite_file(uri) or run_dir.absolute()).parent / "mlartifacts").as_uri()


# ------------------------------------------------------------------------------------------------ what is sent


def _artifacts(config: str, summary: str) -> Iterator[tuple[str, str]]:
    """(file name, content); config.json and summary.json may not be there yet: empty."""
    if config:
        yield "config.json", config
        yield "ds_config.json", json.dumps(json.loads(config)["deepspeed"], indent=2) + "\n"
    if summary:
        yield "summary.json", summary
        if sample := json.loads(summary).get("sample"):
            yield "sample.txt", sample


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        flat += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, str(value))]
    return flat


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
