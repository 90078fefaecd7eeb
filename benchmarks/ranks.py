"""Processes of a group that a benchmark has started. For benchmarks to import: no program of its own."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from typing import Any


def printed_by_first(processes: Sequence[subprocess.Popen[str]]) -> Any:
    """The JSON that the first prints last, once all have ended. Ends the program if one fails; ends them all anyway."""
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                raise SystemExit("a process failed")  # the others would wait for it
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].stdout is not None
    return json.loads(processes[0].stdout.read().splitlines()[-1])
