"""A run folder arrives in MLflow: in a real SQLite store, and at a real server that is really killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gfrnn.config import Settings
from gfrnn.runs import RunFolder
from gfrnn.training.mlflow_sender import SystemMetrics, tracking_uri
from gfrnn.training.tracking import Tracker, main, ui_command
from launch import SMALL, environment, free_port, losses, summary, warm_python, warm_script

# ------------------------------------------------------------------------------------------------- a trainer's part


class Run:
    """A run folder, filled as the trainer fills it."""

    def __init__(self, path: Path):
        self.folder = RunFolder(path)
        self.path = path
        self.folder.create(Settings(output_dir=path), {"zero_optimization": {"stage": 2}}, "0123456789abcdef")
        self.written: list[dict[str, Any]] = []

    def write(self, *steps: int) -> None:
        for step in steps:
            self.folder.append_metrics({"step": step, "epoch": step // 10, "train_bpc": random.random()})
            self.written.append(json.loads(self.folder.metrics_path.read_text().splitlines()[-1]))

    def finish(self, status: str = "finished") -> None:
        summary = {"finished": status == "finished", "status": status, "step": 7, "test_bpc": 1.5, "sample": "of the"}
        self.folder.summary_path.write_text(json.dumps(summary))

    def truncate(self, step: int) -> None:
        self.folder.truncate_metrics(step)
        self.written = [line for line in self.written if line["step"] <= step]

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "mlflow.json").read_text())
        return found


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    """The first true value; a failure names the condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if value := what():
                return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what}")


def lines_sent(run: Run) -> int:
    return int(run.state()["lines_sent"])


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def mlflow_run(run: Run, uri: str | None = None) -> Any:
    return client(uri or tracking_uri(run.path)).get_run(run.state()["run_id"])


def history(run: Run, key: str = "train_bpc", uri: str | None = None) -> list[tuple[int, float, int]]:
    """(step, value, milliseconds) of all points, in order."""
    points = client(uri or tracking_uri(run.path)).get_metric_history(run.state()["run_id"], key)
    return sorted((p.step, p.value, p.timestamp) for p in points)


def expected(run: Run, key: str = "train_bpc") -> list[tuple[int, float, int]]:
    return sorted((line["step"], line[key], round(line["time"] * 1000)) for line in run.written)


