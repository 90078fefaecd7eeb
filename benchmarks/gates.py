"""How the global gates of a net open and close while it is trained, beside how long each of its layers remembers.

    python src/train.py --preset demo --gates --valid-every 50 --output-dir runs/demo
    python benchmarks/gates.py runs/demo --output gates.png --json gates.json

Reads what `--gates` left in metrics.jsonl at each validation: the mean of every gate g^{i->j}, from layer i at t-1 to
layer j at t, and each layer's timescale, the lag at which its states' autocorrelation falls below 1/e. A row of the
picture for each run: the gates at its first and its last validation, each gate over training, the timescales over
training, and gates against the timescales of the layers that they join.

Correlations are Spearman's, of the mean gate with the timescale of the layer that it comes from, of the one that it
ends in, and with the ratio of both (from / to); over the pairs of the last validation, and over those of all
validations. The points of one run are not independent of each other, so no p-values: many runs say more than one.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.stats import spearmanr

from gfrnn import cli
from gfrnn.config import UserError
from gfrnn.runs import RunFolder, replace_file, versions, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Array = npt.NDArray[np.float64]
FEWEST = 3  # points that have a correlation
SHOWN = 5  # validations in the table; --json has all
SIDES = {"from": "from", "to": "to", "ratio": "from / to"}
_KEYS = ("step", "valid_bpc", "mean_gates", "timescales")  # of a line of metrics.jsonl, as History has them
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")  # Paul Tol's bright scheme
_DASHES = ("-", "--", ":", "-.")


class History(NamedTuple):
    """Of one run: N validations of a net of L layers."""

    run: Path
    steps: Array
    """[N] updates."""
    bpc: Array
    """[N], of the validation text."""
    gates: Array
    """[N, L, L]: means of g^{i->j}, by i, then j."""
    timescales: Array
    """[N, L], steps."""


class Correlation(NamedTuple):
    """Spearman's, of gates with timescales."""

    value: float | None
    """None of too few points, or where one of the two is constant."""
    points: int


def read(run: Path) -> History:
    """What a run folder has; raises UserError if that is no gates."""
    folder = RunFolder(run)
    settings = folder.read_settings()
    if settings.task != "text" or settings.model.feedback != "gated" or settings.model.unit == "mrnn":
        raise UserError(f"{run} has no global gates of text: give a run of text with --feedback gated")
    validations = {line["step"]: line for line in folder.read_metrics() if "valid_bpc" in line}
    if not validations:
        raise UserError(f"{run} has no validation yet: wait for one, or train with a smaller --valid-every")
    lines = [line for line in validations.values() if "mean_gates" in line and "timescales" in line]
    if not lines:
        raise UserError(f"{run} was trained without --gates: train it in another folder with that flag")
    try:
        found = [np.array([line[key] for line in lines], dtype=np.float64) for key in _KEYS]
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder.metrics_path} has gates that are none ({error}): damaged?") from error
    return History(run, *found)


def correlations(histories: Sequence[History]) -> dict[str, Correlation]:
    """By the name of a side, over all pairs and validations of these runs."""
    gates: list[Array] = []
    sides: dict[str, list[Array]] = {name: [] for name in SIDES}
    for history in histories:
        source_NLL = np.broadcast_to(history.timescales[:, :, None], history.gates.shape)
        target_NLL = np.broadcast_to(history.timescales[:, None, :], history.gates.shape)
        gates.append(history.gates.ravel())
        for name, values in (("from", source_NLL), ("to", target_NLL), ("ratio", source_NLL / target_NLL)):
            sides[name].append(values.ravel())
    gate = np.concatenate(gates)
    return {name: correlation(gate, np.concatenate(values)) for name, values in sides.items()}


def correlation(a: Array, b: Array) -> Correlation:
    if len(a) < FEWEST or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(None, len(a))
    return Correlation(float(spearmanr(a, b).statistic), len(a))


def last(history: History) -> History:
    """Its last validation alone."""
    return history._replace(**{name: getattr(history, name)[-1:] for name in history._fields[1:]})


# The picture ----------------------------------------------------------------------------------------------------


