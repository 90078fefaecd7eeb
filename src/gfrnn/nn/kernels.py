"""Triton kernels for all that is pointwise in a step of the recurrence, forward and back; fused.py has the products.

What adds to a pre-activation, the unit and the rounding for the next product are one pass over memory. The equations
are those of reference.py and units.py.

Everything has its features first and rows of the batch last. The bodies are in triton_kernels.py.

Legend: T steps, B rows, L layers, H units, G, K as in plan.py, N = K * (L with input skips, else 1), M rows of any
matrix, R columns of any; Y rows of the output, H or L * H. t is a step within the trace, x_t within the input.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gfrnn.config import GATES
from gfrnn.nn import triton_kernels
from gfrnn.nn.inputs import InputPart
from gfrnn.nn.plan import Plan

# Blocks, for an H100: a step of one layer is small (700 x 100), so many small programs rather than few large ones.
_BLOCK_H, _BLOCK_B, _WARPS = 8, 64, 4  # pointwise kernels: 4 elements a thread, 256 bytes a row
_GATE_BLOCK_H, _GATE_BLOCK_B, _GATE_WARPS = 1024, 8, 8  # the gates' gradient, which sums over H: most of it at once
_SUM_BLOCK, _SUM_WARPS = 1024, 4  # sums over columns, a program a row


def usable(plan: Plan, device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels compute this plan, with parameters of this type, here."""
    if plan.layer_norm or dtype != torch.float32 or importlib.util.find_spec("triton") is None:
        return False
    return os.environ.get("TRITON_INTERPRET") == "1" or (device.type == "cuda" and _triton_starts())


@functools.cache
def _triton_starts() -> bool:
    """Whether Triton can run here; said once if not. It builds a module at its first use: with a C compiler."""
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:  # of whatever kind its driver's parts raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"Triton cannot start here ({reason}): torch's operators run instead, slower", stacklevel=2)
        return False
    return True


class Rows(NamedTuple):
    """Rows of a contiguous [M, B] (however its M is called) from `first` on."""

    matrix: Tensor
    first: int = 0


