"""The pointwise part of a unit at one step of one layer, forward and backward by hand.

Everything has its features first and the rows of the batch last, as the products that make and read it have. Rows of a
pre-activation come in the order candidate, unit gates, global gates (K = G * H + Lg):
    tanh: c~;  GRU: n, r, z;  LSTM: c~, i, f, o.
A candidate is n_HB, the unit gates are u_UHB (U = G - 1), their gradients are written into d_GHB, candidate first.
Equations: Chung et al. 2015, sections 2 and 4; the LSTM's capped input gate: Melis et al. 2020 (arXiv 1909.01792).

Legend: B rows, H units a layer, G = 1 + unit gates (tanh 1, GRU 3, LSTM 4), Lg global gates a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM_EPS = 1e-5
# (gradient of f(a), f(a), grad_input=) -> gradient of a, one pass where the formula takes three
tanh_backward = torch.ops.aten.tanh_backward.grad_input
sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


# Normalisation over the units of a layer --------------------------------------------------------------------


def norm_forward(x_GHB: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., H, B] -> (normalised over H, 1 / standard deviation [.., 1, B]); layer norm without gain and bias."""
    variance, mean = torch.var_mean(x_GHB, dim=-2, keepdim=True, correction=0)
    rstd = torch.rsqrt(variance + NORM_EPS)
    return (x_GHB - mean) * rstd, rstd


def norm_backward(d_normal: Tensor, normal: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of norm_forward's x from that of its result."""
    mean = d_normal.mean(dim=-2, keepdim=True)
    slope = (d_normal * normal).mean(dim=-2, keepdim=True)
    return (d_normal - mean - normal * slope) * rstd


# LSTM -------------------------------------------------------------------------------------------------------


def lstm_gates_forward(n_HB: Tensor, u_3HB: Tensor, c_HB: Tensor, c_next_HB: Tensor, *, capped: bool = False) -> None:
    """n, u: pre-activations to activations in place; c_next = f * c + i * c~. capped: i is at most 1 - f."""
    n_HB.tanh_()
    i, f, _ = u_3HB.sigmoid_()
    if capped:
        torch.minimum(i, 1 - f, out=i)
    torch.mul(f, c_HB, out=c_next_HB)
    c_next_HB.addcmul_(i, n_HB)


def lstm_gates_backward(
    d_c_HB: Tensor, n_HB: Tensor, u_3HB: Tensor, c_HB: Tensor, d_4HB: Tensor, *, capped: bool = False
) -> Tensor:
    """From the gradient of c_next: those of c~, i, f's pre-activations, written into d. Returns the gradient of c.

    capped: where i is 1 - f, its gradient is f's, negative, and not its own pre-activation's.
    """
    i, f = u_3HB[0], u_3HB[1]
    tanh_backward(d_c_HB * i, n_HB, grad_input=d_4HB[0])
    d_i, d_f = d_c_HB * n_HB, d_c_HB * c_HB
    if capped:
        at_cap = i >= 1 - f  # never above it: what forward left there is that very number
        d_f.sub_(d_i * at_cap)
        d_i.masked_fill_(at_cap, 0)
    sigmoid_backward(d_i, i, grad_input=d_4HB[1])
    sigmoid_backward(d_f, f, grad_input=d_4HB[2])
    return d_c_HB * f


# GRU --------------------------------------------------------------------------------------------------------


def gru_gates_forward(n_HB: Tensor, u_2HB: Tensor, s_HB: Tensor) -> None:
    """Reset and update gates to activations in place; the candidate becomes x_n + r * s, not yet squashed."""
    r, _ = u_2HB.sigmoid_()
    n_HB.addcmul_(r, s_HB)


def gru_output_forward(n_HB: Tensor, u_2HB: Tensor, h_HB: Tensor, h_next_HB: Tensor) -> None:
    """h_next = z * h + (1 - z) * n."""
    dtype = h_HB.dtype  # autocast's products may be of another
    torch.lerp(n_HB.to(dtype), h_HB, u_2HB[1].to(dtype), out=h_next_HB)


def gru_output_backward(d_h_HB: Tensor, n_HB: Tensor, u_2HB: Tensor, h_HB: Tensor, d_3HB: Tensor) -> Tensor:
    """From the gradient of h_next: those of n's and z's pre-activations into d. Returns that of h through z."""
    z = u_2HB[1]
    tanh_backward(d_h_HB * (1 - z), n_HB, grad_input=d_3HB[0])
    sigmoid_backward(d_h_HB * (h_HB - n_HB), z, grad_input=d_3HB[2])
    return d_h_HB * z


def gru_gates_backward(d_n_HB: Tensor, u_2HB: Tensor, s_HB: Tensor, d_3HB: Tensor) -> Tensor:
    """From the gradient of x_n + r * s: that of r's pre-activation into d. Returns the gradient of s."""
    r = u_2HB[0]
    sigmoid_backward(d_n_HB * s_HB, r, grad_input=d_3HB[1])
    return d_n_HB * r
