"""Matrix products with the weights on the left, [M, K] x [K, N] with few columns N: what a recurrence is made of.

With the weights as the right operand a BLAS packs them anew at every step, which at 64 rows of a batch takes as long as
the arithmetic. As the left operand oneDNN reads them where they lie, and packs the small right one (figures in
docs/performance.md). torch.mm goes to oneDNN for bf16 alone, so for fp32 on a CPU this module calls a private operator
of torch, with `mm` where it is not there or slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _private_operators() -> Any:
    """torch.ops.mkldnn, None in a torch that is built without oneDNN or has no such operators."""
    found = torch.ops.mkldnn
    usable = torch.backends.mkldnn.is_available() and hasattr(found, "_linear_pointwise")
    return found if usable and hasattr(found, "_reorder_linear_weight") else None


_MKLDNN = _private_operators()


def _by_onednn(a: Tensor) -> bool:
    if torch.compiler.is_compiling():  # the compiler takes that operator's weight for a constant
        return False
    return _MKLDNN is not None and a.dtype == torch.float32 and a.device.type == "cpu"


_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"


def _by_mm(left_MK: Tensor, right_KN: Tensor) -> bool:
    """Whether `mm` is faster: for small products, as a call of oneDNN takes 20 us, and without AVX-512 for most.

    For 2 to 15 columns it is slow.
    """
    N, size = right_KN.shape[1], left_MK.numel()
    if N == 1:
        return size < 2**20
    if N < 16:
        return False
    return N >= 32 or size < 2**20 if _AVX2 else size * N < 2**22


def product(left_MK: Tensor, right_KN: Tensor, dtype: torch.dtype, add_MN: Tensor | None = None) -> Tensor:
    """left @ right (+ add), as a new tensor of `dtype`. left and right are contiguous and may be of a narrower dtype.

    Products accumulate in fp32 everywhere; of narrow operands the CPU rounds the result once, at the end.
    """
    if _by_onednn(left_MK) and not _by_mm(left_MK, right_KN):
        if add_MN is None:
            out: Tensor = _MKLDNN._linear_pointwise(left_MK, right_KN.t(), None, "none", [], "")
        else:
            out = _MKLDNN._linear_pointwise.binary(left_MK, add_MN, right_KN.t(), None, "add")
        return out
    if left_MK.dtype == dtype:
        return left_MK @ right_KN if add_MN is None else torch.addmm(add_MN, left_MK, right_KN)
    out = torch.mm(left_MK, right_KN, out_dtype=dtype) if left_MK.is_cuda else (left_MK @ right_KN).to(dtype)
    return out if add_MN is None else out.add_(add_MN)


def packed(right_NR: Tensor) -> Tensor:
    """`right` as `product_transposed` likes it, for use in several products."""
    if _by_onednn(right_NR):
        out: Tensor = _MKLDNN._reorder_linear_weight(right_NR)
        return out
    return right_NR


def product_transposed(left_MR: Tensor, right_NR: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right.T [M, N] of `dtype`: a gradient of weights, summed over steps and rows. right may be `packed`."""
    if _by_onednn(left_MR):
        out: Tensor = _MKLDNN._linear_pointwise(left_MR, right_NR, None, "none", [], "")
        return out
    return product(left_MR, right_NR.T, dtype)
