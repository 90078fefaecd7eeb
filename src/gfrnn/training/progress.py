"""What a person sees while a run trains, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Progress of one run of `total` updates; silent unless enabled (one process speaks)."""

    def __init__(self, total: int, done: int, *, enabled: bool):
        self.total, self.enabled = total, enabled
        self._begin, self._first = time.monotonic(), done
        self._last_line = -math.inf
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, learned: str, characters_per_second: float, mfu: float) -> None:
        """The state after `step` updates: what was learned, speed over all processes, model FLOP utilisation 0..1."""
        figures = f"{learned}  {characters_per_second:,.0f} characters/s  MFU {mfu:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=figures)
        elif self.enabled and (time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES or step == self.total):
            self._last_line = time.monotonic()
            self.say(f"update {step}/{self.total}  {figures}  {self._left(step)}")

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        elif self.enabled:
            print(line, file=sys.stderr, flush=True)

    def _left(self, step: int) -> str:
        seconds = (time.monotonic() - self._begin) / max(step - self._first, 1) * (self.total - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left"
