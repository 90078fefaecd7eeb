"""Table 1 of Chung, Gulcehre, Cho, Bengio 2015 (arXiv 1502.02367v4): test BPC on Hutter, and our presets of it."""

from __future__ import annotations

from typing import NamedTuple

COLUMNS = ("single", "stacked", "GF", "GF-L", "GF, g = 1")
UNITS = {"tanh": "tanh", "gru": "GRU", "lstm": "LSTM", "mrnn": "mRNN"}
"""A unit's setting -> its name."""
COMPARED = ("GF", "GF-L", "GF, g = 1")
"""Columns that are held against the stack."""


class Place(NamedTuple):
    """A cell of the table."""

    unit: str
    column: str


MODELS = {
    "tanh-1x1000": Place("tanh", "single"),
    "tanh-3x390": Place("tanh", "stacked"),
    "gf-tanh-3x303": Place("tanh", "GF"),
    "gru-1x540": Place("gru", "single"),
    "gru-3x228": Place("gru", "stacked"),
    "gf-gru-3x165": Place("gru", "GF"),
    "gf-gru-3x228": Place("gru", "GF-L"),
    "lstm-1x456": Place("lstm", "single"),
    "lstm-3x191": Place("lstm", "stacked"),
    "gf-lstm-3x140": Place("lstm", "GF"),
    "gf-lstm-3x191": Place("lstm", "GF-L"),
    "full-lstm-3x140": Place("lstm", "GF, g = 1"),
    "mrnn-1x679": Place("mrnn", "single"),  # of as many parameters; not in the paper's table
}
"""Preset -> its cell."""

BASELINES = {"tanh": "tanh-3x390", "gru": "gru-3x228", "lstm": "lstm-3x191", "mrnn": "mrnn-1x679"}
"""Unit -> the model that its learning rate is tuned on: the stack; the multiplicative RNN has none."""

TEST_BPC = {
    Place("tanh", "single"): 1.937,
    Place("tanh", "stacked"): 1.892,
    Place("tanh", "GF"): 1.949,
    Place("gru", "single"): 1.883,
    Place("gru", "stacked"): 1.871,
    Place("gru", "GF"): 1.855,
    Place("gru", "GF-L"): 1.813,
    Place("lstm", "single"): 1.887,
    Place("lstm", "stacked"): 1.868,
    Place("lstm", "GF"): 1.842,
    Place("lstm", "GF-L"): 1.789,
    Place("lstm", "GF, g = 1"): 1.854,
}


def published_gain(unit: str, column: str) -> float | None:
    """Published test BPC less the stack's; None where the paper has no figure."""
    ours, stack = TEST_BPC.get(Place(unit, column)), TEST_BPC.get(Place(unit, "stacked"))
    return None if ours is None or stack is None else ours - stack
