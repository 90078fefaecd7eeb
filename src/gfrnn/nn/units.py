"""The pointwise part of a unit at one step of one layer, forward and backward by hand.

Rows of a pre-activation a_BK come in the order candidate, unit gates, global gates (K = G * H + Lg):
    tanh: c~;  GRU: n, r, z;  LSTM: c~, i, f, o.
Each `*_forward` turns pre-activations into activations in place. Each `*_backward` takes activations and the gradient
of the layer's output and writes gradients of pre-activations. Equations: Chung et al. 2015, sections 2 and 4.

Legend: B rows, H units a layer, G = 1 + unit gates (tanh 1, GRU 3, LSTM 4), Lg global gates a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM_EPS = 1e-5
GATES = {"tanh": 1, "gru": 3, "lstm": 4}  # G of each unit
"""Rows of pre-activation a unit has, in multiples of H."""


# Normalisation over the units of a layer --------------------------------------------------------------------


def norm_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., H] -> (normalised, 1 / standard deviation [..., 1]); layer norm without gain and bias."""
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    rstd = torch.rsqrt(variance + NORM_EPS)
    return (x - mean) * rstd, rstd


def norm_backward(d_normal: Tensor, normal: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of norm_forward's x from that of its result."""
    mean = d_normal.mean(dim=-1, keepdim=True)
    slope = (d_normal * normal).mean(dim=-1, keepdim=True)
    return (d_normal - mean - normal * slope) * rstd


# LSTM -------------------------------------------------------------------------------------------------------


def lstm_gates_forward(a_B4H: Tensor, c_BH: Tensor, c_next_BH: Tensor) -> None:
    """a: pre-activations to activations in place; c_next = f * c + i * c~."""
    H = c_BH.shape[-1]
    a_B4H[:, :H].tanh_()
    a_B4H[:, H:].sigmoid_()
    candidate, i, f = a_B4H[:, :H], a_B4H[:, H : 2 * H], a_B4H[:, 2 * H : 3 * H]
    torch.mul(f, c_BH, out=c_next_BH)
    c_next_BH.addcmul_(i, candidate)


def lstm_gates_backward(d_c_BH: Tensor, a_B4H: Tensor, c_BH: Tensor, d_a_B4H: Tensor) -> Tensor:
    """From the gradient of c_next: those of c~, i, f's pre-activations, written into d_a. Returns the gradient of c."""
    H = c_BH.shape[-1]
    candidate, i, f = a_B4H[:, :H], a_B4H[:, H : 2 * H], a_B4H[:, 2 * H : 3 * H]
    torch.mul(d_c_BH * i, 1 - candidate * candidate, out=d_a_B4H[:, :H])
    torch.mul(d_c_BH * candidate, i * (1 - i), out=d_a_B4H[:, H : 2 * H])
    torch.mul(d_c_BH * c_BH, f * (1 - f), out=d_a_B4H[:, 2 * H : 3 * H])
    return d_c_BH * f


# GRU --------------------------------------------------------------------------------------------------------


def gru_gates_forward(a_B3H: Tensor, s_BH: Tensor) -> None:
    """Reset and update gates to activations in place; the candidate becomes x_n + r * s, not yet squashed."""
    H = s_BH.shape[-1]
    a_B3H[:, H:].sigmoid_()
    a_B3H[:, :H].addcmul_(a_B3H[:, H : 2 * H], s_BH)


def gru_output_forward(a_B3H: Tensor, h_BH: Tensor, h_next_BH: Tensor) -> None:
    """h_next = z * h + (1 - z) * n."""
    H = h_BH.shape[-1]
    torch.lerp(a_B3H[:, :H], h_BH, a_B3H[:, 2 * H :], out=h_next_BH)


def gru_output_backward(d_h_BH: Tensor, a_B3H: Tensor, h_BH: Tensor, d_a_B3H: Tensor) -> Tensor:
    """From the gradient of h_next: those of n's and z's pre-activations into d_a. Returns that of h through z."""
    H = h_BH.shape[-1]
    n, z = a_B3H[:, :H], a_B3H[:, 2 * H :]
    torch.mul(d_h_BH * (1 - z), 1 - n * n, out=d_a_B3H[:, :H])
    torch.mul(d_h_BH * (h_BH - n), z * (1 - z), out=d_a_B3H[:, 2 * H :])
    return d_h_BH * z


def gru_gates_backward(d_n_BH: Tensor, a_B3H: Tensor, s_BH: Tensor, d_a_B3H: Tensor) -> Tensor:
    """From the gradient of x_n + r * s: that of r's pre-activation into d_a. Returns the gradient of s."""
    H = s_BH.shape[-1]
    r = a_B3H[:, H : 2 * H]
    torch.mul(d_n_BH * s_BH, r * (1 - r), out=d_a_B3H[:, H : 2 * H])
    return d_n_BH * r