def _blocks(triton: Any, plan: Plan, B: int) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid over H and B, sizes) of a pointwise kernel."""
    block_B = min(_BLOCK_B, triton.next_power_of_2(B))
    grid = (triton.cdiv(plan.hidden_size, _BLOCK_H), triton.cdiv(B, block_B))
    return grid, {"BLOCK_H": _BLOCK_H, "BLOCK_B": block_B, "num_warps": _WARPS}


def _input(plan: Plan, x: InputPart, j: int) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """(columns, symbols, scale, columns of a row), Nones where layer j does not read the input."""
    return (*x, x.columns.stride(0)) if plan.input_skips or j == 0 else (None, None, None, 0)


def gate_forward(
    plan: Plan,
    x: InputPart,
    bias_LK: Tensor,
    below_KB: Tensor | None,
    ungated: Rows,
    hs_TLHB: Tensor,
    g_TLLB: Tensor,
    source_LHB: Tensor,
    t: int,
    x_t: int,
    j: int,
) -> None:
    """The global gates that end in layer j at step t, into g; and what the candidate's product reads, h * g.

    x is contiguous. below: of the layer below, whose last L rows count. ungated: L rows, of all layers at t - 1.
    source: [L, H, B], narrow.
    """
    triton = triton_kernels.load()
    B = hs_TLHB.shape[-1]
    grid, meta = _blocks(triton, plan, B)
    *read, X_ROW = _input(plan, x, j)
    triton_kernels.gate_forward[(*grid, plan.num_layers)](
        bias_LK, *read, below_KB, ungated.matrix, hs_TLHB, g_TLLB, source_LHB, t, x_t, j, ungated.first, X_ROW, B,
        L=plan.num_layers, H=plan.hidden_size, G=GATES[plan.unit], **meta,
    )  # fmt: skip


def unit_forward(
    plan: Plan,
    x: InputPart,
    bias_LK: Tensor,
    below_KB: Tensor | None,
    candidate: Rows,
    unit: Rows | None,
    hidden_bias_LH: Tensor | None,
    hs_TLHB: Tensor,
    cs_TLHB: Tensor,
    activations_TLGHB: Tensor,
    s_TLHB: Tensor | None,
    before_LHTB: Tensor,
    passed_LHB: Tensor | None,
    mask_LHB: Tensor | None,
    below_LHTB: Tensor | None,
    lengths_B: Tensor | None,
    t: int,
    x_t: int,
    j: int,
) -> None:
    """Layer j's unit at step t: from its products (H rows, (G - 1) * H rows) to its state after t.

    Writes the activations (of tanh none: they are h), GRU's s, c and h of step t + 1, and of what the next products
    read: before_LHTB [L, H, T + 1, B] at t + 1 and, where what passes up is not just h, below_LHTB [L - 1, H, T, B]
    at t, both narrow. passed_LHB: with residual, what each layer passes up at this step. Rows that lengths_B says have
    no step x_t keep their c and h.
    """
    B, T = hs_TLHB.shape[-1], before_LHTB.shape[2] - 1
    grid, meta = _blocks(triton_kernels.load(), plan, B)
    *read, X_ROW = _input(plan, x, j)
    unit_MB, second = unit or (None, 0)
    if j == plan.num_layers - 1:  # nothing reads what it passes up at this step
        mask_LHB = below_LHTB = None
    triton_kernels.unit_forward[grid](
        bias_LK, *read, below_KB, candidate.matrix, unit_MB, hidden_bias_LH, hs_TLHB, cs_TLHB, activations_TLGHB,
        s_TLHB, before_LHTB, passed_LHB, mask_LHB, below_LHTB, lengths_B, t, x_t, j, candidate.first, second,
        X_ROW, T, B,
        L=plan.num_layers, H=plan.hidden_size, G=GATES[plan.unit], K=plan.rows,
        IS_BOTTOM=j == 0, CAPPED=plan.cap_input_gate, **meta,
    )  # fmt: skip


def unit_backward(
    plan: Plan,
    hs_TLHB: Tensor,
    cs_TLHB: Tensor,
    activations_TLGHB: Tensor,
    s_TLHB: Tensor | None,
    d_y_TYB: Tensor,
    d_above_HB: Tensor | None,
    mask_LHB: Tensor | None,
    d_passed_LHB: Tensor | None,
    d_gated_LHB: Tensor | None,
    d_all_LHB: Tensor | None,
    d_own_LHB: Tensor | None,
    d_through_LHB: Tensor | None,
    d_c_LHB: Tensor,
    d_LKTB: Tensor,
    d_s_LHTB: Tensor | None,
    candidate_copy: Rows | None,
    unit_copy: Rows | None,
    lengths_B: Tensor | None,
    t: int,
    x_t: int,
    j: int,
) -> None:
    """Layer j's unit at step t, back: the gradient of its pre-activation, rows [0, G * H) of d_LKTB.

    The gradient of h has parts: of the output; of what is above (d_above, the product of layer j + 1 with its `below`,
    under the mask, and with residual what layer j + 1 passes up, d_passed); of step t + 1 (d_gated, d_all, d_own).
    d_through: GRU's, through z, and with lengths that of rows that have no step x_t; read, then written for step t - 1,
    as is d_c. d_s: GRU's own. The copies are for the products after the step: the gradient of the candidate's recurrent
    sum, those of the unit gates.
    """
    T, B = d_LKTB.shape[2:]
    grid, meta = _blocks(triton_kernels.load(), plan, B)
    candidate_MB, copy_first = candidate_copy or (None, 0)
    unit_MB, copy_second = unit_copy or (None, 0)
    triton_kernels.unit_backward[grid](
        hs_TLHB, cs_TLHB, activations_TLGHB, s_TLHB, d_y_TYB, d_above_HB, mask_LHB, d_passed_LHB, d_gated_LHB,
        d_all_LHB, d_own_LHB, d_through_LHB, d_c_LHB, d_LKTB, d_s_LHTB, candidate_MB, unit_MB, lengths_B, t, x_t, j,
        copy_first, copy_second, T, B,
        L=plan.num_layers, H=plan.hidden_size, G=GATES[plan.unit], K=plan.rows,
        IS_TOP=j == plan.num_layers - 1, OUTPUT_SKIPS=plan.output_skips, CAPPED=plan.cap_input_gate, **meta,
    )  # fmt: skip


def gate_backward(
    plan: Plan,
    d_source_LHB: Tensor,
    g_TLLB: Tensor,
    hs_TLHB: Tensor,
    d_gated_LHB: Tensor,
    d_LKTB: Tensor,
    copy: Rows,
    t: int,
    j: int,
) -> None:
    """From the gradient of what layer j's candidate read, g * h: those of h (for the top layer set in d_gated, else
    added to it) and of the gates' pre-activations, the last L rows of d_LKTB, and of a copy for the products after it.
    """
    triton = triton_kernels.load()
    T, B = d_LKTB.shape[2:]
    block_B = min(_GATE_BLOCK_B, triton.next_power_of_2(B))
    triton_kernels.gate_backward[(plan.num_layers, triton.cdiv(B, block_B))](
        d_source_LHB, g_TLLB, hs_TLHB, d_gated_LHB, d_LKTB, copy.matrix, t, j, copy.first, T, B,
        L=plan.num_layers, H=plan.hidden_size, G=GATES[plan.unit], IS_TOP=j == plan.num_layers - 1,
        BLOCK_H=min(_GATE_BLOCK_H, triton.next_power_of_2(plan.hidden_size)), BLOCK_B=block_B, num_warps=_GATE_WARPS,
    )  # fmt: skip


def row_sums(x_MR: Tensor) -> Tensor:
    """Sums over the columns of a contiguous x, [M] in fp32: of gradients of pre-activations, those of biases."""
    triton = triton_kernels.load()
    M, R = x_MR.shape
    sums_M = x_MR.new_empty(M, dtype=torch.float32)
    triton_kernels.row_sums[(M,)](
        x_MR, sums_M, R, BLOCK=min(_SUM_BLOCK, triton.next_power_of_2(R)), num_warps=_SUM_WARPS
    )
    return sums_M
