"""The input's part of the pre-activations: it waits for no step, but of symbols it is a look-up better left to each.

Legend: T steps, B rows, I inputs (or symbols), N rows of pre-activations that read the input, K of them at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gfrnn.nn.noise import PLACE_INPUT, Noise
from gfrnn.nn.products import product_transposed

_MOST_SYMBOLS = 4096  # of which one-hot columns are not too many


class InputPart(NamedTuple):
    """[N, T, B]: `columns` itself, or (of symbols) scale[t, b] * column symbols[t, b] of it.

    W x of a one-hot x is a column of W. Looked up step by step, the whole is never in memory.
    """

    columns: Tensor
    """[N, T, B], or a table [N, I]."""
    symbols_TB: Tensor | None = None
    scale_TB: Tensor | None = None

    @property
    def sizes(self) -> torch.Size:
        """(T, B)."""
        return self.columns.shape[1:] if self.symbols_TB is None else self.symbols_TB.shape

    def some(self, steps: range) -> Tensor:
        """[N, T', B] of T' steps, differentiable."""
        some = slice(steps.start, steps.stop)
        if self.symbols_TB is None:
            return self.columns[:, some]
        symbols_TB = self.symbols_TB[some]
        x_NTB = self.columns.index_select(1, symbols_TB.flatten()).view(-1, *symbols_TB.shape)
        return x_NTB if self.scale_TB is None else x_NTB * self.scale_TB[some]

    def whole(self) -> Tensor:
        """[N, T, B], differentiable."""
        return self.some(range(self.sizes[0]))

    def no_gradient(self) -> Tensor:
        """Of `columns`, for `add_gradient`."""
        return torch.empty_like(self.columns) if self.symbols_TB is None else torch.zeros_like(self.columns)

    def add_gradient(self, d_columns: Tensor, steps: range, d_NTB: Tensor) -> None:
        """From the gradient of some steps of `whole`, each once, to that of `columns`, to which it is added."""
        some = slice(steps.start, steps.stop)
        if self.symbols_TB is None:
            d_columns[:, some] = d_NTB
            return
        if self.scale_TB is not None:
            d_NTB = torch.mul(d_NTB, self.scale_TB[some], out=torch.empty_like(d_NTB))
        if d_NTB.is_cuda and len(d_columns[0]) <= _MOST_SYMBOLS:
            # a product with one-hot columns: in sums by index threads wait for one another, and come in any order
            d_columns += product_transposed(d_NTB.flatten(1), self.one_hot(some, d_NTB.dtype), d_columns.dtype)
        else:
            d_columns.index_add_(1, self.symbols_TB[some].flatten(), d_NTB.flatten(1).to(d_columns.dtype))

    def one_hot(self, some: slice, dtype: torch.dtype) -> Tensor:
        """[I, R] 1 where row i is symbols[r], else 0: columns @ it is `some` steps' input, not scaled."""
        assert self.symbols_TB is not None
        symbols_R = self.symbols_TB[some].flatten()
        one_hot_IR = self.columns.new_zeros(self.columns.shape[1], len(symbols_R), dtype=dtype)
        return one_hot_IR.scatter_(0, symbols_R.unsqueeze(0), 1)


def read_input(
    input: Tensor, weight_NI: Tensor, noise: Noise | None, dropout: float, compute_dtype: torch.dtype | None
) -> InputPart:
    """W x of input [T, B, I], or of integers [T, B] that stand for one-hot vectors, in the weight's dtype.

    dropout: locked, one mask a row (of integers: of whole symbols); needs noise. compute_dtype: of the product's
    operands; None: the weight's.
    """
    dtype = weight_NI.dtype
    mask_BI = None
    if noise is not None and dropout:
        mask_BI = noise.row_mask(PLACE_INPUT, weight_NI.shape[1], dropout).to(dtype)
    if not input.is_floating_point():
        symbols_TB = input.long()  # bytes, say
        return InputPart(weight_NI, symbols_TB, None if mask_BI is None else mask_BI.T.gather(0, symbols_TB))
    x_TBI = input.to(dtype)
    if mask_BI is not None:
        x_TBI = x_TBI * mask_BI
    narrow = compute_dtype or dtype
    x_NR = F.linear(weight_NI.to(narrow), x_TBI.to(narrow).flatten(0, 1))
    return InputPart(x_NR.to(dtype).unflatten(1, input.shape[:2]))
