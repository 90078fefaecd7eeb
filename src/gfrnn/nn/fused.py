"""The same steps as steps.py where the pointwise work is in kernels.py: on CUDA, small enough to be a CUDA graph.

A step is one product for all that reads every layer at t - 1 as it is and one (of batches) for all that reads its own
layer; then, a layer, the product with the layer below, the gates, the candidate's product with what they let through,
and the unit. Backward has the same products with the weights transposed, as views, in the reverse order. Nothing here
waits for the device, and no shape depends on data.

The states that products read are kept in their type with the layers and features first, [L, H, T + 1, B]: step t of it
is the right operand of a product of step t, and all of it that of a weight gradient. Gradients of pre-activations
likewise.

Legend: T steps, B rows, L layers, H units, G, K as in plan.py, N = K * (L with input skips, else 1), Y rows of the
output, H or L * H; S = H * sources of a product, P rows a layer of a stack of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gfrnn.nn import kernels
from gfrnn.nn.gradients import Slopes
from gfrnn.nn.inputs import InputPart
from gfrnn.nn.kernels import Rows
from gfrnn.nn.plan import LayerWeights, Plan


@dataclass
class FusedTrace:
    """What consecutive steps leave for backward."""

    steps: range
    hs_TLHB: Tensor
    """h before the first step and after each: T + 1."""
    cs_TLHB: Tensor
    """Likewise the LSTM's cell, else empty."""
    activations: Tensor
    """[T, L, G * H, B]: candidates, then unit gates; of the tanh unit a view of hs_TLHB."""
    s_TLHB: Tensor | None
    """GRU: what the reset gate multiplies."""
    g_TLLB: Tensor | None
    """[T, L target, L source, B] global gates."""
    before_LHTB: Tensor
    """[L, H, T + 1, B]: hs in the type of products' operands."""
    below_LHTB: Tensor | None
    """[L - 1, H, T, B] in that type: what layer j + 1 reads of layer j at the same step; None: before_LHTB[:-1, :, 1:].
    """


class _Stack:
    """Weights of all layers that are multiplied at once, a layer's under one another, in the type of operands."""

    def __init__(self, weights: list[LayerWeights], names: list[str], dtype: torch.dtype, *, own: bool):
        """own: a layer's read what is its own, not all layers."""
        self.own = own
        self.rows: dict[str, int] = {}
        P = 0
        for name in names:
            self.rows[name] = P
            P += len(getattr(weights[0], name))
        self.left_LPS = weights[0].bias.new_empty(len(weights), P, getattr(weights[0], names[0]).shape[1], dtype=dtype)

    def load(self, weights: list[LayerWeights]) -> None:
        for left_PS, w in zip(self.left_LPS, weights, strict=True):
            for name, row in self.rows.items():
                part = getattr(w, name)
                left_PS[row : row + len(part)] = part  # rounded on the way: weights are large

    def find(self, matrix: Tensor, name: str, j: int) -> Rows:
        """Layer j's rows for `name` of a [L * P, B]."""
        return Rows(matrix, j * self.left_LPS.shape[1] + self.rows[name])

    def forward(self, before_LHB: Tensor, dtype: torch.dtype) -> Tensor:
        """[L * P, B] from the states before the step."""
        if self.own:
            return _product(self.left_LPS, before_LHB, dtype).flatten(0, 1)
        return _product(self.left_LPS.flatten(0, 1), before_LHB.flatten(0, 1), dtype)

    def backward(self, d_MB: Tensor, dtype: torch.dtype) -> Tensor:
        """[L, H, B] from the gradients of the L * P rows."""
        L, P, _ = self.left_LPS.shape
        if self.own:
            return _product(self.left_LPS.transpose(1, 2), d_MB.view(L, P, -1), dtype)
        return _product(self.left_LPS.flatten(0, 1).t(), d_MB, dtype).view(L, -1, d_MB.shape[1])


class Left:
    """The weights as left operands, once for all steps and both directions."""

    def __init__(self, plan: Plan, weights: list[LayerWeights], dtype: torch.dtype):
        everywhere: list[str] = []
        own: list[str] = []
        if plan.feedback != "gated":
            (everywhere if plan.feedback == "full" else own).append("candidate")
        if plan.unit != "tanh":
            (everywhere if plan.unit_sources > 1 else own).append("unit")
        if plan.feedback == "gated":
            everywhere.append("gates")
        self.everywhere = _Stack(weights, everywhere, dtype, own=False) if everywhere else None
        self.own = _Stack(weights, own, dtype, own=True) if own else None
        gated = plan.feedback == "gated"
        self.candidate = [torch.empty_like(w.candidate, dtype=dtype) if gated else None for w in weights]
        self.below = [torch.empty_like(w.below, dtype=dtype) if w.below is not None else None for w in weights]
        self.bias_LK = torch.stack([w.bias for w in weights])
        hidden = [w.hidden_bias for w in weights if w.hidden_bias is not None]
        self.hidden_bias_LH = torch.stack(hidden) if hidden else None
        self.load(weights)

    def load(self, weights: list[LayerWeights]) -> None:
        """Takes the values of other weights."""
        for stack in (self.everywhere, self.own):
            if stack is not None:
                stack.load(weights)
        for j, w in enumerate(weights):
            for ours, given in (
                (self.candidate[j], w.candidate),
                (self.below[j], w.below),
                (self.bias_LK[j], w.bias),
                (self.hidden_bias_LH[j] if self.hidden_bias_LH is not None else None, w.hidden_bias),
            ):
                if ours is not None and given is not None:
                    ours.copy_(given)

    def find(self, name: str, j: int, everywhere: Tensor | None, own: Tensor | None) -> Rows | None:
        """Layer j's rows for `name` in what belongs to one of the stacks, None if it is in neither."""
        for stack, matrix in ((self.everywhere, everywhere), (self.own, own)):
            if stack is not None and matrix is not None and name in stack.rows:
                return stack.find(matrix, name, j)
        return None


