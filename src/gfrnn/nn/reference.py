"""The definition: gated feedback as plain loops over steps and layers, differentiated by autograd.

Slow and readable. The Function in recurrence.py is a claim about this file; tests hold it to it.
Equations: Chung et al. 2015 (arXiv 1502.02367), sections 2 to 4.

Legend: T steps, B rows, L layers, H units, K rows of a pre-activation (plan.py), N = K * (L with input skips, else 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gfrnn.nn.inputs import InputPart
from gfrnn.nn.lengths import zero_past_end
from gfrnn.nn.plan import LayerWeights, Plan, Watch
from gfrnn.nn.units import NORM_EPS


def recurrence_reference(
    plan: Plan,
    x: InputPart,
    h_BLH: Tensor,
    c_BLH: Tensor | None,
    below_mask_LBH: Tensor | None,
    lengths_B: Tensor | None,
    weights: list[LayerWeights],
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs T steps.

    x: the input's part of the pre-activations of layer 0, or of every layer with input skips.
    below_mask_LBH: [L - 1, B, H] dropout masks on what layer j reads from layer j - 1.
    lengths_B: int64, steps that each row has (lengths.py); None: all.
    watch: told of every step.
    Returns y [T, B, H] ([T, B, L * H] with output skips), h [B, L, H], c [B, L, H] or None.
    """
    L, H, GH, K = plan.num_layers, plan.hidden_size, plan.unit_rows, plan.rows
    h = list(h_BLH.unbind(1))
    c = list(c_BLH.unbind(1)) if c_BLH is not None else []
    outputs = []
    for t, x_BN in enumerate(x.whole().permute(1, 2, 0)):
        h_star = torch.cat(h, dim=1)  # all layers at t - 1
        before: list[Tensor] = list(h)
        c_before = list(c)
        passed_up: list[Tensor] = []
        gates: list[Tensor] = []
        for j, w in enumerate(weights):
            a = x_BN[:, j * K : (j + 1) * K] if j == 0 or plan.input_skips else x_BN.new_zeros(len(x_BN), K)
            if w.below is not None:
                y = passed_up[j - 1]
                if below_mask_LBH is not None:
                    y = y * below_mask_LBH[j - 1]
                a = a + y @ w.below.T

            # the candidate's recurrent sum: layer i at t - 1 through its gate g^{i->j}
            if plan.feedback == "gated":
                assert w.gates is not None
                g = torch.sigmoid(a[:, GH:] + h_star @ w.gates.T + w.bias[GH:])
                gates.append(g)
                s = sum(
                    (g[:, i : i + 1] * (before[i] @ w.candidate[:, i * H : (i + 1) * H].T) for i in range(L)),
                    start=torch.zeros_like(before[j]),
                )
            else:
                s = (h_star if plan.feedback == "full" else before[j]) @ w.candidate.T

            # the unit's own gates: no global gate inside
            a_unit = a[:, H:GH]
            if w.unit is not None:
                a_unit = a_unit + (h_star if plan.unit_sources > 1 else before[j]) @ w.unit.T

            def squash(part: Tensor, rows: slice, w: LayerWeights = w) -> Tensor:
                """Normalise (if asked) over H, then add the bias."""
                if w.gain is None:
                    return part + w.bias[rows]
                normal = F.layer_norm(part.unflatten(-1, (-1, H)), (H,), eps=NORM_EPS).flatten(-2)
                return normal * w.gain[rows] + w.bias[rows]

            a_unit = squash(a_unit, slice(H, GH))
            if plan.unit == "lstm":
                i_gate, f_gate, o_gate = torch.sigmoid(a_unit).chunk(3, dim=1)
                if plan.cap_input_gate:  # not torch.minimum, whose gradient at equality is shared out
                    most = 1 - f_gate
                    i_gate = torch.where(i_gate >= most, most, i_gate)
                c[j] = f_gate * c[j] + i_gate * torch.tanh(squash(a[:, :H] + s, slice(0, H)))
                cell = c[j]
                if w.cell_gain is not None and w.cell_bias is not None:
                    cell = F.layer_norm(cell, (H,), w.cell_gain, w.cell_bias, eps=NORM_EPS)
                h[j] = o_gate * torch.tanh(cell)
            elif plan.unit == "gru":
                r, z = torch.sigmoid(a_unit).chunk(2, dim=1)
                if w.hidden_bias is not None:
                    s = s + w.hidden_bias
                n = torch.tanh(squash(a[:, :H] + r * s, slice(0, H)))
                h[j] = z * before[j] + (1 - z) * n
            else:
                h[j] = torch.tanh(squash(a[:, :H] + s, slice(0, H)))
            passed_up.append(h[j] + passed_up[j - 1] if plan.residual and j > 0 else h[j])
        outputs.append(torch.cat(passed_up, dim=1) if plan.output_skips else passed_up[-1])
        if lengths_B is not None:
            ended_B1 = (lengths_B <= t).unsqueeze(1)
            h = [torch.where(ended_B1, old, new) for old, new in zip(before, h, strict=True)]
            c = [torch.where(ended_B1, old, new) for old, new in zip(c_before, c, strict=True)]
        if watch is not None:
            g_LLB = torch.stack(gates).transpose(1, 2).detach() if gates else None
            watch(torch.stack(h).transpose(1, 2)[None].detach(), g_LLB[None] if g_LLB is not None else None)
    y_TBY = torch.stack(outputs)
    if lengths_B is not None:
        y_TBY = zero_past_end(y_TBY, lengths_B)
    return y_TBY, torch.stack(h, dim=1), torch.stack(c, dim=1) if c else None
