"""GatedFeedbackRNN: the layer, with torch.nn.LSTM's interface.

Parameters of layer j (L layers, H units, I inputs; G * H rows of unit pre-activations, Lg global gates, K = G * H + Lg;
rows in the order candidate, unit gates (GRU r, z; LSTM i, f, o), global gates):
    weight_ih_l{j} [K, I or H]       from the layer below (layer 0: the input)
    weight_xh_l{j} [K, I]            input skips, j > 0
    weight_hc_l{j} [H, H or L * H]   recurrent, candidate: U^{i->j} side by side over i
    weight_hu_l{j} [(G - 1) * H, H or L * H]   recurrent, unit gates (not tanh)
    weight_hg_l{j} [L, L * H]        recurrent, global gates: u_g of i -> j, one row an i (gated feedback)
    bias_l{j} [K], bias_hc_l{j} [H]  (the latter GRU with hidden_bias)
    norm_l{j} [G * H], norm_cell_l{j} [H], bias_cell_l{j} [H]   layer norm (the last two LSTM)
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gfrnn.config import GATES, Feedback, UnitGates
from gfrnn.nn.graphs import Graphs
from gfrnn.nn.inputs import read_input
from gfrnn.nn.lengths import check_lengths
from gfrnn.nn.noise import PLACE_BELOW, PLACE_WEIGHT, Noise
from gfrnn.nn.plan import LayerWeights, Plan, Watch
from gfrnn.nn.recurrence import recurrence
from gfrnn.nn.reference import recurrence_reference

State = Tensor | tuple[Tensor, Tensor]
"""h [L, B, H], for the LSTM (h, c)."""

# Our row order of a unit's pre-activations, as indices of torch's (LSTM i f g o, GRU r z n).
_TORCH_ROWS = {"lstm": (2, 0, 1, 3), "gru": (2, 0, 1), "tanh": (0,)}


class GatedFeedbackRNN(nn.Module):
    """A multi-layer recurrent network in which every layer at t-1 feeds every layer at t through a learned scalar gate.

    Chung, Gulcehre, Cho, Bengio: Gated Feedback Recurrent Neural Networks, ICML 2015 (arXiv 1502.02367).

    Args:
        input_size: I, width of the input, or number of symbols when the input is integers.
        hidden_size: H, units a layer.
        num_layers: L.
        unit: "lstm", "gru" or "tanh".
        feedback: "gated"; "full" (every gate fixed to 1); "none" (a plain stack, equal to torch.nn.LSTM / GRU / RNN).
        unit_gates: whether the unit's own gates read "all" layers at t-1 or their "own" (no effect without feedback).
        input_skips: every layer reads the input.
        output_skips: the output is all layers' side by side, [.., L * H].
        residual: from the second layer on, a layer passes up its output plus its input.
        bias: as torch.nn.LSTM's.
        batch_first: input and output are [B, T, ..]; states stay [L, B, H].
        dropout: locked dropout between layers, one mask a row for all steps.
        input_dropout: locked dropout on the input (of integer input: of whole symbols).
        weight_dropout: dropout on the recurrent weights (not those of global gates), one mask a call.
        layer_norm: normalise every unit pre-activation over H, and the LSTM's cell before its tanh.
        hidden_bias: GRU: a bias inside the product with the reset gate, as torch.nn.GRU has.
        cap_input_gate: LSTM: the input gate is at most 1 - the forget gate (Melis et al. 2020, arXiv 1909.01792).
        compute_dtype: of the operands of products (torch.bfloat16); None: the parameters'. All else keeps fp32.
        recompute: keep the state of every so many steps, and compute the rest again in backward: the same gradients in
            less memory and more time. 0 keeps all.
        cuda: how steps run on CUDA: "graphs" of kernels, one launch for many steps, in memory that is kept for the next
            call; "kernels", one launch each; "operators" of torch, as always with layer norm or without Triton.
        reference: run the plain loop instead of the fast path; same results, many times slower.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        unit: str = "lstm",
        feedback: Feedback = "gated",
        unit_gates: UnitGates = "all",
        input_skips: bool = False,
        output_skips: bool = False,
        residual: bool = False,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        hidden_bias: bool = False,
        cap_input_gate: bool = False,
        compute_dtype: torch.dtype | None = None,
        recompute: int = 0,
        cuda: str = "graphs",
        reference: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check(unit, feedback, unit_gates, cuda, hidden_bias, cap_input_gate, input_size, hidden_size, num_layers)
        for name, value in {
            "dropout": dropout,
            "input_dropout": input_dropout,
            "weight_dropout": weight_dropout,
        }.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 0 and less than 1")
        self.plan = Plan(
            unit=unit,
            num_layers=num_layers,
            hidden_size=hidden_size,
            feedback=feedback,
            unit_gates=unit_gates,
            input_skips=input_skips,
            output_skips=output_skips,
            residual=residual,
            layer_norm=layer_norm,
            cap_input_gate=cap_input_gate,
            compute_dtype=compute_dtype,
            recompute=recompute,
        )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.bias = batch_first, bias
        self.dropout, self.input_dropout, self.weight_dropout = dropout, input_dropout, weight_dropout
        self.reference = reference
        self.graphs, self.fused = Graphs() if cuda == "graphs" else None, cuda != "operators"

        plan, L, H, K = self.plan, num_layers, hidden_size, self.plan.rows
        unit_gate_rows = plan.unit_rows - H

        def parameter(name: str, *shape: int) -> None:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

        for j in range(L):
            parameter(f"weight_ih_l{j}", K, input_size if j == 0 else H)
            if j > 0 and input_skips:
                parameter(f"weight_xh_l{j}", K, input_size)
            parameter(f"weight_hc_l{j}", H, plan.candidate_sources * H)
            if unit_gate_rows:
                parameter(f"weight_hu_l{j}", unit_gate_rows, plan.unit_sources * H)
            if plan.global_gates:
                parameter(f"weight_hg_l{j}", L, L * H)
            if bias:
                parameter(f"bias_l{j}", K)
            if hidden_bias:
                parameter(f"bias_hc_l{j}", H)
            if layer_norm:
                parameter(f"norm_l{j}", plan.unit_rows)
                if plan.has_cell:
                    parameter(f"norm_cell_l{j}", H)
                    parameter(f"bias_cell_l{j}", H)
        self.reset_parameters()

    @property
    def output_size(self) -> int:
        """Width of the output: H, with output skips L * H."""
        return self.hidden_size * (self.num_layers if self.plan.output_skips else 1)

    def reset_parameters(self) -> None:
        """Recurrent H x H blocks orthogonal each, biases zero (as the authors' code), the rest uniform(+-1/sqrt(H))."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name, p in self.named_parameters():
            if name.startswith(("weight_hc", "weight_hu")):
                for rows in p.data.split(self.hidden_size, dim=0):
                    for block in rows.split(self.hidden_size, dim=1):
                        # orthogonal_ knows no narrow types
                        wide = block.to(torch.promote_types(block.dtype, torch.float32))
                        block.copy_(nn.init.orthogonal_(wide))
            elif name.startswith("weight"):
                nn.init.uniform_(p, -bound, bound)
            elif name.startswith("norm"):
                nn.init.ones_(p)
            else:
                nn.init.zeros_(p)

    def set_forget_bias(self, value: float) -> None:
        """Sets the LSTM's forget gates' biases."""
        H = self.hidden_size
        for j in range(self.num_layers):
            self.get_parameter(f"bias_l{j}").data[2 * H : 3 * H] = value

    def scale_feedback(self) -> None:
        """Divides recurrent weights that are read from n layers by sqrt(n): before gates their sum is as of one."""
        for name, p in self.named_parameters():
            if name.startswith(("weight_hc", "weight_hu")):
                p.data /= math.sqrt(p.shape[1] // self.hidden_size)

    def forward(
        self,
        input: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        noise: Noise | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, State]:
        """Runs T steps.

        Args:
            input: [T, B, I] ([B, T, I] if batch_first, [T, I] unbatched), or integers in 0..I-1 without the last axis,
                which stand for one-hot vectors and are looked up.
            state: h [L, B, H], for the LSTM (h, c); zeros if None; [L, H] unbatched.
            lengths: int64 [B], steps of each row, 0 to T, on the input's device; None: all have T. From its end on a
                row's state stays as it was and its output is zero, whatever (finite) the input is; no gradient comes
                from there. On CUDA the values are not checked.
            noise: where dropout masks come from; None draws fresh ones, as nn.Dropout does. Unused in eval mode.
            watch: told of states and global gates as they come (plan.py); it changes nothing.

        Returns:
            output [T, B, H] ([.., L * H] with output skips) and the state after each row's last step; fp32 of bf16
            parameters.

        Raises:
            ValueError: shapes or lengths that do not fit, no steps, no rows, lengths of unbatched input.
        """
        symbols = not input.is_floating_point()
        batched = input.dim() == (2 if symbols else 3)
        if not batched:
            if input.dim() != (1 if symbols else 2):
                raise ValueError(f"input has shape {tuple(input.shape)}; expected [T, B{', I' * (not symbols)}]")
            input = input.unsqueeze(1)
        elif self.batch_first:
            input = input.transpose(0, 1)
        if not symbols and input.shape[2] != self.input_size:
            raise ValueError(f"input is {input.shape[2]} wide; this network has input_size={self.input_size}")
        T, B = input.shape[:2]
        if T == 0 or B == 0:
            raise ValueError(f"input has no {'steps' if T == 0 else 'rows'}")
        if lengths is not None:
            if not batched:
                raise ValueError("lengths are for batches; unbatched input is as long as it is")
            check_lengths(lengths, T, B, input.device)
            lengths = lengths.contiguous()  # as kernels read them
        if self.training and noise is None and (self.dropout or self.input_dropout or self.weight_dropout):
            noise = Noise.fresh(B, input.device)
        if not self.training:
            noise = None

        weights, from_input_NI = self.layer_weights(noise)
        dtype = from_input_NI.dtype
        plan = self.plan
        if self.weight_ih_l0.dtype == torch.bfloat16:  # DeepSpeed's own bf16: products in bf16, everything else fp32
            plan = dataclasses.replace(plan, compute_dtype=torch.bfloat16)
        h_BLH, c_BLH = self._start(state, batched, B, dtype, input.device)
        x = read_input(input, from_input_NI, noise, self.input_dropout, plan.compute_dtype)
        mask_LBH = None
        if noise is not None and self.dropout and self.num_layers > 1:
            masks = [noise.row_mask(PLACE_BELOW + j, self.hidden_size, self.dropout) for j in range(1, self.num_layers)]
            mask_LBH = torch.stack(masks).to(dtype)

        run = recurrence_reference if self.reference else partial(recurrence, graphs=self.graphs, fused=self.fused)
        y_TBY, h_BLH, c_next_BLH = run(plan, x, h_BLH, c_BLH, mask_LBH, lengths, weights, watch=watch)
        h_LBH = h_BLH.transpose(0, 1)
        c_LBH = c_next_BLH.transpose(0, 1) if c_next_BLH is not None else None
        if not batched:
            y_TBY, h_LBH = y_TBY.squeeze(1), h_LBH.squeeze(1)
            c_LBH = c_LBH.squeeze(1) if c_LBH is not None else None
        elif self.batch_first:
            y_TBY = y_TBY.transpose(0, 1)
        return y_TBY, h_LBH if c_LBH is None else (h_LBH, c_LBH)

    def layer_weights(self, noise: Noise | None = None) -> tuple[list[LayerWeights], Tensor]:
        """Every layer's weights as the recurrence takes them, and those of the input [N, I]; weight dropout applied."""
        place = PLACE_WEIGHT

        def get(name: str) -> Tensor | None:
            p = self._parameters.get(name)
            if p is None:
                return None
            return p.float() if p.dtype == torch.bfloat16 else p

        def recurrent(name: str) -> Tensor | None:
            nonlocal place
            place += 1
            p = get(name)
            if p is None or noise is None or not self.weight_dropout:
                return p
            return p * noise.weight_mask(place, p, self.weight_dropout)

        layers, from_input = [], []
        for j in range(self.num_layers):
            below = get(f"weight_ih_l{j}")
            candidate = recurrent(f"weight_hc_l{j}")
            assert below is not None
            assert candidate is not None
            bias = get(f"bias_l{j}")
            layers.append(
                LayerWeights(
                    below=below if j > 0 else None,
                    candidate=candidate,
                    unit=recurrent(f"weight_hu_l{j}"),
                    gates=get(f"weight_hg_l{j}"),
                    bias=bias if bias is not None else below.new_zeros(self.plan.rows),
                    hidden_bias=get(f"bias_hc_l{j}"),
                    gain=get(f"norm_l{j}"),
                    cell_gain=get(f"norm_cell_l{j}"),
                    cell_bias=get(f"bias_cell_l{j}"),
                )
            )
            skip = below if j == 0 else get(f"weight_xh_l{j}")
            if skip is not None:
                from_input.append(skip)
        return layers, torch.cat(from_input) if len(from_input) > 1 else from_input[0]

    def _start(
        self, state: State | None, batched: bool, B: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """The state before the first step, [B, L, H] each."""
        L, H = self.num_layers, self.hidden_size
        if state is None:
            zeros = torch.zeros(B, L, H, dtype=dtype, device=device)
            return zeros, zeros if self.plan.has_cell else None
        parts: tuple[Tensor, ...] = state if isinstance(state, tuple) else (state,)
        if len(parts) != 1 + self.plan.has_cell:
            raise ValueError("the state of an LSTM is (h, c)" if self.plan.has_cell else "the state is one tensor, h")
        if not batched:
            parts = tuple(part.unsqueeze(1) for part in parts)
        for part in parts:
            if part.shape != (L, B, H):
                raise ValueError(f"state has shape {tuple(part.shape)}; expected {(L, B, H)}")
        by_row = [part.to(dtype).transpose(0, 1) for part in parts]
        return by_row[0], by_row[1] if self.plan.has_cell else None

    @classmethod
    def from_torch(cls, module: nn.LSTM | nn.GRU | nn.RNN) -> GatedFeedbackRNN:
        """A stack (feedback="none") with the weights of a torch.nn.LSTM, GRU or tanh RNN, equal to it.

        Raises ValueError for what has no counterpart here: bidirectional, projections, relu.
        """
        unit = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "tanh"}.get(module.mode)
        if unit is None:
            raise ValueError(f"{module.mode} has no counterpart here: only LSTM, GRU and tanh RNN")
        if module.bidirectional or module.proj_size:
            raise ValueError("bidirectional networks and projections have no counterpart here")
        weight: Tensor = module.get_parameter("weight_ih_l0")
        ours = cls(
            module.input_size,
            module.hidden_size,
            module.num_layers,
            unit=unit,
            feedback="none",
            bias=module.bias,
            batch_first=module.batch_first,
            dropout=module.dropout,
            hidden_bias=unit == "gru" and module.bias,
            device=weight.device,
            dtype=weight.dtype,
        ).train(module.training)
        order, H = _TORCH_ROWS[unit], module.hidden_size
        with torch.no_grad():
            for j in range(module.num_layers):

                def rows(name: str, j: int = j) -> Tensor:
                    theirs: Tensor = getattr(module, f"{name}_l{j}")
                    return torch.cat([theirs[k * H : (k + 1) * H] for k in order])

                recurrent = rows("weight_hh")
                ours.get_parameter(f"weight_ih_l{j}").copy_(rows("weight_ih"))
                ours.get_parameter(f"weight_hc_l{j}").copy_(recurrent[:H])
                if unit != "tanh":
                    ours.get_parameter(f"weight_hu_l{j}").copy_(recurrent[H:])
                if module.bias:
                    inside = rows("bias_hh")
                    bias = rows("bias_ih") + inside
                    if unit == "gru":
                        bias[:H] -= inside[:H]
                        ours.get_parameter(f"bias_hc_l{j}").copy_(inside[:H])
                    ours.get_parameter(f"bias_l{j}").copy_(bias)
        return ours

    def extra_repr(self) -> str:
        p = self.plan
        known = ("input_skips", "output_skips", "residual", "layer_norm", "cap_input_gate")
        options = [name for name in known if getattr(p, name)]
        return ", ".join(
            [
                f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, unit={p.unit!r}",
                f"feedback={p.feedback!r}, unit_gates={p.unit_gates!r}",
                *options,
            ]
        )


def _check(
    unit: str,
    feedback: str,
    unit_gates: str,
    cuda: str,
    hidden_bias: bool,
    cap_input_gate: bool,
    input_size: int,
    hidden_size: int,
    num_layers: int,
) -> None:
    for name, value, allowed in (
        ("unit", unit, tuple(GATES)),
        ("feedback", feedback, ("gated", "full", "none")),
        ("unit_gates", unit_gates, ("all", "own")),
        ("cuda", cuda, ("graphs", "kernels", "operators")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
    if hidden_bias and unit != "gru":
        raise ValueError("hidden_bias is for unit='gru'")
    if cap_input_gate and unit != "lstm":
        raise ValueError("cap_input_gate is for unit='lstm'")
    if min(input_size, hidden_size, num_layers) < 1:
        raise ValueError("input_size, hidden_size and num_layers must be at least 1")
