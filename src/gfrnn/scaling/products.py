"""What a recurrence's products take here and now, apart from all else of an update.

How long a product takes is no straight line of its rows: kernels change with them, and few rows read as much memory as
many. So each point times a time step's products, with the model's own weights, for its rows and for powers of two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from gfrnn.nn import LanguageModel
from gfrnn.nn.products import product
from gfrnn.nn.rnn import GatedFeedbackRNN
from gfrnn.nn.steps import left_operands
from gfrnn.scaling.records import Products

POWERS = tuple(2**power for power in range(10))
_FEWEST, _MOST = 3, 50  # times that a number of rows is tried


class ProductTimer:
    """Times the products of a model's time step; of a model without a GatedFeedbackRNN it has nothing to say.

    Args:
        dtype: of the operands.
    """

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        self._sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        if isinstance(model.rnn, GatedFeedbackRNN):
            with torch.no_grad():
                self._sides = left_operands(model.rnn.plan, model.rnn.layer_weights()[0], dtype)

    def times(self, rows: int, seconds: float) -> list[Products]:
        """Medians for so many rows, then for powers of two, the fewest first, until so many seconds are spent."""
        if not self._sides[0]:
            return []
        end = time.perf_counter() + seconds
        found: list[Products] = []
        for each in (rows, *(power for power in POWERS if power != rows)):
            forward, backward = (self._time(side, each, seconds / len(POWERS) / 2) for side in self._sides)
            found.append(Products(each, forward, backward))
            if time.perf_counter() > end:
                break
        return found

    def _time(self, lefts: Sequence[Tensor], rows: int, seconds: float) -> float:
        right_KN = [torch.randn(left.shape[1], rows, device=left.device).to(left.dtype) for left in lefts]
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < _FEWEST or (len(times) < _MOST and time.perf_counter() - begin < seconds):
            start = time.perf_counter()
            for left, right in zip(lefts, right_KN, strict=True):
                product(left, right, torch.float32)
            if lefts[0].is_cuda:
                torch.cuda.synchronize(lefts[0].device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)
