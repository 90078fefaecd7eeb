"""Predictions from what was measured: how well they do, and what they say of machines that nobody measured.

    model = fit(measurements, sweep, ds_config_of)
    model.predict(point, ds_config_of(point))
    residuals(model, measurements, ds_config_of)
    held_out(measurements, sweep, ds_config_of, group=lambda measurement: measurement.point.world_size)
    for_cluster(load_cluster("dgx-h100"), [point], measured=model)
    scaled(model, point, ds_config_of, per_node=8, kind="strong")

`ds_config_of` gives a point's DeepSpeed config, resolved.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from gfrnn.config import UserError, preset
from gfrnn.scaling.clusters import Cluster
from gfrnn.scaling.compute import Compute
from gfrnn.scaling.datasheet import assumed_compute
from gfrnn.scaling.messages import Message
from gfrnn.scaling.model import THEORY, Model, Prediction
from gfrnn.scaling.model_fit import Configs, fit, usable
from gfrnn.scaling.records import Measurement, Point, Timed

__all__ = [
    "HeldOut",
    "Model",
    "Prediction",
    "Residual",
    "fit",
    "for_cluster",
    "held_out",
    "residuals",
    "scaled",
    "usable",
]

_DATASHEET = 0.4  # relative standard deviation of a data sheet's latencies and bytes/s
_DATASHEET_WAIT = 0.3  # of what is waited for, hidden or not, on a cluster that nobody measured
_DATASHEET_STRAGGLING = 0.01


class Residual(NamedTuple):
    """A measured step beside its prediction."""

    measurement: Measurement
    prediction: Prediction

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.prediction.step_seconds / self.measurement.step_seconds - 1

    @property
    def inside(self) -> bool:
        """Whether the interval holds what was measured."""
        return self.prediction.low <= self.measurement.step_seconds <= self.prediction.high


def residuals(model: Model, measurements: Sequence[Measurement], ds_config_of: Configs) -> list[Residual]:
    """Of each point that was measured, in their order."""
    return [
        Residual(each, model.predict(each.point, ds_config_of(each.point), sent=_sent(each)))
        for each in measurements
        if not each.failed
    ]


@dataclass(frozen=True)
class HeldOut:
    """Each group of points, predicted by a model that was fitted to the others."""

    groups: dict[Hashable, list[Residual]]
    skipped: dict[Hashable, str]
    """Groups that the others say nothing of, and why."""

    @property
    def errors(self) -> list[float]:
        """Relative, without sign."""
        return [abs(each.error) for group in self.groups.values() for each in group]

    @property
    def median(self) -> float:
        return statistics.median(self.errors)

    @property
    def worst(self) -> float:
        return max(self.errors)

    @property
    def inside(self) -> float:
        """Share of the points whose interval holds them: 0.9, if intervals are right."""
        found = [each.inside for group in self.groups.values() for each in group]
        return sum(found) / len(found)


def held_out(
    measurements: Sequence[Measurement],
    sweep: Sequence[Timed],
    ds_config_of: Configs,
    group: Callable[[Measurement], Hashable],
) -> HeldOut:
    """Fit without a group's points, predict them. The sweep stays: it is no training."""
    members: dict[Hashable, list[Measurement]] = defaultdict(list)
    for each in usable(measurements):
        members[group(each)].append(each)
    groups: dict[Hashable, list[Residual]] = {}
    skipped: dict[Hashable, str] = {}
    for name, out in members.items():
        rest = [each for other, some in members.items() if other != name for each in some]
        try:
            groups[name] = residuals(fit(rest, sweep, ds_config_of), out, ds_config_of)
        except UserError as error:
            skipped[name] = str(error)
    return HeldOut(groups, skipped)


def for_cluster(cluster: Cluster, points: Iterable[Point], measured: Model | None = None) -> Model:
    """A model of a described cluster, for the points' presets and dtypes.

    Links are the data sheet's, known within 40 %; what a GPU computes is `measured`'s, fitted on GPUs as this cluster's
    has, where that has the preset or one like it, and else assumed from the data sheet (datasheet.py). Nothing of
    communication is taken to be hidden, but the interval allows for it.
    """
    computes: dict[tuple[str, str], Compute] = {} if measured is None else dict(measured.computes)
    for point in points:
        if not any(dtype == point.dtype for _, dtype in (measured.computes if measured else ())):
            settings = preset(point.preset)
            computes[point.preset, point.dtype] = assumed_compute(cluster, settings, point.dtype)
    network = cluster.network
    network = dataclasses.replace(
        network, covariance=np.diag((_DATASHEET * network.constants) ** 2), spread=_DATASHEET, largest_world=1
    )
    return Model(
        computes,
        network,
        exposed_deviation=_DATASHEET_WAIT,
        straggling=measured.straggling if measured and measured.straggling else _DATASHEET_STRAGGLING,
        spread=measured.spread if measured else 0.0,
        spare=measured.spare if measured else math.inf,
        largest_world=cluster.gpus_per_node,
    )


def scaled(
    model: Model,
    point: Point,
    ds_config_of: Configs,
    *,
    per_node: int,
    kind: Literal["strong", "weak"],
    most: int = 4096,
) -> list[Prediction]:
    """1, 2, 4, ... up to `most` processes, nodes filled first; efficiency is against one process.

    Args:
        point: its rows are all processes' with strong scaling, which ends where processes would have none, and each
            process' with weak scaling. Its processes and nodes do not matter.
    """
    first = dataclasses.replace(point, world_size=1, nodes=1)
    found = []
    for world_size in _worlds(per_node, min(most, point.rows) if kind == "strong" else most):
        rows = point.rows * (world_size if kind == "weak" else 1)
        at = dataclasses.replace(point, world_size=world_size, nodes=max(1, world_size // per_node), rows=rows)
        found.append(model.predict(at, ds_config_of(at), compared=first))
    return found


def _worlds(per_node: int, most: int) -> list[int]:
    """Powers of two in a node, then a power of two of nodes."""
    found = [1]
    while found[-1] < most:
        now = found[-1]
        found.append(2 * now if now >= per_node else min(2 * now, per_node))
    return [world_size for world_size in found if world_size <= most]


def _sent(each: Measurement) -> list[Message] | None:
    """What was counted, where theory knows nothing."""
    if each.point.compression in THEORY:
        return None
    return [Message(kind, each.bytes[kind] / calls, calls) for kind, calls in each.calls.items() if calls]
