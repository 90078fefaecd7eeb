"""A study's report: from what MLflow has of it to one HTML page, pictures, tables and plain conclusions.

Everything said in it is computed from the measurements; what they cannot say is left out, and said to be.
"""

from __future__ import annotations

import base64
import csv
import io
import re
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfrnn.config import UserError
from gfrnn.scaling import figures
from gfrnn.scaling.clusters import Cluster
from gfrnn.scaling.curves import Curve, On, curves, setting
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
    usable,
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
        return re.sub("[^a-z0-9.]+", "-", self.title.lower().replace("'s", "")).strip("-")


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
    _learning(report, ran)
    _fits(report, ran, sweep, models)
    _outlook(report, ran, models, clusters, target)
    done = {(each.point, each.machine.network) for each in ran}
    failed = [each for each in measurements if each.failed and (each.point, each.machine.network) not in done]
    if failed:
        rows = [[setting(each), _shape(each.point), each.failed] for each in failed]
        report.sections.append(Section("Points without figures", header=["setting", "shape", "why"], rows=rows))
    return report


def _order(point: Point) -> tuple[Any, ...]:
    return point.nodes, point.world_size, point.ds_config, point.compression, point.dtype, point.steps, point.rows


def _shape(point: Point) -> str:
    on = f" on {point.nodes} nodes" if point.nodes > 1 else ""
    return f"{_processes(point.world_size)}{on}, {point.rows} rows"


def _names(measurements: Sequence[Measurement]) -> list[str]:
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


def _model(
    machine: Machine, ran: Sequence[Measurement], sweep: Sequence[tuple[Machine, Timed]]
) -> tuple[Model, list[Measurement], list[Timed]] | None:
    """Of one machine, with what it was fitted to; None if it has points of several processes and nothing was timed."""
    own = [each for each in ran if each.machine == machine]
    timed = [each for where, each in sweep if where == machine]
    if not timed and any(each.point.world_size > 1 for each in own):
        return None
    try:
        return fit(own, timed, ds_config_of), own, timed
    except UserError:  # nothing that a model can be fitted to
        return None


# --------------------------------------------------------------------------------------------------------- measured


def _scaling(report: Report, ran: Sequence[Measurement]) -> None:
    for kind, title in (("strong", "Strong scaling"), ("weak", "Weak scaling")):
        found = curves(ran, "strong" if kind == "strong" else "weak")
        section = Section(title, header=["curve", "processes", "characters/s", "of ideal", "spread of an update"])
        if not found:
            section.text.append("Not measured: it takes points that differ in the number of processes alone.")
            report.sections.append(section)
            continue
        section.figure = figures.scaling(found, _common(found))
        if len(found) > figures.MOST_LABELS:
            section.text.append(f"Of {len(found)} curves the first {figures.MOST_LABELS} are named; the table has all.")
        for curve in found:
            for on in curve.points:
                each = on.measurement
                spread = (each.step_seconds_high - each.step_seconds_low) / each.step_seconds
                speed, shape = f"{each.characters_per_second:,.0f}", str(on.world_size)
                section.rows.append([curve.name, shape, speed, f"{on.efficiency:.0%}", f"{spread:.1%}"])
        for machine in dict.fromkeys(curve.points[-1].measurement.machine for curve in found):
            ends = [curve.points[-1] for curve in found if curve.points[-1].measurement.machine == machine]
            report.conclusions.append(_reached(title, kind, machine, ends))
        report.sections.append(section)


def _reached(title: str, kind: str, machine: Machine, ends: Sequence[On]) -> str:
    most = max(on.world_size for on in ends)
    ends = sorted((on for on in ends if on.world_size == most), key=lambda on: on.efficiency)
    where = f" on {machine.network}" if machine.network else ""
    same = "the rows fixed" if kind == "strong" else "the rows of each fixed"
    low, high = ends[0], ends[-1]
    return (
        f"{title}{where}, {same}: {most} processes reach {low.efficiency:.0%} ({_point(low)}) to {high.efficiency:.0%} "
        f"({_point(high)}) of {most} times one."
    )


def _point(on: On) -> str:
    point = on.measurement.point
    return f"{point.ds_config}{_with(point)}, {point.rows} rows"


def _common(found: Sequence[Curve]) -> str:
    """What all curves' names end with, from a comma or blank on."""
    names = [curve.name.split(" ") for curve in found]
    same: list[str] = []
    for words in zip(*(reversed(name) for name in names), strict=False):
        if len(set(words)) > 1:
            break
        same.insert(0, words[0])
    return " " + " ".join(same) if len(found) > 1 and same else ""


