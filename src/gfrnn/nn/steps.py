"""Steps of the recurrence, forward and back, in torch's operators: the path of every plan on every device.

On a CPU cpu_kernels.py has the pointwise work of the unit and of the global gates, where it is built.

Features come first and rows of the batch last everywhere, so that weights are the left operand of every product, where
they need no packing (products.py), and every product writes what the next reads. A layer's step is: the layer below,
the unit gates' and the candidate's recurrent products, each adding to the one before, and the unit. Backward has the
same products with the transposed weights, made once.

Legend: T steps, B rows, R = T * B, L layers, H units, G, K as in plan.py, N = K * (L with input skips, else 1),
U = G - 1 unit gates, S = H * sources of a product. Products have operands of plan.compute_dtype; everything kept
between them has the parameters' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gfrnn.nn import cpu_kernels, units
from gfrnn.nn.gradients import NormGradients, Slopes
from gfrnn.nn.inputs import InputPart
from gfrnn.nn.lengths import common_steps
from gfrnn.nn.plan import LayerWeights, Plan
from gfrnn.nn.products import product

_LOOKED_UP = 4  # steps whose symbols are looked up at once: what a cache holds
_TRANSPOSED = 8  # steps whose output's gradient is transposed at once


class _Left:
    """The weights as left operands: in the compute dtype, as they lie or (for backward) transposed."""

    def __init__(self, plan: Plan, weights: list[LayerWeights], dtype: torch.dtype, *, transposed: bool):
        def left(*parts: Tensor | None) -> Tensor | None:
            """The parts that there are, one under the other."""
            found = [part.to(dtype) for part in parts if part is not None]
            if not found:
                return None
            return _transposed(found) if transposed else (torch.cat(found) if len(found) > 1 else found[0].contiguous())

        # what reads all layers at t - 1 without global gates, every layer's at once: [L * P, L * H]. In forward the
        # unit gates stay apart: to put them together is a copy of the weights, too dear for a call of one step
        all_units = plan.unit_sources > 1 and transposed
        self.ungated = left(*(part for w in weights for part in (w.unit if all_units else None, w.gates)))
        self.unit = [left(w.unit) if not all_units else None for w in weights]
        self.candidate = [left(w.candidate) for w in weights]
        self.below = [left(w.below) for w in weights]
        # normalised rows get their bias after that; here the others'
        self.bias_K1 = [w.bias.unsqueeze(1).clone() for w in weights]
        for bias, w in zip(self.bias_K1, weights, strict=True):
            bias[: plan.unit_rows] *= w.gain is None


def left_operands(plan: Plan, weights: list[LayerWeights], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """What a time step multiplies states with, forward and back: matrices [M, K] of products [M, K] x [K, B]."""

    def of(left: _Left) -> list[Tensor]:
        found = [left.ungated, *left.unit, *left.candidate, *left.below]
        return [each for each in found if each is not None]

    return of(_Left(plan, weights, dtype, transposed=False)), of(_Left(plan, weights, dtype, transposed=True))


def _transposed(parts_MN: list[Tensor]) -> Tensor:
    """Matrices one under the other, transposed: [N, sum of M]."""
    N = parts_MN[0].shape[1]
    blocks = 2 - N % 2  # a copy to transpose has one thread; as one of three axes it has all
    out = parts_MN[0].new_empty(blocks, N // blocks, sum(map(len, parts_MN)))
    begin = 0
    for part in parts_MN:
        out[..., begin : begin + len(part)] = part.unflatten(1, (blocks, -1)).permute(1, 2, 0)
        begin += len(part)
    return out.flatten(0, 1)


@dataclass
class _Kept:
    """What backward needs of one layer at one step, besides h and c."""

    n_HB: Tensor
    """Candidate."""
    u_UHB: Tensor | None
    """Unit gates."""
    g_LB: Tensor | None
    """Global gates that end here."""
    s_HB: Tensor | None
    """GRU: what the reset gate multiplies."""
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer norm: (normalised, 1 / standard deviation) of the candidate, the unit gates, the cell."""
    kernels_norms: cpu_kernels.Norms | None = None
    """The same, if cpu_kernels.py made it."""


