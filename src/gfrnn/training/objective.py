"""What an update minimises, as the module that DeepSpeed wraps.

Legend: T steps, B rows of a micro-batch, V symbols.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gfrnn.nn import LanguageModel, Noise, State
from gfrnn.training.evaluation import bits_TB, detach


class SegmentLoss(nn.Module):
    """The loss of one segment: bits of the counted symbols, divided so that processes' averages add up to a mean."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(
        self, inputs_TB: Tensor, targets_TB: Tensor, weights_B: Tensor, state: State, noise: Noise, divisor: float
    ) -> tuple[Tensor, Tensor, State]:
        """inputs, targets int64 [T, B]; weights [B] 1, or 0 for padding rows.

        Returns (loss = bits / divisor, the bits themselves without history, the next state without history).
        """
        logits_TBV, state = self.model(inputs_TB, state, noise=noise)
        bits = (bits_TB(logits_TBV, targets_TB) * weights_B).sum()
        return bits / divisor, bits.detach(), detach(state)


def gemm_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s of a large product on this device now, as model FLOP utilisation is measured against; best of several."""
    import time

    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, begin = 0.0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
