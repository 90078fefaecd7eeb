"""Accuracy by cell: nesting x length, each with programs of its own and a confidence interval.

Legend: P programs of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gfrnn.data.program_dataset import load_programs
from gfrnn.nn import EncoderDecoder
from gfrnn.training.program_evaluation import ProgramScores, score_programs

_Z = 1.959963984540054  # of a normal distribution 95 % lie within so many standard deviations


class Share(NamedTuple):
    """A part of a whole with its 95 % confidence interval: of 1, or (a difference) from -1 to 1."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """What was found for one nesting and length."""

    nesting: int
    length: int
    scores: tuple[ProgramScores, ...]
    """Of each model, on the same programs."""

    def accuracy(self, model: int = 0) -> Share:
        """Characters that are right. Those of a program depend on one another: it counts as the sample."""
        found = self.scores[model]
        return ratio(found.right, found.characters)

    def exact(self, model: int = 0) -> Share:
        """Whole targets that are right."""
        found = self.scores[model].exact
        return ratio(found, np.ones(len(found)))

    def accuracy_gain(self) -> Share:
        """The first model's accuracy less the second's."""
        ours, theirs = self.scores
        return difference(ours.right, theirs.right, ours.characters)

    def exact_gain(self) -> Share:
        """Likewise of whole targets."""
        ours, theirs = self.scores
        return difference(ours.exact, theirs.exact, np.ones(len(ours.exact)))

    def to_json(self) -> dict[str, Any]:
        """Plain values: shares as NAME, NAME_low and NAME_high; a second model's are other_NAME, gains NAME_gain."""
        ours = self.scores[0]
        values: dict[str, Any] = {
            "nesting": self.nesting,
            "length": self.length,
            "programs": len(ours.program),
            "characters": int(ours.characters.sum()),
        }
        shares = {"accuracy": self.accuracy(), "exact": self.exact()}
        if len(self.scores) > 1:
            shares |= {"other_accuracy": self.accuracy(1), "other_exact": self.exact(1)}
            shares |= {"accuracy_gain": self.accuracy_gain(), "exact_gain": self.exact_gain()}
        for name, share in shares.items():
            values |= {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
        values["bpc"] = float(ours.bits.sum() / ours.characters.sum())
        return values


def score_grid(
    models: list[EncoderDecoder],
    data_dir: Path,
    *,
    nesting: int,
    length: int,
    programs: int,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> list[Cell]:
    """Every cell of nesting 1 to `nesting` and length 1 to `length`, with so many programs of the test split each.

    progress: called with the part done, 0 to 1. Raises UserError for programs that cannot be made or kept.
    """
    places = [(lines, digits) for lines in range(1, nesting + 1) for digits in range(1, length + 1)]
    effort = np.cumsum([0, *(lines * (digits + 5) for lines, digits in places)])  # characters, about
    cells = []
    for number, (lines, digits) in enumerate(places):
        table = load_programs(
            data_dir,
            split="test",
            nesting=lines,
            length=digits,
            num_programs=programs,
            curriculum="baseline",
            seed=seed,
        )
        cells.append(Cell(lines, digits, tuple(score_programs(model, table) for model in models)))
        if progress is not None:
            progress(float(effort[number + 1] / effort[-1]))
    return cells


# ------------------------------------------------------------------------------------------------ intervals


def ratio(parts_P: npt.NDArray[Any], wholes_P: npt.NDArray[Any]) -> Share:
    """Sum of parts by sum of wholes, over independent samples.

    Wilson's interval for as many independent trials as have the ratio's variance (Cochran, Sampling Techniques, 6.3);
    where no sample differs from the ratio, as many as there are samples.
    """
    value = float(parts_P.sum() / wholes_P.sum())
    error = _standard_error(parts_P - value * wholes_P, wholes_P)
    trials = value * (1 - value) / error**2 if error > 0 else len(parts_P)
    centre = (value + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    half = _Z / (1 + _Z**2 / trials) * math.sqrt(value * (1 - value) / trials + (_Z / (2 * trials)) ** 2)
    return Share(value, centre - half if value > 0 else 0.0, centre + half if value < 1 else 1.0)  # exact at the ends


def difference(ours_P: npt.NDArray[Any], theirs_P: npt.NDArray[Any], wholes_P: npt.NDArray[Any]) -> Share:
    """The ratio of the first less that of the second, on the same samples.

    The paired interval of Agresti and Min 2005 (Statistics in Medicine 24): as if in two more samples one had been
    right by half a unit more, and the other. So a handful of samples that differ are no evidence.
    """
    gains_P = ours_P.astype(float) - theirs_P
    value = float(gains_P.sum() / wholes_P.sum())
    more = 1 + 2 / len(gains_P)
    residuals_P = np.append(gains_P - value / more * wholes_P, 1.0)
    centre, half = value / more, _Z * math.sqrt((residuals_P**2).sum()) / (wholes_P.sum() * more)
    return Share(value, min(value, centre - half), max(value, centre + half))


def _standard_error(residuals_P: npt.NDArray[Any], wholes_P: npt.NDArray[Any]) -> float:
    """Of a ratio, from what each sample's part differs by."""
    count = len(residuals_P)
    return float(math.sqrt((residuals_P**2).sum() * count / max(count - 1, 1)) / wholes_P.sum())
