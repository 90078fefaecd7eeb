"""What a process computes in an update, and how long: seconds by part, each a sum of terms with a coefficient.

    forward, backward   arithmetic   FLOP: rows, steps and parameters; the coefficient is one over a rate
                        weights      weights that T time steps read, whatever the rows: k T times the multiplied ones. A
                                     time step's launches and pointwise work are in here too
                        gather       parameters gathered one by one (stage 3)
                        call         micro-batches k
    optimizer           parameter    elements that this process updates: P, or P / W from stage 1 on
                        offloaded    those of them whose moments are in the host's memory
                        update       1
    other               update       1
                        character    of this process
                        parameter    as above
                        gather       as above

So few rows cost more a character: arithmetic falls with them, the weights' term does not. The sum is an upper bound of
what overlaps (arithmetic while weights are read); near either end it is exact.

Which terms a set of points can tell apart is decided by the points: a term is taken, in the order above, if there are
points enough and the columns of the terms so far, scaled to length 1, have a condition number below 50. The rest is
left out and named. One preset's points never tell a time step's launches from the weights it reads: hence one term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

TERMS = {
    "forward": ("arithmetic", "weights", "gather", "call"),
    "backward": ("arithmetic", "weights", "gather", "call"),
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
    slowdown: float = 1.0
    """How much slower than the fastest measured the same product was there and then: cores or memory shared."""

    @property
    def rows_at_once(self) -> float:
        """Of a micro-batch."""
        return self.rows / self.micro_batches

    def terms(self, names: Sequence[str]) -> NDArray[np.float64]:
        """[terms]: what the coefficients multiply, the slowdown included."""
        found = {
            "arithmetic": self.flops,
            "weights": self.micro_batches * self.steps * self.weights,
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

    def seconds(self, load: Load) -> dict[str, float]:
        """By part."""
        return {name: part.seconds(load) for name, part in self.parts.items()}

    @property
    def left_out(self) -> dict[str, tuple[str, ...]]:
        """By part, the terms that the points cannot tell."""
        return {name: part.left_out for name, part in self.parts.items() if part.left_out}


def fit(loads: Sequence[Load], seconds: Sequence[dict[str, float]], peak_flops: float = 0.0) -> Compute:
    """From points, one or more, of one preset and dtype.

    Args:
        seconds: of each load, by part (records.PARTS; communication is not looked at).
    """
    at_once = [load.rows_at_once for load in loads]
    parts = {
        part: fit_part(part, loads, [max(each.get(part, 0.0), 1e-4 * sum(each.values())) for each in seconds])
        for part in TERMS
    }
    return Compute(parts, loads[0].weights, (min(at_once), max(at_once)), peak_flops)


def fit_part(part: str, loads: Sequence[Load], seconds: Sequence[float]) -> Part:
    """Nonnegative coefficients that leave the least relative errors; points more than 10 % off count less (Huber)."""
    terms, left_out = _told_apart(TERMS[part], loads)
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


def _told_apart(terms: Sequence[str], loads: Sequence[Load]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Terms that the points can tell, and the others."""
    design = np.stack([load.terms(terms) / load.slowdown for load in loads])
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
