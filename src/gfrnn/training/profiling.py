"""Traces of a few updates for Perfetto (ui.perfetto.dev): what the processor and the device did, and when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_BEFORE = 3  # updates of this start that are not like the later ones: allocations, first collectives


class UpdateProfiler:
    """Traces `updates` consecutive updates of this process into `path`, from the fourth of this start on.

    Args:
        updates: how many; 0 for none, which costs nothing.
        path: a .json.gz in Chrome's trace format.
        say: is told when it is written.
    """

    def __init__(self, updates: int, path: Path, say: Callable[[str], None]):
        def write(finished: profile) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(path))
            say(f"{updates} updates traced into {path}; open it in ui.perfetto.dev")

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None
        if updates:
            plan = schedule(wait=_BEFORE - 1, warmup=1, active=updates, repeat=1)
            self._profile = profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True)
            self._profile.start()

    def step(self) -> None:
        """After each update."""
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """At the end of the run; a trace that is not complete yet is written as far as it is."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
