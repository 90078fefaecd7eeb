"""The pictures of a study's report, each a matplotlib figure of what it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gfrnn.scaling.curves import Curve
from gfrnn.scaling.prediction import Prediction, Residual
from gfrnn.scaling.records import PARTS, Measurement
from gfrnn.scaling.target import Outlook

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 9.0, 3.6  # inches
MOST_LABELS = 24  # in a legend
_COLOURS = {
    "forward": "#4477aa",
    "backward": "#66ccee",
    "communication": "#ee6677",
    "optimizer": "#ccbb44",
    "other": "#bbbbbb",
}
"""Paul Tol's bright scheme, which the colour-blind can tell apart."""


def _figure(columns: int = 1, height: float = _HEIGHT) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")  # not pyplot's: no screen is needed
    axes = figure.subplots(1, columns, squeeze=False)
    for each in axes[0]:
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _processes(axes: Axes, what: str = "processes") -> None:
    """A logarithmic axis of whole numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(what)


def _logarithmic(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _percent(axes: Axes, label: str) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel(label)


def _legend(figure: Figure, axes: Axes) -> None:
    """Below, in two columns."""
    handles, labels = axes.get_legend_handles_labels()
    handles, labels = handles[:MOST_LABELS], labels[:MOST_LABELS]
    rows = math.ceil(len(labels) / 2)
    figure.set_figheight(_HEIGHT + 0.17 * rows)
    figure.legend(handles, labels, loc="outside lower left", ncols=2, fontsize="x-small", frameon=False)


def scaling(curves: Sequence[Curve], common: str) -> Figure:
    """Characters a second and efficiency against processes, with ideal lines (dashed).

    common: the part of the curves' names that is the same and need not be said.
    """
    figure, (speed, efficiency) = _figure(2)
    for curve in curves:
        worlds = [point.world_size for point in curve.points]
        rates = [point.measurement.characters_per_second for point in curve.points]
        (line,) = speed.plot(worlds, rates, marker="o", label=curve.name.replace(common, ""))
        speed.plot(worlds, [point.ideal for point in curve.points], linestyle="--", color=line.get_color(), alpha=0.5)
        efficiency.plot(worlds, [point.efficiency for point in curve.points], marker="o", color=line.get_color())
    speed.set_yscale("log")
    speed.set_ylabel("characters/s")
    efficiency.axhline(1.0, linestyle="--", color="grey")
    efficiency.set_ylim(0, None)
    _percent(efficiency, "of ideal")
    _processes(speed)
    _processes(efficiency)
    _legend(figure, speed)
    return figure


def breakdown(measurements: Sequence[Measurement], names: Sequence[str]) -> Figure:
    """Where an update's time goes, a bar a point, stacked."""
    figure, (axes,) = _figure(1, 0.9 + 0.26 * len(measurements))
    left = [0.0] * len(measurements)
    for part in PARTS:
        width = [1e3 * each.parts[part] for each in measurements]
        axes.barh(range(len(width)), width, left=left, color=_COLOURS[part], label=part, height=0.75)
        left = [a + b for a, b in zip(left, width, strict=True)]
    _bars(axes, names, "ms an update")
    axes.legend(ncols=len(PARTS), fontsize="x-small", frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def memory(measurements: Sequence[Measurement], names: Sequence[str]) -> Figure:
    """Peak memory of the process that took most, beside the formula's."""
    figure, (axes,) = _figure(1, 0.9 + 0.32 * len(measurements))
    for offset, colour, label, values in (
        (-0.2, "#4477aa", "measured", [each.memory_bytes for each in measurements]),
        (0.2, "#ccbb44", "predicted", [each.predicted_memory_bytes for each in measurements]),
    ):
        places = [number + offset for number in range(len(values))]
        axes.barh(places, [value / 1e6 for value in values], height=0.38, color=colour, label=label)
    _bars(axes, names, "MB a process")
    axes.legend(ncols=2, fontsize="x-small", frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def communication(measurements: Sequence[Measurement], names: Sequence[str]) -> Figure:
    """Share of an update that is waited for communication."""
    figure, (axes,) = _figure(1, 0.8 + 0.26 * len(measurements))
    shares = [each.communication_share for each in measurements]
    bars = axes.barh(range(len(shares)), shares, color=_COLOURS["communication"], height=0.75)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize="x-small", padding=2)
    _bars(axes, names, "of an update")
    from matplotlib.ticker import PercentFormatter

    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlim(0, 1)
    return figure


def _bars(axes: Axes, names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names, fontsize="x-small")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(label)


def fit(residuals: Sequence[Residual]) -> Figure:
    """Predicted against measured, with intervals of 90 %, and the relative errors."""
    figure, (both, errors) = _figure(2)
    measured = [each.measurement.step_seconds for each in residuals]
    predicted = [each.prediction.step_seconds for each in residuals]
    below = [each.prediction.step_seconds - each.prediction.low for each in residuals]
    above = [each.prediction.high - each.prediction.step_seconds for each in residuals]
    both.errorbar(measured, predicted, yerr=(below, above), fmt="o", markersize=4, linewidth=1, color="#4477aa")
    ends = (min(measured + predicted) / 1.2, max(measured + predicted) * 1.2)
    both.plot(ends, ends, linestyle="--", color="grey")
    both.set(xscale="log", yscale="log", xlabel="measured, s", ylabel="predicted, s")
    errors.axhline(0.0, linestyle="--", color="grey")
    errors.plot(measured, [each.error for each in residuals], "o", markersize=4, color="#4477aa")
    errors.set(xscale="log", xlabel="measured, s")
    for axis in (both.xaxis, both.yaxis, errors.xaxis):
        _logarithmic(axis)
    largest = max(0.05, *(abs(each.error) for each in residuals))
    errors.set_ylim(-1.15 * largest, 1.15 * largest)
    _percent(errors, "predicted / measured - 1")
    return figure


def outlook(predictions: dict[str, Sequence[Prediction]]) -> Figure:
    """Efficiency against processes by kind of scaling, with intervals of 90 %."""
    figure, axes = _figure(len(predictions))
    for each, (name, found) in zip(axes, predictions.items(), strict=True):
        worlds = [prediction.point.world_size for prediction in found]
        each.fill_between(
            worlds,
            [prediction.efficiency_low for prediction in found],
            [prediction.efficiency_high for prediction in found],
            alpha=0.25,
            color="#4477aa",
            linewidth=0,
        )
        each.plot(worlds, [prediction.efficiency for prediction in found], marker="o", markersize=3, color="#4477aa")
        each.axhline(0.5, linestyle=":", color="grey")
        each.set_ylim(0, 1.05)
        each.set_title(name, fontsize="small")
        _processes(each, "GPUs")
        _percent(each, "efficiency")
    return figure


def target(found: Sequence[Outlook], best: Outlook) -> Figure:
    """Hours and GPU-hours to the target against GPUs; the knee is marked."""
    figure, (hours, cost) = _figure(2)
    worlds = [each.world_size for each in found]
    for axes, values, label in (
        (hours, [each.hours for each in found], "hours to the target"),
        (cost, [each.gpu_hours for each in found], "GPU-hours to the target"),
    ):
        axes.plot(worlds, values, marker="o", markersize=3, color="#4477aa")
        axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.axvline(best.world_size, linestyle=":", color="#ee6677")
        at = values[worlds.index(best.world_size)]
        axes.annotate(
            f"knee: {best.world_size} GPUs, {_short(at)}",
            (best.world_size, at),
            textcoords="offset points",
            xytext=(6, 6),
            fontsize="x-small",
            color="#ee6677",
        )
        _processes(axes, "GPUs")
    return figure


def _short(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f} h"
