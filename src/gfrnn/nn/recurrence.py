"""The fast path: T steps of gated feedback as one autograd.Function with its own backward through time.

Most of a step depends only on h*_{t-1}, so it is done first, in a few large products (`_Products.recurrent`); what is
left in the chain over layers is one product with the layer below, the global gates' weighted sum and the unit. Since a
global gate is a scalar, U^{i->j} h^i is made for all pairs before any gate is known. Backward keeps the gradients of
all pre-activations and makes the weight gradients after the loop, as products over all T * B rows, a layer at a time.

Legend: T steps, B rows, L layers, H units, G, K as in plan.py, N = K * (L with input skips, else 1).
Products have operands of plan.compute_dtype; everything kept between them has the parameters' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gfrnn.nn import units
from gfrnn.nn.plan import LayerWeights, Plan, recurrent_rows

_FIELDS = len(LayerWeights._fields)


def recurrence(
    plan: Plan,
    x_TBN: Tensor,
    h_BLH: Tensor,
    c_BLH: Tensor | None,
    below_mask_LBH: Tensor | None,
    weights: list[LayerWeights],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Same arguments, result and gradients as reference.recurrence_reference."""
    flat = [tensor for layer in weights for tensor in layer]
    run: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = Recurrence.apply
    return run(plan, x_TBN, h_BLH, c_BLH, below_mask_LBH, *flat)


