"""The multiplicative RNN, which GF-LSTM beat: Sutskever, Martens, Hinton, Generating Text with RNNs, ICML 2011.

    m_t = (W_mx x_t) * (W_mh h_{t-1});   h_t = tanh(W_hx x_t + W_hm m_t + b)

Legend: T steps, B rows, I inputs, H units (and factors).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfrnn.nn.inputs import read_input
from gfrnn.nn.lengths import check_lengths, zero_past_end
from gfrnn.nn.noise import PLACE_WEIGHT, Noise
from gfrnn.nn.plan import Watch


class MultiplicativeRNN(nn.Module):
    """One layer of multiplicative recurrence with as many factors as units.

    Args:
        input_size: I. hidden_size: H. input_dropout, weight_dropout: as GatedFeedbackRNN's.
        compute_dtype: of the operands of products; None: the parameters'.
    """

    num_layers = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        input_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, hidden_size
        self.input_dropout, self.weight_dropout = input_dropout, weight_dropout
        self.compute_dtype = compute_dtype
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(2 * hidden_size, input_size, **kind))  # rows W_hx, W_mx
        self.weight_mh = nn.Parameter(torch.empty(hidden_size, hidden_size, **kind))
        self.weight_hm = nn.Parameter(torch.empty(hidden_size, hidden_size, **kind))
        self.bias = nn.Parameter(torch.empty(hidden_size, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Square matrices orthogonal, W_mx uniform with unit variance (so that m has h's size), the rest small."""
        H = self.hidden_size
        nn.init.orthogonal_(self.weight_mh)
        nn.init.orthogonal_(self.weight_hm)
        nn.init.uniform_(self.weight_ih.data[:H], -1 / math.sqrt(H), 1 / math.sqrt(H))
        nn.init.uniform_(self.weight_ih.data[H:], -math.sqrt(3), math.sqrt(3))
        nn.init.zeros_(self.bias)

    def forward(
        self,
        input: Tensor,
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        noise: Noise | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, Tensor]:
        """input [T, B, I] or integers [T, B]; state h [1, B, H] or None. Returns output [T, B, H] and h [1, B, H].

        lengths, watch: as GatedFeedbackRNN's. Raises ValueError for shapes that do not fit.
        """
        symbols = not input.is_floating_point()
        if input.dim() != (2 if symbols else 3):
            raise ValueError(f"input has shape {tuple(input.shape)}; expected [T, B{', I' * (not symbols)}]")
        T, B = input.shape[:2]
        if lengths is not None:
            check_lengths(lengths, T, B, input.device)
        if not self.training:
            noise = None
        elif noise is None and (self.input_dropout or self.weight_dropout):
            noise = Noise.fresh(B, input.device)
        # parameters kept in bf16 (DeepSpeed's own bf16): everything but products stays fp32
        wide = torch.float32 if self.weight_ih.dtype == torch.bfloat16 else self.weight_ih.dtype
        narrow = self.compute_dtype or self.weight_ih.dtype
        weight_ih, bias = self.weight_ih.to(wide), self.bias.to(wide)
        weight_mh: Tensor = self.weight_mh
        weight_hm: Tensor = self.weight_hm
        if noise is not None and self.weight_dropout:
            weight_mh = weight_mh * noise.weight_mask(PLACE_WEIGHT, weight_mh, self.weight_dropout)
            weight_hm = weight_hm * noise.weight_mask(PLACE_WEIGHT + 1, weight_hm, self.weight_dropout)
        x_2HTB = read_input(input, weight_ih, noise, self.input_dropout, self.compute_dtype).whole()
        x_TB2H = x_2HTB.permute(1, 2, 0)
        to_h_TBH, to_m_TBH = x_TB2H.chunk(2, dim=2)
        to_h_TBH = to_h_TBH + bias

        weight_mh, weight_hm = weight_mh.to(narrow), weight_hm.to(narrow)
        h_BH = x_TB2H.new_zeros(B, self.hidden_size) if state is None else state[0].to(wide)
        outputs = []
        for t, (to_h_BH, to_m_BH) in enumerate(zip(to_h_TBH.unbind(0), to_m_TBH.unbind(0), strict=True)):
            m_BH = to_m_BH * F.linear(h_BH.to(narrow), weight_mh).to(wide)
            next_BH = torch.tanh(to_h_BH + F.linear(m_BH.to(narrow), weight_hm).to(wide))
            h_BH = next_BH if lengths is None else torch.where((lengths > t).unsqueeze(1), next_BH, h_BH)
            outputs.append(h_BH)
        y_TBH = torch.stack(outputs)
        if watch is not None:
            watch(y_TBH.detach().transpose(1, 2).unsqueeze(1), None)
        return y_TBH if lengths is None else zero_past_end(y_TBH, lengths), h_BH.unsqueeze(0)
