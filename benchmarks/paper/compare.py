"""Rows over seeds: means, spreads, differences to the stack and what may be said of them; the way to a given BPC."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from paper.published import COMPARED, published_gain
from paper.rows import Point, Row

_LIKELY = 0.1
"""Ranges that are apart by chance more often than this support no claim."""


class Spread(NamedTuple):
    """A figure over seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.fmean(values), min(values), max(values), len(values))


class Line(NamedTuple):
    """A line of the table: one unit, optimized in one way."""

    unit: str
    choice: str
    rows: dict[str, list[Row]]
    """By column, seed by seed."""

    def test(self, column: str) -> Spread | None:
        """Test BPC."""
        found = self.rows.get(column)
        return Spread.of([row.test_bpc for row in found]) if found else None


class Gain(NamedTuple):
    """A column's test BPC less the stack's: below 0 is better."""

    unit: str
    choice: str
    column: str
    mean: float
    """Difference of means."""
    low: float
    high: float
    """Of any seed's against any seed's of the stack."""
    counts: tuple[int, int]
    published: float | None
    verdict: str


def sections(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that may be compared, together: of one budget, one text and the same settings."""
    found: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.condition].append(row)
    return list(found.values())


def lines(section: Iterable[Row]) -> list[Line]:
    """Of a section, in the table's order."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in section:
        found[row.unit, str(row.choice)][row.column].append(row)
    return [Line(unit, choice, dict(rows)) for (unit, choice), rows in found.items()]


def gains(line: Line) -> list[Gain]:
    """Of every column that there is, against the stack; none without one."""
    stack = line.test("stacked")
    found = []
    for column in COMPARED:
        ours = line.test(column)
        if ours is None or stack is None:
            continue
        found.append(
            Gain(
                line.unit,
                line.choice,
                column,
                ours.mean - stack.mean,
                ours.low - stack.high,
                ours.high - stack.low,
                (ours.seeds, stack.seeds),
                published_gain(line.unit, column),
                verdict(ours, stack),
            )
        )
    return found


def verdict(ours: Spread, theirs: Spread) -> str:
    """What may be said: better or worse only if all seeds of one are on the same side of all seeds of the other.

    If both models were the same, n seeds of one and m of the other would still be apart in 2 of (n + m over n) cases:
    that chance is said, and with too few seeds there is no claim.
    """
    if min(ours.seeds, theirs.seeds) == 1:
        return "one seed: no claim"
    if ours.low <= theirs.high and theirs.low <= ours.high:
        return "within the seeds' spread"
    chance = 2 / math.comb(ours.seeds + theirs.seeds, ours.seeds)
    side = "better" if ours.high < theirs.low else "worse"
    if chance > _LIKELY:
        return f"{side} with every seed, but too few of them: by chance {chance:.0%}"
    return f"{side} with every seed (by chance {chance:.0%})"


# -------------------------------------------------------------------------------------------------- to a given BPC


def way(curve: Sequence[Point], bpc: float, what: str) -> float | None:
    """Seconds or characters to a validation BPC, by a straight line between the validations on either side.

    None if it is not reached, or was reached before the first validation.
    """
    for before, after in itertools.pairwise(curve):
        if before.bpc > bpc >= after.bpc:
            part = (before.bpc - bpc) / (before.bpc - after.bpc)
            start, end = float(getattr(before, what)), float(getattr(after, what))
            return start + part * (end - start)
    return None


def levels(rows: Iterable[Row], most: int = 4) -> list[float]:
    """BPCs that all of these have come past: the lowest in steps of .05 and then ever further up, the highest first."""
    curves = [row.curve for row in rows if len(row.curve) > 1]
    if not curves:
        return []
    lowest = math.ceil(20 * max(min(point.bpc for point in curve) for curve in curves)) / 20
    highest = min(curve[0].bpc for curve in curves)
    found = [lowest + 0.05 * step for step in (0, 1, 3, 7, 15, 31)]
    return [round(level, 2) for level in found if level < highest][:most][::-1]


def ways(rows: Sequence[Row], bpc: float, what: str) -> Spread | None:
    """Over seeds; None if any of them has none."""
    found = [way(row.curve, bpc, what) for row in rows]
    there = [value for value in found if value is not None]
    return Spread.of(there) if found and len(there) == len(found) else None


def alone_by_machine(section: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows whose seconds count, machine by machine: of those alone on it."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in section:
        if row.alone:
            name = f"{row.machine['device']}, {row.machine['threads']} of {row.machine['cores']} cores"
            found[name].append(row)
    return dict(found)
