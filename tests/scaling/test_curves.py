"""Strong and weak scaling from measurements."""

from __future__ import annotations

from typing import Any

import pytest

from gfrnn.scaling.curves import curves
from gfrnn.scaling.records import Machine, Measurement, Point

MACHINE = Machine("cpu", 1)


def measured(world_size: int, rows: int, seconds: float, **other: Any) -> Measurement:
    point = Point(world_size=world_size, rows=rows, steps=10, **other)
    return Measurement(point, MACHINE, step_seconds=seconds, characters=rows * 10)


def test_strong_and_weak() -> None:
    found = [
        measured(2, 8, 0.6),
        measured(1, 8, 1.0),
        measured(2, 16, 1.25),
        Measurement(Point(world_size=4, rows=8, steps=10), MACHINE, failed="out of memory"),
        measured(4, 8, 0.5),
        measured(1, 8, 2.0, ds_config="z3"),
    ]
    (strong,) = curves(found, "strong")
    assert strong.points[0].measurement is found[1]
    assert strong.name == "8 rows, gf-lstm-5x700 z0 fp32 T 10 cpu"
    assert [point.world_size for point in strong.points] == [1, 2, 4]
    assert [point.efficiency for point in strong.points] == pytest.approx([1, 1 / 1.2, 0.5])
    assert [point.ideal for point in strong.points] == pytest.approx([80, 160, 320])
    (weak,) = curves(found, "weak")
    assert weak.name.startswith("8 rows a process")
    assert [point.efficiency for point in weak.points] == pytest.approx([1, 0.8])


def test_alone_all_configs_are_the_same() -> None:
    found = [measured(1, 8, 1.0), measured(2, 8, 0.6), measured(2, 8, 0.8, ds_config="z2"), measured(2, 4, 1.0)]
    z0, z2 = curves(found, "strong")
    assert [point.efficiency for point in z0.points] == pytest.approx([1, 1 / 1.2])
    assert [point.efficiency for point in z2.points] == pytest.approx([1, 1 / 1.6])
    assert " z2 " in z2.name


def test_one_node_and_several_are_told_apart() -> None:
    found = [measured(1, 8, 1.0), measured(2, 8, 0.6), measured(2, 8, 1.25, nodes=2)]
    one, several = curves(found, "strong")
    assert [point.efficiency for point in one.points] == pytest.approx([1, 1 / 1.2])
    assert [point.efficiency for point in several.points] == pytest.approx([1, 0.4])
    assert several.name.startswith("across nodes, 8 rows")


def test_machines_are_kept_apart() -> None:
    one = measured(1, 8, 1.0)
    other = Measurement(Point(world_size=2, rows=8, steps=10), Machine("cpu", 1, "1gbit"), step_seconds=1, characters=1)
    assert curves([one, other], "strong") == []
