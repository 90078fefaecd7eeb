"""Sections of a report that say what models make of the measurements: how well, how far, and what a target takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gfrnn.config import UserError
from gfrnn.scaling import figures
from gfrnn.scaling.clusters import Cluster
from gfrnn.scaling.grid import How, prepared
from gfrnn.scaling.model_fit import Configs
from gfrnn.scaling.page import Report, Section
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
    usable,
)
from gfrnn.scaling.records import Machine, Measurement, Point, Timed
from gfrnn.scaling.target import Outlook, Target, knee, outlooks
from gfrnn.scaling.words import names, processes

Fitted = tuple[Model, list[Measurement], list[Timed]]
Models = dict[Machine, Fitted | None]

_GROUPS: dict[str, Callable[[Measurement], Hashable]] = {
    "each ZeRO config": lambda each: each.point.ds_config,
    "each number of rows": lambda each: each.point.rows,
    "each number of processes": lambda each: each.point.world_size,
}
"""What is held out, in turn, and predicted from the rest."""


class _Place(NamedTuple):
    """Where more processes than were measured are predicted."""

    name: str
    basis: str
    """What the prediction is made from."""
    model: Model
    point: Point
    """The fastest for a process, of those that the model speaks of."""
    per_node: int
    """Processes."""
    price: float | None = None
    """Dollars a GPU-hour."""
    assumed: bool = False
    """Whether nobody has measured such a GPU."""


def fits(report: Report, models: Models, configs: Configs) -> None:
    section = Section("The model and its residuals")
    section.header = ["point", "measured, ms", "predicted, ms", "90 %", "error", "inside"]
    found: list[Residual] = []
    for fitted in models.values():
        if fitted is not None:
            model, own, _ = fitted
            found += residuals(model, usable(own), configs)
    if not found:
        section.text.append(
            "No model: it takes points that were measured, and timed collectives beside several processes."
        )
        report.sections.append(section)
        return
    for each, name in zip(found, names([each.measurement for each in found]), strict=True):
        low, high = 1e3 * each.prediction.low, 1e3 * each.prediction.high
        section.rows.append(
            [
                name,
                f"{1e3 * each.measurement.step_seconds:.1f}",
                f"{1e3 * each.prediction.step_seconds:.1f}",
                f"{low:.1f} to {high:.1f}",
                f"{each.error:+.1%}",
                "yes" if each.inside else "no",
            ]
        )
    errors = [abs(each.error) for each in found]
    section.figure = figures.fit(found)
    if len(found) > 1:
        off = f"{statistics.median(errors):.1%} off in the median, {max(errors):.1%} at worst, on the points"
        section.text.append(
            f"Points that it was fitted to: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}; "
            f"{sum(each.inside for each in found)} of {len(found)} lie inside their interval."
        )
    else:
        off = f"{errors[0]:.1%} off on the one point"
        section.text.append(f"It was fitted to one point: error {errors[0]:.1%}.")
    unseen = ""
    for machine, fitted in models.items():
        if fitted is None:
            continue
        _, own, timed = fitted
        for name, group in _GROUPS.items():
            if len({group(each) for each in own}) > 1:
                section.text.append(_held_out(name, machine, held_out(own, timed, configs, group)))
                unseen = "; points it has not seen are in its section"
    report.sections.append(section)
    report.conclusions.append(f"The model of a step's time is {off} it was fitted to{unseen}.")


def _held_out(name: str, machine: Machine, found: HeldOut) -> str:
    where = f" ({machine.network})" if machine.network else ""
    if not found.groups:
        return f"Held out, {name}{where}: the others say nothing of it."
    return (
        f"Held out, {name} in turn{where}: median error {found.median:.1%}, worst {found.worst:.1%}; "
        f"{found.inside:.0%} of the intervals hold."
    )


def outlook(
    report: Report,
    ran: Sequence[Measurement],
    models: Models,
    configs: Configs,
    clusters: Sequence[Cluster],
    target: Target | None,
) -> None:
    measured = {machine: fitted for machine, fitted in models.items() if fitted is not None}
    places: list[_Place] = []
    for machine, (model, own, _) in measured.items():
        if model.network is not None:
            name = f"this network ({machine.network})" if machine.network else "machines such as these"
            several = [each.point for each in own if each.point.nodes > 1]
            per_node = max((point.world_size // point.nodes for point in several), default=8)
            points = usable(own)
            basis = f"{len(points)} point{'s' * (len(points) > 1)}"
            places.append(_Place(name, basis, model, _fastest(points), per_node))
    for cluster in clusters:
        gpu = next((model for machine, (model, _, _) in measured.items() if cluster.has(machine.device)), None)
        dtypes = {dtype for _, dtype in gpu.computes} if gpu is not None else {each.point.dtype for each in ran}
        point = _fastest([each for each in ran if each.point.dtype in dtypes])
        model = for_cluster(cluster, [point], gpu)
        basis = "data sheets' rates" if gpu is None else "such GPUs as measured and data sheets' rates of links"
        price = cluster.dollars_per_gpu_hour
        places.append(_Place(cluster.name, basis, model, point, cluster.gpus_per_node, price, assumed=gpu is None))
    for place in places:
        name, _, model, point, per_node, _, assumed = place
        each = max(1, point.rows // point.world_size)
        strong = scaled(model, replace(point, rows=max(point.rows, 64)), configs, per_node=per_node, kind="strong")
        weak = scaled(model, replace(point, rows=each), configs, per_node=per_node, kind="weak")
        section = Section(f"Predicted to 4096 processes, {name}")
        section.figure = figures.outlook(
            {f"strong, {strong[0].point.rows} rows": strong, f"weak, {each} rows a process": weak}
        )
        section.header = ["scaling", "processes", "characters/s", "efficiency", "90 %", "step, ms"]
        section.rows = [_row(kind, found) for kind, all_ in (("strong", strong), ("weak", weak)) for found in all_]
        if assumed:
            section.text.append(
                "No GPU of this kind was measured: what one computes is assumed from its data sheet, and so wide."
            )
        report.sections.append(section)
        for kind, found in (("strong", strong), ("weak", weak)):
            report.conclusions.append(_beyond(place, kind, found))
        if target is not None:
            worlds = [found.point.world_size for found in weak]
            _to_target(report, place, configs, worlds, target)


def _fastest(several: Sequence[Measurement]) -> Point:
    """With most characters a second for a process; uncompressed."""
    best = max(several, key=lambda each: each.characters_per_second / each.point.world_size)
    return replace(best.point, compression="none")


def _interval(found: Prediction) -> str:
    """Of the efficiency."""
    return f"{found.efficiency_low:.0%} to {found.efficiency_high:.0%}"


def _row(kind: str, found: Prediction) -> list[str]:
    interval = _interval(found)
    speed, step = f"{found.characters_per_second:,.0f}", f"{1e3 * found.step_seconds:.1f}"
    return [kind, str(found.point.world_size), speed, f"{found.efficiency:.0%}", interval, step]


def _beyond(place: _Place, kind: str, found: Sequence[Prediction]) -> str:
    good = [each for each in found if each.efficiency >= 0.5]
    last = good[-1]
    rows = f"{found[0].point.rows} rows{' a process' * (kind == 'weak')}"
    what = f"Predicted from {place.basis}: on {place.name}, {kind} scaling ({rows})"
    if last is found[-1]:
        upto = processes(last.point.world_size)
        return f"{what} keeps {last.efficiency:.0%} efficiency ({_sure(last)}) up to {upto}."
    after = found[found.index(last) + 1]
    largest = max(after.parts, key=lambda part: after.parts[part])
    there = f"{after.efficiency:.0%} at {after.point.world_size}; {_sure(after)}"
    return (
        f"{what}: beyond {processes(last.point.world_size)} efficiency falls below 50 % ({there}); "
        f"{_IN_WORDS.get(largest, largest)} takes most of an update there."
    )


def _sure(found: Prediction) -> str:
    """How sure an efficiency is, in words."""
    interval = _interval(found)
    return "no interval: too few points" if interval == "0% to 100%" else f"90 % interval: {interval}"


_IN_WORDS = {"other": "what each update costs, however small,"}


def ds_config_of(point: Point, written: dict[str, Any] | None = None) -> dict[str, Any]:
    """A point's DeepSpeed config, resolved: of what is written in its file, which is read if that is not given."""
    return prepared(point, How(), Path("study"), written)[1]


