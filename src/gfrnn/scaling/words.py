"""Points and measurements in words, for a report."""

from __future__ import annotations

from collections.abc import Sequence

from gfrnn.scaling.records import Measurement, Point


def processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


def with_compression(point: Point) -> str:
    return "" if point.compression == "none" else f" with {point.compression}"


def shape(point: Point) -> str:
    on = f" on {point.nodes} nodes" if point.nodes > 1 else ""
    return f"{processes(point.world_size)}{on}, {point.rows} rows"


def said(each: Measurement) -> str:
    words = [each.point.ds_config, shape(each.point), each.point.dtype]
    words += [each.point.compression] * (each.point.compression != "none") + [each.machine.network] * bool(
        each.machine.network
    )
    return ", ".join(words)


def names(measurements: Sequence[Measurement]) -> list[str]:
    """Of bars: what is the same for all is left out."""
    several = len({each.machine for each in measurements}) > 1
    found = []
    for each in measurements:
        point = each.point
        words = [point.ds_config, f"W {point.world_size}", f"R {point.rows}", f"T {point.steps}", point.dtype]
        words += [point.compression] * (point.compression != "none")
        words += [each.machine.network or each.machine.device] * several
        found.append(words)
    same = [number for number in range(5) if len({words[number] for words in found}) == 1] if len(found) > 1 else []
    return [", ".join(word for number, word in enumerate(words) if number not in same) or words[0] for words in found]
