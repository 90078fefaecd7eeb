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
    """input [T, B, I], or integers [T, B] that stand for one-hot vectors -> W x [N, T, B], in the weight's dtype.

    dropout: locked, one mask a row (of integers: of whole symbols); needs noise. compute_dtype: of the product's
    operands; None: the weight's.
    """
    dtype = weight_NI.dtype
    T, B = input.shape[:2]
    mask_BI = None
    if noise is not None and dropout:
        mask_BI = noise.row_mask(PLACE_INPUT, weight_NI.shape[1], dropout).to(dtype)
    if not input.is_floating_point():  # W x of a one-hot x is a column of W
        x_NTB = weight_NI.index_select(1, input.flatten()).view(-1, T, B)
        return x_NTB if mask_BI is None else x_NTB * mask_BI.T.gather(0, input)
    x_TBI = input.to(dtype)
    if mask_BI is not None:
        x_TBI = x_TBI * mask_BI
    narrow = compute_dtype or dtype
    x_NR = F.linear(weight_NI.to(narrow), x_TBI.to(narrow).flatten(0, 1))
    return x_NR.to(dtype).view(-1, T, B)
