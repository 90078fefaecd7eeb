"""What cpu_kernels.c computes of a step, for tensors: the unit and the global gates, forward and back.

The library is built with the package where there is a C compiler; elsewhere, and for what it does not know, steps.py
has the same in torch's operators. Everything is float32 and contiguous, features first and rows of the batch last.

Legend: B rows of the batch, H units, L layers, G, K as in plan.py; a candidate is n_HB, unit gates are u_UHB.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gfrnn.nn.gradients import NormGradients
from gfrnn.nn.plan import LayerWeights, Plan

_MOST = 2**17  # elements [H, B] of a layer: of more, several threads of torch's make shorter work than one of these
_VERSION = 1  # of what the functions take, as cpu_kernels.c has it
_TAKES = {
    "lstm_forward": (3, 13),
    "lstm_backward": (3, 19),
    "gru_forward": (2, 9),
    "gru_backward": (2, 14),
    "tanh_forward": (2, 6),
    "tanh_backward": (2, 9),
    "gates_forward": (3, 4),
    "gates_backward": (3, 5),
}
"""Whole numbers, and arrays after them."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where it was not built, or for another version of this module, or with GFRNN_CPU_KERNELS=0."""
    if _unwanted():
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu_kernels{suffix}")
        if path.exists():
            return _loaded(path)
    return None


def _loaded(path: Path) -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(str(path))
        version = ctypes.c_int.in_dll(found, "gfrnn_cpu_kernels").value
    except (OSError, ValueError):  # of another machine; older than its version
        return None
    if version != _VERSION:
        return None
    for name, (numbers, arrays) in _TAKES.items():
        function = getattr(found, name)
        function.argtypes = [ctypes.c_ssize_t] * numbers + [ctypes.c_void_p] * arrays
        function.restype = None
    return found


def missing() -> bool:
    """Whether they were not built, and nobody has said to do without."""
    return library() is None and not _unwanted()


def _unwanted() -> bool:
    return os.environ.get("GFRNN_CPU_KERNELS") == "0"


def usable(plan: Plan, device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether the kernels are here and compute this plan's steps sooner than torch's operators."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):  # tensors have no data, or any type
        return False
    here = device.type == "cpu" and dtype == torch.float32 and library() is not None
    return here and (plan.hidden_size * rows <= _MOST or torch.get_num_threads() == 1)


class Norms(NamedTuple):
    """Layer norm, for backward: what was normalised, and 1 / standard deviation."""

    normal_GHB: Tensor
    rstd_GB: Tensor
    cell_normal_HB: Tensor | None
    cell_rstd_B: Tensor | None


_NO_NORMS = (None, None, None, None)


def unit_forward(
    plan: Plan,
    w: LayerWeights,
    n_HB: Tensor,
    u_UHB: Tensor | None,
    s_HB: Tensor | None,
    h_HB: Tensor,
    cell: tuple[Tensor, Tensor] | None,
    h_next_HB: Tensor,
) -> Norms | None:
    """Pre-activations, without the bias of what is normalised, to activations in place; writes h_next.

    s: GRU's recurrent sum of the candidate. cell: LSTM's c before, and to write, after.
    """
    H, B = n_HB.shape
    G, new, norms = plan.unit_rows // H, n_HB.new_empty, None
    if w.gain is not None:
        cell_normal, cell_rstd = (None, None) if w.cell_gain is None else (new(H, B), new(B))
        norms = Norms(new(G, H, B), new(G, B), cell_normal, cell_rstd)
    normal, rstd, cell_normal, cell_rstd = norms or _NO_NORMS
    gates_norm = w.gain, w.bias, normal, rstd
    if plan.unit == "tanh":
        _call("tanh_forward", H, B, n_HB, h_next_HB, *gates_norm)
    elif cell is None:
        _call("gru_forward", H, B, n_HB, u_UHB, s_HB, h_HB, h_next_HB, *gates_norm)
    else:
        cell_norm = w.cell_gain, w.cell_bias, cell_normal, cell_rstd
        _call("lstm_forward", H, B, plan.cap_input_gate, n_HB, u_UHB, *cell, h_next_HB, *gates_norm, *cell_norm)
    return norms


def unit_backward(
    plan: Plan,
    w: LayerWeights,
    norms: Norms | None,
    n_HB: Tensor,
    u_UHB: Tensor | None,
    s_HB: Tensor | None,
    h_HB: Tensor,
    h_next_HB: Tensor,
    cell: tuple[Tensor, Tensor] | None,
    d_h_next_HB: Tensor,
    d_passed_HB: Tensor,
    d_h_HB: Tensor,
    d_c_HB: Tensor,
    d_KB: Tensor,
    sums: NormGradients,
) -> Tensor:
    """From the gradient of h_next, d_h_next + d_passed, to those of the pre-activations, the first rows of d_KB.

    Adds to d_h what goes past the products (GRU's); has d_c go from c after to c before (LSTM's); adds to the
    normalisation's. Returns the gradient of the candidate's recurrent sum.
    """
    H, B = n_HB.shape
    normal, rstd, cell_normal, cell_rstd = norms or _NO_NORMS
    ups, gates_norm, gates_sums = (d_h_next_HB, d_passed_HB), (w.gain, normal, rstd), (sums.gain, sums.bias)
    if plan.unit == "tanh":
        _call("tanh_backward", H, B, h_next_HB, *ups, d_KB, *gates_norm, *gates_sums)
    elif cell is None:
        d_s_HB = torch.empty_like(n_HB)
        _call("gru_backward", H, B, n_HB, u_UHB, s_HB, h_HB, *ups, d_h_HB, d_KB, d_s_HB, *gates_norm, *gates_sums)
        return d_s_HB
    else:
        given = n_HB, u_UHB, *cell, *ups, d_c_HB, d_KB
        cell_norm = w.cell_gain, w.cell_bias, cell_normal, cell_rstd
        cell_sums = sums.cell_gain, sums.cell_bias
        _call("lstm_backward", H, B, plan.cap_input_gate, *given, *gates_norm, *cell_norm, *gates_sums, *cell_sums)
    return d_KB[:H]


def gates_forward(a_LB: Tensor, g_LB: Tensor, h_LHB: Tensor) -> Tensor:
    """g: products, to which a is added, to gates in place. Returns g * h [L, H, B]."""
    gated_LHB = torch.empty_like(h_LHB)
    _call("gates_forward", *h_LHB.shape, a_LB, g_LB, h_LHB, gated_LHB)
    return gated_LHB


def gates_backward(d_gated_LHB: Tensor, g_LB: Tensor, h_LHB: Tensor, d_h_LHB: Tensor, d_a_LB: Tensor) -> None:
    """From the gradient of g * h: adds to that of h, writes that of the gates' pre-activations."""
    _call("gates_backward", *h_LHB.shape, d_gated_LHB, g_LB, h_LHB, d_h_LHB, d_a_LB)


def _call(name: str, *arguments: Tensor | int | None) -> None:
    loaded = library()
    assert loaded is not None
    getattr(loaded, name)(*(_pointer(each) if isinstance(each, Tensor) else each for each in arguments))


def _pointer(tensor: Tensor) -> int:
    if not (tensor.is_contiguous() and tensor.dtype == torch.float32):
        raise ValueError(f"kernels read contiguous float32, not strides {tensor.stride()} of {tensor.dtype}")
    return tensor.data_ptr()
