"""What a process computes in an update, and how long: seconds by part, each a sum of terms with a coefficient.

    forward, backward   products     what the time steps' products alone took there and then, with these rows
                                     (products.py), k T times; the coefficient is about one
                        arithmetic   FLOP: rows, steps and parameters; the coefficient is one over a rate. Beside
                                     products: pointwise work, and the weights' gradients
                        weights      weights that T time steps read, whatever the rows: k T times the multiplied ones. A
                                     time step's launches are in here too
                        gather       parameters gathered one by one (stage 3)
                        call         micro-batches k
    optimizer           parameter    elements that this process updates: P, or P / W from stage 1 on
                        offloaded    those of them whose moments are in the host's memory
                        update       1
    other               update       1
                        character    of this process
                        parameter    as above
                        gather       as above

So few rows cost more a character: arithmetic falls with them, the weights' term does not. Where some point has no timed
products, arithmetic and weights stand for them: an upper bound of what overlaps (arithmetic while weights are read),
exact near either end.

Which terms a set of points can tell apart is decided by the points: a term is taken, in the order above, if there are
points enough and the columns of the terms so far, scaled to length 1, have a condition number below 50. The rest is
left out and named. One preset's points never tell a time step's launches from the weights it reads: hence one term.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from gfrnn.scaling.records import Products

TERMS = {
    "forward": ("forward_products", "arithmetic", "weights", "gather", "call"),
    "backward": ("backward_products", "arithmetic", "weights", "gather", "call"),
    "optimizer": ("parameter", "offloaded", "update"),
    "other": ("update", "character", "parameter", "gather"),
}
"""By part (records.PARTS, without communication), the most telling first."""

_CONDITION = 50.0
_OUTLIER = 0.1  # relative error from which a point counts less
_SATURATED = 0.1  # relative standard deviation if there are no more points than terms
_ROUNDS = 20


@dataclass(frozen=True)
class Load:
    """What one process does in an update."""

    flops: float
    weights: float
    """Multiplied weights, read once a time step and micro-batch."""
    steps: int
    """T."""
    rows: int
    """Of this process."""
    micro_batches: int
    updated: float
    """Elements."""
    offloaded: float = 0.0
    """Elements."""
    gathers: int = 0
    products: Products | None = None
    """Of a time step with these rows at once; None: not known."""
    slowdown: float = 1.0
    """How much slower than the fastest measured the same product was there and then: cores or memory shared."""

    @property
    def rows_at_once(self) -> float:
        """Of a micro-batch."""
        return self.rows / self.micro_batches

    def terms(self, names: Sequence[str]) -> NDArray[np.float64]:
        """[terms]: what the coefficients multiply, the slowdown included: products were timed with it."""
        times = self.micro_batches * self.steps
        timed = self.products or Products(0, 0.0, 0.0)
        found = {
            "forward_products": times * timed.forward / self.slowdown,
            "backward_products": times * timed.backward / self.slowdown,
            "arithmetic": self.flops,
            "weights": times * self.weights,
            "gather": self.gathers,
            "call": self.micro_batches,
            "parameter": self.updated,
            "offloaded": self.offloaded,
            "update": 1.0,
            "character": self.rows * self.steps,
        }
        return self.slowdown * np.array([found[name] for name in names], dtype=np.float64)


@dataclass(frozen=True)
class Part:
    """Fitted terms of a part, or assumed ones."""

    terms: tuple[str, ...]
    coefficients: NDArray[np.float64]
    """[terms], seconds a unit, none negative."""
    covariance: NDArray[np.float64]
    """[terms, terms]"""
    left_out: tuple[str, ...] = ()
    """What the points cannot tell: taken to cost nothing beyond what the other terms have of it."""
    spread: float = 0.0
    """Standard deviation of the relative errors of the points it was fitted to."""

    def seconds(self, load: Load) -> float:
        return float(load.terms(self.terms) @ self.coefficients)

    def deviation(self, terms: NDArray[np.float64]) -> float:
        """Standard deviation of terms @ coefficients."""
        variance = float(terms @ self.covariance @ terms)
        return math.sqrt(max(variance, 0.0))


@dataclass(frozen=True)
class Compute:
    """Of one preset and dtype on one kind of device."""

    parts: dict[str, Part]
    weights: float
    """Of the preset they were measured for; terms count in weights and FLOP, so that others are predicted as well."""
    rows: tuple[float, float] = (1.0, float("inf"))
    """Fewest and most rows at once that were measured."""
    peak_flops: float = 0.0
    """FLOP/s of a process' large products where they were fastest: a slowdown is against it. 0: not known."""
    products: Mapping[tuple[int, int], Sequence[Products]] = field(default_factory=dict)
    """By world size and nodes, as the points have timed them, in rising order of rows. Empty: not known."""

    def seconds(self, load: Load) -> dict[str, float]:
        """By part."""
        return {name: part.seconds(load) for name, part in self.parts.items()}

    def products_of(self, weights: float, rows: int, world_size: int, nodes: int) -> Products | None:
        """Of a model of so many multiplied weights; of the layout that is nearest to the one asked for."""
        if not self.products:
            return None
        layout = min(self.products, key=lambda key: far(key, (world_size, nodes)))
        return at(self.products[layout], rows, weights / self.weights)

    @property
    def left_out(self) -> dict[str, tuple[str, ...]]:
        """By part, the terms that the points cannot tell."""
        return {name: part.left_out for name, part in self.parts.items() if part.left_out}


