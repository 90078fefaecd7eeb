"""The fast path: T steps of gated feedback as one autograd.Function with its own backward through time.

What runs the steps: torch's operators (steps.py), or where there is Triton its kernels (fused.py), on CUDA as graphs
(graphs.py). Weight gradients come after the steps, in nodes of their own (gradients.py).

Legend: T steps, B rows, L layers, H units, N, Y as in reference.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gfrnn.nn import kernels
from gfrnn.nn.fused import FusedSteps, Left
from gfrnn.nn.gradients import LayerToken, NormGradients, Slopes, WeightGradients
from gfrnn.nn.graphs import Graphs
from gfrnn.nn.inputs import InputPart
from gfrnn.nn.lengths import zero_past_end
from gfrnn.nn.plan import LayerWeights, Plan, Watch
from gfrnn.nn.steps import Steps, passed_up

_FIELDS = len(LayerWeights._fields)
_WITHOUT_BACKWARD = 8  # steps between which all is freed


def recurrence(
    plan: Plan,
    x: InputPart,
    h_BLH: Tensor,
    c_BLH: Tensor | None,
    below_mask_LBH: Tensor | None,
    lengths_B: Tensor | None,
    weights: list[LayerWeights],
    graphs: Graphs | None = None,
    fused: bool = True,
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Same arguments, result and gradients as reference.recurrence_reference.

    On CUDA: graphs, the caller's, of earlier calls; fused, whether to run Triton's kernels where they know the plan.
    """
    if not torch.is_grad_enabled():  # there is no backward: keep nothing for long
        plan = dataclasses.replace(plan, recompute=_WITHOUT_BACKWARD)
    gradients = WeightGradients(plan)
    token: Callable[..., Tensor] = LayerToken.apply
    tokens = [token(gradients, j, *layer) for j, layer in enumerate(weights)]
    run: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = Recurrence.apply
    runner = partial(_runner, plan, graphs, fused)
    return run(plan, runner, watch, gradients, weights, *x, h_BLH, c_BLH, below_mask_LBH, lengths_B, *tokens)


class Trace(Protocol):
    """What steps leave for backward; the rest is between the two of them."""

    steps: range
    hs_TLHB: Tensor
    """h before the first step and after each: T + 1."""
    cs_TLHB: Tensor
    """Likewise the LSTM's cell, else empty."""

    @property
    def g_TLLB(self) -> Tensor | None:
        """[T, L target, L source, B] global gates."""


class Runner(Protocol):
    """What runs steps, and back; documented in steps.py."""

    def forward(self, x: InputPart, steps: range, h_LHB: Tensor, c_LHB: Tensor | None) -> Any: ...

    def backward(
        self, trace: Any, d_y_TBY: Tensor, d_h_LHB: Tensor, d_c_LHB: Tensor, norms: list[NormGradients]
    ) -> tuple[Slopes, Tensor, Tensor]: ...


def _runner(
    plan: Plan,
    graphs: Graphs | None,
    fused: bool,
    weights: list[LayerWeights],
    mask_LHB: Tensor | None,
    lengths_B: Tensor | None,
    dtype: torch.dtype,
    *,
    backward: bool,
) -> Runner:
    """What runs one call's steps. backward: whether it will be asked to run them back."""
    device = weights[0].bias.device
    if not fused or not kernels.usable(plan, device, dtype):
        return Steps(plan, weights, mask_LHB, lengths_B, dtype)
    if graphs is None or not graphs.usable(device):
        return FusedSteps(plan, Left(plan, weights, plan.compute_dtype or dtype), mask_LHB, lengths_B, dtype)
    return graphs.take(plan, weights, mask_LHB, lengths_B, dtype, backward=backward)


