"""Validation BPC against seconds or characters: a panel a unit, a colour a column of the table."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from gfrnn.runs import replace_file
from paper.compare import Line
from paper.published import COLUMNS, UNITS
from paper.rows import Row

COLOURS = dict(zip(COLUMNS, ("#bbbbbb", "#4477aa", "#ee6677", "#aa3377", "#ccbb44"), strict=True))
"""Paul Tol's bright scheme, which the colour-blind can tell apart."""
_SHOWN = 1.0  # BPC above the best: beyond it curves fall too steeply to be told apart
_LABELS = {"characters": "characters read", "seconds": "seconds of training"}


def draw(lines: Sequence[Line], what: str, path: Path, title: str) -> None:
    """Writes a PNG: every seed a thin line, a model's mean over them a thick one.

    what: characters or seconds.
    """
    from matplotlib.figure import Figure  # not pyplot's: no screen is needed
    from matplotlib.ticker import EngFormatter

    columns = min(len(lines), 2)
    height = -(-len(lines) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * height + 0.3), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).flat
    for line, axis in zip(lines, axes, strict=False):  # in this order, so that no axis more is taken than is drawn on
        bpcs = [[point.bpc for point in row.curve] for rows in line.rows.values() for row in rows]
        for column in COLUMNS:
            rows = line.rows.get(column)
            if not rows:
                continue
            colour, name = COLOURS[column], f"{column}: {rows[0].model}"
            mean = _mean(rows, what)
            if len(rows) > 1:
                for row in rows:
                    places = [getattr(point, what) for point in row.curve]
                    axis.plot(places, [point.bpc for point in row.curve], color=colour, linewidth=0.6, alpha=0.6)
            axis.plot(*zip(*mean, strict=True), color=colour, linewidth=1.8, label=name)
        best, worst = min(map(min, bpcs)), max(map(max, bpcs))
        last = max(map(min, bpcs))
        top = min(best + _SHOWN, worst) if last < best + 0.8 * _SHOWN else worst  # no curve is left out as a whole
        margin = 0.03 * max(top - best, 0.01)
        axis.set_ylim(best - margin, top + margin)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set(xlabel=_LABELS[what], ylabel="validation BPC", title=f"{UNITS[line.unit]} ({line.choice})")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize="small")
    for axis in list(axes):
        axis.set_visible(False)
    figure.suptitle(textwrap.fill(title, 64 * columns), fontsize=10, parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    replace_file(path, picture.getvalue())


def _mean(rows: Sequence[Row], what: str) -> list[tuple[float, float]]:
    """Means over seeds of (place, BPC) at the validations that all of them have."""
    by_characters = [{point.characters: point for point in row.curve} for row in rows]
    common = sorted(set.intersection(*(set(points) for points in by_characters)))
    found = []
    for characters in common:
        points = [each[characters] for each in by_characters]
        places = [getattr(point, what) for point in points]
        found.append((sum(places) / len(points), sum(point.bpc for point in points) / len(points)))
    return found
