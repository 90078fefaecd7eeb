"""The stop flag: Ctrl-C, SIGTERM, SIGUSR1 (SLURM's warning) and a time limit raise it; the loop looks at it.

A signal reaches some processes and not others, and at different moments; so a raised flag is only a wish until the
processes have agreed on it, which they do in the small all-reduce that each update makes anyway.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StopFlag:
    """Why this process wants to stop, if it does.

    Args:
        time_limit: minutes from now; 0 for none.
    """

    def __init__(self, time_limit: float = 0.0):
        self.time_limit = time_limit
        self._begin = time.monotonic()
        self._reason = ""

    @property
    def reason(self) -> str:
        """Empty while nothing asks to stop."""
        if not self._reason and self.time_limit and time.monotonic() - self._begin > 60 * self.time_limit:
            self._reason = f"time limit of {self.time_limit:g} minutes"
        return self._reason

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals raise the flag instead of ending the process; also the second and the third."""

        def on_signal(number: int, frame: object) -> None:
            self._reason = self._reason or signal.Signals(number).name

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = [signal.signal(number, on_signal) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
