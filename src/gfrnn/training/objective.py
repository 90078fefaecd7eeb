"""What an update minimises, as the modules that DeepSpeed wraps.

Legend: T steps, B rows of a micro-batch, V symbols.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gfrnn.data.program_batches import ProgramBatch
from gfrnn.nn import EncoderDecoder, LanguageModel, Noise, State
from gfrnn.training.evaluation import bits_TB, detach
from gfrnn.training.program_evaluation import row_sums


class SegmentLoss(nn.Module):
    """The loss of one segment: bits of the counted symbols, divided so that processes' averages add up to a mean."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(
        self, inputs_TB: Tensor, targets_TB: Tensor, weights_B: Tensor, state: State, noise: Noise, divisor: float
    ) -> tuple[Tensor, Tensor, State]:
        """inputs, targets int64 [T, B]; weights [B] 1, or 0 for padding rows.

        Returns (loss = bits / divisor, [the bits themselves] without history, the next state without history).
        """
        logits_TBV, state = self.model(inputs_TB, state, noise=noise)
        bits = (bits_TB(logits_TBV, targets_TB) * weights_B).sum()
        return bits / divisor, bits.detach().view(1), detach(state)


class ProgramLoss(nn.Module):
    """The loss of some programs' targets, divided likewise."""

    def __init__(self, model: EncoderDecoder):
        super().__init__()
        self.model = model

    def forward(self, batch: ProgramBatch, noise: Noise, divisor: float) -> tuple[Tensor, Tensor, None]:
        """Returns (loss = bits / divisor, [bits, characters that were right] without history, no state)."""
        logits_TBV = self.model(batch.sources_SB, batch.source_lengths_B, batch.inputs_TB, noise=noise)
        bits_B, right_B = row_sums(logits_TBV, batch)
        bits = bits_B.sum()
        return bits / divisor, torch.stack([bits.detach(), right_B.sum().to(bits.dtype)]), None