def draw(histories: Sequence[History], path: Path) -> None:
    """Writes a PNG, SVG or PDF by its name: a row a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.0 * len(histories)), layout="constrained")  # not pyplot's: no screen is needed
    rows = figure.subplots(len(histories), 5, squeeze=False, width_ratios=(1, 1, 1.5, 1.2, 1.2))
    shown = [gate for history in histories for gate in (history.gates[0], history.gates[-1])]
    colours = {"vmin": min(map(np.min, shown)), "vmax": max(map(np.max, shown))}
    for axes, history in zip(rows, histories, strict=True):
        _matrix(axes[0], history.gates[0], f"{history.run.name}: update {history.steps[0]:.0f}", colours)
        _matrix(axes[1], history.gates[-1], f"update {history.steps[-1]:.0f}", colours)
        _gates(axes[2], history)
        _timescales(axes[3], history)
        _against(axes[4], history)
        for axis in axes[2:]:
            axis.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format=path.suffix[1:].lower())
    replace_file(path, file.getvalue())


def _matrix(axes: Axes, gate_LL: Array, title: str, colours: dict[str, float]) -> None:
    L = len(gate_LL)
    picture = axes.imshow(gate_LL, cmap="viridis", **colours)
    for i in range(L):
        for j in range(L):
            dark = picture.norm(gate_LL[i, j]) < 0.6
            text = f"{gate_LL[i, j]:.2f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    layers = [str(layer + 1) for layer in range(L)]
    axes.set_xticks(range(L), layers)
    axes.set_yticks(range(L), layers)
    axes.set(xlabel="to layer", ylabel="from layer")
    axes.set_title(title, fontsize=10, parse_math=False)  # the name of a folder


def _gates(axes: Axes, history: History) -> None:
    """A curve each: its colour is the layer to which, its dashes the layer from which."""
    L = history.gates.shape[1]
    for i in range(L):
        for j in range(L):
            axes.plot(
                history.steps,
                history.gates[:, i, j],
                color=_COLOURS[j % len(_COLOURS)],
                linestyle=_DASHES[i % len(_DASHES)],
                marker="." if len(history.steps) < 30 else "",
                label=f"{i + 1} to {j + 1}",
            )
    axes.set(xlabel="updates", ylabel="mean gate")
    _legend(axes, ncols=L)


def _timescales(axes: Axes, history: History) -> None:
    for j, own_N in enumerate(history.timescales.T):
        marker = "." if len(own_N) < 30 else ""
        axes.plot(history.steps, own_N, marker=marker, color=_COLOURS[j % len(_COLOURS)], label=f"layer {j + 1}")
    axes.set(xlabel="updates", ylabel="timescale, steps", yscale="log")
    _plain(axes.yaxis)
    _legend(axes, ncols=len(history.timescales.T))


def _against(axes: Axes, history: History) -> None:
    now, found = last(history), correlations([last(history)])
    gate_LL, tau_L = now.gates[0], now.timescales[0]
    for name, values, marker in (("from", tau_L[:, None], "o"), ("to", tau_L[None, :], "x")):  # a gate is there twice
        each = found[name]
        rho = "no correlation" if each.value is None else f"rank correlation {each.value:+.2f}"
        x = np.broadcast_to(values, gate_LL.shape).ravel()
        axes.plot(x, gate_LL.ravel(), marker, label=f"of the layer {name}: {rho}")
    axes.set(xlabel="timescale, steps", ylabel="mean gate", xscale="log")
    axes.set_title(f"update {now.steps[0]:.0f}, {gate_LL.size} gates", fontsize=10)
    _plain(axes.xaxis)
    _legend(axes)


def _plain(axis: Axis) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5 of each decade, or more where it is short, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high > 5 * low else tuple(range(1, 10))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _legend(axes: Axes, ncols: int = 1) -> None:
    """Below, where no curve is."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}
    axes.legend(frameon=False, fontsize="x-small", ncols=min(ncols, 5), **place)


# What is said ---------------------------------------------------------------------------------------------------


def show(histories: Sequence[History]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    for history in histories:
        N, L, _ = history.gates.shape
        title = Text(f"{history.run}: mean gates and timescales, at most {SHOWN} of {N} validations")
        table = Table(title=title, title_justify="left")
        for column in ("update", "BPC", "from layer", *(f"to {j + 1}" for j in range(L)), "its timescale, steps"):
            table.add_column(column, justify="right")
        for n in sorted({round(k * (N - 1) / (SHOWN - 1)) for k in range(SHOWN)}):
            for i in range(L):
                when = ("", "") if i else (f"{history.steps[n]:.0f}", f"{history.bpc[n]:.3f}")
                gates = [f"{gate:.3f}" for gate in history.gates[n, i]]
                table.add_row(*when, str(i + 1), *gates, f"{history.timescales[n, i]:.1f}", end_section=i == L - 1)
        console.print(table)
    table = Table(title="Rank correlation (Spearman) of the mean gate with timescales", title_justify="left")
    for column in ("run", "validations", "points", *(f"of the layer {what}" for what in SIDES.values())):
        table.add_column(column, justify="left" if column in ("run", "validations") else "right")
    for name, which, found in summaries(histories):
        table.add_row(Text(name), which, str(found["from"].points), *(_said(found[side]) for side in SIDES))
    console.print(table)


def summaries(histories: Sequence[History]) -> list[tuple[str, str, dict[str, Correlation]]]:
    """(run, which validations, correlations) of each run, and of several together."""
    groups = [(str(history.run), [history]) for history in histories]
    if len(histories) > 1:
        groups.append(("all runs", list(histories)))
    return [
        (name, which, correlations(chosen))
        for name, group in groups
        for which, chosen in (("last", [last(history) for history in group]), ("all", group))
    ]


def _said(found: Correlation) -> str:
    return "-" if found.value is None else f"{found.value:+.2f}"


def results(histories: Sequence[History]) -> dict[str, Any]:
    """As --json has it."""
    runs = [{"run": str(h.run), **{name: getattr(h, name).tolist() for name in h._fields[1:]}} for h in histories]
    found = [
        {"run": name, "validations": which, **{side: each._asdict() for side, each in sides.items()}}
        for name, which, sides in summaries(histories)
    ]
    return {"runs": runs, "spearman": found, "versions": versions(), "date": time.strftime("%F")}


def main() -> None:
    cli.run(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, trained with --gates")
    parser.add_argument("--output", type=Path, default=Path("gates.png"), help="the picture: .png, .svg or .pdf")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    if flags.output.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--output {flags.output}: give a name that ends in .png, .svg or .pdf")
    cli.check_writable("--output", flags.output)
    if flags.json is not None:
        cli.check_writable("--json", flags.json)
    histories = [read(run) for run in flags.runs]
    show(histories)
    draw(histories, flags.output)
    if flags.json is not None:
        write_json(flags.json, results(histories))


if __name__ == "__main__":
    main()
