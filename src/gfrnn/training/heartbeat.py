"""What a rank and whoever started it say to each other, through the folder that the environment's GFRNN_CONTROL names.

    stop             made by whoever wants the training to end with a checkpoint; rank 0 looks for it once a second
    rank-00003.json  rank 3: its node, where it is, and how it ended
    rank-00003.crash its stack, where a signal ended it that is a fault: SIGSEGV, or SIGABRT from NCCL's watchdog
    preflight.json   what preflight.py found

The file is written again every few seconds by a thread, so it stands still when the process or its node does; what it
says of the main thread stands still when that hangs. slurm/supervise.py reads them; nobody's clock is compared with
another's. Without GFRNN_CONTROL nothing is written.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gfrnn import cli
from gfrnn.config import RunFailed, Stopped, UserError
from gfrnn.runs import TakenOver

PHASES = (
    "starting",
    "meeting",
    "loading",
    "fetch",
    "forward",
    "backward",
    "optimizer",
    "agree",
    "validation",
    "checkpoint",
    "test",
)
"""Where a rank may be; those of an update in its order."""

_SIZE = 4096  # bytes of the file, which is written over: also on a disk that has filled up

PREFLIGHT = "preflight.json"


def folder() -> Path | None:
    """GFRNN_CONTROL, if it is set."""
    named = os.environ.get("GFRNN_CONTROL")
    return Path(named) if named else None


def stop_wanted() -> str | None:
    """What the file `stop` says, if it is there."""
    control = folder()
    try:
        return None if control is None else (control / "stop").read_text().strip() or "stop file"
    except OSError:
        return None


def measured_network() -> dict[str, float]:
    """The all-reduce between this start's nodes as preflight measured it, named as metrics; nothing if none did."""
    control = folder()
    try:
        found = {} if control is None else json.loads((control / PREFLIGHT).read_text())["network"]
    except (OSError, ValueError, KeyError):
        found = {}
    return {f"network_{name}": value for name, value in found.items()}


class Heartbeat:
    """Where this rank is, for who may have to say why it hangs: set `step`; enter `phase(...)`."""

    def __init__(self) -> None:
        self.step = 0
        self._phase = PHASES[0]
        self._ended: dict[str, Any] | None = None
        self._beats = 0
        self._writing = threading.Lock()
        self._look: Callable[[], None] = lambda: None
        control = folder()
        self._file = control / f"rank-{cli.rank():05d}.json" if control is not None else None
        if self._file is not None:
            self._seconds = float(os.environ.get("GFRNN_BEAT_SECONDS", "5"))
            self._watch_crashes()
            self.beat()
            threading.Thread(target=self._go_on, daemon=True).start()

    def at(self, phase: str) -> None:
        self._phase = phase

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of an update, named in profiler traces too."""
        from torch.profiler import record_function

        self._phase = name
        with record_function(name):
            yield

    def each_beat(self, look: Callable[[], None]) -> None:
        """Has `look` called with every beat, in the thread: it may end the process."""
        self._look = look

    def beat(self) -> None:
        """Writes the file. A disk that fails does not end a training here."""
        if self._file is None:
            return
        with self._writing, contextlib.suppress(OSError):
            self._beats += 1
            record = {
                "rank": cli.rank(),
                "node": node_name(),
                "pid": os.getpid(),
                "beats": self._beats,
                "step": self.step,
                "phase": self._phase,
                "ended": self._ended,
            }
            # opened and closed each time: on a network's file system others see it when it is closed
            with self._file.open("r+b" if self._file.exists() else "w+b", buffering=0) as f:
                f.write(json.dumps(record).encode().ljust(_SIZE))

    def _watch_crashes(self) -> None:
        """A killed process leaves an empty file, one that crashed or was aborted says so."""
        assert self._file is not None
        with contextlib.suppress(OSError):
            self._crash = self._file.with_suffix(".crash").open("w")  # open until the end: no fault can open files
            faulthandler.enable(self._crash)

    def end(self, error: BaseException | None) -> None:
        """Says how the process ends: by this error, or well."""
        if self._ended is None:
            reason = " ".join(str(error).split()) if error is not None else ""
            self._ended = {"kind": _kind(error), "reason": reason[:1000]}
            self.beat()

    def _go_on(self) -> None:
        while self._ended is None:
            threading.Event().wait(self._seconds)
            self.beat()
            self._look()


def _kind(error: BaseException | None) -> str:
    """finished, stopped, taken over, user, failed; lost: another process is; error: what is none of these."""
    if isinstance(error, RuntimeError) and cli.is_lost_peer(error):
        return "lost"
    if isinstance(error, OSError):
        return "user" if cli.is_users(error) else "error"
    if isinstance(error, MemoryError | RuntimeError) and cli.is_out_of_memory(error):
        return "user"
    kinds = {TakenOver: "taken over", Stopped: "stopped", UserError: "user", RunFailed: "failed"}
    return "finished" if error is None else next((kind for of, kind in kinds.items() if isinstance(error, of)), "error")


def node_name() -> str:
    """This machine, as SLURM calls it if that started the process."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename
