"""A program's characters in, logits of what it prints out: the encoder-decoder of Chung et al. 2015, section 5.2.

Legend: S steps of sources, T steps of targets, B rows, V characters of targets.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from gfrnn.config import TARGET_SYMBOLS, ModelSettings
from gfrnn.nn.language_model import LanguageModel, SymbolRNN
from gfrnn.nn.noise import Noise, hash_numbers
from gfrnn.nn.rnn import State

_DECODER = 0xDEC0DE  # keeps the decoder's masks apart from the encoder's


class EncoderDecoder(nn.Module):
    """Two nets of the settings: the decoder, a language model of targets, starts from the encoder's final state.

    Args:
        settings: sizes and options of both; vocab_size is the encoder's, the decoder has TARGET_SYMBOLS.
        options: as SymbolRNN's.
    """

    def __init__(self, settings: ModelSettings, **options: Any):
        super().__init__()
        self.settings = settings
        targets = dataclasses.replace(settings, vocab_size=len(TARGET_SYMBOLS))
        self.encoder = SymbolRNN(settings, **options)
        self.decoder = LanguageModel(targets, **options)

    def encode(self, sources_SB: Tensor, lengths_B: Tensor | None = None, *, noise: Noise | None = None) -> State:
        """Sources int64 [S, B], the first lengths[b] symbols of each row (None: all) -> the state that reading leaves.

        A row without any symbol leaves zeros.
        """
        _, state = self.encoder.read(sources_SB, lengths_B=lengths_B, noise=noise)
        return state

    def forward(
        self, sources_SB: Tensor, lengths_B: Tensor | None, inputs_TB: Tensor, *, noise: Noise | None = None
    ) -> Tensor:
        """Logits [T, B, V] of each target character given those before it (fp32 under bf16).

        sources, lengths as `encode`'s; inputs int64 [T, B]: the targets a character later, END before the first.
        """
        state = self.encode(sources_SB, lengths_B, noise=noise)
        if noise is not None:
            noise = dataclasses.replace(noise, seed=hash_numbers(noise.seed, _DECODER))
        logits_TBV: Tensor = self.decoder(inputs_TB, state, noise=noise)[0]
        return logits_TBV