def send(run: Run, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """python -m gfrnn.training.tracking RUN, from a folder in which nothing may appear."""
    cwd = run.path.parent.parent / "elsewhere"
    cwd.mkdir(exist_ok=True)
    done = warm_python("-m", "gfrnn.training.tracking", run.path, *flags, cwd=cwd, env=environment(**variables))
    assert not list(cwd.iterdir())
    return done


# --------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture
def run(tmp_path: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir()
    shutil.copy(mlflow_tables, tmp_path / "runs/mlflow.db")
    return Run(tmp_path / "runs/a run")


class Server:
    """`mlflow server`, to be killed and started again on the same files."""

    def __init__(self, path: Path, database: Path):
        self.path, self.port = path, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        shutil.copy(database, path / "mlflow.db")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns at once, as it does when the server is up already; `wait` until it answers."""
        if self._process is not None:
            return
        store = ["--backend-store-uri", f"sqlite:///{self.path}/mlflow.db", "--artifacts-destination", str(self.path)]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *store, *where],
            cwd=self.path,
            env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self) -> None:
        wait_for(lambda: urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200, 90)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # with its workers: they are in its session
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, mlflow_tables: Path) -> Iterator[Server]:
    """Not started: the first test wants it down."""
    server = Server(tmp_path_factory.mktemp("server"), mlflow_tables)
    yield server
    server.kill()


# ------------------------------------------------------------------------------------------------- the SQLite default


def test_a_finished_run_arrives_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = run.folder.checkpoints / "step-00000007"
    checkpoint.mkdir()
    (run.folder.checkpoints / "latest").write_text(checkpoint.name)
    run.write(*range(1, 8))
    run.finish()
    done = send(run)
    assert (done.returncode, done.stderr) == (0, "")
    where = f"MLflow at {tracking_uri(run.path)}"
    sent = f"{7 * len(set(run.written[0]) - {'step', 'time'}) + 1} values of metrics and 4 artifacts"
    assert done.stdout == f"{where} was sent {sent} of {run.path}: it has all of it now\n"

    there = mlflow_run(run)
    assert there.info.status == "FINISHED"
    assert there.info.run_name == "a run"
    assert there.data.params["model.num_layers"] == "5"
    assert there.data.params["batch.rows"] == "100"
    assert there.data.tags["preset"] == "gf-lstm-5x700"
    assert there.data.tags["gfrnn.version"] == "0.1.0"
    assert there.data.tags["checkpoint.latest"] == str(checkpoint)
    assert there.data.metrics["test_bpc"] == 1.5
    assert history(run) == expected(run)
    assert history(run, "epoch") == expected(run, "epoch")
    artifacts = run.path.parent / "mlartifacts" / there.info.run_id / "artifacts"
    assert {path.name for path in artifacts.iterdir()} == {
        "config.json",
        "ds_config.json",
        "summary.json",
        "sample.txt",
    }
    assert (artifacts / "sample.txt").read_text() == "of the"
    assert json.loads((artifacts / "ds_config.json").read_text()) == {"zero_optimization": {"stage": 2}}
    assert {path.name for path in run.path.parent.iterdir()} == {"a run", "mlflow.db", "mlartifacts"}
    experiments = client(tracking_uri(run.path)).search_experiments()
    assert {e.name for e in experiments} == {"Default", "gfrnn"}

    state = run.state()
    assert state["lines_sent"] == 7
    assert state["summary_sent"]
    assert state["config_sent"]
    assert (state["run_id"], state["tracking_uri"]) == (there.info.run_id, tracking_uri(run.path))
    assert f"sqlite:///{run.path.parent}/mlflow.db" in ui_command(run.path)

    again = send(run)  # nothing doubles
    assert (again.returncode, again.stdout) == (0, f"{where} has all of {run.path}\n")
    assert history(run) == expected(run)
    assert run.state()["run_id"] == there.info.run_id


def test_runs_that_start_together_share_a_new_database(tmp_path: Path) -> None:
    """Also after one that was killed while it made the tables, at whatever instant."""
    runs = [Run(tmp_path / "runs" / name) for name in "abc"]
    senders = []
    for run in runs:
        run.write(1, 2)
        command = [sys.executable, "-m", "gfrnn.training.tracking", str(run.path)]
        senders.append(subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE))
        if run is runs[0]:
            time.sleep(3)
            senders[0].kill()
            senders[0].communicate()
    for sender in senders[1:]:
        assert (sender.communicate(timeout=120)[1], sender.returncode) == (b"", 0)
    for run in runs[1:]:
        assert history(run) == expected(run)
    assert not list(runs[0].path.parent.glob(".*"))


def test_long_settings_and_many_lines_stay_within_mlflows_limits(run: Run) -> None:
    config = json.loads(run.folder.config_path.read_text())
    config["settings"]["long"] = "x" * 10_000
    config["settings"]["many"] = {f"s{i}": i for i in range(150)}
    run.folder.config_path.write_text(json.dumps(config))
    lines = [{"step": i, "time": i, "train_bpc": float(i), "valid_bpc": float("nan")} for i in range(1, 1201)]
    run.folder.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert send(run, "--experiment", "limits").returncode == 0
    params = mlflow_run(run).data.params
    assert params["long"] == "x" * 6000
    assert [params[f"many.s{i}"] for i in range(150)] == [str(i) for i in range(150)]
    assert history(run) == [(i, float(i), 1000 * i) for i in range(1, 1201)]
    assert len(history(run, "valid_bpc")) == 1200
    assert run.state()["experiment"] == "limits"


def test_following_stopping_and_resuming_is_one_mlflow_run(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker.start(run.path, "gfrnn")
    assert not (run.path / "mlflow.json").exists(), "the trainer waited"
    run.write(*range(1, 31))
    wait_for(lambda: lines_sent(run) == 30)
    assert mlflow_run(run).info.status == "RUNNING"
    run.finish("stopped")
    tracker.finish()
    first = mlflow_run(run)
    assert first.info.status == "KILLED"
    assert expected(run) == history(run)
    lost = [line for line in expected(run) if line[0] > 20]

    run.folder.summary_path.unlink()
    run.truncate(20)
    run.write(*range(21, 51))  # longer than before: an offset alone would miss lines
    with Tracker.start(run.path, "gfrnn") as tracker:
        wait_for(lambda: lines_sent(run) == 50)
        assert mlflow_run(run).info.status == "RUNNING"
        run.write(51)
        run.finish()
    again = mlflow_run(run)
    assert (again.info.run_id, again.info.status) == (first.info.run_id, "FINISHED")
    assert history(run) == sorted(expected(run) + lost)
    assert capfd.readouterr() == ("", "")


def test_signals_do_not_end_it_and_its_twin_does_not_send(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker.start(run.path, "gfrnn")
    run.write(1)
    wait_for(lambda: lines_sent(run) == 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        tracker._process.send_signal(number)
    run.write(2)
    wait_for(lambda: lines_sent(run) == 2)
    assert os.getsid(tracker._process.pid) == tracker._process.pid, "Ctrl-C in a terminal would reach it"
    assert psutil.Process(tracker._process.pid).nice() >= 10

    twin = send(run, "--drain", "1")
    assert twin.returncode == 1
    assert "by another process" in twin.stderr
    heir = Tracker.start(run.path, "gfrnn")
    tracker._process.kill()
    tracker.finish()
    assert "status -9" in capfd.readouterr().err
    run.write(3)
    wait_for(lambda: lines_sent(run) == 3)
    run.finish("failed")
    heir.finish()
    assert mlflow_run(run).info.status == "FAILED"
    assert history(run) == expected(run)
    assert capfd.readouterr().err == ""


TRAINER = """
import sys, time
from pathlib import Path
from gfrnn.training.tracking import Tracker
tracker = Tracker.start(Path(sys.argv[1]), "gfrnn")
time.sleep(600)
"""


def test_a_killed_trainer_leaves_a_killed_run(run: Run) -> None:
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(run.path)], env=environment())
    try:
        run.write(1)
        wait_for(lambda: lines_sent(run) == 1)
        (sidecar,) = psutil.Process(trainer.pid).children()
        run.write(*range(2, 40))
    finally:
        trainer.kill()
        trainer.wait()
    gone, _ = psutil.wait_procs([sidecar], 60)
    assert gone, "it outlived its trainer"
    assert mlflow_run(run).info.status == "KILLED"
    assert history(run) == expected(run)


def test_system_metrics(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gfrnn.training.mlflow_sender.SYSTEM_EVERY", 0.1)
    begin = time.time() - 5
    system = SystemMetrics(begin)
    time.sleep(0.2)
    system.sample()
    monkeypatch.setattr("gfrnn.training.mlflow_sender.SYSTEM_EVERY", 1000.0)
    system.sample()  # too early
    found = {point.key: point for point in system.points}
    assert len(found) == len(system.points)
    for key in ("cpu_utilization_percentage", "system_memory_usage_percentage", "disk_usage_percentage"):
        assert 0 < found[f"system/{key}"].value <= 100
        assert 5 <= found[f"system/{key}"].step <= time.time() - begin
    assert "system/network_receive_megabytes" in found


def test_a_missing_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "none", tmp_path):
        assert main([str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


LOCKLESS = """
import errno, fcntl, sys
from gfrnn.training import tracking
def flock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = flock
sys.exit(tracking.main(sys.argv[1:]))
"""


def test_a_file_system_without_locks(run: Run, tmp_path: Path) -> None:
    """Nor is what was left there by one who was killed elsewhere a lock."""
    run.write(1, 2)
    run.finish()
    (run.path / "mlflow.lock").write_text("1\nelsewhere\n")
    (tmp_path / "lockless.py").write_text(LOCKLESS)
    done = warm_python(tmp_path / "lockless.py", run.path, "--drain", "0", cwd=tmp_path, env=environment())
    assert (done.returncode, history(run)) == (0, expected(run)), done.stderr
    assert done.stderr == f"MLflow may be sent {run.path} by others too: it is on a file system without locks\n"


# ------------------------------------------------------------------------------------------------------- the server


IMPATIENT = """
import sys
from gfrnn.training import tracking
tracking.LONGEST_BACK_OFF = 2.0
sys.exit(tracking.main(sys.argv[1:]))
"""


def test_an_outage_costs_one_warning_and_no_line(run: Run, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down at the start, up, killed in mid-run, up again: everything is there once."""
    server.kill()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    said = run.path.parent / "stderr"
    with (
        said.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, str(run.path), "--experiment=gfrnn", "--follow"],
            env=environment(MLFLOW_TRACKING_URI=server.uri),
            stdin=subprocess.PIPE,
            stderr=stderr,
        ) as sidecar,
    ):
        run.write(*range(1, 11))
        wait_for(lambda: said.read_text().count("fails") == 1)
        server.start()
        run.write(11)
        wait_for(lambda: said.read_text().count("is back") == 1, 90)
        assert lines_sent(run) == 11
        first = run.state()["run_id"]
        server.kill()
        run.write(*range(12, 31))
        wait_for(lambda: said.read_text().count("fails") == 2)
        assert lines_sent(run) == 11
        server.start()
        run.write(31)
        wait_for(lambda: said.read_text().count("is back") == 2, 90)
        run.write(32)
        run.finish()
    assert sidecar.returncode == 0

    there = mlflow_run(run, server.uri)
    assert (there.info.run_id, there.info.status) == (first, "FINISHED")
    assert history(run, uri=server.uri) == expected(run)
    assert len(client(server.uri).search_runs([there.info.experiment_id])) == 1
    artifacts = {a.path for a in client(server.uri).list_artifacts(first)}
    assert artifacts == {"config.json", "ds_config.json", "summary.json", "sample.txt"}
    assert not (run.path.parent / "mlartifacts").exists()
    warnings = said.read_text().splitlines()
    assert ["fails (ConnectionRefusedError" in line for line in warnings] == [True, False, True, False], warnings
    assert server.uri in ui_command(run.path)