@dataclass
class Trace:
    """What consecutive steps leave for backward."""

    steps: range
    hs_TLHB: Tensor
    """h before the first step and after each: T + 1."""
    cs_TLHB: Tensor
    """Likewise the LSTM's cell, else empty."""
    kept: list[list[_Kept]]
    """By step and layer."""
    by_kernels: bool
    """Whether cpu_kernels.py has made it."""

    @property
    def g_TLLB(self) -> Tensor | None:
        """[T, L target, L source, B] global gates; before backward has run."""
        gates = [now.g_LB for kept_L in self.kept for now in kept_L if now.g_LB is not None]
        return torch.stack(gates).unflatten(0, (len(self.kept), -1)) if gates else None


class Steps:
    """Runs steps, and back."""

    def __init__(
        self,
        plan: Plan,
        weights: list[LayerWeights],
        mask_LHB: Tensor | None,
        lengths_B: Tensor | None,
        dtype: torch.dtype,
    ):
        """mask_LHB: [L - 1, H, B], on what the layer above reads. lengths_B: of rows. dtype: of all that is kept."""
        self.plan, self.weights, self.mask_LHB, self.dtype = plan, weights, mask_LHB, dtype
        self.lengths_B, self.common_steps = lengths_B, common_steps(lengths_B) if lengths_B is not None else 0
        self.narrow = plan.compute_dtype or dtype
        self.forward_left: _Left | None = None
        self.backward_left: _Left | None = None

    def _ended(self, t: int) -> Tensor | None:
        """[B] whether a row has no step t of the input; None if all have it."""
        return None if self.lengths_B is None or t < self.common_steps else self.lengths_B <= t

    def forward(self, x: InputPart, steps: range, h_LHB: Tensor, c_LHB: Tensor | None) -> Trace:
        """From the state before the first of `steps`."""
        plan, mask_LHB, dtype, narrow = self.plan, self.mask_LHB, self.dtype, self.narrow
        left = self.forward_left = self.forward_left or _Left(plan, self.weights, narrow, transposed=False)
        L, H, GH, K = plan.num_layers, plan.hidden_size, plan.unit_rows, plan.rows
        T, B = len(steps), h_LHB.shape[-1]
        by_kernels = cpu_kernels.usable(plan, h_LHB.device, dtype, B)
        hs_TLHB = h_LHB.new_empty(T + 1, L, H, B)
        hs_TLHB[0] = h_LHB
        cs_TLHB = h_LHB.new_empty(T + 1 if plan.has_cell else 0, L, H, B)
        if c_LHB is not None:
            cs_TLHB[0] = c_LHB
        kept: list[list[_Kept]] = []
        for t in range(T):
            if t % _LOOKED_UP == 0:
                x_NTB = x.some(steps[t : t + _LOOKED_UP])
            h_LHB = hs_TLHB[t]
            narrow_h_LHB = h_LHB.to(narrow)
            gates_LLB = None
            if left.ungated is not None:
                gates_LLB = product(left.ungated, narrow_h_LHB.view(L * H, B), dtype).view(L, L, B)
            kept.append([])
            below_HB = h_LHB[0]  # of layer j - 1; layer 0 has none
            for j, w in enumerate(self.weights):
                if plan.input_skips or j == 0:
                    a_KB = x_NTB[j * K : (j + 1) * K, t % _LOOKED_UP] + left.bias_K1[j]
                else:
                    a_KB = left.bias_K1[j].expand(K, B).contiguous()
                below = left.below[j]
                if below is not None:
                    y_HB = below_HB if mask_LHB is None else below_HB * mask_LHB[j - 1]
                    a_KB = product(below, y_HB.to(narrow), dtype, a_KB)

                g_LB, source_SB = None, narrow_h_LHB.view(L * H, B)
                if gates_LLB is not None and by_kernels:
                    g_LB = gates_LLB[j]
                    source_SB = cpu_kernels.gates_forward(a_KB[GH:], g_LB, h_LHB).to(narrow).view(L * H, B)
                elif gates_LLB is not None:
                    g_LB = gates_LLB[j].add_(a_KB[GH:]).sigmoid_()
                    source_SB = (h_LHB * g_LB.unsqueeze(1)).to(narrow).view(L * H, B)
                elif plan.feedback == "none":
                    source_SB = narrow_h_LHB[j]
                candidate, unit = left.candidate[j], left.unit[j]
                assert candidate is not None
                u_UHB = s_HB = None
                if unit is not None:
                    read_SB = narrow_h_LHB.view(L * H, B) if plan.unit_sources > 1 else narrow_h_LHB[j]
                    u_UHB = product(unit, read_SB, dtype, a_KB[H:GH]).view(-1, H, B)
                if plan.unit == "gru":
                    s_HB = product(candidate, source_SB, dtype)
                    if w.hidden_bias is not None:
                        s_HB += w.hidden_bias.unsqueeze(1)
                    n_HB = a_KB[:H]
                else:
                    n_HB = product(candidate, source_SB, dtype, a_KB[:H])
                now = _Kept(n_HB, u_UHB, g_LB, s_HB)
                kept[t].append(now)

                h_next, cell = hs_TLHB[t + 1, j], (cs_TLHB[t, j], cs_TLHB[t + 1, j]) if plan.has_cell else None
                if by_kernels:
                    now.kernels_norms = cpu_kernels.unit_forward(plan, w, n_HB, u_UHB, s_HB, h_LHB[j], cell, h_next)
                else:
                    _unit_forward(plan, w, now, h_LHB[j], cell, h_next)
                below_HB = h_next + below_HB if plan.residual and j > 0 else h_next
            ended_B = self._ended(steps[t])
            if ended_B is not None:  # what such rows computed, from finite numbers, is finite: its gradient is 0
                for states_TLHB in (hs_TLHB, cs_TLHB)[: 1 + plan.has_cell]:
                    torch.where(ended_B, states_TLHB[t], states_TLHB[t + 1], out=states_TLHB[t + 1])
        return Trace(steps, hs_TLHB, cs_TLHB, kept, by_kernels)

    def backward(
        self, trace: Trace, d_y_TBY: Tensor, d_h_LHB: Tensor, d_c_LHB: Tensor, norms: list[NormGradients]
    ) -> tuple[Slopes, Tensor, Tensor]:
        """From the gradients of the steps' output and of the state after them to those of the state before them.

        Frees of the trace what it has used; may write into d_c. Adds to norms.
        """
        plan, weights, mask_LHB, dtype, narrow = self.plan, self.weights, self.mask_LHB, self.dtype, self.narrow
        if trace.steps.start == 0:  # the last to run back: no forward follows
            self.forward_left = None
        left = self.backward_left = self.backward_left or _Left(plan, weights, narrow, transposed=True)
        hs_TLHB, cs_TLHB, kept = trace.hs_TLHB, trace.cs_TLHB, trace.kept
        L, H, GH, K = plan.num_layers, plan.hidden_size, plan.unit_rows, plan.rows
        T, B = len(trace.steps), hs_TLHB.shape[-1]
        d_LKTB = hs_TLHB.new_empty(L, K, T, B)
        # of the candidate's recurrent sum, where it differs from that of its pre-activation
        d_s_LHTB = hs_TLHB.new_empty(L, H, T, B) if plan.unit == "gru" else d_LKTB[:, :H]
        P = left.ungated.shape[1] // L if left.ungated is not None else 0
        d_ungated_LPB = hs_TLHB.new_empty(L, P, B, dtype=narrow)
        g_LLTB = hs_TLHB.new_empty(L, L, T, B) if plan.global_gates else None
        first = T  # step of those whose output's gradient is transposed
        for t in reversed(range(T)):
            if t < first:
                first = max(0, t + 1 - _TRANSPOSED)
                d_y_TYB = d_y_TBY[first : t + 1].transpose(1, 2).contiguous()
            d_y_YB = d_y_TYB[t - first]
            ended_B, after = self._ended(trace.steps[t]), (d_h_LHB, d_c_LHB)
            if ended_B is not None:
                d_y_YB, d_h_LHB, d_c_LHB = (d.masked_fill(ended_B, 0) for d in (d_y_YB, d_h_LHB, d_c_LHB))
            h_LHB = hs_TLHB[t]
            d_before_LHB = torch.zeros_like(d_h_LHB)
            d_below_HB = d_y_YB[-H:]  # of what layer j passes up
            kept_L = kept.pop()
            for j in reversed(range(L)):
                w, now = weights[j], kept_L[j]
                n_HB, u_UHB, s_HB = now.n_HB, now.u_UHB, now.s_HB
                d_KB = hs_TLHB.new_empty(K, B)
                cell = (cs_TLHB[t, j], cs_TLHB[t + 1, j]) if plan.has_cell else None
                states, written = (h_LHB[j], hs_TLHB[t + 1, j], cell), (d_before_LHB[j], d_c_LHB[j], d_KB)
                if trace.by_kernels:
                    parts = plan, w, now.kernels_norms, n_HB, u_UHB, s_HB
                    d_s_HB = cpu_kernels.unit_backward(*parts, *states, d_h_LHB[j], d_below_HB, *written, norms[j])
                else:
                    d_s_HB = _unit_backward(plan, w, now, *states, d_h_LHB[j] + d_below_HB, *written, norms[j])
                if s_HB is not None:
                    d_s_LHTB[j, :, t] = d_s_HB

                candidate, unit, below = left.candidate[j], left.unit[j], left.below[j]
                assert candidate is not None
                narrow_d_s_HB = d_s_HB.to(narrow)
                if now.g_LB is not None and g_LLTB is not None:
                    # the gradient of the gated states [g^i h^i] gives that of g and of h
                    d_gated_LHB = product(candidate, narrow_d_s_HB, dtype).view(L, H, B)
                    if trace.by_kernels:
                        cpu_kernels.gates_backward(d_gated_LHB, now.g_LB, h_LHB, d_before_LHB, d_KB[GH:])
                    else:
                        d_before_LHB.addcmul_(d_gated_LHB, now.g_LB.unsqueeze(1))
                        units.sigmoid_backward(d_gated_LHB.mul_(h_LHB).sum(1), now.g_LB, grad_input=d_KB[GH:])
                    g_LLTB[j, :, t] = now.g_LB
                elif plan.feedback == "none":
                    d_before_LHB[j] += product(candidate, narrow_d_s_HB, dtype)
                else:
                    d_before_LHB = _sum(candidate, narrow_d_s_HB, d_before_LHB)
                if unit is not None:
                    d_before_LHB[j] += product(unit, d_KB[H:GH].to(narrow), dtype)

                d_LKTB[j, :, t] = d_KB
                d_ungated_LPB[j] = d_KB[K - P :]
                if below is not None:
                    passed = product(below, d_KB.to(narrow), dtype)
                    if mask_LHB is not None:
                        passed *= mask_LHB[j - 1]
                    if plan.residual:
                        passed += d_below_HB
                    if plan.output_skips:
                        passed += d_y_YB[(j - 1) * H : j * H]
                    d_below_HB = passed
            if left.ungated is not None:
                d_before_LHB = _sum(left.ungated, d_ungated_LPB.view(L * P, B), d_before_LHB)
            d_h_LHB = d_before_LHB
            if ended_B is not None:
                d_h_LHB, d_c_LHB = (torch.where(ended_B, *pair) for pair in zip(after, (d_h_LHB, d_c_LHB), strict=True))

        passed_TLHB = passed_up(plan, hs_TLHB[1:])

        def what_it_read(j: int) -> Tensor:
            y_HTB = passed_TLHB[:, j - 1].transpose(0, 1)
            return y_HTB if mask_LHB is None else y_HTB * mask_LHB[j - 1].unsqueeze(1)

        sums = d_LKTB.sum((2, 3)), d_s_LHTB.sum((2, 3))
        return Slopes(d_LKTB, d_s_LHTB, *sums, hs_TLHB[:-1].permute(1, 2, 0, 3), what_it_read, g_LLTB), d_h_LHB, d_c_LHB


