"""Starts the real programs as a user would: the DeepSpeed launcher, or one python process a rank."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

import warm

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

# A model and a text that an update takes milliseconds for.
_SMALL = """--preset demo --num-layers 2 --hidden-size 16 --rows 5 --steps 12 --eval-streams 64 --eval-warmup 20
--valid-bytes 2000 --sample-length 20 --log-every 1 --no-mlflow"""
SMALL = _SMALL.split()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    """What a test's programs see: no hub, one thread each, no launcher's leftovers."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MLFLOW_TRACKING_URI")}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **extra}


def as_from_a_terminal() -> None:
    """For preexec_fn: signals that whoever runs the tests ignores (nohup, a shell's background) act again."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def script(name: str, *flags: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """python src/NAME.py FLAGS, to its end."""
    command = [sys.executable, str(ROOT / "src" / f"{name}.py"), *map(str, flags)]
    options: dict[str, Any] = {
        "capture_output": True,
        "text": True,
        "errors": "replace",
        "timeout": 300,
        "env": environment(),
    }
    return subprocess.run(command, **{**options, **kwargs})


AT_ONCE = 6.0  # seconds; 3 are promised, the rest is for a busy machine


def script_at_once(name: str, *flags: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The same, and it must end at once: in one of three tries, as a busy machine can only add to what it takes."""
    for _ in range(3):
        begin = time.monotonic()
        done = script(name, *flags, **kwargs)
        if time.monotonic() - begin < AT_ONCE:
            return done
    raise AssertionError(f"{name} {flags} took more than {AT_ONCE:g} s three times: {done.stderr}")


def warm_script(
    name: str, *flags: str | Path, env: dict[str, str] | None = None, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """script, where it is not about how the program starts: without the seconds of its imports (warm.py)."""
    return warm_python(ROOT / "src" / f"{name}.py", *flags, env=env, **kwargs)


def warm_python(
    *command: str | Path, env: dict[str, str] | None = None, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Of another script or, after -m, of a module."""
    return warm.run([*map(str, command)], env=env or environment(), **kwargs)


def start_training(
    output_dir: Path, flags: Sequence[str] = SMALL, *, processes: int = 1, stage: str = "z0", launcher: bool = False
) -> subprocess.Popen[str]:
    """Starts training and returns at once; with the DeepSpeed launcher, or (one process) without."""
    config = ["--deepspeed", str(ROOT / "ds_configs" / f"{stage}.json")]
    tail = [str(ROOT / "src/train.py"), *config, "--output-dir", str(output_dir), *flags]
    if launcher:
        head = [str(BIN / "deepspeed"), "--num_gpus", str(processes), "--master_port", str(free_port())]
    else:
        assert processes == 1, "several processes need the launcher"
        head = [sys.executable]
    process = subprocess.Popen(
        [*head, *tail],
        env=environment(PATH=f"{BIN}:{os.environ['PATH']}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=as_from_a_terminal,
        cwd=output_dir.parent,
    )
    _started.append(process)
    return process


def start_ranks(
    command: Sequence[str | Path],
    processes: int,
    *,
    only: int | None = None,
    extra: Callable[[int], dict[str, str]] = lambda rank: {},
    where: Callable[[int], list[str]] = lambda rank: [],
) -> list[subprocess.Popen[str]]:
    """python COMMAND, one process a rank without a launcher: as SLURM starts them.

    only: the first so many. extra: more of the environment, by rank. where: what stands before its command.
    """
    ranks = [
        subprocess.Popen(
            [*where(rank), sys.executable, *map(str, command)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, env in enumerate(_ranks(processes, only, extra))
    ]
    _started.extend(ranks)
    return ranks


_started: list[subprocess.Popen[str]] = []


def end_all() -> None:
    """Kills what was started in the background, with all that it has started, where a test has failed to end it."""
    for process in _started:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.communicate()
    _started.clear()


def warm_ranks(
    command: Sequence[str | Path],
    processes: int,
    *,
    only: int | None = None,
    extra: Callable[[int], dict[str, str]] = lambda rank: {},
    cwd: Path | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """The same to their ends, where it is not about how they start."""
    return warm.run_together([*map(str, command)], _ranks(processes, only, extra), cwd=cwd)


def _ranks(processes: int, only: int | None, extra: Callable[[int], dict[str, str]]) -> list[dict[str, str]]:
    """The environment of each."""
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        environment(**{"RANK": str(rank), "LOCAL_RANK": str(rank), **group, **extra(rank)})
        for rank in range(only or processes)
    ]


def wait_until_listening(process: subprocess.Popen[str]) -> None:
    """Until it has opened a port: its process group's."""
    deadline = time.monotonic() + 120
    while not any(c.status == psutil.CONN_LISTEN for c in psutil.Process(process.pid).net_connections()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def train(
    output_dir: Path, flags: Sequence[str] = SMALL, *, processes: int = 1, stage: str = "z0", launcher: bool = False
) -> tuple[int, str, str]:
    """Trains to the end: (exit status, stdout, stderr), the first status that is not 0. Without the launcher: warm."""
    if launcher:
        process = start_training(output_dir, flags, processes=processes, stage=stage, launcher=True)
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err
    config = ["--deepspeed", ROOT / "ds_configs" / f"{stage}.json"]
    command = [ROOT / "src/train.py", *config, "--output-dir", output_dir, *flags]
    if processes == 1:
        done = warm_python(*command, cwd=output_dir.parent)
        return done.returncode, done.stdout, done.stderr
    ranks = warm_ranks(command, processes, cwd=output_dir.parent)
    status = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return status, ranks[0].stdout, ranks[0].stderr


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir: Path) -> dict[int, float]:
    """Training BPC by update."""
    return {line["step"]: line["train_bpc"] for line in metrics(output_dir) if "train_bpc" in line}


def validations(output_dir: Path) -> dict[int, float]:
    return {line["step"]: line["valid_bpc"] for line in metrics(output_dir) if "valid_bpc" in line}


def summary(output_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output_dir / "summary.json").read_text())
    return found


def measured_overlap(folder: Path, *flags: str) -> dict[str, dict[str, float]]:
    """The results of benchmarks/overlap.py, by mode."""
    script, where = ROOT / "benchmarks/overlap.py", folder / "overlap.json"
    sizes = ["--preset", "gf-lstm-3x191", "--rows", "8", "--steps", "10", "--repeats", "3"]
    command = [sys.executable, script, *sizes, "--port", str(free_port()), "--json", where, *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "apart" in done.stdout
    found: dict[str, dict[str, float]] = json.loads(where.read_text())["results"]
    return found
