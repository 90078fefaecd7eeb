"""Where a GPU's update goes: what of its collectives no other kernel hides, from a profiler's trace.

NCCL's collectives run on streams of their own, so a call or a `wait` returns before they are done; and while one waits
for a slower process its kernel runs. So the time that an update waits for others is that of collectives' kernels with
no other kernel beside them. Unverified on GPUs: only the arithmetic is tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Interval = tuple[float, float]
"""Begin and end."""


def united(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as disjoint intervals, in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Moments of the first that are none of the second; both united."""
    left: list[Interval] = []
    for begin, end in intervals:
        for other_begin, other_end in others:
            if other_end <= begin or other_begin >= end:
                continue
            if other_begin > begin:
                left.append((begin, other_begin))
            begin = other_end
        if begin < end:
            left.append((begin, end))
    return left


def shared(intervals: Sequence[Interval], others: Sequence[Interval]) -> float:
    """How long both last together; both united."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in intervals for b in others)


def exposed(events: Iterable[Any], phases: Sequence[str]) -> dict[str, float]:
    """Seconds that collectives alone ran, by phase of an update, "other" for what lies in none.

    Args:
        events: `torch.profiler.profile(...).events()`. phases: as Heartbeat.phase names them in the trace; each must
            have ended with a synchronization, so that what it started lies in it.
    """
    collectives: list[Interval] = []
    compute: list[Interval] = []
    windows: dict[str, list[Interval]] = {name: [] for name in phases}
    for event in events:
        interval = (event.time_range.start, event.time_range.end)  # microseconds
        if event.name in windows:
            if event.device_type.name == "CPU":
                windows[event.name].append(interval)
        elif event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False):
            (collectives if "nccl" in event.name.lower() else compute).append(interval)
    alone = without(united(collectives), united(compute))
    seconds = {name: shared(alone, united(within)) / 1e6 for name, within in windows.items()}
    total = sum(end - begin for begin, end in alone) / 1e6
    return seconds | {"other": max(0.0, total - sum(seconds.values()))}