def _parts(report: Report, ran: Sequence[Measurement]) -> None:
    names = _names(ran)
    section = Section("Where an update's time goes", figure=figures.breakdown(ran, names))
    section.text.append(
        "Means over the processes. Communication is what they waited for, stragglers included, not what others hid."
    )
    section.header = ["point", "ms", *ran[0].parts, "fastest to slowest process", "MFU"]
    for each, name in zip(ran, names, strict=True):
        busy = each.busy_seconds
        apart = f"{max(busy) / min(busy) - 1:.1%}" if len(busy) > 1 else ""
        mfu = f"{each.mfu:.0%}" if each.peak_flops else ""
        parts = [f"{1e3 * seconds:.1f}" for seconds in each.parts.values()]
        section.rows.append([name, f"{1e3 * each.step_seconds:.1f}", *parts, apart, mfu])
    report.sections.append(section)
    several = [each for each in ran if each.point.world_size > 1]
    if several:
        least, most = (choose(several, key=lambda each: each.communication_share) for choose in (min, max))
        report.sections.append(Section("Communication's share", figure=figures.communication(several, _names(several))))
        report.conclusions.append(
            f"Communication takes {least.communication_share:.0%} of an update at least ({_said(least)}) and "
            f"{most.communication_share:.0%} at most ({_said(most)})."
        )
    alone = max((each for each in ran if each.peak_flops), key=lambda each: each.mfu, default=None)
    if alone is not None:
        report.conclusions.append(f"The products' peak is used to {alone.mfu:.0%} at best ({_said(alone)}).")


def _said(each: Measurement) -> str:
    words = [each.point.ds_config, _shape(each.point), each.point.dtype]
    words += [each.point.compression] * (each.point.compression != "none") + [each.machine.network] * bool(
        each.machine.network
    )
    return ", ".join(words)


def _memory(report: Report, ran: Sequence[Measurement]) -> None:
    known = [each for each in ran if each.memory_bytes and each.predicted_memory_bytes]
    if not known:
        return
    names = _names(known)
    section = Section("Memory of a process", figure=figures.memory(known, names))
    section.header = ["point", "measured, MB", "predicted, MB", "predicted / measured"]
    ratios = []
    for each, name in zip(known, names, strict=True):
        ratios.append(each.predicted_memory_bytes / each.memory_bytes)
        figures_ = [f"{each.memory_bytes / 1e6:,.0f}", f"{each.predicted_memory_bytes / 1e6:,.0f}", f"{ratios[-1]:.2f}"]
        section.rows.append([name, *figures_])
    report.sections.append(section)
    report.conclusions.append(
        f"Memory is predicted at {statistics.median(ratios):.2f} of what is measured, in the median "
        f"({min(ratios):.2f} to {max(ratios):.2f})."
    )


def _volume(report: Report, ran: Sequence[Measurement]) -> None:
    several = [each for each in ran if each.point.world_size > 1 and each.bytes]
    if not several:
        return
    section = Section("What an update sends")
    section.header = [
        "point",
        "collectives",
        "calls",
        "counted, MB",
        "theory, MB",
        "theory off by",
        "a process sends, MB",
    ]
    worst, least = 0.0, several[0]
    for each, name in zip(several, _names(several), strict=True):
        counted, theory = sum(each.bytes.values()), sum(each.predicted_bytes.values())
        off = theory / counted - 1
        worst = max(worst, abs(off))
        own = sent(each.bytes, each.point.world_size)
        if own < sent(least.bytes, least.point.world_size):
            least = each
        kinds = ", ".join(f"{kind} {size / 1e6:,.1f}" for kind, size in each.bytes.items())
        calls = str(sum(each.calls.values()))
        row = [f"{counted / 1e6:,.1f}", f"{theory / 1e6:,.1f}", f"{off:+.2%}", f"{own / 1e6:,.1f}"]
        section.rows.append([name, kinds, calls, *row])
    report.sections.append(section)
    report.conclusions.append(
        f"Least is sent by {least.point.ds_config}{_with(least.point)}; the bytes that theory gives are "
        f"{worst:.2%} off those counted at most."
    )


def _with(point: Point) -> str:
    return "" if point.compression == "none" else f" with {point.compression}"


