"""What a net does while it reads a text: how far its global gates are open, and how long each layer remembers.

The mean gate g^{i->j} is over every scored position of every stream. The timescale of a layer is the lag, in steps, at
which the autocorrelation of its h falls below 1/e: that is the time constant of a state that decays exponentially,
and needs no gate to look at, so that units can be compared. It is measured on the first 1,024 scored positions of as
many streams as make about 4 million numbers.

Legend: T steps, B streams of this process, b those of them whose states are kept, L layers, H units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gfrnn.nn.plan import Watch

_STEPS = 1024  # of a stream that correlations are measured on, at lags up to half as many
_NUMBERS = 1 << 22  # states kept, of all processes
_AT_ONCE = 512  # series transformed: memory only


class Dynamics:
    """Sums over what one process reads (`begin`, then `watch` for each call of the net); `figures` of all processes."""

    def __init__(self, num_layers: int, hidden_size: int, *, gated: bool, device: torch.device):
        self.num_layers, self.hidden_size, self.device = num_layers, hidden_size, device
        self.gates_LL = torch.zeros(num_layers, num_layers, dtype=torch.float64, device=device) if gated else None
        """Summed; by target, then source, as the net has them."""
        self.positions = 0
        self.states: list[Tensor] = []
        """[T', L, H, b] each, in order."""

    def begin(self, rows_B: Tensor, length: int, size: int) -> None:
        """rows: the numbers of this process's streams, each of which reads so many bytes of a text of `size`."""
        self.steps = min(_STEPS, length)
        most = max(1, _NUMBERS // (self.steps * self.num_layers * self.hidden_size))
        whole_B = rows_B * length + self.steps <= size  # the last one may be shorter
        self.kept = torch.nonzero((rows_B < most) & whole_B).flatten()

    def watch(self, start: int, inside_TB: Tensor) -> Watch:
        """For a call of the net that reads positions from `start` on. inside: whether a position counts."""
        self.positions += int(inside_TB.sum())
        seen = 0

        def see(hs_TLHB: Tensor, g_TLLB: Tensor | None) -> None:
            nonlocal seen
            T = len(hs_TLHB)
            if self.gates_LL is not None and g_TLLB is not None:
                inside_T11B = inside_TB[seen : seen + T, None, None]
                self.gates_LL += torch.where(inside_T11B, g_TLLB, 0).sum((0, 3), dtype=torch.float64)
            left = self.steps - start - seen
            if left > 0 and len(self.kept):
                self.states.append(hs_TLHB[:left, ..., self.kept])  # a copy
            seen += T

        return see

    def figures(self, add_up: Callable[[Tensor], Any]) -> dict[str, Any]:
        """By name, as metrics.jsonl has them; collective. add_up: a tensor over all processes, in place.

        mean_gates: [L][L], of g^{i->j} in row i, column j; only with gated feedback. timescales: [L], in
        steps; the largest lag looked at, 512 or half a stream's piece, stands for whatever is longer.
        """
        found: dict[str, Any] = {}
        if self.gates_LL is not None:
            sums = torch.cat([self.gates_LL.flatten(), self.gates_LL.new_tensor([self.positions])])
            add_up(sums)
            found["mean_gates"] = (sums[:-1] / sums[-1]).view_as(self.gates_LL).T.tolist()
        correlation_LK = self._autocorrelation(add_up)
        if correlation_LK.shape[1] > 1:
            found["timescales"] = [timescale(correlation_K.tolist()) for correlation_K in correlation_LK]
        return found

    def _autocorrelation(self, add_up: Callable[[Tensor], Any]) -> Tensor:
        """[L, 1 + largest lag]: of h less its unit's mean; a unit counts by its variance. 1 of what never moves."""
        L, H, T = self.num_layers, self.hidden_size, self.steps
        sums = torch.zeros(L * H + 1, dtype=torch.float64, device=self.device)
        states_TLHB = torch.cat(self.states) if self.states else None
        if states_TLHB is not None:
            sums[:-1] = states_TLHB.sum((0, 3), dtype=torch.float64).flatten()
            sums[-1] = states_TLHB.shape[3] * T
        add_up(sums)
        mean_LH1 = (sums[:-1] / sums[-1]).view(L, H, 1)
        products_LK = torch.zeros(L, T // 2 + 1, dtype=torch.float64, device=self.device)
        if states_TLHB is not None:
            for j in range(L):
                series_HBT = (states_TLHB[:, j] - mean_LH1[j].to(states_TLHB.dtype)).permute(1, 2, 0)
                products_LK[j] = lagged_products(series_HBT.flatten(0, 1), T // 2)
        add_up(products_LK)
        products_LK /= T - torch.arange(T // 2 + 1, device=self.device)  # each lag has its own number of pairs
        variance_L1 = products_LK[:, :1]
        return torch.where(variance_L1 > 0, products_LK / variance_L1, 1.0)


def lagged_products(series_NT: Tensor, most: int) -> Tensor:
    """sum over n, t of x[n, t] x[n, t + k] for the lags k = 0 .. most, in fp64: by the power spectrum."""
    T = series_NT.shape[1]
    power = series_NT.new_zeros(T + 1, dtype=torch.float64)
    for some_NT in series_NT.split(_AT_ONCE):
        spectrum = torch.fft.rfft(some_NT, n=2 * T)  # padded, so that no end meets a beginning
        power += (spectrum.real.square() + spectrum.imag.square()).sum(0, dtype=torch.float64)
    products: Tensor = torch.fft.irfft(power, n=2 * T)
    return products[: most + 1]


def timescale(correlation_K: list[float]) -> float:
    """The lag, by a straight line between two, at which a correlation (of lags 0, 1, ..) first falls below 1/e.

    The largest lag there is, if it does not.
    """
    for lag, (here, after) in enumerate(itertools.pairwise(correlation_K)):
        if after < 1 / math.e:
            return lag + (here - 1 / math.e) / (here - after)
    return float(len(correlation_K) - 1)