class FusedSteps:
    """As steps.Steps, of which this is the same: runs steps, and back."""

    def __init__(self, plan: Plan, left: Left, mask_LHB: Tensor | None, lengths_B: Tensor | None, dtype: torch.dtype):
        """mask_LHB: [L - 1, H, B], on what the layer above reads. lengths_B: of rows. dtype: of parameters, float32."""
        self.plan, self.left, self.mask_LHB, self.lengths_B, self.dtype = plan, left, mask_LHB, lengths_B, dtype
        self.narrow = plan.compute_dtype or dtype

    def forward(self, x: InputPart, steps: range, h_LHB: Tensor, c_LHB: Tensor | None) -> FusedTrace:
        """From the state before the first of `steps`."""
        plan, left, dtype = self.plan, self.left, self.dtype
        L, H, GH = plan.num_layers, plan.hidden_size, plan.unit_rows
        T, B = len(steps), h_LHB.shape[-1]
        gated, gru = plan.feedback == "gated", plan.unit == "gru"
        x = InputPart(*(part if part is None else part.contiguous() for part in x))  # type: ignore[arg-type]
        new = h_LHB.new_empty
        hs_TLHB = new(T + 1, L, H, B)
        hs_TLHB[0] = h_LHB
        cs_TLHB = new(T + 1 if plan.has_cell else 0, L, H, B)
        if plan.has_cell:
            assert c_LHB is not None
            cs_TLHB[0] = c_LHB
        before_LHTB = new(L, H, T + 1, B, dtype=self.narrow)
        before_LHTB[:, :, 0] = h_LHB
        passes_h = not plan.residual and self.mask_LHB is None
        trace = FusedTrace(
            steps,
            hs_TLHB,
            cs_TLHB,
            hs_TLHB[1:] if plan.unit == "tanh" else new(T, L, GH, B),
            new(T, L, H, B) if gru else None,
            new(T, L, L, B) if gated else None,
            before_LHTB,
            None if passes_h or L == 1 else new(L - 1, H, T, B, dtype=self.narrow),
        )
        passed_LHB = new(L, H, B) if plan.residual else None
        source_LHB = new(L, H, B, dtype=self.narrow)
        with torch.cuda.device_of(h_LHB):  # where Triton launches
            for t in range(T):
                before_LHB = before_LHTB[:, :, t]
                everywhere = left.everywhere.forward(before_LHB, dtype) if left.everywhere is not None else None
                own = left.own.forward(before_LHB, dtype) if left.own is not None else None
                for j in range(L):
                    below, below_KB = left.below[j], None
                    if below is not None:
                        read_LHB = before_LHTB[:, :, t + 1] if trace.below_LHTB is None else trace.below_LHTB[:, :, t]
                        below_KB = _product(below, read_LHB[j - 1], dtype)
                    candidate, at = left.find("candidate", j, everywhere, own), (t, steps[t], j)
                    if trace.g_TLLB is not None:
                        gates, weight = left.find("gates", j, everywhere, own), left.candidate[j]
                        assert gates is not None
                        assert weight is not None
                        kernels.gate_forward(
                            plan, x, left.bias_LK, below_KB, gates, hs_TLHB, trace.g_TLLB, source_LHB, *at
                        )
                        candidate = Rows(_product(weight, source_LHB.flatten(0, 1), dtype))
                    assert candidate is not None
                    kernels.unit_forward(
                        plan, x, left.bias_LK, below_KB, candidate, left.find("unit", j, everywhere, own),
                        left.hidden_bias_LH, hs_TLHB, cs_TLHB, trace.activations, trace.s_TLHB, before_LHTB,
                        passed_LHB, self.mask_LHB, trace.below_LHTB, self.lengths_B, *at,
                    )  # fmt: skip
        return trace

    def backward(
        self, trace: FusedTrace, d_y_TBY: Tensor, d_h_LHB: Tensor, d_c_LHB: Tensor, _: object = None
    ) -> tuple[Slopes, Tensor, Tensor]:
        """From the gradients of the steps' output and of the state after them, which stay as they are."""
        plan, left, dtype = self.plan, self.left, self.dtype
        L, H, K = plan.num_layers, plan.hidden_size, plan.rows
        T, B = len(trace.steps), trace.hs_TLHB.shape[-1]
        new = trace.hs_TLHB.new_empty
        d_LKTB = new(L, K, T, B, dtype=self.narrow)
        d_s_LHTB = new(L, H, T, B, dtype=self.narrow) if plan.unit == "gru" else None
        d_candidate_LHTB = d_LKTB[:, :H] if d_s_LHTB is None else d_s_LHTB
        d_y_TYB = d_y_TBY.transpose(1, 2).contiguous()
        d_c_LHB = d_c_LHB.clone(memory_format=torch.contiguous_format)

        # What step t + 1 leaves for the gradient of h, a tensor for each source. After the last step there is only
        # what is given: it goes in the place of a product.
        given, nothing = d_h_LHB.contiguous(), torch.zeros_like(trace.hs_TLHB[0])
        d_all_LHB = None if left.everywhere is None else given
        d_own_LHB = None if left.own is None else given if left.everywhere is None else nothing
        d_gated_LHB = nothing if plan.feedback == "gated" else None
        next_gated_LHB = torch.empty_like(nothing) if plan.feedback == "gated" else None
        passes_through = plan.unit == "gru" or self.lengths_B is not None
        d_through_LHB = torch.zeros_like(nothing) if passes_through else None
        d_passed_LHB = torch.empty_like(nothing) if plan.residual else None
        d_everywhere, d_own = (
            new(stack.left_LPS.shape[:2].numel(), B, dtype=self.narrow) if stack is not None else None
            for stack in (left.everywhere, left.own)
        )
        with torch.cuda.device_of(trace.hs_TLHB):
            for t in reversed(range(T)):
                d_above_HB = None
                for j in reversed(range(L)):
                    kernels.unit_backward(
                        plan, trace.hs_TLHB, trace.cs_TLHB, trace.activations, trace.s_TLHB, d_y_TYB, d_above_HB,
                        self.mask_LHB, d_passed_LHB, d_gated_LHB, d_all_LHB, d_own_LHB, d_through_LHB, d_c_LHB, d_LKTB,
                        d_s_LHTB, left.find("candidate", j, d_everywhere, d_own),
                        left.find("unit", j, d_everywhere, d_own), self.lengths_B, t, trace.steps[t], j,
                    )  # fmt: skip
                    weight, below = left.candidate[j], left.below[j]
                    if trace.g_TLLB is not None:
                        gates = left.find("gates", j, d_everywhere, d_own)
                        assert weight is not None
                        assert gates is not None
                        assert next_gated_LHB is not None
                        d_source_SB = _product(weight.t(), d_candidate_LHTB[j, :, t], dtype)
                        kernels.gate_backward(
                            plan, d_source_SB, trace.g_TLLB, trace.hs_TLHB, next_gated_LHB, d_LKTB, gates, t, j
                        )
                    if below is not None:
                        d_above_HB = _product(below.t(), d_LKTB[j, :, t], dtype)
                if left.everywhere is not None and d_everywhere is not None:
                    d_all_LHB = left.everywhere.backward(d_everywhere, dtype)
                if left.own is not None and d_own is not None:
                    d_own_LHB = left.own.backward(d_own, dtype)
                # not in place: a step's top layer sets what the layers under it have yet to read
                d_gated_LHB, next_gated_LHB = next_gated_LHB, d_gated_LHB
        parts = [part for part in (d_all_LHB, d_own_LHB, d_gated_LHB, d_through_LHB) if part is not None]
        before_LHTB, below_LHTB = trace.before_LHTB, trace.below_LHTB

        def what_it_read(j: int) -> Tensor:
            return before_LHTB[j - 1, :, 1:] if below_LHTB is None else below_LHTB[j - 1]

        g_LLTB = trace.g_TLLB.permute(1, 2, 0, 3) if trace.g_TLLB is not None else None
        bias_LK = kernels.row_sums(d_LKTB.view(L * K, T * B)).view(L, K)
        hidden_bias_LH = (
            bias_LK[:, :H] if d_s_LHTB is None else kernels.row_sums(d_s_LHTB.view(L * H, T * B)).view(L, H)
        )
        slopes = Slopes(d_LKTB, d_candidate_LHTB, bias_LK, hidden_bias_LH, before_LHTB[:, :, :-1], what_it_read, g_LLTB)
        return slopes, torch.stack(parts).sum(0), d_c_LHB


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right of matrices, or of batches of them, in `dtype`, to which their elements' type may be narrower."""
    times = torch.bmm if left.ndim == 3 else torch.mm
    if left.dtype == dtype:
        return times(left, right)
    if left.is_cuda:
        return times(left, right, out_dtype=dtype)
    return times(left.to(dtype), right.to(dtype))
