"""Parts of an update as they happen: a heartbeat with a stop-watch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from gfrnn.scaling.collectives import Watch
from gfrnn.training.heartbeat import Heartbeat

TIMED = ("forward", "backward", "optimizer")
"""Phases that are parts of an update by their names; the rest of an update is "other"."""


class Stopwatch(Heartbeat):
    """Seconds by phase of an update, without what the process waited for collectives in them.

    settle: waits until the device has done what it was told, so that a phase's work ends with it.
    """

    def __init__(self, watch: Watch, settle: Callable[[], None]) -> None:
        super().__init__()
        self.watch, self._settle = watch, settle
        self._spent = dict.fromkeys(TIMED, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin, blocked = time.perf_counter(), self.watch.blocked
        with super().phase(name):
            yield
            self._settle()
        if name in self._spent:
            self._spent[name] += time.perf_counter() - begin - (self.watch.blocked - blocked)

    def timed(self, update: Callable[[], None]) -> dict[str, float]:
        """Seconds by part (records.PARTS) of one update; they add up to all of it."""
        self._spent = dict.fromkeys(TIMED, 0.0)
        begin, blocked = time.perf_counter(), self.watch.blocked
        update()
        seconds = time.perf_counter() - begin
        parts = self._spent | {"communication": self.watch.blocked - blocked}
        return parts | {"other": seconds - sum(parts.values())}