def _learning(report: Report, ran: Sequence[Measurement]) -> None:
    trained = [each for each in ran if each.bpc is not None]
    if not trained:
        return
    section = Section("Speed beside what is learned")
    section.text.append("Validation bits a character after as many updates, and what it is above no compression.")
    section.header = ["point", "updates", "characters/s", "sends, MB", "BPC", "above none", "noise scale, characters"]
    costs: dict[str, list[float]] = {}
    for each, name in zip(trained, _names(trained), strict=True):
        bpc = each.bpc or 0.0
        whole = [other.bpc or 0.0 for other in trained if _same(other, each) and other.point.compression == "none"]
        if whole and each.point.compression != "none":
            costs.setdefault(each.point.compression, []).append(bpc - whole[0])
        cost = f"{bpc - whole[0]:+.3f}" if whole else ""
        speed, noise = f"{each.characters_per_second:,.0f}", f"{each.noise_scale:,.0f}" if each.noise_scale else ""
        own = f"{sent(each.bytes, each.point.world_size) / 1e6:.2f}"
        section.rows.append([name, str(each.trained_updates), speed, own, f"{bpc:.3f}", cost, noise])
    report.sections.append(section)
    if costs:
        words = ", ".join(f"{kind} {max(found, key=abs):+.3f}" for kind, found in costs.items())
        report.conclusions.append(f"BPC above that without compression after as many updates, at most: {words}.")


def _same(one: Measurement, other: Measurement) -> bool:
    """But for the compression."""
    return one.machine == other.machine and replace(one.point, compression="") == replace(other.point, compression="")


# -------------------------------------------------------------------------------------------------------- predicted


Fitted = tuple[Model, list[Measurement], list[Timed]]
Models = dict[Machine, Fitted | None]

_GROUPS: dict[str, Callable[[Measurement], Hashable]] = {
    "each ZeRO config": lambda each: each.point.ds_config,
    "each number of rows": lambda each: each.point.rows,
    "each number of processes": lambda each: each.point.world_size,
}
"""What is held out, in turn, and predicted from the rest."""


def _fits(report: Report, ran: Sequence[Measurement], sweep: Sequence[tuple[Machine, Timed]], models: Models) -> None:
    section = Section("The model and its residuals")
    section.header = ["point", "measured, ms", "predicted, ms", "90 %", "error", "inside"]
    found: list[Residual] = []
    for fitted in models.values():
        if fitted is not None:
            model, own, _ = fitted
            found += residuals(model, usable(own), ds_config_of)
    if not found:
        section.text.append(
            "No model: it takes points that were measured, and timed collectives beside several processes."
        )
        report.sections.append(section)
        return
    for each, name in zip(found, _names([each.measurement for each in found]), strict=True):
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
    section.text.append(
        f"Points that it was fitted to: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}; "
        f"{sum(each.inside for each in found)} of {len(found)} lie inside their interval."
    )
    for machine, fitted in models.items():
        if fitted is None:
            continue
        _, own, timed = fitted
        for name, group in _GROUPS.items():
            if len({group(each) for each in own}) > 1:
                section.text.append(_held_out(name, machine, held_out(own, timed, ds_config_of, group)))
    report.sections.append(section)
    report.conclusions.append(
        f"The model of a step's time is {statistics.median(errors):.1%} off in the median, {max(errors):.1%} at worst, "
        "on the points it was fitted to; points it has not seen are in its section."
    )


def _held_out(name: str, machine: Machine, found: HeldOut) -> str:
    where = f" ({machine.network})" if machine.network else ""
    if not found.groups:
        return f"Held out, {name}{where}: the others say nothing of it."
    return (
        f"Held out, {name} in turn{where}: median error {found.median:.1%}, worst {found.worst:.1%}; "
        f"{found.inside:.0%} of the intervals hold."
    )


