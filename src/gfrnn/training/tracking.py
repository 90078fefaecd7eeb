"""The run folder is the truth; MLflow holds a copy of it, made by a process of its own that follows the folder.

    trainer --appends--> RUN_DIR/metrics.jsonl --tailed by--> `python -m gfrnn.training.tracking --follow` --> MLflow
            --holds its stdin open; end of file means that the trainer is over, however it ended

So nothing in training ever waits for MLflow. A server that is down costs one warning; what it missed is sent later,
into the same MLflow run: by that process, by the next start of the training, or by
`python -m gfrnn.training.tracking RUN_DIR`.

RUN_DIR/mlflow.json says what has arrived. Lines carry their own time and MLflow's stores keep one of two equal points,
so sending a line twice (an answer lost on its way) changes nothing. Delete mlflow.json from a copy of a run folder, and
the copy becomes an MLflow run of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote
from zlib import crc32

from gfrnn import __version__
from gfrnn.config import EXIT_USER, UserError
from gfrnn.runs import RunFolder, write_json

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

POLL = 1.0  # seconds between looks at the folder
LONGEST_BACK_OFF = 30.0  # seconds between attempts at a server that is down
SYSTEM_EVERY = 10.0  # seconds between samples of the machine's load
METRICS_A_BATCH, PARAMS_A_BATCH, PARAM_LENGTH = 1000, 100, 6000  # MLflow's limits
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}  # of summary.json -> of MLflow


# ---------------------------------------------------------------------------------------------- the trainer's side


class Tracker:
    """Has a run folder copied to MLflow by another process, from `start` to `finish`; a context manager."""

    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path):
        self._process = process
        self._run_dir = run_dir

    @classmethod
    def start(cls, run_dir: Path, experiment: str) -> Tracker:
        """Starts the sidecar and returns at once. Its warnings go to this process' stderr."""
        source = str(Path(__file__).parents[2])  # src/train.py also runs where gfrnn is not installed
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.Popen(
            [sys.executable, "-m", "gfrnn.training.tracking", str(run_dir), f"--experiment={experiment}", "--follow"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C and a launcher's signals to the process group are not for it
        )
        return cls(process, run_dir)

    def finish(self, timeout: float = 30.0) -> None:
        """Says that the run is over and waits up to `timeout` seconds until all of it has arrived, or says it has not.

        The sidecar itself says on stderr what it could not send.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            _say(f"is still being sent {self._run_dir}; if that is cut short: {_send_command(self._run_dir)}")
            return
        if status not in (0, 1):
            _say(f"was not sent all of {self._run_dir} (status {status}); later: {_send_command(self._run_dir)}")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()


def ui_command(run_dir: Path) -> str:
    """What to type, or open, to look at a run in MLflow."""
    uri = tracking_uri(run_dir)
    if uri.startswith("http"):
        return f"open {_without_password(uri)}"
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def tracking_uri(run_dir: Path) -> str:
    """MLFLOW_TRACKING_URI; else the server that the run was sent to before; else mlflow.db beside the run folder."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return os.environ["MLFLOW_TRACKING_URI"]
    before = Sent.load(run_dir).tracking_uri
    if before.startswith("http"):
        return before
    database = str(run_dir.absolute().parent / "mlflow.db")
    return "sqlite:///" + database.replace("%", "%25").replace("?", "%3F")


# ------------------------------------------------------------------------------------------------ reading the folder


class Mark(NamedTuple):
    """A position in metrics.jsonl with what identifies everything before it."""

    offset: int = 0
    lines: int = 0
    last_step: int = 0
    crc: int = 0


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    timestamp: int  # milliseconds since 1970
    step: int


class MetricsReader:
    """Reads metrics.jsonl from where sending ended, also after the file was cut and written on.

    A resumed run drops the lines after its checkpoint and writes them again, so an offset alone could point into lines
    that were never sent. `marks` are checksums of the file's beginning, at distances that grow with it; the last one is
    the cursor. When the file is not what it was, reading goes on from the last mark that still holds.
    """

    def __init__(self, path: Path, marks: list[Mark]):
        self.path = path
        self.marks = marks
        self._tail: bytes | None = None  # the bytes just before the cursor; None: not looked at yet
        self._next = (marks[-1], b"")

    @property
    def cursor(self) -> Mark:
        return self.marks[-1]

    def read(self, limit: int = METRICS_A_BATCH) -> list[Point] | None:
        """At most `limit` points of the next complete lines; None if there is no such line. `commit` moves on."""
        try:
            f = self.path.open("rb")
        except FileNotFoundError:
            return None
        with f:
            mark = self._verify(f)
            f.seek(mark.offset)
            points: list[Point] = []
            last = b""
            while (line := f.readline()).endswith(b"\n"):  # a torn one is left for later
                step, more = _points(line) or (mark.last_step, [])
                if len(points) + len(more) > limit:
                    break
                points += more
                mark = Mark(mark.offset + len(line), mark.lines + 1, step, crc32(line, mark.crc))
                last = line
        self._next = (mark, last)
        return points if last else None

    def commit(self) -> None:
        """What was read last has arrived."""
        mark, self._tail = self._next
        # marks lie 5 % of the file apart: few in number, and a cut costs little more than what was cut
        if len(self.marks) > 1 and self.marks[-1].offset < 1.05 * self.marks[-2].offset + 4096:
            self.marks.pop()
        self.marks.append(mark)

    def unread(self) -> int:
        """Complete lines after the cursor."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as f:
            f.seek(self._verify(f).offset)
            return sum(line.endswith(b"\n") for line in f)

    def _verify(self, f: IO[bytes]) -> Mark:
        """The cursor, moved back if the file is not what was read before."""
        if self._tail is not None:
            f.seek(self.cursor.offset - len(self._tail))
            if f.read(len(self._tail)) == self._tail:
                return self.cursor
        f.seek(0)
        crc, good = 0, 0
        for i, mark in enumerate(self.marks):
            crc = crc32(f.read(mark.offset - f.tell()), crc)
            if f.tell() != mark.offset or crc != mark.crc:
                break
            good = i
        del self.marks[good + 1 :]
        start = max(0, self.cursor.offset - 256)
        f.seek(start)
        self._tail = f.read(self.cursor.offset - start)
        return self.cursor


def _points(line: bytes) -> tuple[int, list[Point]] | None:
    """Step and points of a line; None if a kill tore it and a later life wrote on after it."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    step, milliseconds = values.pop("step"), round(values.pop("time") * 1000)
    return step, [Point(key, float(value), milliseconds, step) for key, value in _numbers(values)]


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


# ---------------------------------------------------------------------------------------------------------- sending


class Sender:
    """Brings MLflow up to date with a run folder. Any failure raises; the next `sync` goes on from there."""

    def __init__(self, run_dir: Path, experiment: str):
        self.run_dir, self.folder = run_dir, RunFolder(run_dir)
        self.uri = tracking_uri(run_dir)
        self.sent = Sent.load(run_dir)
        self.sent.tracking_uri = _without_password(self.uri)
        self.sent.experiment = experiment
        self.sent.save(run_dir)  # before anything is sent: its id must be known afterwards
        self.reader = MetricsReader(self.folder.metrics_path, self.sent.marks)
        self.system = SystemMetrics(self.sent.started)
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
        while (points := self.reader.read()) is not None:
            self._log(client, points)
            self.reader.commit()
            self.sent.series = sorted({*self.sent.series, *(point.key for point in points)})
            self.sent.save(self.run_dir)
        while points := list(islice(self.system.points, METRICS_A_BATCH)):
            self._log(client, points)
            for _ in points:
                self.system.points.popleft()
        if over:
            self._send_end(client, json.loads(summary) if summary else {})
        # last, since an artifact store may be out of reach where the server is not
        for name, text in _artifacts(config, summary):
            if self.sent.artifacts_sent.get(name) != _checksum(text):
                client.log_text(run_id, text, name)
                self.sent.artifacts_sent[name] = _checksum(text)
                self.sent.save(self.run_dir)
        if summary and self.sent.summary_sent != _checksum(summary):
            self.sent.summary_sent = _checksum(summary)
            self.sent.save(self.run_dir)

    def disconnect(self) -> None:
        """Has the next sync look for the run again: the server may have come back with another store."""
        self._client = None

    def _connect(self, over: bool) -> MlflowClient:
        from mlflow.tracking import MlflowClient

        if (database := _sqlite_file(self.uri)) is not None and not database.exists():
            _make_database(database)
        client = MlflowClient(self.uri)
        name = self.sent.experiment
        if (experiment := client.get_experiment_by_name(name)) is not None:
            experiment_id = experiment.experiment_id
        else:
            experiment_id = client.create_experiment(name, _artifact_location(self.uri, self.run_dir))
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

    def _send_end(self, client: MlflowClient, summary: dict[str, Any]) -> None:
        there = [path for path in (self.folder.metrics_path, self.folder.summary_path) if path.exists()]
        ended = max((path.stat().st_mtime for path in there), default=self.sent.started)
        milliseconds, step = int(ended * 1000), self.reader.cursor.last_step
        numbers = [(key, value) for key, value in _numbers(summary) if key not in (*self.sent.series, "step")]
        self._log(client, [Point(key, value, milliseconds, step) for key, value in numbers])
        for name in ("latest", "best"):
            if checkpoint := self.folder.named_checkpoint(name):
                client.set_tag(self.sent.run_id, f"checkpoint.{name}", str(checkpoint.absolute()))
        client.set_terminated(self.sent.run_id, STATUS[summary.get("status", "stopped")], milliseconds)


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


# ------------------------------------------------------------------------------------------------------ the process


class _Trainer:
    """The other end of stdin."""

    def __init__(self, *, follow: bool, drain: float):
        self.over = not follow
        self._drain = drain
        self._deadline = time.monotonic() + drain

    def wait(self, seconds: float) -> None:
        """Sleeps, but no longer than until the trainer's end."""
        if self.over:
            time.sleep(seconds)
        elif select.select([0], [], [], seconds)[0]:  # nothing is ever written there: this is the end of file
            self.over = True
            self._deadline = time.monotonic() + self._drain

    @property
    def patience(self) -> bool:
        """Whether to go on trying against a failure."""
        return not self.over or time.monotonic() < self._deadline


def send(run_dir: Path, experiment: str, *, follow: bool, drain: float) -> int:
    """Copies a run folder to MLflow; 0 if all of it arrived, else 1 (after a line that says what did not).

    follow: until stdin is closed. drain: seconds to go on trying after that, while MLflow fails.
    """
    from filelock import FileLock, Timeout

    trainer = _Trainer(follow=follow, drain=drain)
    lock = FileLock(run_dir / "mlflow.lock")  # freed by the system when its holder dies
    while not lock.is_locked:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not trainer.patience:
                _say(f"is being sent {run_dir} by another process: wait for it, then {_send_command(run_dir)}")
                return 1
            trainer.wait(0.5)
    sender = Sender(run_dir, experiment)
    failures, next_try = 0, 0.0
    while True:
        if not trainer.over:
            sender.system.sample()
        over = trainer.over
        if over or time.monotonic() >= next_try:
            try:
                sender.sync(over=over)
            except Exception as error:  # every kind of store raises errors of its own; all mean: try again
                sender.disconnect()
                failures += 1
                next_try = time.monotonic() + min(LONGEST_BACK_OFF, 2.0 ** (failures - 1))
                failing = f"at {sender.sent.tracking_uri} fails ({_reason(error)})"
                if not trainer.patience:
                    rest = f"{sender.reader.unread()} lines, the end and files of {run_dir} are not sent"
                    _say(f"{failing}: {rest}; later: {_send_command(run_dir)}")
                    return 1
                if failures == 2:  # one alone passes: a database locked for a moment, two runs that start together
                    _say(f"{failing}; training goes on, its figures stay in {run_dir} and are sent later")
            else:
                if failures > 1:
                    _say(f"at {sender.sent.tracking_uri} is back")
                if over:
                    return 0
                failures = 0
        trainer.wait(POLL)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m gfrnn.training.tracking RUN_DIR`: sends what MLflow lacks of a run that is over."""
    parser = argparse.ArgumentParser(prog="python -m gfrnn.training.tracking", description=main.__doc__)
    parser.add_argument("run_dir", type=Path, help="run folder (train.py --output-dir)")
    parser.add_argument("--experiment", help="MLflow experiment (default: the run's own)")
    parser.add_argument("--drain", type=float, default=20.0, help="seconds to go on trying while MLflow fails")
    parser.add_argument("--follow", action="store_true", help="send what is added, until stdin is closed")
    arguments = parser.parse_args(argv)
    if arguments.follow:  # the trainer's life is this process' life, not the signals that its launcher sends around
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.nice(10)
    try:
        if not arguments.run_dir.is_dir():
            raise UserError(f"{arguments.run_dir} is not a folder; give the one that train.py had as --output-dir")
        experiment = arguments.experiment or _experiment(arguments.run_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    _quieten()
    return send(arguments.run_dir, experiment, follow=arguments.follow, drain=arguments.drain)


def _experiment(run_dir: Path) -> str:
    return Sent.load(run_dir).experiment or RunFolder(run_dir).read_settings().run.experiment


def _quieten() -> None:
    """Before mlflow is imported: fail fast (retries are ours), say nothing, ask nobody."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import mlflow.store.db.utils

    mlflow.store.db.utils.MAX_RETRY_COUNT = 1  # else a database that is down blocks for 100 s


# ------------------------------------------------------------------------------------------------------- helpers


def _say(what: str) -> None:
    with contextlib.suppress(OSError):  # whoever read our stderr may be gone with the trainer
        print(f"MLflow {what}", file=sys.stderr, flush=True)


def _send_command(run_dir: Path) -> str:
    return f"python -m gfrnn.training.tracking {shlex.quote(str(run_dir))}"


def _reason(error: BaseException) -> str:
    """The innermost cause, in a line: the outer ones only say that a request failed."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _without_password(uri: str) -> str:
    return re.sub("//[^/@]*@", "//", uri)


def _sqlite_file(uri: str) -> Path | None:
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
    return ((_sqlite_file(uri) or run_dir.absolute()).parent / "mlartifacts").as_uri()


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


def _numbers(values: dict[str, Any]) -> list[tuple[str, float]]:
    return [(k, v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
