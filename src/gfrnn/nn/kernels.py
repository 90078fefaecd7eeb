"""Triton kernels for all that is pointwise in a step of the recurrence, forward and back; fused.py has the products.

What adds to a pre-activation, the unit and the rounding for the next product are one pass over memory. The equations
are those of reference.py and units.py.

Everything has its features first and rows of the batch last. Kernels take whole tensors with the step and the layer as
numbers, not slices: an address that is a slice's is aligned at some steps and not at others, and Triton would compile
for each. What a plan does not have is None, for which nothing is compiled. Arithmetic is fp32.

Triton is imported at the first launch, so that this module can be imported without it, and whether it is interpreted
(TRITON_INTERPRET=1, the way to run this without a GPU) is settled only then. Whoever imported Triton before may have
settled it for what it ships in its own language (tl.zeros, tl.sum), so kernels use its primitives alone.

Legend: T steps, B rows, L layers, H units, G, K as in plan.py, N = K * (L with input skips, else 1), M rows of any
matrix, R columns of any; Y rows of the output, H or L * H. t is a step within the trace, x_t within the input.
"""
# Bodies are Triton's language, not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gfrnn.config import GATES
from gfrnn.nn.inputs import InputPart
from gfrnn.nn.plan import Plan

if TYPE_CHECKING:
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

# Blocks, for an H100: a step of one layer is small (700 x 100), so many small programs rather than few large ones.
_BLOCK_H, _BLOCK_B, _WARPS = 8, 64, 4  # pointwise kernels: 4 elements a thread, 256 bytes a row
_GATE_BLOCK_H, _GATE_BLOCK_B, _GATE_WARPS = 1024, 8, 8  # the gates' gradient, which sums over H: most of it at once
_SUM_BLOCK, _SUM_WARPS = 1024, 4  # sums over columns, a program a row


def usable(plan: Plan, device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels compute this plan, with parameters of this type, here."""
    here = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return here and not plan.layer_norm and dtype == torch.float32 and importlib.util.find_spec("triton") is not None


class Rows(NamedTuple):
    """Rows of a contiguous [M, B] (however its M is called) from `first` on."""

    matrix: Tensor
    first: int = 0


# Triton, late ---------------------------------------------------------------------------------------------------

_FUNCTIONS: list[str] = []  # that are not triton's yet
_LOADING = threading.Lock()
_SEPARATE = ("t", "x_t", "j", "first", "second", "copy_first", "copy_second")  # numbers for which no code of their own


def _jit(function: Callable[..., Any]) -> Any:
    """Marks what `_load` gives to triton.jit."""
    _FUNCTIONS.append(function.__name__)
    return function


def _load() -> Any:
    """The module triton, once all of this module's kernels are its own."""
    import triton
    import triton.language

    module = globals()
    with _LOADING:
        while _FUNCTIONS:
            module["tl"] = triton.language
            name = _FUNCTIONS[-1]
            known = module[name].__code__.co_varnames[: module[name].__code__.co_argcount]
            module[name] = triton.jit(module[name], do_not_specialize=[n for n in _SEPARATE if n in known])
            _FUNCTIONS.pop()
    return triton


# Parts of kernels -----------------------------------------------------------------------------------------------


@_jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@_jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))  # of the absolute value, so that nothing overflows
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@_jit
def _add(a, b):
    return a + b