def _outlook(
    report: Report,
    ran: Sequence[Measurement],
    models: Models,
    clusters: Sequence[Cluster],
    target: Target | None,
) -> None:
    best = max(ran, key=lambda each: each.characters_per_second / each.point.world_size)
    measured = {machine: fitted for machine, fitted in models.items() if fitted is not None}
    places: list[tuple[str, Model, int]] = []
    for machine, (model, _, _) in measured.items():
        if model.network is not None:
            name = f"this network ({machine.network})" if machine.network else "machines such as these"
            places.append((name, model, 1 if any(each.point.nodes > 1 for each in ran) else 8))
    gpus = next((model for machine, (model, _, _) in measured.items() if machine.device != "cpu"), None)
    for cluster in clusters:
        places.append((cluster.name, for_cluster(cluster, [best.point], gpus), cluster.gpus_per_node))
    for name, model, per_node in places:
        point = replace(best.point, compression="none")
        each = max(1, point.rows // point.world_size)
        strong = scaled(model, replace(point, rows=max(point.rows, 64)), ds_config_of, per_node=per_node, kind="strong")
        weak = scaled(model, replace(point, rows=each), ds_config_of, per_node=per_node, kind="weak")
        section = Section(f"Predicted to 4096 processes, {name}")
        section.figure = figures.outlook(
            {f"strong, {strong[0].point.rows} rows": strong, f"weak, {each} rows a process": weak}
        )
        section.header = ["scaling", "processes", "characters/s", "efficiency", "90 %", "step, ms"]
        section.rows = [_row(kind, found) for kind, all_ in (("strong", strong), ("weak", weak)) for found in all_]
        if any(cluster.name == name for cluster in clusters) and gpus is None:
            section.text.append("No GPU was measured: what one computes is assumed from its data sheet, and so wide.")
        report.sections.append(section)
        for kind, found in (("strong", strong), ("weak", weak)):
            report.conclusions.append(_beyond(name, kind, found))
        if target is not None:
            _to_target(report, name, model, point, per_node, target, _price(name, clusters))


def _row(kind: str, found: Prediction) -> list[str]:
    interval = f"{found.efficiency_low:.0%} to {found.efficiency_high:.0%}"
    speed, step = f"{found.characters_per_second:,.0f}", f"{1e3 * found.step_seconds:.1f}"
    return [kind, str(found.point.world_size), speed, f"{found.efficiency:.0%}", interval, step]


def _beyond(name: str, kind: str, found: Sequence[Prediction]) -> str:
    good = [each for each in found if each.efficiency >= 0.5]
    last = good[-1]
    what = f"On {name}, {kind} scaling ({found[0].point.rows} rows{' a process' * (kind == 'weak')})"
    if last is found[-1]:
        return f"{what} keeps {last.efficiency:.0%} efficiency up to {_processes(last.point.world_size)}."
    after = found[found.index(last) + 1]
    largest = max(after.parts, key=lambda part: after.parts[part])
    return (
        f"{what}: beyond {_processes(last.point.world_size)} efficiency falls below 50 % "
        f"({after.efficiency:.0%} at {after.point.world_size}); {_IN_WORDS.get(largest, largest)} takes most of an "
        "update there."
    )


_IN_WORDS = {"other": "what each update costs, however small,"}


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


def _price(name: str, clusters: Sequence[Cluster]) -> float | None:
    return next((cluster.dollars_per_gpu_hour for cluster in clusters if cluster.name == name), None)


def _to_target(
    report: Report, name: str, model: Model, point: Point, per_node: int, target: Target, price: float | None
) -> None:
    def seconds(world_size: int, rows: int) -> float:
        nodes = max(1, world_size // per_node)
        at = replace(point, world_size=world_size, nodes=nodes, rows=rows)
        return model.predict(at, ds_config_of(at)).step_seconds

    worlds = [found.point.world_size for found in scaled(model, point, ds_config_of, per_node=per_node, kind="weak")]
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
        f"On {name}, {best.world_size} GPUs are worth using to reach {target.bpc:g} BPC: {best.hours:.3g} hours, "
        f"{best.gpu_hours:.3g} GPU-hours{cost}; a doubling beyond that saves less than a third."
    )


def _outlook_row(each: Outlook) -> list[str]:
    hours = [f"{each.hours:.3g}", f"{each.gpu_hours:.3g}"]
    return [str(each.world_size), str(each.rows), f"{each.updates:,.0f}", *hours, f"{each.efficiency:.0%}"]


# ---------------------------------------------------------------------------------------------------------- written


def write(report: Report, folder: Path) -> Path:
    """index.html, which needs no other file, and each section's PNG and CSV beside it; returns the page."""
    import jinja2

    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, str] = {}
    for section in report.sections:
        if section.figure is not None:
            held = io.BytesIO()
            section.figure.savefig(held, dpi=150, format="png")
            (folder / f"{section.slug}.png").write_bytes(held.getvalue())
            pictures[section.slug] = base64.b64encode(held.getvalue()).decode()
        if section.rows:
            with (folder / f"{section.slug}.csv").open("w", newline="") as f:
                csv.writer(f).writerows([section.header, *section.rows])
    loader = jinja2.PackageLoader("gfrnn.scaling", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html").render(
        report=report, pictures=pictures, date=time.strftime("%Y-%m-%d")
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path
