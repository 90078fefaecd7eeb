"""Which symbol comes next: drawn row by row, each row's draw a function of its own logits and number alone.

Legend: B rows, V symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Symbols = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sampling:
    """How a sequence is drawn. Raises ValueError for what has no meaning."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely symbol, the first of equals."""
    top_k: int = 0
    """Draw only from so many most likely symbols; 0: from all."""
    top_p: float = 1.0
    """Of these, draw only from the most likely ones that together have this probability."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be a number, at least 0")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


def log_probabilities(logits_BV: npt.NDArray[np.float32]) -> Floats:
    """Natural logarithms of the probabilities, [B, V], in fp64."""
    wide_BV = logits_BV.astype(np.float64)
    wide_BV -= wide_BV.max(axis=1, keepdims=True)
    wide_BV -= np.log(np.exp(wide_BV).sum(axis=1, keepdims=True))
    return wide_BV


def bits(logits_BV: npt.NDArray[np.float32], symbols_B: Symbols) -> Floats:
    """-log2 p(symbol), [B]."""
    chosen: Floats = log_probabilities(logits_BV)[np.arange(len(symbols_B)), symbols_B] / -np.log(2)
    return chosen


def stop_length(text: bytes | bytearray, stops: Sequence[bytes]) -> int:
    """Bytes of the stop that a text ends with, the longest of several; 0 if it ends with none."""
    return max((len(stop) for stop in stops if text.endswith(stop)), default=0)


def draw(logits_BV: npt.NDArray[np.float32], samplings: list[Sampling], numbers_B: Floats) -> Symbols:
    """A symbol a row [B]; numbers: one in [0, 1) for each row, uniform. Where temperature is 0 it is not used."""
    logits_BV = logits_BV.astype(np.float64)
    logits_BV -= logits_BV.max(axis=1, keepdims=True)  # so that no temperature is too small
    greedy_B = np.array([s.temperature == 0 for s in samplings])
    temperature_B = np.array([s.temperature or 1.0 for s in samplings])
    with np.errstate(over="ignore"):  # -inf is as unlikely as it should be
        weight_BV = np.exp(logits_BV / temperature_B[:, None])
    for row, sampling in enumerate(samplings):
        if not greedy_B[row] and (sampling.top_k or sampling.top_p < 1):
            _keep(weight_BV[row], sampling)
    below_BV = weight_BV.cumsum(axis=1)
    # the first symbol whose cumulated weight is above the number's part of the whole
    drawn_B = (below_BV <= numbers_B[:, None] * below_BV[:, -1:]).sum(axis=1)
    symbols_B: Symbols = np.where(greedy_B, logits_BV.argmax(axis=1), drawn_B)
    return symbols_B


def _keep(weight_V: Floats, sampling: Sampling) -> None:
    """Sets the weights of symbols that may not be drawn to 0."""
    order_V = np.argsort(-weight_V, kind="stable")
    if sampling.top_k:
        weight_V[order_V[sampling.top_k :]] = 0
    if sampling.top_p < 1:
        sorted_V = weight_V[order_V] / weight_V.sum()
        # keep those whose predecessors' sum is still below top_p: at least one
        weight_V[order_V[sorted_V.cumsum() - sorted_V >= sampling.top_p]] = 0
