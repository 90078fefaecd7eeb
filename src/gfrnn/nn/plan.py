"""What a recurrence computes, apart from its numbers: read by the plain loop and by the Function alike.

Legend: T steps, B rows, L layers, H units, I inputs, K = G * H + Lg rows of a layer's pre-activation in the order
candidate, unit gates, global gates (G * H of units.py, then Lg = L with gated feedback, else 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gfrnn.config import Feedback, UnitGates
from gfrnn.nn.units import GATES


@dataclass(frozen=True)
class Plan:
    """The shape of a recurrence."""

    unit: str
    num_layers: int
    hidden_size: int
    feedback: Feedback
    unit_gates: UnitGates
    input_skips: bool
    output_skips: bool
    residual: bool
    layer_norm: bool
    compute_dtype: torch.dtype | None = None
    """Of the operands of products; None: that of the parameters. Accumulation, cell and gates keep the latter."""

    @property
    def unit_rows(self) -> int:
        """G * H: rows of the candidate and the unit gates."""
        return GATES[self.unit] * self.hidden_size

    @property
    def global_gates(self) -> int:
        """Lg: global gates that end in one layer."""
        return self.num_layers if self.feedback == "gated" else 0

    @property
    def rows(self) -> int:
        """K."""
        return self.unit_rows + self.global_gates

    @property
    def has_cell(self) -> bool:
        return self.unit == "lstm"

    @property
    def candidate_sources(self) -> int:
        """Layers at t-1 that a candidate reads: its own or all."""
        return 1 if self.feedback == "none" else self.num_layers

    @property
    def unit_sources(self) -> int:
        """Layers at t-1 that unit gates read."""
        return self.num_layers if self.feedback != "none" and self.unit_gates == "all" else 1

    @property
    def all_rows(self) -> slice:
        """Rows of K whose recurrent part is one ungated product with h* of all layers."""
        H, GH, K = self.hidden_size, self.unit_rows, self.rows
        start = 0 if self.feedback == "full" else H
        if self.feedback == "none":
            return slice(K, K)
        if self.unit_gates == "all":
            return slice(start, K)
        return slice(0, H) if self.feedback == "full" else slice(GH, K)

    @property
    def own_rows(self) -> slice:
        """Rows of K whose recurrent part is a product with the layer's own h."""
        H, GH = self.hidden_size, self.unit_rows
        if self.feedback == "none":
            return slice(0, GH)
        return slice(H, GH) if self.unit_gates == "own" else slice(GH, GH)


class LayerWeights(NamedTuple):
    """One layer's parameters, None where the plan has no such part."""

    below: Tensor | None
    """[K, H], what the layer below feeds; layer 0 has none."""
    candidate: Tensor
    """[H, candidate_sources * H], recurrent."""
    unit: Tensor | None
    """[(G - 1) * H, unit_sources * H], recurrent."""
    gates: Tensor | None
    """[L, L * H]: u_g of the gates i -> this layer, one row an i."""
    bias: Tensor
    """[K]; zeros where the module has no bias."""
    hidden_bias: Tensor | None
    """[H], GRU: inside the product with the reset gate."""
    gain: Tensor | None
    """[G * H], layer norm of pre-activations."""
    cell_gain: Tensor | None
    """[H], layer norm of the LSTM's cell."""
    cell_bias: Tensor | None
    """[H]."""


def recurrent_rows(weights: LayerWeights, plan: Plan, rows: slice) -> Tensor:
    """The recurrent weights [rows, sources * H] of a contiguous range of K (one that all has the same sources)."""
    H, GH = plan.hidden_size, plan.unit_rows
    parts = [(slice(0, H), weights.candidate), (slice(H, GH), weights.unit), (slice(GH, plan.rows), weights.gates)]
    chosen = [part for span, part in parts if part is not None and rows.start <= span.start < span.stop <= rows.stop]
    return torch.cat(chosen) if len(chosen) > 1 else chosen[0]