def _sum(left: Tensor, right_KB: Tensor, add_LHB: Tensor) -> Tensor:
    """left @ right + add, as [L, H, B]."""
    return product(left, right_KB, add_LHB.dtype, add_LHB.flatten(0, 1)).view_as(add_LHB)


def _unit_forward(
    plan: Plan,
    w: LayerWeights,
    now: _Kept,
    h_HB: Tensor,
    cell: tuple[Tensor, Tensor] | None,
    h_next_HB: Tensor,
) -> None:
    """What is kept, from pre-activations to activations in place; writes h_next. cell: c before and, written, after."""
    H, GH = plan.hidden_size, plan.unit_rows
    n_HB, u_UHB, s_HB = now.n_HB, now.u_UHB, now.s_HB
    if u_UHB is not None:
        _normalize(u_UHB, slice(H, GH), w, now, "unit")
    if s_HB is not None:
        assert u_UHB is not None
        units.gru_gates_forward(n_HB, u_UHB, s_HB)
    _normalize(n_HB.unsqueeze(0), slice(0, H), w, now, "candidate")
    if u_UHB is None:
        torch.tanh(n_HB, out=h_next_HB)
    elif cell is None:
        n_HB.tanh_()
        units.gru_output_forward(n_HB, u_UHB, h_HB, h_next_HB)
    else:
        c_HB, c_next_HB = cell
        units.lstm_gates_forward(n_HB, u_UHB, c_HB, c_next_HB, capped=plan.cap_input_gate)
        if w.cell_gain is not None and w.cell_bias is not None:
            now.norms["cell"] = units.norm_forward(c_next_HB)
            c_next_HB = torch.addcmul(w.cell_bias.unsqueeze(1), now.norms["cell"][0], w.cell_gain.unsqueeze(1))
        torch.mul(u_UHB[2], torch.tanh(c_next_HB), out=h_next_HB)