def at(products: Sequence[Products], rows: int, scale: float = 1.0) -> Products:
    """Of so many rows: between those known a power law, beyond the most a time in proportion to the rows.

    Args:
        products: one or more, in rising order of rows.
        scale: of the times.
    """

    def side(times: list[float]) -> float:
        known = [each.rows for each in products]
        if rows > known[-1]:
            return scale * times[-1] * rows / known[-1]
        return scale * math.exp(np.interp(math.log(rows), np.log(known), np.log(times)))

    return Products(rows, side([each.forward for each in products]), side([each.backward for each in products]))


def far(layout: tuple[int, int], other: tuple[int, int]) -> tuple[float, float]:
    """Doublings between two world sizes, then between their nodes."""
    return abs(math.log2(layout[0] / other[0])), abs(math.log2(layout[1] / other[1]))


def fit(
    loads: Sequence[Load],
    seconds: Sequence[dict[str, float]],
    peak_flops: float = 0.0,
    products: Mapping[tuple[int, int], Sequence[Products]] | None = None,
) -> Compute:
    """From points, one or more, of one preset and dtype.

    Args:
        products: Compute's.
        seconds: of each load, by part (records.PARTS; communication is not looked at).
    """
    at_once = [load.rows_at_once for load in loads]
    parts = {
        part: fit_part(part, loads, [max(each.get(part, 0.0), 1e-4 * sum(each.values())) for each in seconds])
        for part in TERMS
    }
    return Compute(parts, loads[0].weights, (min(at_once), max(at_once)), peak_flops, products or {})


def fit_part(part: str, loads: Sequence[Load], seconds: Sequence[float]) -> Part:
    """Nonnegative coefficients that leave the least relative errors; points more than 10 % off count less (Huber)."""
    timed = all(load.products for load in loads)
    names = [name for name in TERMS[part] if timed or not name.endswith("_products")]
    terms, left_out = _told_apart(names, loads)
    relative = np.stack([load.terms(terms) / taken for load, taken in zip(loads, seconds, strict=True)])  # [points, C]
    scale = np.linalg.norm(relative, axis=0)
    relative, weights = relative / scale, np.ones(len(loads))
    for _ in range(_ROUNDS):
        root = np.sqrt(weights)
        found = nnls(relative * root[:, None], root)[0]
        errors = np.abs(relative @ found - 1)
        weights = np.minimum(1.0, _OUTLIER / np.maximum(errors, 1e-12))
    spare = len(loads) - len(terms)
    spread = float(np.sqrt(np.sum(weights * errors**2) / spare)) if spare > 0 else _SATURATED
    normal = relative.T @ (relative * weights[:, None])
    covariance = spread**2 * np.linalg.inv(normal) / np.outer(scale, scale)
    return Part(terms, found / scale, covariance, left_out, spread)


def _typical(loads: Sequence[Load]) -> list[Load]:
    """Without what differs from one measurement to the next alone: the same rows have the same products."""
    by_rows: dict[float, list[Products]] = {}
    for load in loads:
        if load.products is not None:
            by_rows.setdefault(load.rows_at_once, []).append(load.products)
    means = {rows: Products.summary(several, statistics.fmean) for rows, several in by_rows.items()}
    return [dataclasses.replace(load, slowdown=1.0, products=means.get(load.rows_at_once)) for load in loads]


def _told_apart(terms: Sequence[str], loads: Sequence[Load]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Terms that the points can tell, and the others."""
    design = np.stack([typical.terms(terms) for typical in _typical(loads)])
    # relative to the first term, which is about what a point takes
    design = design / design[:, :1]
    distinct, taken = len(np.unique(design.round(12), axis=0)), [0]
    if len(loads) > distinct == 1:  # repetitions alone
        return (terms[0],), tuple(terms[1:])
    for column in range(1, len(terms)):
        some = design[:, [*taken, column]]
        length = np.linalg.norm(some, axis=0)
        if length.all() and len(taken) < distinct and np.linalg.cond(some / length) < _CONDITION:
            taken.append(column)
    left = [name for column, name in enumerate(terms) if column not in taken]
    return tuple(terms[column] for column in taken), tuple(left)
