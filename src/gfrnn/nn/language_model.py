"""Models of symbols around the recurrent net: one that reads them, and one that says what comes next.

Legend: T steps, B rows, V symbols, E embedding width, Y width of the net's output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfrnn.config import ModelSettings
from gfrnn.nn.multiplicative import MultiplicativeRNN
from gfrnn.nn.noise import PLACE_OUTPUT, Noise
from gfrnn.nn.plan import Watch
from gfrnn.nn.rnn import GatedFeedbackRNN, State


class SymbolRNN(nn.Module):
    """The net of the settings, fed symbols one-hot or through an embedding.

    Args:
        settings: sizes and options.
        compute_dtype: of the operands of the recurrence's products; None: the parameters'.
        recompute, cuda: GatedFeedbackRNN's; without effect on the multiplicative RNN.
    """

    def __init__(
        self,
        settings: ModelSettings,
        *,
        compute_dtype: torch.dtype | None = None,
        recompute: int = 0,
        cuda: str = "graphs",
    ):
        super().__init__()
        self.settings = settings
        V, E = settings.vocab_size, settings.embedding_size
        self.embedding = nn.Embedding(V, E) if E else None
        options: dict[str, Any] = {
            "input_dropout": settings.input_dropout,
            "weight_dropout": settings.weight_dropout,
            "compute_dtype": compute_dtype,
        }
        self.rnn: GatedFeedbackRNN | MultiplicativeRNN
        if settings.unit == "mrnn":
            self.rnn = MultiplicativeRNN(E or V, settings.hidden_size, **options)
        else:
            self.rnn = GatedFeedbackRNN(
                E or V,
                settings.hidden_size,
                settings.num_layers,
                unit=settings.unit,
                feedback=settings.feedback,
                unit_gates=settings.unit_gates,
                input_skips=settings.input_skips,
                output_skips=settings.output_skips,
                residual=settings.residual,
                dropout=settings.dropout,
                layer_norm=settings.layer_norm,
                hidden_bias=settings.hidden_bias,
                cap_input_gate=settings.cap_input_gate,
                recompute=recompute,
                cuda=cuda,
                **options,
            )
            if settings.forget_bias:
                self.rnn.set_forget_bias(settings.forget_bias)
            if settings.scale_feedback:
                self.rnn.scale_feedback()

    def read(
        self,
        symbols_TB: Tensor,
        state: State | None = None,
        *,
        lengths_B: Tensor | None = None,
        noise: Noise | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, State]:
        """Symbols int64 [T, B], of each row the first so many, and the net's state (None: zeros) -> y, next state.

        watch: told of the net's states and global gates (plan.py).
        """
        x = symbols_TB if self.embedding is None else self.embedding(symbols_TB)
        y_TBY, state = self.rnn(x, state, lengths=lengths_B, noise=noise, watch=watch)
        return y_TBY, state

    def zero_state(self, batch: int, device: torch.device | str = "cpu") -> State:
        """The state that every text starts from."""
        h = torch.zeros(self.rnn.num_layers, batch, self.rnn.hidden_size, device=device)
        return (h, h.clone()) if self.settings.unit == "lstm" else h


class LanguageModel(SymbolRNN):
    """`logits, state = model(symbols, state)`: symbols int64 [T, B] -> logits [T, B, V]. Arguments as SymbolRNN's."""

    def __init__(self, settings: ModelSettings, **options: Any):
        super().__init__(settings, **options)
        self.softmax = nn.Linear(self.rnn.output_size, settings.vocab_size)
        nn.init.zeros_(self.softmax.bias)

    def forward(
        self,
        symbols_TB: Tensor,
        state: State | None = None,
        *,
        noise: Noise | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, State]:
        """symbols int64 [T, B], state as the net's (None: zeros) -> logits [T, B, V] (fp32 under bf16), next state."""
        p = self.settings.output_dropout
        if self.training and noise is None and p:
            noise = Noise.fresh(symbols_TB.shape[1], symbols_TB.device)
        y_TBY, state = self.read(symbols_TB, state, noise=noise, watch=watch)
        if self.training and noise is not None and p:
            y_TBY = y_TBY * noise.row_mask(PLACE_OUTPUT, y_TBY.shape[-1], p).to(y_TBY.dtype)
        weight, bias = self.softmax.weight, self.softmax.bias
        return F.linear(y_TBY, weight.to(y_TBY.dtype), bias.to(y_TBY.dtype)), state
