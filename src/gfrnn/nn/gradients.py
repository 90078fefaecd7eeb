"""The gradients of the weights: large products over all steps and rows, after backward through time, a layer at a time.

Each layer is a node of its own in the graph, so that a data-parallel engine can reduce one layer's gradients while the
next layer's are computed.

Legend: T steps, B rows, R = T * B, L layers, H units, G, K, Lg as in plan.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gfrnn.nn.plan import LayerWeights, Plan
from gfrnn.nn.products import packed, product_transposed


class Slopes(NamedTuple):
    """What the gradients are made of: those of what consecutive steps computed, and what they read."""

    d_LKTB: Tensor
    """Of the pre-activations, before normalisation."""
    d_s_LHTB: Tensor
    """Of the candidates' recurrent sums."""
    bias_LK: Tensor
    """The former summed over steps and rows."""
    hidden_bias_LH: Tensor
    """The latter."""
    before_LHTB: Tensor
    """h before each step."""
    below: Callable[[int], Tensor]
    """Layer -> [H, T, B], what it read of the layer below."""
    g_LLTB: Tensor | None
    """Global gates, by the layer where they end."""
    owner: object = None
    """Whoever writes to these tensors again when nobody holds it any more."""


class NormGradients:
    """Sums over steps of the gradients of one layer's normalisation parameters; None where it has none."""

    def __init__(self, w: LayerWeights):
        self.gain, self.bias = _zeros(w.gain), _zeros(w.gain)
        self.cell_gain, self.cell_bias = _zeros(w.cell_gain), _zeros(w.cell_bias)

    def add(self, rows: slice, d_GHB: Tensor, normal_GHB: Tensor) -> None:
        """A step's, of some rows of pre-activations: from the gradient after normalisation, and the normalised."""
        assert self.bias is not None
        assert self.gain is not None
        self.bias[rows] += d_GHB.sum(-1).flatten()
        self.gain[rows] += (d_GHB * normal_GHB).sum(-1).flatten()

    def add_cell(self, d_HB: Tensor, normal_HB: Tensor) -> None:
        """Likewise, of the cell."""
        assert self.cell_bias is not None
        assert self.cell_gain is not None
        self.cell_bias += d_HB.sum(-1)
        self.cell_gain += (d_HB * normal_HB).sum(-1)


def _zeros(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.zeros_like(like)


class WeightGradients:
    """Of all layers: `start`; `add` what steps leave, and `make` it before more is added; `take` each layer's."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def start(self, weights: list[LayerWeights], layers: set[int]) -> None:
        """For one pass of backward, in which these layers may be asked for. What an earlier pass left is dropped."""
        self.weights, self.left = weights, layers
        self.norms = [NormGradients(w) for w in weights]
        """To which whoever runs steps back adds."""
        self.sums: dict[int, LayerWeights] = {}
        self.products: _Products | None = None

    def add(self, slopes: Slopes) -> None:
        if self.left:
            self.products = _Products(self.plan, slopes, self.weights[0].bias.dtype)

    def make(self) -> None:
        """The products of what was added, which is freed."""
        if self.products is not None:
            for j in self.left:
                self.sums[j] = self.products.layer(j, self.weights[j], self.sums.pop(j, None))
            self.products = None

    def take(self, j: int) -> LayerWeights:
        """The gradients of layer j's weights. The last of them frees everything."""
        assert self.products is not None
        found, norm = self.products.layer(j, self.weights[j], self.sums.pop(j, None)), self.norms[j]
        self.left.discard(j)
        if not self.left:
            self.products, self.weights = None, []
        bias = found.bias
        if norm.bias is not None:  # the normalised rows' is added after that
            bias = torch.cat([norm.bias, bias[len(norm.bias) :]])
        return found._replace(bias=bias, gain=norm.gain, cell_gain=norm.cell_gain, cell_bias=norm.cell_bias)


class _Products:
    """Of some steps, a layer at a time; what several layers read is made once."""

    def __init__(self, plan: Plan, slopes: Slopes, dtype: torch.dtype):
        self.plan, self.slopes, self.dtype = plan, slopes, dtype
        self.narrow = plan.compute_dtype or dtype
        before_LHR = slopes.before_LHTB.to(self.narrow).flatten(2)
        self.all_SR = packed(before_LHR.flatten(0, 1)) if plan.feedback != "none" else None
        self.own_LHR = before_LHR if plan.unit_sources == 1 else None
        self.gates_LLS = None
        if self.all_SR is not None and slopes.g_LLTB is not None:
            d_GR = _columns(slopes.d_LKTB[:, plan.unit_rows :], self.narrow)
            gates_GS = product_transposed(d_GR, self.all_SR, self.dtype)
            self.gates_LLS = gates_GS.unflatten(0, (plan.num_layers, -1))

    def layer(self, j: int, w: LayerWeights, sums: LayerWeights | None) -> LayerWeights:
        """Those of layer j up to hidden_bias, added to `sums`."""
        plan, slopes, narrow = self.plan, self.slopes, self.narrow
        H, GH = plan.hidden_size, plan.unit_rows
        d_KR, d_s_HR = slopes.d_LKTB[j].flatten(1), slopes.d_s_LHTB[j].flatten(1)
        narrow_KR = d_KR.to(narrow)

        def product(name: str, left_MR: Tensor, right_NR: Tensor) -> Tensor:
            """left @ right.T, added to the sum in place."""
            out = product_transposed(left_MR, right_NR, self.dtype)
            return out if sums is None else getattr(sums, name).add_(out)

        below = None
        if w.below is not None:
            below = product("below", narrow_KR, packed(_columns(slopes.below(j), narrow, rows=H)))
        own_SR = self.all_SR if self.own_LHR is None else self.own_LHR[j]
        assert own_SR is not None
        unit = product("unit", narrow_KR[H:GH], own_SR) if w.unit is not None else None
        if slopes.g_LLTB is not None:
            source_SR = _columns(slopes.before_LHTB * slopes.g_LLTB[j].unsqueeze(1), narrow)
        else:
            source_SR = own_SR if self.all_SR is None else self.all_SR
        candidate = product("candidate", d_s_HR.to(narrow), source_SR)

        gates = self.gates_LLS[j] if self.gates_LLS is not None else None
        bias = slopes.bias_LK[j].clone()
        hidden_bias = slopes.hidden_bias_LH[j].clone() if w.hidden_bias is not None else None
        if sums is not None:
            bias += sums.bias
            if gates is not None and sums.gates is not None:
                gates = gates + sums.gates
            if hidden_bias is not None and sums.hidden_bias is not None:
                hidden_bias += sums.hidden_bias
        return LayerWeights(below, candidate, unit, gates, bias, hidden_bias, None, None, None)


class LayerToken(torch.autograd.Function):
    """Stands for one layer's weights in the graph of the recurrence; its backward makes their gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: WeightGradients, layer: int, *weights: Tensor | None) -> Tensor:
        ctx.gradients, ctx.layer = gradients, layer
        bias = LayerWeights(*weights).bias  # type: ignore[arg-type]
        return bias.new_zeros(())  # where the weights are: that decides where backward runs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.gradients.take(ctx.layer)


def _columns(x: Tensor, dtype: torch.dtype, rows: int = -1) -> Tensor:
    """[.., T, B] as [rows, R] of `dtype`, its columns next to one another."""
    return x.to(dtype).reshape(rows, x.shape[-2] * x.shape[-1])
