"""What an update minimises, as the module that DeepSpeed wraps.

Legend: T steps, B rows of a micro-batch, V symbols.
"""

from __future__ import annotations

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
