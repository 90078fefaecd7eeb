"""The input's part of the pre-activations, for all steps at once: no step needs to wait for it.

Legend: T steps, B rows, I inputs (or symbols), N rows of pre-activations that read the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gfrnn.nn.noise import PLACE_INPUT, Noise


def read_input(
    input: Tensor, weight_NI: Tensor, noise: Noise | None, dropout: float, compute_dtype: torch.dtype | None
) -> Tensor:
    """input [T, B, I], or integers [T, B] that stand for one-hot vectors -> W x [T, B, N], in the weight's dtype.

    dropout: locked, one mask a row (of integers: of whole symbols); needs noise. compute_dtype: of the product's
    operands; None: the weight's.
    """
    dtype = weight_NI.dtype
    mask_BI = None
    if noise is not None and dropout:
        mask_BI = noise.row_mask(PLACE_INPUT, weight_NI.shape[1], dropout).to(dtype)
    if not input.is_floating_point():  # W x of a one-hot x is a column of W
        x_TBN = F.embedding(input, weight_NI.T.contiguous())
        return x_TBN if mask_BI is None else x_TBN * mask_BI.T.gather(0, input).unsqueeze(-1)
    x_TBI = input.to(dtype)
    if mask_BI is not None:
        x_TBI = x_TBI * mask_BI
    narrow = compute_dtype or dtype
    return F.linear(x_TBI.to(narrow), weight_NI.to(narrow)).to(dtype)
