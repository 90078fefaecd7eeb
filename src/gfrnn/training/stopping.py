"""The stop flag: Ctrl-C, SIGTERM, SIGUSR1, SIGHUP (a terminal that closes), a time limit, a stop file (heartbeat.py)
and a dead launcher raise it; the loop looks.

A signal reaches some processes and not others, and at different moments; so a raised flag is only a wish until the
processes have agreed on it, and on why, which they do in the small all-reduce that each update makes anyway. Outside
the loop, while torch is loaded or others are waited for, there is nothing to save, and a signal ends the process at
once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil

from gfrnn import cli
from gfrnn.config import EXIT_STOPPED
from gfrnn.training import heartbeat

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_TIME_LIMIT, _NO_LAUNCHER, _STOP_FILE = "time limit", "launcher", "stop file"
CAUSES = (*(number.name for number in _SIGNALS), _NO_LAUNCHER, _TIME_LIMIT, _STOP_FILE)
"""Why a process may want to stop; of several, the first is what is said."""
_LAUNCHER = "deepspeed.launcher.launch"
_SECONDS_BETWEEN_LOOKS = 1.0


def _is_launcher(pid: int) -> bool:
    try:
        return any("deepspeed" in part for part in psutil.Process(pid).cmdline())
    except psutil.Error:  # another user's, on a machine that hides those
        return False


def _launchers() -> tuple[int, ...]:
    """Pids of the DeepSpeed launcher's two processes above this one; () without it.

    The outer one (`deepspeed`, which a user would kill) passes no signal on: its ranks live on, with a new grandparent.
    """
    try:
        parent = psutil.Process(os.getppid())
        return (parent.pid, parent.ppid()) if _LAUNCHER in parent.cmdline() else ()
    except psutil.Error:  # gone between two looks
        return ()


_AT_START = _launchers()  # import this module early: a launcher may be killed while torch is being loaded


class StopFlag:
    """Why this process wants to stop, if it does.

    Args:
        time_limit: minutes from now; 0 for none.
    """

    def __init__(self, time_limit: float = 0.0):
        self.time_limit = time_limit
        self._begin = self._last_look = time.monotonic()
        self._cause: str | None = None
        self._launchers = _AT_START
        if len(_AT_START) > 1 and _AT_START[1] == 1 and not _is_launcher(1):
            self._cause = _NO_LAUNCHER  # before this process began

    @property
    def wishes(self) -> list[bool]:
        """For each of CAUSES whether it asks this process to stop: one at most does."""
        now = time.monotonic()
        if self._cause is None and self.time_limit and now - self._begin > 60 * self.time_limit:
            self._cause = _TIME_LIMIT
        if self._cause is None and now - self._last_look > _SECONDS_BETWEEN_LOOKS:
            self._last_look = now
            if _launchers() != self._launchers:
                self._cause = _NO_LAUNCHER
            elif cli.rank() == 0 and heartbeat.stop_wanted() is not None:  # one look a second, not one a rank
                self._cause = _STOP_FILE
        return [cause == self._cause for cause in CAUSES]

    def agreed(self, wishes: Sequence[float]) -> str | None:
        """Why all stop, in words, from the sum of all processes' wishes; None if nobody asks for it."""
        cause = next((cause for cause, wish in zip(CAUSES, wishes, strict=True) if wish), None)
        if cause == _STOP_FILE:
            return heartbeat.stop_wanted() or _STOP_FILE
        in_words = {_TIME_LIMIT: f"time limit of {self.time_limit:g} minutes", _NO_LAUNCHER: "the launcher was killed"}
        return None if cause is None else in_words.get(cause, cause)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals raise the flag instead of ending the process; also the second and the third."""
        global _listening

        def on_signal(number: int, frame: object) -> None:
            self._cause = self._cause or signal.Signals(number).name

        before = _handle(on_signal)
        _listening = True
        try:
            yield
        finally:
            _listening = False
            for number, handler in before.items():
                signal.signal(number, handler)


_listening = False


def end_on_signals() -> None:
    """From now on a signal ends this process with one line and status 75, unless a StopFlag is listening.

    A thread sees to it, told by the interpreter's wake-up descriptor: a handler would have to wait until the main one
    comes back from torch, which may wait minutes for other processes.
    """

    def end() -> None:
        while number := os.read(read_end, 1)[0]:
            if number in _SIGNALS and not _listening:
                name = signal.Signals(number).name
                cli.end(f"stopped: {name} while no update was under way; the same command goes on", EXIT_STOPPED)

    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=end, daemon=True).start()
    _handle(lambda number, frame: None)


def _handle(handler: Callable[[int, object], None]) -> dict[signal.Signals, Any]:
    """Makes `handler` that of every signal that stops; returns the handlers before it. nohup's wish is respected."""
    wanted = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}