class _Products:
    """The weights as the products of a step read them, in the compute dtype, and those products."""

    def __init__(self, plan: Plan, weights: list[LayerWeights], dtype: torch.dtype):
        self.plan, self.dtype = plan, dtype
        L, H = plan.num_layers, plan.hidden_size
        all_rows, own_rows = plan.all_rows, plan.own_rows
        self.n_all = all_rows.stop - all_rows.start
        self.n_own = own_rows.stop - own_rows.start
        self.below = [w.below.to(dtype) if w.below is not None else None for w in weights]
        self.all: Tensor | None = None  # [L * n_all, L * H]
        if self.n_all:
            self.all = torch.cat([recurrent_rows(w, plan, all_rows) for w in weights]).to(dtype)
        self.own = [recurrent_rows(w, plan, own_rows).to(dtype) for w in weights] if self.n_own else []
        self.candidate: list[Tensor] = []  # target j: [H, L * H]
        self.pairs: list[Tensor] = []  # source i: [L * H (targets), H]
        if plan.feedback == "gated":
            self.candidate = [w.candidate.to(dtype) for w in weights]
            stacked = torch.stack(self.candidate).unflatten(2, (L, H))
            self.pairs = [stacked[:, :, i].reshape(L * H, H) for i in range(L)]

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def recurrent(self, h_BLH: Tensor, r_BLK: Tensor, pairs_LBLH: Tensor | None) -> None:
        """All that needs only h at t - 1: r, the recurrent pre-activations, and pairs[i, :, j] = U^{i->j} h^i."""
        h_BLH = self.cast(h_BLH)
        B = len(h_BLH)
        if self.all is not None:
            product = _product(h_BLH.reshape(B, -1), self.all.T, r_BLK.dtype)
            r_BLK[:, :, self.plan.all_rows] = product.view(B, -1, self.n_all)
        for j, weight in enumerate(self.own):
            r_BLK[:, j, self.plan.own_rows] = _product(h_BLH[:, j], weight.T, r_BLK.dtype)
        if pairs_LBLH is not None:
            for i, weight in enumerate(self.pairs):
                pairs_LBLH[i] = _product(h_BLH[:, i], weight.T, r_BLK.dtype).view(pairs_LBLH.shape[1:])

    def recurrent_backward(self, d_BLK: Tensor, d_h_BLH: Tensor) -> None:
        """Adds to d_h what r's gradient d sends back."""
        B = len(d_BLK)
        if self.all is not None:
            d_all = self.cast(d_BLK[:, :, self.plan.all_rows]).reshape(B, -1)
            _add_product(d_h_BLH.view(B, -1), d_all, self.all)
        for j, weight in enumerate(self.own):
            _add_product(d_h_BLH[:, j], self.cast(d_BLK[:, j, self.plan.own_rows]), weight)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with a result of `dtype`, where a and b may be of a narrower one.

    Products accumulate in fp32 everywhere; the CPU has none with a wider result and rounds once, at the end.
    """
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, where a and b may be of a narrower dtype."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(_product(a, b, out.dtype))


class Recurrence(torch.autograd.Function):
    """See `recurrence`; takes the LayerWeights flattened."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        x_TBN: Tensor,
        h_BLH: Tensor,
        c_BLH: Tensor | None,
        mask_LBH: Tensor | None,
        *flat: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        weights = _layers(flat)
        T, B = x_TBN.shape[:2]
        L, H, GH, K = plan.num_layers, plan.hidden_size, plan.unit_rows, plan.rows
        products = _Products(plan, weights, plan.compute_dtype or x_TBN.dtype)
        gated, norm, gru, lstm = plan.feedback == "gated", plan.layer_norm, plan.unit == "gru", plan.has_cell

        a_TBLK = x_TBN.new_empty(T, B, L, K)  # pre-activations, then activations
        hs_TBLH = x_TBN.new_empty(T + 1, B, L, H)
        hs_TBLH[0] = h_BLH
        cs_TBLH = x_TBN.new_empty(T + 1 if lstm else 0, B, L, H)
        if c_BLH is not None:
            cs_TBLH[0] = c_BLH
        s_TBLH = x_TBN.new_empty(T if gru else 0, B, L, H)  # GRU: what the reset gate multiplies
        normal_TBLG = x_TBN.new_empty(T if norm else 0, B, L, GH)
        rstd_TBLg = x_TBN.new_empty(T if norm else 0, B, L, GH // H)
        cell_TBLH = x_TBN.new_empty(T if norm and lstm else 0, B, L, H)
        cell_rstd_TBL1 = x_TBN.new_empty(T if norm and lstm else 0, B, L, 1)
        r_BLK = x_TBN.new_empty(B, L, K)
        pairs_LBLH = x_TBN.new_empty(L, B, L, H) if gated else None

        for t in range(T):
            products.recurrent(hs_TBLH[t], r_BLK, pairs_LBLH)
            below_BH = hs_TBLH[t + 1, :, 0]
            for j, w in enumerate(weights):
                a = a_TBLK[t, :, j]
                if plan.input_skips or j == 0:
                    a.copy_(x_TBN[t, :, j * K : (j + 1) * K])
                else:
                    a.zero_()
                weight = products.below[j]
                if weight is not None:
                    y = below_BH if mask_LBH is None else below_BH * mask_LBH[j - 1]
                    _add_product(a, products.cast(y), weight.T)
                a[:, H:] += r_BLK[:, j, H:]

                if pairs_LBLH is not None:
                    g = a[:, GH:].add_(w.bias[GH:]).sigmoid_()
                    s = torch.einsum("bi,ibh->bh", g, pairs_LBLH[:, :, j])
                else:
                    s = r_BLK[:, j, :H]

                h_next = hs_TBLH[t + 1, :, j]
                if gru:
                    s_TBLH[t, :, j] = s if w.hidden_bias is None else s + w.hidden_bias
                    _squash(a, slice(H, GH), w, H, normal_TBLG, rstd_TBLg, t, j)
                    units.gru_gates_forward(a[:, :GH], s_TBLH[t, :, j])
                    _squash(a, slice(0, H), w, H, normal_TBLG, rstd_TBLg, t, j)
                    a[:, :H].tanh_()
                    units.gru_output_forward(a[:, :GH], hs_TBLH[t, :, j], h_next)
                else:
                    a[:, :H] += s
                    _squash(a, slice(0, GH), w, H, normal_TBLG, rstd_TBLg, t, j)
                    if lstm:
                        cell = cs_TBLH[t + 1, :, j]
                        units.lstm_gates_forward(a[:, :GH], cs_TBLH[t, :, j], cell)
                        if w.cell_gain is not None and w.cell_bias is not None:
                            cell_TBLH[t, :, j], cell_rstd_TBL1[t, :, j] = units.norm_forward(cell)
                            cell = torch.addcmul(w.cell_bias, cell_TBLH[t, :, j], w.cell_gain)
                        torch.mul(a[:, 3 * H : GH], torch.tanh(cell), out=h_next)
                    else:
                        torch.tanh(a[:, :H], out=h_next)
                below_BH = h_next + below_BH if plan.residual and j > 0 else h_next

        ctx.plan, ctx.products = plan, products
        ctx.save_for_backward(
            mask_LBH, a_TBLK, hs_TBLH, cs_TBLH, s_TBLH, normal_TBLG, rstd_TBLg, cell_TBLH, cell_rstd_TBL1, *flat
        )
        h_next_BLH = hs_TBLH[T].clone()
        c_next_BLH = cs_TBLH[T].clone() if lstm else None
        passed_TBLH = _passed_up(plan, hs_TBLH[1:])
        y_TBY = passed_TBLH.flatten(2) if plan.output_skips else passed_TBLH[:, :, -1]
        return y_TBY.clone(memory_format=torch.contiguous_format), h_next_BLH, c_next_BLH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TBY: Tensor, d_h_last_BLH: Tensor, d_c_last_BLH: Tensor | None) -> tuple[Any, ...]:
        plan: Plan = ctx.plan
        products: _Products = ctx.products
        mask_LBH, a_TBLK, hs_TBLH, cs_TBLH, s_TBLH, normal_TBLG, rstd_TBLg, cell_TBLH, cell_rstd_TBL1, *flat = (
            ctx.saved_tensors
        )
        weights = _layers(flat)
        T, B = a_TBLK.shape[:2]
        L, H, GH = plan.num_layers, plan.hidden_size, plan.unit_rows
        gated, gru, lstm = plan.feedback == "gated", plan.unit == "gru", plan.has_cell

        d_TBLK = torch.empty_like(a_TBLK)  # gradients of pre-activations (before normalisation)
        d_s_TBLH = torch.empty_like(s_TBLH) if gru else d_TBLK[..., :H]  # of the candidate's recurrent sum
        gain_grads = [_NormGradients(w) for w in weights]
        d_h_BLH = d_h_last_BLH.clone()  # of h at t, as far as later steps ask for it
        d_c_BLH = d_c_last_BLH.contiguous().clone() if d_c_last_BLH is not None else a_TBLK.new_zeros(B, L, H)
        for t in reversed(range(T)):
            d_h_before_BLH = a_TBLK.new_zeros(B, L, H)
            d_below_BH = d_y_TBY[t, :, -H:]  # of what layer j passes up
            for j in reversed(range(L)):
                w, a, d = weights[j], a_TBLK[t, :, j], d_TBLK[t, :, j]
                d_h = d_h_BLH[:, j] + d_below_BH
                h_before = hs_TBLH[t, :, j]
                if lstm:
                    o = a[:, 3 * H : GH]
                    if w.cell_gain is not None and w.cell_bias is not None:
                        normal = cell_TBLH[t, :, j]
                        tanh_c = torch.tanh(torch.addcmul(w.cell_bias, normal, w.cell_gain))
                        d_cell = d_h * o * (1 - tanh_c * tanh_c)
                        gain_grads[j].add_cell(d_cell, normal)
                        d_cell = units.norm_backward(d_cell * w.cell_gain, normal, cell_rstd_TBL1[t, :, j])
                    else:
                        tanh_c = torch.tanh(cs_TBLH[t + 1, :, j])
                        d_cell = d_h * o * (1 - tanh_c * tanh_c)
                    torch.mul(d_h * tanh_c, o * (1 - o), out=d[:, 3 * H : GH])
                    d_c_BLH[:, j] = units.lstm_gates_backward(
                        d_cell + d_c_BLH[:, j], a[:, :GH], cs_TBLH[t, :, j], d[:, :GH]
                    )
                    _squash_backward(d, slice(0, GH), w, H, normal_TBLG, rstd_TBLg, t, j, gain_grads[j])
                elif gru:
                    d_h_before_BLH[:, j] += units.gru_output_backward(d_h, a[:, :GH], h_before, d[:, :GH])
                    _squash_backward(d, slice(0, H), w, H, normal_TBLG, rstd_TBLg, t, j, gain_grads[j])
                    d_s_TBLH[t, :, j] = units.gru_gates_backward(d[:, :H], a[:, :GH], s_TBLH[t, :, j], d[:, :GH])
                    _squash_backward(d, slice(H, GH), w, H, normal_TBLG, rstd_TBLg, t, j, gain_grads[j])
                else:
                    n = hs_TBLH[t + 1, :, j]
                    torch.mul(d_h, 1 - n * n, out=d[:, :H])
                    _squash_backward(d, slice(0, H), w, H, normal_TBLG, rstd_TBLg, t, j, gain_grads[j])

                if gated:  # gradient of the gated states [g^i h^i], which gives that of g and of h
                    d_gated_BH = _product(products.cast(d_s_TBLH[t, :, j]), products.candidate[j], a.dtype)
                    d_gated_BLH = d_gated_BH.view(B, L, H)
                    g = a[:, GH:]
                    d[:, GH:] = torch.einsum("blh,blh->bl", d_gated_BLH, hs_TBLH[t]) * (g * (1 - g))
                    d_h_before_BLH.addcmul_(d_gated_BLH, g.unsqueeze(-1))

                if j > 0:
                    weight = products.below[j]
                    assert weight is not None
                    passed = _product(products.cast(d), weight, a.dtype)
                    if mask_LBH is not None:
                        passed *= mask_LBH[j - 1]
                    if plan.residual:
                        passed = passed + d_below_BH
                    d_below_BH = passed + d_y_TBY[t, :, (j - 1) * H : j * H] if plan.output_skips else passed
            d_r_BLK = d_TBLK[t]
            if gru and not gated:  # the candidate's recurrent part has the gradient of what r multiplies
                d_r_BLK = torch.cat([d_s_TBLH[t], d_TBLK[t, :, :, H:]], dim=-1)
            products.recurrent_backward(d_r_BLK, d_h_before_BLH)
            d_h_BLH = d_h_before_BLH

        flat_grads = _weight_gradients(plan, products, weights, a_TBLK, hs_TBLH, d_TBLK, d_s_TBLH, mask_LBH, gain_grads)
        d_x_TBN = d_TBLK.flatten(2) if plan.input_skips else d_TBLK[:, :, 0]
        return None, d_x_TBN, d_h_BLH, d_c_BLH if lstm else None, None, *flat_grads


