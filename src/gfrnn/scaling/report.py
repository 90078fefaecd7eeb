"""A study's report: from what MLflow has of it to one page of pictures, tables and plain conclusions.

Everything said in it is computed from the measurements; what they cannot say is left out, and said to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gfrnn.config import UserError
from gfrnn.scaling import report_measured, report_predicted
from gfrnn.scaling.clusters import Cluster
from gfrnn.scaling.curves import setting
from gfrnn.scaling.page import Report, Section
from gfrnn.scaling.records import Machine, Measurement, Point, Timed
from gfrnn.scaling.target import Target
from gfrnn.scaling.words import shape


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
    configs = report_predicted.configs_of(ran)
    models = {
        machine: report_predicted.model_of(machine, ran, sweep, configs)
        for machine in dict.fromkeys(each.machine for each in ran)
    }
    report_measured.scaling(report, ran)
    report_measured.parts(report, ran)
    report_measured.memory(report, ran)
    report_measured.volume(report, ran)
    report_measured.learning(report, ran)
    report_predicted.fits(report, models, configs)
    report_predicted.outlook(report, ran, models, configs, clusters, target)
    done = {(each.point, each.machine.network) for each in ran}
    failed = [each for each in measurements if each.failed and (each.point, each.machine.network) not in done]
    if failed:
        rows = [[setting(each), shape(each.point), each.failed] for each in failed]
        report.sections.append(Section("Points without figures", header=["setting", "shape", "why"], rows=rows))
    return report


def _order(point: Point) -> tuple[Any, ...]:
    return point.nodes, point.world_size, point.ds_config, point.compression, point.dtype, point.steps, point.rows


def _about(ran: Sequence[Measurement]) -> str:
    words = []
    for machine in dict.fromkeys(each.machine for each in ran):
        count = sum(each.machine == machine for each in ran)
        name = f"{machine.network}: " if machine.network else ""
        threads = (
            f", {machine.threads} thread{'s' * (machine.threads > 1)} a process" if machine.device == "cpu" else ""
        )
        libraries = f"torch {machine.torch}, DeepSpeed {machine.deepspeed}"
        words.append(f"{count} points on {name}{machine.device}{threads} ({libraries})")
    parameters = next((each.parameters for each in ran if each.parameters), 0)
    return f"{parameters:,} parameters. " + "; ".join(words) + "."
