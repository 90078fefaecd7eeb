"""A study's report: from what MLflow has of it to one HTML page, pictures, tables and plain conclusions.

Everything said in it is computed from the measurements; what they cannot say is left out, and said to be.
"""

from __future__ import annotations

import base64
import csv
import io
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfrnn.config import UserError
from gfrnn.scaling import figures
from gfrnn.scaling.clusters import Cluster
from gfrnn.scaling.curves import Curve, curves, setting
from gfrnn.scaling.grid import How, prepared
from gfrnn.scaling.prediction import (
    HeldOut,
    Model,
    Prediction,
    Residual,
    fit,
    for_cluster,
    held_out,
    residuals,
    scaled,
)
from gfrnn.scaling.records import Machine, Measurement, Point, Timed
from gfrnn.scaling.target import Outlook, Reference, knee, outlooks
from gfrnn.scaling.volume import sent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[list[str]]


@dataclass(frozen=True)
class Target:
    """What is to be reached, from a run that has reached it."""

    bpc: float
    reference: Reference
    critical: float
    """Critical batch size, characters."""


@dataclass
class Section:
    """A part of the page."""

    title: str
    text: list[str] = field(default_factory=list)
    figure: Figure | None = None
    header: list[str] = field(default_factory=list)
    rows: Rows = field(default_factory=list)

    @property
    def slug(self) -> str:
        return "-".join(self.title.lower().replace(",", "").split())


@dataclass
class Report:
    """What the page holds."""

    title: str
    about: str
    conclusions: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def ds_config_of(point: Point) -> dict[str, Any]:
    """A point's DeepSpeed config, resolved."""
    return prepared(point, How(), Path("study"))[1]


def make(
    measurements: Sequence[Measurement],
    sweep: Sequence[tuple[Machine, Timed]],
    *,
    clusters: Sequence[Cluster] = (),
    target: Target | None = None,
) -> Report:
    """The report of one preset's measurements, of one machine or several.

    Raises UserError if they are of several presets, or none has figures.
    """
    presets = sorted({each.point.preset for each in measurements})
    if len(presets) > 1:
        raise UserError(f"the experiment has measurements of {' and '.join(presets)}; choose one with --preset")
    ran = sorted((each for each in measurements if not each.failed), key=lambda each: _order(each.point))
    if not ran:
        reasons = "; ".join(sorted({each.failed for each in measurements}))
        raise UserError(f"every point of the study failed ({reasons}): there is nothing to report")
    report = Report(f"How {presets[0]} scales", _about(ran))
    models = {machine: _model(machine, ran, sweep) for machine in dict.fromkeys(each.machine for each in ran)}
    _scaling(report, ran)
    _parts(report, ran)
    _memory(report, ran)
    _volume(report, ran)
    _fits(report, ran, sweep, models)
    _outlook(report, ran, models, clusters, target)
    failed = [each for each in measurements if each.failed]
    if failed:
        rows = [[setting(each), _shape(each.point), each.failed] for each in failed]
        report.sections.append(Section("Points without figures", header=["setting", "shape", "why"], rows=rows))
    return report