def _unit_backward(
    plan: Plan,
    w: LayerWeights,
    now: _Kept,
    h_HB: Tensor,
    h_next_HB: Tensor,
    cell: tuple[Tensor, Tensor] | None,
    d_h_next_HB: Tensor,
    d_h_HB: Tensor,
    d_c_HB: Tensor,
    d_KB: Tensor,
    norms: NormGradients,
) -> Tensor:
    """From the gradient of h_next to those of the pre-activations, the first rows of d_KB. Adds to that of h what goes
    past the products, has d_c go from c after to c before. Returns the gradient of the candidate's recurrent sum.
    """
    H, GH = plan.hidden_size, plan.unit_rows
    n_HB, u_UHB, s_HB = now.n_HB, now.u_UHB, now.s_HB
    d_GHB = d_KB[:GH].view(-1, *h_HB.shape)
    if u_UHB is None:
        units.tanh_backward(d_h_next_HB, h_next_HB, grad_input=d_GHB[0])
    elif cell is None:
        d_h_HB += units.gru_output_backward(d_h_next_HB, n_HB, u_UHB, h_HB, d_GHB)
    else:
        c_HB, c_next_HB = cell
        d_c_HB += _cell_backward(w, now, u_UHB[2], c_next_HB, d_h_next_HB, d_GHB[3], norms)
        d_c_HB.copy_(units.lstm_gates_backward(d_c_HB, n_HB, u_UHB, c_HB, d_GHB, capped=plan.cap_input_gate))
    _normalize_backward(d_GHB[:1], slice(0, H), w, now, "candidate", norms)
    d_s_HB = d_GHB[0]
    if u_UHB is not None:
        if s_HB is not None:
            d_s_HB = units.gru_gates_backward(d_GHB[0], u_UHB, s_HB, d_GHB)
        _normalize_backward(d_GHB[1:], slice(H, GH), w, now, "unit", norms)
    return d_s_HB


