"""Sections of a report that say what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from gfrnn.scaling import figures
from gfrnn.scaling.curves import Curve, On, curves
from gfrnn.scaling.page import Report, Section
from gfrnn.scaling.records import Machine, Measurement
from gfrnn.scaling.volume import sent
from gfrnn.scaling.words import names, said, with_compression


def scaling(report: Report, ran: Sequence[Measurement]) -> None:
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
            own = [curve for curve in found if curve.points[-1].measurement.machine == machine]
            report.conclusions.append(_reached(title, kind, machine, own))
        report.sections.append(section)


def _reached(title: str, kind: str, machine: Machine, found: Sequence[Curve]) -> str:
    """How far the longest curves come, of those the ones that begin with the fewest processes."""
    most = max(curve.points[-1].world_size for curve in found)
    least = min(curve.points[0].world_size for curve in found if curve.points[-1].world_size == most)
    longest = [curve for curve in found if (curve.points[0].world_size, curve.points[-1].world_size) == (least, most)]
    ends = sorted((curve.points[-1] for curve in longest), key=lambda on: on.efficiency)
    where = f" on {machine.network}" if machine.network else ""
    same = "the rows fixed" if kind == "strong" else "the rows of each fixed"
    reached = " to ".join(f"{on.efficiency:.0%} ({_point(on)})" for on in (*ends[:1], *ends[1:][-1:]))
    return (
        f"{title}{where}, {same}: {most} processes reach {reached} of {most / least:g} times "
        f"{'one' if least == 1 else f'what {least} do'}."
    )


def _point(on: On) -> str:
    point = on.measurement.point
    return f"{point.ds_config}{with_compression(point)}, {point.rows} rows"


def _common(found: Sequence[Curve]) -> str:
    """What all curves' names end with, from a comma or blank on."""
    words_of = [curve.name.split(" ") for curve in found]
    same: list[str] = []
    for words in zip(*(reversed(name) for name in words_of), strict=False):
        if len(set(words)) > 1:
            break
        same.insert(0, words[0])
    return " " + " ".join(same) if len(found) > 1 and same else ""


def parts(report: Report, ran: Sequence[Measurement]) -> None:
    labels = names(ran)
    section = Section("Where an update's time goes", figure=figures.breakdown(ran, labels))
    section.text.append(
        "Means over the processes. Communication is what they waited for, stragglers included, not what others hid."
    )
    section.header = ["point", "ms", *ran[0].parts, "fastest to slowest process", "MFU"]
    for each, name in zip(ran, labels, strict=True):
        busy = each.busy_seconds
        apart = f"{max(busy) / min(busy) - 1:.1%}" if len(busy) > 1 else ""
        mfu = f"{each.mfu:.0%}" if each.peak_flops else ""
        parts = [f"{1e3 * seconds:.1f}" for seconds in each.parts.values()]
        section.rows.append([name, f"{1e3 * each.step_seconds:.1f}", *parts, apart, mfu])
    report.sections.append(section)
    several = [each for each in ran if each.point.world_size > 1]
    if several:
        least, most = (choose(several, key=lambda each: each.communication_share) for choose in (min, max))
        report.sections.append(Section("Communication's share", figure=figures.communication(several, names(several))))
        report.conclusions.append(
            f"Communication takes {least.communication_share:.0%} of an update at least ({said(least)}) and "
            f"{most.communication_share:.0%} at most ({said(most)})."
            if len(several) > 1
            else f"Communication takes {most.communication_share:.0%} of an update ({said(most)})."
        )
    known = [each for each in ran if each.peak_flops]
    if known:
        best = max(known, key=lambda each: each.mfu)
        at_best = " at best" * (len(known) > 1)
        report.conclusions.append(f"The products' peak is used to {best.mfu:.0%}{at_best} ({said(best)}).")


def memory(report: Report, ran: Sequence[Measurement]) -> None:
    known = [each for each in ran if each.memory_bytes and each.predicted_memory_bytes]
    if not known:
        return
    labels = names(known)
    section = Section("Memory of a process", figure=figures.memory(known, labels))
    section.header = ["point", "measured, MB", "predicted, MB", "predicted / measured"]
    ratios = []
    for each, name in zip(known, labels, strict=True):
        ratios.append(each.predicted_memory_bytes / each.memory_bytes)
        figures_ = [f"{each.memory_bytes / 1e6:,.0f}", f"{each.predicted_memory_bytes / 1e6:,.0f}", f"{ratios[-1]:.2f}"]
        section.rows.append([name, *figures_])
    report.sections.append(section)
    span = f", in the median ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    report.conclusions.append(f"Memory is predicted at {statistics.median(ratios):.2f} of what is measured{span}.")


def volume(report: Report, ran: Sequence[Measurement]) -> None:
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
    for each, name in zip(several, names(several), strict=True):
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
    ways = {(each.point.ds_config, each.point.compression) for each in several}
    if len(ways) > 1:
        report.conclusions.append(f"Least is sent by {least.point.ds_config}{with_compression(least.point)}.")
    at_most = " at most" * (len(several) > 1)
    report.conclusions.append(f"The bytes that theory gives are {worst:.2%} off those counted{at_most}.")


def learning(report: Report, ran: Sequence[Measurement]) -> None:
    trained = [each for each in ran if each.bpc is not None]
    if not trained:
        return
    section = Section("Speed beside what is learned")
    section.text.append("Validation bits a character after as many updates, and what it is above no compression.")
    section.header = ["point", "updates", "characters/s", "sends, MB", "BPC", "above none", "noise scale, characters"]
    costs: dict[str, list[float]] = {}
    for each, name in zip(trained, names(trained), strict=True):
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
    if (one.machine, one.trained_updates) != (other.machine, other.trained_updates):
        return False
    return replace(one.point, compression="") == replace(other.point, compression="")
