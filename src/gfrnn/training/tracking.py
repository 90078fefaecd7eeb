"""The run folder is the truth; MLflow holds a copy of it, made by a process of its own that follows the folder.

    trainer --appends--> RUN_DIR/metrics.jsonl --tailed by--> `python -m gfrnn.training.tracking --follow` --> MLflow
            --holds its stdin open; end of file means that the trainer is over, however it ended

So nothing in training ever waits for MLflow. A server that is down costs one warning; what it missed is sent later,
into the same MLflow run: by that process, by the next start of the training, or by
`python -m gfrnn.training.tracking RUN_DIR`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import select
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from gfrnn.config import EXIT_USER, UserError
from gfrnn.runs import RunFolder
from gfrnn.training.mlflow_sender import Sender, Sent, tracking_uri, without_password

POLL = 1.0  # seconds between looks at the folder
LONGEST_BACK_OFF = 30.0  # seconds between attempts at a server that is down
DRAIN = 15.0  # seconds to go on trying after the end; the trainer waits longer, so only one of the two says the rest


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


def add_to_run(run_dir: Path, figures: dict[str, float], files: Sequence[Path], *, step: int) -> None:
    """Adds metrics of a step and files to the MLflow run that follows a folder; says so where that fails."""
    quieten()
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    run_id, now = Sent.load(run_dir).run_id, round(time.time() * 1000)
    try:
        client = MlflowClient(tracking_uri(run_dir))
        client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in figures.items()])
        for file in files:
            client.log_artifact(run_id, str(file))
    except Exception as error:  # every kind of store raises errors of its own
        _say(f"at {without_password(tracking_uri(run_dir))} fails ({reason(error)}); the figures are not there")


def ui_command(run_dir: Path) -> str:
    """What to type, or open, to look at a run in MLflow."""
    uri = tracking_uri(run_dir)
    if uri.startswith("http"):
        return f"open {without_password(uri)}"
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


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
    lock = FileLock(run_dir / "mlflow.lock", fallback_to_soft=False)  # freed by the system when its holder dies
    while not lock.is_locked:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not trainer.patience:
                _say(f"is being sent {run_dir} by another process: wait for it, then {_send_command(run_dir)}")
                return 1
            trainer.wait(0.5)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            if not follow:  # else the trainer has said it
                _say(f"may be sent {run_dir} by others too: it is on a file system without locks")
            break
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
                failing = f"at {sender.sent.tracking_uri} fails ({reason(error)})"
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
                    if not follow:
                        print(_arrived(sender))
                    return 0
                failures = 0
        trainer.wait(POLL)


def _arrived(sender: Sender) -> str:
    if not sender.values and not sender.files:
        return f"MLflow at {sender.sent.tracking_uri} has all of {sender.run_dir}"
    what = f"{sender.values:,} values of metrics and {sender.files} artifacts of {sender.run_dir}"
    return f"MLflow at {sender.sent.tracking_uri} was sent {what}: it has all of it now"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m gfrnn.training.tracking RUN_DIR`: sends what MLflow lacks of a run that is over."""
    parser = argparse.ArgumentParser(prog="python -m gfrnn.training.tracking", description=main.__doc__)
    parser.add_argument("run_dir", type=Path, help="run folder (train.py --output-dir)")
    parser.add_argument("--experiment", help="MLflow experiment (default: the run's own)")
    parser.add_argument("--drain", type=float, default=DRAIN, help="seconds to go on trying while MLflow fails")
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
    quieten()
    return send(arguments.run_dir, experiment, follow=arguments.follow, drain=arguments.drain)


def _experiment(run_dir: Path) -> str:
    return Sent.load(run_dir).experiment or RunFolder(run_dir).read_settings().run.experiment


def quieten() -> None:
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


def reason(error: BaseException) -> str:
    """The innermost cause, in a line: the outer ones only say that a request failed."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    sys.exit(main())