def _cell_backward(
    w: LayerWeights, now: _Kept, o_HB: Tensor, c_HB: Tensor, d_h_HB: Tensor, d_o_HB: Tensor, gradients: NormGradients
) -> Tensor:
    """From the gradient of h = o * tanh(cell): that of o's pre-activation into d_o. Returns that of c through h."""
    if w.cell_gain is not None and w.cell_bias is not None:
        normal, rstd = now.norms["cell"]
        c_HB = torch.addcmul(w.cell_bias.unsqueeze(1), normal, w.cell_gain.unsqueeze(1))
    tanh_c = torch.tanh(c_HB)
    units.sigmoid_backward(d_h_HB * tanh_c, o_HB, grad_input=d_o_HB)
    d_cell = d_h_HB * o_HB
    units.tanh_backward(d_cell, tanh_c, grad_input=d_cell)
    if w.cell_gain is None:
        return d_cell
    gradients.add_cell(d_cell, normal)
    return units.norm_backward(d_cell * w.cell_gain.unsqueeze(1), normal, rstd)


def _normalize(a_GHB: Tensor, rows: slice, w: LayerWeights, now: _Kept, name: str) -> None:
    """Normalises over H (if the plan does), keeps what backward needs, adds the bias; in place."""
    if w.gain is None:
        return
    shape = (-1, *a_GHB.shape[1:2], 1)
    now.norms[name] = units.norm_forward(a_GHB)
    torch.addcmul(w.bias[rows].view(shape), now.norms[name][0], w.gain[rows].view(shape), out=a_GHB)


def _normalize_backward(
    d_GHB: Tensor, rows: slice, w: LayerWeights, now: _Kept, name: str, gradients: NormGradients
) -> None:
    """Turns the gradient after _normalize into the one before it, in place."""
    if w.gain is None:
        return
    normal, rstd = now.norms[name]
    gradients.add(rows, d_GHB, normal)
    d_GHB.copy_(units.norm_backward(d_GHB * w.gain[rows].view(-1, d_GHB.shape[1], 1), normal, rstd))


def passed_up(plan: Plan, hs_TLHB: Tensor) -> Tensor:
    """What each layer passes up: its output, plus (residual) what the layer below passed."""
    return hs_TLHB.cumsum(dim=1) if plan.residual else hs_TLHB
