"""Rows that end before the batch does: row b has steps 0 .. lengths[b] - 1.

From there on its state stays as it was and its output is zero, whatever (finite) the input is; weights get nothing from
there, and the gradient of the last state passes through to the row's last step.

Legend: T steps, B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_lengths(lengths_B: Tensor, T: int, B: int, device: torch.device) -> None:
    """Raises ValueError for what is not a length a row. On CUDA the values are not read: that would wait for it."""
    if lengths_B.shape != (B,) or lengths_B.dtype != torch.int64 or lengths_B.device != device:
        raise ValueError(
            f"lengths is {lengths_B.dtype} {list(lengths_B.shape)} on {lengths_B.device}; "
            f"expected torch.int64 [{B}] on {device}"
        )
    if device.type == "cpu" and (int(lengths_B.min()) < 0 or int(lengths_B.max()) > T):
        raise ValueError(f"lengths has {int(lengths_B.min())} .. {int(lengths_B.max())}; this input has {T} steps")


def common_steps(lengths_B: Tensor) -> int:
    """How many first steps every row has, as far as it is known: on CUDA 0, not to wait for it."""
    return int(lengths_B.min()) if lengths_B.device.type == "cpu" else 0


def zero_past_end(y_TBY: Tensor, lengths_B: Tensor) -> Tensor:
    """y, in place, zero at steps that rows do not have."""
    first, T = common_steps(lengths_B), len(y_TBY)
    ended_TB = torch.arange(first, T, device=y_TBY.device).unsqueeze(1) >= lengths_B
    y_TBY[first:].masked_fill_(ended_TB.unsqueeze(2), 0)
    return y_TBY