def _weight_gradients(
    plan: Plan,
    products: _Products,
    weights: list[LayerWeights],
    a_TBLK: Tensor,
    hs_TBLH: Tensor,
    d_TBLK: Tensor,
    d_s_TBLH: Tensor,
    mask_LBH: Tensor | None,
    gain_grads: list[_NormGradients],
) -> list[Tensor | None]:
    """Gradients of every field of every layer, as large products over all T * B rows."""
    L, H, GH = plan.num_layers, plan.hidden_size, plan.unit_rows
    T = len(a_TBLK)
    dtype = a_TBLK.dtype
    before_RLH = products.cast(hs_TBLH[:T]).flatten(0, 1)  # R = T * B
    passed_TBLH = _passed_up(plan, hs_TBLH[1:])
    grads: list[Tensor | None] = []
    for j, w in enumerate(weights):
        d_RK = d_TBLK[:, :, j].flatten(0, 1)
        d_s_RH = d_s_TBLH[:, :, j].flatten(0, 1)
        # gradients of the K rows' recurrent parts; the GRU's candidate differs from its pre-activation's
        narrow_RK = products.cast(d_RK)
        narrow_s_RH = products.cast(d_s_RH)

        below = None
        if w.below is not None:
            y_TBH = passed_TBLH[:, :, j - 1]
            if mask_LBH is not None:
                y_TBH = y_TBH * mask_LBH[j - 1]
            below = _product(narrow_RK.T, products.cast(y_TBH).flatten(0, 1), dtype)

        sources_of = {1: before_RLH[:, j], L: before_RLH.flatten(1)}
        if plan.feedback == "gated":
            gated_RLH = products.cast(a_TBLK[:, :, j, GH:].flatten(0, 1).unsqueeze(-1)) * before_RLH
            candidate = _product(narrow_s_RH.T, gated_RLH.flatten(1), dtype)
        else:
            candidate = _product(narrow_s_RH.T, sources_of[plan.candidate_sources], dtype)
        unit = gates = None
        if w.unit is not None:
            unit = _product(narrow_RK[:, H:GH].T, sources_of[plan.unit_sources], dtype)
        if w.gates is not None:
            gates = _product(narrow_RK[:, GH:].T, before_RLH.flatten(1), dtype)

        bias = torch.cat([gain_grads[j].bias, d_RK[:, GH:].sum(0)]) if plan.layer_norm else d_RK.sum(0)
        hidden_bias = d_s_RH.sum(0) if w.hidden_bias is not None else None
        norm = gain_grads[j]
        grads += LayerWeights(
            below,
            candidate,
            unit,
            gates,
            bias,
            hidden_bias,
            norm.gain if w.gain is not None else None,
            norm.cell_gain if w.cell_gain is not None else None,
            norm.cell_bias if w.cell_bias is not None else None,
        )
    return grads


