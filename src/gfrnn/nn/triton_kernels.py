"""The bodies of the kernels in kernels.py, in Triton's language; how they are launched is there.

Kernels take whole tensors with the step and the layer as numbers, not slices: an address that is a slice's is aligned
at some steps and not at others, and Triton would compile for each. What a plan does not have is None, for which nothing
is compiled. Arithmetic is fp32.

Triton is imported at the first launch, so that this module can be imported without it, and whether it is interpreted
(TRITON_INTERPRET=1, the way to run this without a GPU) is settled only then. Whoever imported Triton before may have
settled it for what it ships in its own language (tl.zeros, tl.sum), so kernels use its primitives alone.

Legend: as in kernels.py.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


# Triton, late ---------------------------------------------------------------------------------------------------

_FUNCTIONS: list[str] = []  # that are not triton's yet
_LOADING = threading.Lock()
_SEPARATE = ("t", "x_t", "j", "first", "second", "copy_first", "copy_second")  # numbers for which no code of their own


def _jit(function: Callable[..., Any]) -> Any:
    """Marks what `_load` gives to triton.jit."""
    _FUNCTIONS.append(function.__name__)
    return function


def load() -> Any:
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
def gate_forward(
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
def unit_forward(
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
    CAPPED: tl.constexpr,
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
        if CAPPED:  # what is kept above is the gate as it was: backward caps it again
            u_1 = tl.where(u_1 >= 1.0 - u_2, 1.0 - u_2, u_1)
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
def unit_backward(
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
    CAPPED: tl.constexpr,
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
            d_i = d_c * n
            d_f = d_c * _get(cs_TLHB, layer * H + h, b, B, valid)
            if CAPPED:
                at_cap = u_1 >= 1.0 - u_2
                u_1 = tl.where(at_cap, 1.0 - u_2, u_1)
                d_f -= tl.where(at_cap, d_i, 0.0)
                d_i = tl.where(at_cap, 0.0, d_i)
            d_n = d_c * u_1 * (1.0 - n * n)
            d_1 = d_i * u_1 * (1.0 - u_1)
            d_2 = d_f * u_2 * (1.0 - u_2)
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
def gate_backward(
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
def row_sums(x_MR, sums_M, R, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.full([BLOCK], 0, tl.float32)
    for begin in range(0, R, BLOCK):
        r = begin + tl.arange(0, BLOCK)
        total += tl.load(x_MR + row * R + r, mask=r < R, other=0.0).to(tl.float32)
    tl.store(sums_M + row, tl.reduce(total, 0, _add))