def configs_of(ran: Sequence[Measurement]) -> Configs:
    """The same, of what was written in the files when these were measured."""
    written = {each.point.ds_config: each.config for each in ran if each.config}
    return lambda point: ds_config_of(point, written.get(point.ds_config))


def model_of(
    machine: Machine, ran: Sequence[Measurement], sweep: Sequence[tuple[Machine, Timed]], configs: Configs
) -> Fitted | None:
    """Of one machine, with what it was fitted to; None if it has points of several processes and nothing was timed."""
    own = [each for each in ran if each.machine == machine]
    timed = [each for where, each in sweep if where == machine]
    if not timed and any(each.point.world_size > 1 for each in own):
        return None
    try:
        return fit(own, timed, configs), own, timed
    except UserError:  # nothing that a model can be fitted to
        return None


def _to_target(report: Report, place: _Place, configs: Configs, worlds: Sequence[int], target: Target) -> None:
    name, basis, model, point, per_node, price, _ = place

    def seconds(world_size: int, rows: int) -> float:
        nodes = max(1, world_size // per_node)
        at = replace(point, world_size=world_size, nodes=nodes, rows=rows)
        return model.predict(at, configs(at)).step_seconds

    rows = [2**power for power in range(3, 17)]
    found = outlooks(target.reference, target.critical, seconds, steps=point.steps, world_sizes=worlds, rows=rows)
    best = knee(found)
    section = Section(f"Time and cost to {target.bpc:g} BPC, {name}", figure=figures.target(found, best))
    section.text.append(
        f"A run reached it after {target.reference.updates:,.0f} updates of "
        f"{target.reference.characters_per_update:,} characters; critical batch size {target.critical:,.0f} characters."
    )
    section.header = ["GPUs", "rows", "updates", "hours", "GPU-hours", "efficiency"]
    section.rows = [_outlook_row(each) for each in found]
    if price is not None:
        section.header.append("dollars")
        for row, each in zip(section.rows, found, strict=True):
            row.append(f"{price * each.gpu_hours:,.0f}")
    report.sections.append(section)
    cost = "" if price is None else f", {price * best.gpu_hours:,.0f} dollars"
    report.conclusions.append(
        f"Predicted from {basis}: on {name}, {best.world_size} GPUs are worth using to reach {target.bpc:g} BPC: "
        f"{best.hours:.3g} hours, {best.gpu_hours:.3g} GPU-hours{cost}; a doubling beyond that saves less than a third."
    )


def _outlook_row(each: Outlook) -> list[str]:
    hours = [f"{each.hours:.3g}", f"{each.gpu_hours:.3g}"]
    return [str(each.world_size), str(each.rows), f"{each.updates:,.0f}", *hours, f"{each.efficiency:.0%}"]