class _NormGradients:
    """Sums over steps of the gradients of one layer's normalisation parameters."""

    def __init__(self, w: LayerWeights):
        if w.gain is not None:
            self.gain, self.bias = torch.zeros_like(w.gain), torch.zeros_like(w.gain)
        if w.cell_gain is not None:
            self.cell_gain, self.cell_bias = torch.zeros_like(w.cell_gain), torch.zeros_like(w.cell_gain)

    def add(self, rows: slice, d: Tensor, normal: Tensor) -> None:
        self.bias[rows] += d.sum(0)
        self.gain[rows] += (d * normal).sum(0)

    def add_cell(self, d: Tensor, normal: Tensor) -> None:
        self.cell_bias += d.sum(0)
        self.cell_gain += (d * normal).sum(0)


def _squash(
    a: Tensor, rows: slice, w: LayerWeights, H: int, normal_TBLG: Tensor, rstd_TBLg: Tensor, t: int, j: int
) -> None:
    """Normalises rows of a over H (if the plan does), saves what backward needs, adds the bias; in place."""
    if w.gain is None:
        a[:, rows] += w.bias[rows]
        return
    normal, rstd = units.norm_forward(a[:, rows].unflatten(-1, (-1, H)))
    normal_TBLG[t, :, j, rows] = normal.flatten(1)
    rstd_TBLg[t, :, j, rows.start // H : rows.stop // H] = rstd.squeeze(-1)
    torch.addcmul(w.bias[rows], normal.flatten(1), w.gain[rows], out=a[:, rows])


def _squash_backward(
    d: Tensor,
    rows: slice,
    w: LayerWeights,
    H: int,
    normal_TBLG: Tensor,
    rstd_TBLg: Tensor,
    t: int,
    j: int,
    gradients: _NormGradients,
) -> None:
    """Turns the gradient after _squash into the one before it, in place."""
    if w.gain is None:
        return
    normal = normal_TBLG[t, :, j, rows]
    gradients.add(rows, d[:, rows], normal)
    rstd = rstd_TBLg[t, :, j, rows.start // H : rows.stop // H].unsqueeze(-1)
    d_normal = (d[:, rows] * w.gain[rows]).unflatten(-1, (-1, H))
    d[:, rows] = units.norm_backward(d_normal, normal.unflatten(-1, (-1, H)), rstd).flatten(1)


def _passed_up(plan: Plan, hs_TBLH: Tensor) -> Tensor:
    """What each layer passes up: its output, plus (residual) what the layer below passed."""
    return hs_TBLH.cumsum(dim=2) if plan.residual else hs_TBLH


def _layers(flat: Any) -> list[LayerWeights]:
    return [LayerWeights(*flat[i : i + _FIELDS]) for i in range(0, len(flat), _FIELDS)]
