"""The gradient noise scale, measured while training: how many symbols an update needs before more stop paying.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training" (arXiv 1812.06162), eq. 2.9 and appendix A.1:
B_simple = tr(Sigma) / |G|^2, where G is the true gradient of the mean loss and Sigma the covariance of a symbol's own.
Batches much smaller than it are noise (twice the batch, half the updates), much larger ones waste symbols.

An update's N counted symbols lie in m parts, the micro-batches of all processes, which have n_p of them each and a mean
gradient g_p; g is the mean over all N. As E|g_p|^2 = |G|^2 + tr(Sigma) / n_p and E|g|^2 = |G|^2 + tr(Sigma) / N,

    S      = (sum_p n_p |g_p|^2 - N |g|^2) / (m - 1)    is an unbiased estimate of tr(Sigma), and
    |g|^2 - S / N                                       of |G|^2, whatever the parts' sizes.

Both are noisy, so each is averaged over updates before their ratio is taken. Symbols of a row are not independent: what
is estimated is the noise of rows, in symbols, so it goes with the segment length that it was measured at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class NoiseScale:
    """Exponential moving averages of the two estimates, both from 0: what they lack at first cancels in the ratio."""

    decay: float
    """An update's; 0: nothing is measured."""
    spread: float = 0.0
    """Of tr(Sigma), times one symbol."""
    signal: float = 0.0
    """Of |G|^2."""

    def see(self, weighted: float, parts: int, count: int, norm: float) -> None:
        """Takes in an update.

        weighted: sum over parts of n_p |g_p|^2. parts: m, those that have symbols; fewer than 2 tell nothing.
        count: N. norm: |g|, before clipping.
        """
        if parts < 2:
            return
        spread = (weighted - count * norm**2) / (parts - 1)
        signal = norm**2 - spread / count
        self.spread += (1 - self.decay) * (spread - self.spread)
        self.signal += (1 - self.decay) * (signal - self.signal)

    def figures(self) -> dict[str, float]:
        """For a logged line: the scale, once there is one."""
        value = self.value
        return {"noise_scale": value} if self.decay and value is not None else {}

    @property
    def value(self) -> float | None:
        """B_simple in counted symbols; None before the first update, and while noise hides the gradient altogether."""
        return self.spread / self.signal if self.signal > 0 else None


class PartNorms:
    """Sums this process's n_p |g_p|^2, as backward makes its micro-batches' gradients.

    A tensor hook sees a parameter's gradient of this micro-batch alone, in full, before it is added to those of others
    and before any engine reduces it: the same at every ZeRO stage. It costs one pass over each gradient.

    parameters: all that are trained; after the engine has been made of them.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self._squares: list[Tensor] = []
        self._weighted: list[Tensor] = []
        for parameter in parameters:
            parameter.register_hook(self._see)

    def _see(self, gradient: Tensor) -> None:
        self._squares.append(torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square())

    def take(self, counted: int, scale: float) -> None:
        """After a micro-batch's backward. counted: its n_p. scale: what makes its gradients the sum over its symbols.

        A part without symbols (padding rows alone) has no gradient and is left out.
        """
        squares, self._squares = self._squares, []
        if counted:
            self._weighted.append(torch.stack(squares).sum() * (scale**2 / counted))

    def shared(self, device: torch.device) -> Tensor:
        """[sum of n_p |g_p|^2, parts] of the update's micro-batches, float64 [2], to be summed over processes."""
        weighted, self._weighted = self._weighted, []
        total = torch.stack(weighted).sum() if weighted else torch.zeros((), device=device, dtype=torch.float64)
        return torch.stack([total, torch.full_like(total, len(weighted))])
