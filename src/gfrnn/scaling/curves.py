"""What measurements say of scaling, as curves: strong (the same rows on more processes) and weak (as many for each)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from gfrnn.scaling.records import Measurement, Point

Scaling = Literal["strong", "weak"]

_ROWS: dict[Scaling, Callable[[Point], str]] = {
    "strong": lambda point: f"{point.rows} rows",
    "weak": lambda point: f"{point.rows / point.world_size:g} rows a process",
}


class On(NamedTuple):
    """A curve's value at a number of processes."""

    measurement: Measurement
    ideal: float
    """Characters a second, had nothing been lost since the curve's first point."""

    @property
    def world_size(self) -> int:
        return self.measurement.point.world_size

    @property
    def efficiency(self) -> float:
        return self.measurement.characters_per_second / self.ideal


class Curve(NamedTuple):
    """Points that differ in the number of processes (and nodes) alone."""

    name: str
    points: tuple[On, ...]


def curves(measurements: Sequence[Measurement], scaling: Scaling) -> list[Curve]:
    """Of two points and more; those that failed are left out.

    Processes of one node and processes of several make curves of their own, both from one process on: of another config
    where this has none, as alone all do the same.
    """
    groups: dict[str, list[Measurement]] = defaultdict(list)
    alone: dict[str, Measurement] = {}
    ran = [measurement for measurement in measurements if not measurement.failed]
    several = any(measurement.point.nodes > 1 for measurement in ran)
    for measurement in ran:
        point = measurement.point
        name = f"{_ROWS[scaling](point)}, {setting(measurement)}"
        if point.world_size == 1:
            alone.setdefault(_but_config(name, point), measurement)
        if point.nodes == 1:
            groups[name].append(measurement)
        if several and (point.nodes > 1 or point.world_size == 1):
            groups[f"across nodes, {name}"].append(measurement)
    found = []
    for name, group in groups.items():
        base = alone.get(_but_config(name.removeprefix("across nodes, "), group[0].point))
        if base is not None and all(measurement.point.world_size > 1 for measurement in group):
            group.append(base)
        group.sort(key=lambda measurement: (measurement.point.world_size, measurement.point.nodes))
        first = group[0]
        each = first.characters_per_second / first.point.world_size
        points = tuple(On(measurement, each * measurement.point.world_size) for measurement in group)
        if len({point.world_size for point in points}) > 1:
            found.append(Curve(name, points))
    return found


def _but_config(name: str, point: Point) -> str:
    """A curve's name without what does not matter to one process."""
    return name.replace(f" {point.ds_config} ", " ").replace(f" {point.compression} ", " ")


def setting(measurement: Measurement) -> str:
    """All of a measurement but rows and processes, in words."""
    point, machine = measurement.point, measurement.machine
    words = [point.preset, point.ds_config, point.dtype, f"T {point.steps}"]
    words += [point.compression] * (point.compression != "none") + [machine.network] * bool(machine.network)
    return " ".join([*words, machine.device])