class Recurrence(torch.autograd.Function):
    """See `recurrence`; tokens stand for the weights in the graph, and `gradients` makes theirs."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        make_runner: Callable[..., Runner],
        watch: Watch | None,
        gradients: WeightGradients,
        weights: list[LayerWeights],
        columns: Tensor,
        symbols_TB: Tensor | None,
        scale_TB: Tensor | None,
        h_BLH: Tensor,
        c_BLH: Tensor | None,
        mask_LBH: Tensor | None,
        lengths_B: Tensor | None,
        *tokens: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x = InputPart(columns, symbols_TB, scale_TB)
        T, B = x.sizes
        mask_LHB = mask_LBH.transpose(1, 2).contiguous() if mask_LBH is not None else None
        backward = any(ctx.needs_input_grad[-len(tokens) :])
        runner = make_runner(weights, mask_LHB, lengths_B, columns.dtype, backward=backward)
        h_LHB = h_BLH.permute(1, 2, 0)
        c_LHB = c_BLH.permute(1, 2, 0) if c_BLH is not None else None
        y_TBY = columns.new_empty(T, B, plan.hidden_size * (plan.num_layers if plan.output_skips else 1))
        starts: list[tuple[Tensor, Tensor | None]] = []
        at_once = plan.recompute or T
        trace: Trace | None = None
        for begin in range(0, T, at_once):
            starts.append((h_LHB, c_LHB))
            trace = None  # freed before the next
            trace = runner.forward(x, range(begin, min(begin + at_once, T)), h_LHB, c_LHB)
            if watch is not None:
                watch(trace.hs_TLHB[1:], trace.g_TLLB)
            y_TBY[begin : begin + at_once] = _output(plan, trace.hs_TLHB[1:]).transpose(1, 2)
            h_LHB = trace.hs_TLHB[-1].clone()  # not a view, which would keep all of the trace
            c_LHB = trace.cs_TLHB[-1].clone() if plan.has_cell else None
        if lengths_B is not None:
            zero_past_end(y_TBY, lengths_B)
        ctx.plan, ctx.make_runner, ctx.gradients, ctx.mask_LHB = plan, make_runner, gradients, mask_LHB
        ctx.starts, ctx.runner, ctx.trace = starts, runner, trace
        # the state, of which starts has views, and the lengths to know that nobody changes them
        ctx.save_for_backward(*x, h_BLH, c_BLH, lengths_B, *(tensor for layer in weights for tensor in layer))
        return (
            y_TBY,
            h_LHB.permute(2, 0, 1).contiguous(),
            c_LHB.permute(2, 0, 1).contiguous() if c_LHB is not None else None,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TBY: Tensor, d_h_last_BLH: Tensor, d_c_last_BLH: Tensor | None) -> tuple[Any, ...]:
        plan: Plan = ctx.plan
        columns, symbols_TB, scale_TB, _, _, lengths_B, *flat = ctx.saved_tensors
        x = InputPart(columns, symbols_TB, scale_TB)
        weights = [LayerWeights(*flat[i : i + _FIELDS]) for i in range(0, len(flat), _FIELDS)]
        T = x.sizes[0]
        d_h_LHB = d_h_last_BLH.permute(1, 2, 0).contiguous()
        d_c_LHB = torch.zeros_like(d_h_LHB)
        if d_c_last_BLH is not None:
            d_c_LHB.copy_(d_c_last_BLH.permute(1, 2, 0))
        gradients: WeightGradients = ctx.gradients
        # taken, so that they are freed as they are used; a second backward of a retained graph computes the trace again
        trace: Trace | None = ctx.trace
        runner: Runner = ctx.runner or ctx.make_runner(weights, ctx.mask_LHB, lengths_B, columns.dtype, backward=True)
        ctx.trace = ctx.runner = None
        tokens = ctx.needs_input_grad[-plan.num_layers :]
        gradients.start(weights, {j for j, needed in enumerate(tokens) if needed})
        d_columns = x.no_gradient()
        at_once = plan.recompute or T
        for begin in reversed(range(0, T, at_once)):
            gradients.make()
            steps = range(begin, min(begin + at_once, T))
            if trace is None:
                trace = runner.forward(x, steps, *ctx.starts[begin // at_once])
            slopes, d_h_LHB, d_c_LHB = runner.backward(
                trace, d_y_TBY[begin : steps.stop], d_h_LHB, d_c_LHB, gradients.norms
            )
            x.add_gradient(d_columns, steps, slopes.d_LKTB.flatten(0, 1) if plan.input_skips else slopes.d_LKTB[0])
            gradients.add(slopes)
            trace = None  # freed before the next, as what is left of it
            del slopes
        d_c_BLH = d_c_LHB.permute(2, 0, 1) if plan.has_cell else None
        token = d_columns.new_zeros(())
        return (
            *(None, None, None, None, None, d_columns, None, None, d_h_LHB.permute(2, 0, 1), d_c_BLH, None, None),
            *(token for _ in tokens),
        )


def _output(plan: Plan, hs_TLHB: Tensor) -> Tensor:
    """[T, Y, B] of the states."""
    passed_TLHB = passed_up(plan, hs_TLHB)
    return passed_TLHB.flatten(1, 2) if plan.output_skips else passed_TLHB[:, -1]