def test_what_a_dead_server_missed_is_sent_by_hand(run: Run, server: Server) -> None:
    run.write(*range(1, 4))
    run.finish()
    nobody = f"http://127.0.0.1:{free_port()}"
    missed = send(run, "--drain", "0", MLFLOW_TRACKING_URI=nobody)
    assert missed.returncode == 1
    assert missed.stderr.count("\n") == 1
    assert "3 lines" in missed.stderr
    assert "python -m gfrnn.training.tracking" in missed.stderr
    assert tracking_uri(run.path) == nobody  # by hand it goes to the same server, without the variable
    server.start()
    server.wait()
    assert send(run, MLFLOW_TRACKING_URI=server.uri).returncode == 0
    assert history(run, uri=server.uri) == expected(run)
    assert mlflow_run(run, server.uri).info.status == "FINISHED"


# ------------------------------------------------------------------------------------------------- a real training


def test_a_dead_mlflow_server_costs_a_warning_and_the_next_start_sends_it_all(
    tmp_path: Path, mlflow_tables: Path
) -> None:
    output_dir = tmp_path / "run"
    flags = [*(flag for flag in SMALL if flag != "--no-mlflow"), "--max-updates", "20", "--output-dir", output_dir]
    dead = warm_script("train", *flags, env=environment(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}"))
    assert dead.returncode == 0, dead.stderr
    assert summary(output_dir)["finished"] is True
    said = [line for line in dead.stderr.splitlines() if line.startswith("MLflow")]
    warnings = [line for line in said if "if that is cut short" not in line]  # what is said where the end takes long
    assert len(warnings) == 2  # that it fails, and what is not sent
    assert "fails" in warnings[0]
    assert f"later: python -m gfrnn.training.tracking {output_dir}" in warnings[1]
    assert "Traceback" not in dead.stderr

    store = f"sqlite:///{shutil.copy(mlflow_tables, tmp_path)}"
    again = warm_script("train", *flags, env=environment(MLFLOW_TRACKING_URI=store))
    assert again.returncode == 0, again.stderr
    assert "finished already" in again.stderr
    there = client(store)
    (run,) = there.search_runs([there.get_experiment_by_name("gfrnn").experiment_id])
    assert run.info.status == "FINISHED"
    assert {p.step: p.value for p in there.get_metric_history(run.info.run_id, "train_bpc")} == losses(output_dir)
    assert run.data.metrics["test_bpc"] == summary(output_dir)["test_bpc"]