@_jit
def _place(H: tl.constexpr, B, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """This program's h [BLOCK_H, 1], b [1, BLOCK_B]."""
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    return h.to(tl.int64), b


@_jit
def _outside(row, b, valid, j, x_t, bias_LK, columns, symbols_TB, scale_TB, below_KB, X_ROW, B, K: tl.constexpr):
    """Of a row of layer j's K: the bias, the input's part, the layer below's."""
    a = tl.load(bias_LK + j * K + row + 0 * b, mask=valid, other=0.0).to(tl.float32)
    if columns is not None:
        x_row = columns + (j * K + row) * X_ROW
        if symbols_TB is None:
            a += tl.load(x_row + x_t * B + b, mask=valid, other=0.0).to(tl.float32)
        else:
            here = b < B
            column = tl.load(symbols_TB + x_t * B + b, mask=here, other=0)
            known = (column >= 0) & (column < X_ROW)  # others make it not a number, which nobody overlooks
            x = tl.load(x_row + column, mask=valid & known, other=float("nan")).to(tl.float32)
            if scale_TB is not None:
                x *= tl.load(scale_TB + x_t * B + b, mask=here, other=0.0).to(tl.float32)
            a += x
    if below_KB is not None:
        a += tl.load(below_KB + row * B + b, mask=valid, other=0.0).to(tl.float32)
    return a


@_jit
def _ended(lengths_B, x_t, b, B):
    """[1, b] whether a row has no such step."""
    return tl.load(lengths_B + b, mask=b < B, other=0) <= x_t


@_jit
def _get(x, row, b, B, valid):
    """[.., b] of rows of x, whose last axis is B."""
    return tl.load(x + row * B + b, mask=valid, other=0.0).to(tl.float32)


@_jit
def _put(x, row, b, B, valid, value):
    tl.store(x + row * B + b, value.to(x.dtype.element_ty), mask=valid)


@_jit
def _put_gradient(d_LKTB, row, copy_MB, copy_row, t, b, T, B, valid, value):
    """Into a row of d [.., T, B] at t, and of what the step's products read."""
    tl.store(d_LKTB + (row * T + t) * B + b, value.to(d_LKTB.dtype.element_ty), mask=valid)
    if copy_MB is not None:
        _put(copy_MB, copy_row, b, B, valid, value)


# Forward --------------------------------------------------------------------------------------------------------


@_jit
def _gate_forward(
    bias_LK,
    columns,
    symbols_TB,
    scale_TB,
    below_KB,
    ungated_MB,
    hs_TLHB,
    g_TLLB,
    source_LHB,
    t,
    x_t,
    j,
    first,
    X_ROW,
    B,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    h, b = _place(H, B, BLOCK_H, BLOCK_B)
    i = tl.program_id(2)
    row = G * H + i + tl.full([1, 1], 0, tl.int64)
    here = b < B
    a = _outside(row, b, here, j, x_t, bias_LK, columns, symbols_TB, scale_TB, below_KB, X_ROW, B, G * H + L)
    g = _sigmoid(a + _get(ungated_MB, first + i, b, B, here))
    _put(g_TLLB, (t * L + j) * L + i, b, B, here & (tl.program_id(0) + 0 * b == 0), g)
    valid = (h < H) & here
    before = _get(hs_TLHB, (t * L + i) * H + h, b, B, valid)
    _put(source_LHB, i * H + h, b, B, valid, before * g)


@_jit
def _unit_forward(
    bias_LK,
    columns,
    symbols_TB,
    scale_TB,
    below_KB,
    candidate_MB,
    unit_MB,
    hidden_bias_LH,
    hs_TLHB,
    cs_TLHB,
    activations_TLGHB,
    s_TLHB,
    before_LHTB,
    passed_LHB,
    mask_LHB,
    below_LHTB,
    lengths_B,
    t,
    x_t,
    j,
    first,
    second,
    X_ROW,
    T,
    B,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    IS_BOTTOM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    h, b = _place(H, B, BLOCK_H, BLOCK_B)
    valid = (h < H) & (b < B)
    layer = t * L + j  # of tensors [T, L, ..]
    if lengths_B is not None:
        ended = _ended(lengths_B, x_t, b, B)
    s = _get(candidate_MB, first + h, b, B, valid)
    a_n = _outside(h, b, valid, j, x_t, bias_LK, columns, symbols_TB, scale_TB, below_KB, X_ROW, B, K)
    if G > 1:  # GRU: r, z; LSTM: i, f
        row = H + h
        a_1 = _outside(row, b, valid, j, x_t, bias_LK, columns, symbols_TB, scale_TB, below_KB, X_ROW, B, K)
        u_1 = _sigmoid(a_1 + _get(unit_MB, second + h, b, B, valid))
        _put(activations_TLGHB, layer * G * H + row, b, B, valid, u_1)
        row += H
        a_2 = _outside(row, b, valid, j, x_t, bias_LK, columns, symbols_TB, scale_TB, below_KB, X_ROW, B, K)
        u_2 = _sigmoid(a_2 + _get(unit_MB, second + H + h, b, B, valid))
        _put(activations_TLGHB, layer * G * H + row, b, B, valid, u_2)
    if G == 3:
        if hidden_bias_LH is not None:
            s += tl.load(hidden_bias_LH + j * H + h + 0 * b, mask=valid, other=0.0).to(tl.float32)
        _put(s_TLHB, layer * H + h, b, B, valid, s)
        n = _tanh(a_n + u_1 * s)
        next_h = n + u_2 * (_get(hs_TLHB, layer * H + h, b, B, valid) - n)
    else:
        n = _tanh(a_n + s)
        next_h = n
    if G == 4:
        row += H
        a_3 = _outside(row, b, valid, j, x_t, bias_LK, columns, symbols_TB, scale_TB, below_KB, X_ROW, B, K)
        u_3 = _sigmoid(a_3 + _get(unit_MB, second + 2 * H + h, b, B, valid))
        _put(activations_TLGHB, layer * G * H + row, b, B, valid, u_3)
        before_c = _get(cs_TLHB, layer * H + h, b, B, valid)
        c = u_2 * before_c + u_1 * n
        if lengths_B is not None:
            c = tl.where(ended, before_c, c)
        _put(cs_TLHB, (layer + L) * H + h, b, B, valid, c)
        next_h = u_3 * _tanh(c)
    if G > 1:  # the tanh unit's is h
        _put(activations_TLGHB, layer * G * H + h, b, B, valid, n)
    if lengths_B is not None:
        next_h = tl.where(ended, _get(hs_TLHB, layer * H + h, b, B, valid), next_h)
    _put(hs_TLHB, (layer + L) * H + h, b, B, valid, next_h)
    _put(before_LHTB, (j * H + h) * (T + 1) + t + 1, b, B, valid, next_h)
    passed = next_h
    if passed_LHB is not None:
        if not IS_BOTTOM:
            passed += _get(passed_LHB, (j - 1) * H + h, b, B, valid)
        _put(passed_LHB, j * H + h, b, B, valid, passed)
    if below_LHTB is not None:
        if mask_LHB is not None:
            passed *= _get(mask_LHB, j * H + h, b, B, valid)
        _put(below_LHTB, (j * H + h) * T + t, b, B, valid, passed)


# Backward -------------------------------------------------------------------------------------------------------


@_jit
def _unit_backward(
    hs_TLHB,
    cs_TLHB,
    activations_TLGHB,
    s_TLHB,
    d_y_TYB,
    d_above_HB,
    mask_LHB,
    d_passed_LHB,
    d_gated_LHB,
    d_all_LHB,
    d_own_LHB,
    d_through_LHB,
    d_c_LHB,
    d_LKTB,
    d_s_LHTB,
    candidate_copy_MB,
    unit_copy_MB,
    lengths_B,
    t,
    x_t,
    j,
    copy_first,
    copy_second,
    T,
    B,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    IS_TOP: tl.constexpr,
    OUTPUT_SKIPS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    h, b = _place(H, B, BLOCK_H, BLOCK_B)
    valid = (h < H) & (b < B)
    layer = t * L + j
    at = j * H + h  # of tensors [L, H, ..]

    # of what this layer passes up
    d_h = tl.full([BLOCK_H, BLOCK_B], 0, tl.float32)
    if OUTPUT_SKIPS:
        d_h += _get(d_y_TYB, layer * H + h, b, B, valid)
    elif IS_TOP:
        d_h += _get(d_y_TYB, t * H + h, b, B, valid)
    if not IS_TOP:
        d_above = _get(d_above_HB, h, b, B, valid)
        if mask_LHB is not None:
            d_above *= _get(mask_LHB, at, b, B, valid)
        d_h += d_above
        if d_passed_LHB is not None:
            d_h += _get(d_passed_LHB, at + H, b, B, valid)
    if lengths_B is not None:
        ended = _ended(lengths_B, x_t, b, B)
        d_h = tl.where(ended, 0.0, d_h)  # whatever the output's is
    if d_passed_LHB is not None:
        _put(d_passed_LHB, at, b, B, valid, d_h)

    # and from the step after this one
    if d_all_LHB is not None:
        d_h += _get(d_all_LHB, at, b, B, valid)
    if d_own_LHB is not None:
        d_h += _get(d_own_LHB, at, b, B, valid)
    if d_gated_LHB is not None:
        d_h += _get(d_gated_LHB, at, b, B, valid)
    if d_through_LHB is not None:
        d_h += _get(d_through_LHB, at, b, B, valid)
    if lengths_B is not None:  # of a row that has ended it all goes through
        d_through = tl.where(ended, d_h, 0.0)
        d_h = tl.where(ended, 0.0, d_h)
        if G != 3:
            _put(d_through_LHB, at, b, B, valid, d_through)

    row = j * K + h  # of d_LKTB
    if G == 1:
        n = _get(hs_TLHB, (layer + L) * H + h, b, B, valid)
        d_n = d_h * (1.0 - n * n)
        _put_gradient(d_LKTB, row, candidate_copy_MB, copy_first + h, t, b, T, B, valid, d_n)
    else:
        activation = layer * G * H + h
        n = _get(activations_TLGHB, activation, b, B, valid)
        u_1 = _get(activations_TLGHB, activation + H, b, B, valid)
        u_2 = _get(activations_TLGHB, activation + 2 * H, b, B, valid)
        copy = copy_second + h
        if G == 3:
            s = _get(s_TLHB, layer * H + h, b, B, valid)
            before = _get(hs_TLHB, layer * H + h, b, B, valid)
            d_n = d_h * (1.0 - u_2) * (1.0 - n * n)
            d_1 = d_n * s * u_1 * (1.0 - u_1)
            d_2 = d_h * (before - n) * u_2 * (1.0 - u_2)
            d_before = d_h * u_2
            if lengths_B is not None:
                d_before += d_through
            _put(d_through_LHB, at, b, B, valid, d_before)
            _put_gradient(d_LKTB, row, None, 0, t, b, T, B, valid, d_n)
            _put_gradient(d_s_LHTB, at, candidate_copy_MB, copy_first + h, t, b, T, B, valid, d_n * u_1)
        else:
            u_3 = _get(activations_TLGHB, activation + 3 * H, b, B, valid)
            tanh_c = _tanh(_get(cs_TLHB, (layer + L) * H + h, b, B, valid))
            d_c = _get(d_c_LHB, at, b, B, valid)
            if lengths_B is not None:
                d_c_through = tl.where(ended, d_c, 0.0)
                d_c = tl.where(ended, 0.0, d_c)
            d_c += d_h * u_3 * (1.0 - tanh_c * tanh_c)
            d_n = d_c * u_1 * (1.0 - n * n)
            d_1 = d_c * n * u_1 * (1.0 - u_1)
            d_2 = d_c * _get(cs_TLHB, layer * H + h, b, B, valid) * u_2 * (1.0 - u_2)
            d_3 = d_h * tanh_c * u_3 * (1.0 - u_3)
            d_before_c = d_c * u_2
            if lengths_B is not None:
                d_before_c += d_c_through
            _put(d_c_LHB, at, b, B, valid, d_before_c)
            _put_gradient(d_LKTB, row, candidate_copy_MB, copy_first + h, t, b, T, B, valid, d_n)
            _put_gradient(d_LKTB, row + 3 * H, unit_copy_MB, copy + 2 * H, t, b, T, B, valid, d_3)
        _put_gradient(d_LKTB, row + H, unit_copy_MB, copy, t, b, T, B, valid, d_1)
        _put_gradient(d_LKTB, row + 2 * H, unit_copy_MB, copy + H, t, b, T, B, valid, d_2)


@_jit
def _gate_backward(
    d_source_LHB,
    g_TLLB,
    hs_TLHB,
    d_gated_LHB,
    d_LKTB,
    copy_MB,
    t,
    j,
    copy_first,
    T,
    B,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    IS_TOP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    i = tl.program_id(0)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    here = b < B
    g = _get(g_TLLB, (t * L + j) * L + i, b, B, here)
    d_g = tl.full([1, BLOCK_B], 0, tl.float32)
    for begin in range(0, H, BLOCK_H):
        h = begin + tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
        valid = (h < H) & here
        d_source = _get(d_source_LHB, i * H + h, b, B, valid)
        before = _get(hs_TLHB, (t * L + i) * H + h, b, B, valid)
        d_g += tl.reduce(d_source * before, 0, _add)[None, :]
        d_gated = d_source * g
        if not IS_TOP:  # the first layer of a step to come here sets, the others add
            d_gated += _get(d_gated_LHB, i * H + h, b, B, valid)
        _put(d_gated_LHB, i * H + h, b, B, valid, d_gated)
    row = j * (G * H + L) + G * H + i + tl.full([1, 1], 0, tl.int64)
    _put_gradient(d_LKTB, row, copy_MB, copy_first + i, t, b, T, B, here, d_g * g * (1.0 - g))


@_jit
def _row_sums(x_MR, sums_M, R, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.full([BLOCK], 0, tl.float32)
    for begin in range(0, R, BLOCK):
        r = begin + tl.arange(0, BLOCK)
        total += tl.load(x_MR + row * R + r, mask=r < R, other=0.0).to(tl.float32)
    tl.store(sums_M + row, tl.reduce(total, 0, _add))


# Launches -------------------------------------------------------------------------------------------------------


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
    triton = _load()
    B = hs_TLHB.shape[-1]
    grid, meta = _blocks(triton, plan, B)
    *read, X_ROW = _input(plan, x, j)
    _gate_forward[(*grid, plan.num_layers)](
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
    grid, meta = _blocks(_load(), plan, B)
    *read, X_ROW = _input(plan, x, j)
    unit_MB, second = unit or (None, 0)
    if j == plan.num_layers - 1:  # nothing reads what it passes up at this step
        mask_LHB = below_LHTB = None
    _unit_forward[grid](
        bias_LK, *read, below_KB, candidate.matrix, unit_MB, hidden_bias_LH, hs_TLHB, cs_TLHB, activations_TLGHB,
        s_TLHB, before_LHTB, passed_LHB, mask_LHB, below_LHTB, lengths_B, t, x_t, j, candidate.first, second,
        X_ROW, T, B,
        L=plan.num_layers, H=plan.hidden_size, G=GATES[plan.unit], K=plan.rows,
        IS_BOTTOM=j == 0, **meta,
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
    grid, meta = _blocks(_load(), plan, B)
    candidate_MB, copy_first = candidate_copy or (None, 0)
    unit_MB, copy_second = unit_copy or (None, 0)
    _unit_backward[grid](
        hs_TLHB, cs_TLHB, activations_TLGHB, s_TLHB, d_y_TYB, d_above_HB, mask_LHB, d_passed_LHB, d_gated_LHB,
        d_all_LHB, d_own_LHB, d_through_LHB, d_c_LHB, d_LKTB, d_s_LHTB, candidate_MB, unit_MB, lengths_B, t, x_t, j,
        copy_first, copy_second, T, B,
        L=plan.num_layers, H=plan.hidden_size, G=GATES[plan.unit], K=plan.rows,
        IS_TOP=j == plan.num_layers - 1, OUTPUT_SKIPS=plan.output_skips, **meta,
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
    triton = _load()
    T, B = d_LKTB.shape[2:]
    block_B = min(_GATE_BLOCK_B, triton.next_power_of_2(B))
    _gate_backward[(plan.num_layers, triton.cdiv(B, block_B))](
        d_source_LHB, g_TLLB, hs_TLHB, d_gated_LHB, d_LKTB, copy.matrix, t, j, copy.first, T, B,
        L=plan.num_layers, H=plan.hidden_size, G=GATES[plan.unit], IS_TOP=j == plan.num_layers - 1,
        BLOCK_H=min(_GATE_BLOCK_H, triton.next_power_of_2(plan.hidden_size)), BLOCK_B=block_B, num_warps=_GATE_WARPS,
    )  # fmt: skip


def row_sums(x_MR: Tensor) -> Tensor:
    """Sums over the columns of a contiguous x, [M] in fp32: of gradients of pre-activations, those of biases."""
    triton = _load()
    M, R = x_MR.shape
    sums_M = x_MR.new_empty(M, dtype=torch.float32)
    _row_sums[(M,)](x_MR, sums_M, R, BLOCK=min(_SUM_BLOCK, triton.next_power_of_2(R)), num_warps=_SUM_WARPS)
    return sums_M
