"""Processes of this machine that measure one point, from their start to how they ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from gfrnn.config import EXIT_STOPPED, Stopped
from gfrnn.scaling.folder import StudyFolder
from gfrnn.training.network import free_port

Launcher = Literal["plain", "deepspeed"]
LIFELINE = "GFRNN_LIFELINE"
"""In the environment of a process that is to end when its standard input does: when who started it is gone."""
_LAST_WORDS = 8.0  # seconds for the rest, once one has failed: all but the first wait 5 before they speak (cli.end)


class Place(NamedTuple):
    """Where a process is started."""

    prefix: tuple[str, ...]
    """What stands before its command: ip netns exec NAME, ssh HOST."""
    address: str
    """By which the others reach it."""
    local_rank: int


def measured_here(study: StudyFolder, number: int, launcher: Launcher, places: Sequence[Place] = ()) -> str:
    """Starts the processes of a point and waits for them: "" or why there is no result.

    places: of each process, with launcher plain; without any, all are here.

    Raises Stopped if they were told to stop, which says nothing of the point.
    """
    point = study.point(number)
    folder = study.of(point)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank-*.txt"):
        old.unlink()
    begin = time.monotonic()
    processes = _start(study, number, launcher, places)
    try:
        statuses: list[int | None] = [None] * len(processes)
        deadline = begin + 60 * study.how.limit
        while None in statuses and time.monotonic() < deadline:
            time.sleep(0.05)
            statuses = [process.poll() for process in processes]
            if any(statuses):  # one has ended badly; the others find that out, and may say more
                deadline = min(deadline, time.monotonic() + _LAST_WORDS)
        ended = [process.poll() for process in processes]
    finally:
        _end(processes)
    if EXIT_STOPPED in ended:
        raise Stopped("the processes of a point were told to; the same command goes on")
    if all(status == 0 for status in ended):
        return "" if study.result(point) is not None else "its processes ended without a result"
    if not any(ended):
        return f"took more than {study.how.limit:g} minutes"
    return reason(ended, [file.read_text(errors="replace") for file in sorted(folder.glob("rank-*.txt"), key=_rank)])


def reason(ended: list[int | None], said: list[str]) -> str:
    """Why a group failed, in one line, from its statuses (None: ended by us) and what each process said.

    What a process says of itself comes before what the others say of its loss.
    """
    spoken = [line for text in said for line in text.splitlines() if re.match(r"(rank \d+: )?(error|failed): ", line)]
    own = [line for line in spoken if "another process " not in line]
    for rank, status in enumerate(ended):
        if status == -signal.SIGKILL and not own:
            return f"rank {rank} was killed: out of memory?"
        if status is not None and status < 0 and not own:
            return f"rank {rank} was ended by {signal.Signals(-status).name}"
    lines = own or [line for text in said for line in text.splitlines() if line.strip() and line not in spoken][-1:]
    if lines:
        return re.sub(r"^(rank \d+: )?(error|failed): ", "", lines[0])
    rank, status = next(((rank, status) for rank, status in enumerate(ended) if status), (0, 0))
    return spoken[0] if spoken else f"rank {rank} ended with status {status}"


def _rank(file: Path) -> int:
    return int(file.stem.removeprefix("rank-"))


def _start(
    study: StudyFolder, number: int, launcher: Launcher, places: Sequence[Place]
) -> list[subprocess.Popen[bytes]]:
    point, port = study.point(number), str(free_port())
    source = str(Path(__file__).parents[2])  # src/study.py also runs where gfrnn is not installed
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(study.how.threads),
        LIFELINE: "1",
    }
    program = ["gfrnn.scaling.main", "measure", str(study.path), str(number)]
    if launcher == "deepspeed":
        count, head = ["--num_gpus", str(point.world_size)], [sys.executable, "-m", "deepspeed.launcher.runner"]
        quiet = ["--log_level", "critical", "--master_port", port, "--module"]
        return [_popen([*head, *count, *quiet, *program], environment, study.of(point) / "rank-0.txt")]
    places = places or [Place((), "127.0.0.1", rank) for rank in range(point.world_size)]
    group = {"WORLD_SIZE": str(point.world_size), "MASTER_ADDR": places[0].address, "MASTER_PORT": port}
    return [
        _popen(
            [*place.prefix, sys.executable, "-m", *program],
            environment | group | {"RANK": str(rank), "LOCAL_RANK": str(place.local_rank)},
            study.of(point) / f"rank-{rank}.txt",
        )
        for rank, place in enumerate(places[: point.world_size])
    ]


def _popen(command: list[str], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """All of them, and what they started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
