"""What a recurrence computes, apart from its numbers: read by the plain loop and by the Function alike.

Legend: T steps, B rows, L layers, H units, I inputs, K = G * H + Lg rows of a layer's pre-activation in the order
candidate, unit gates, global gates (G * H of gfrnn.config, then Lg = L with gated feedback, else 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gfrnn.config import GATES, Feedback, UnitGates

Watch = Callable[[Tensor, Tensor | None], None]
"""Told of a call's steps, some at a time and in order: h after each [T', L, H, B], and the global gates [T', L target,
L source, B] (None where there are none). They are valid until it returns."""


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
    cap_input_gate: bool = False
    compute_dtype: torch.dtype | None = None
    """Of the operands of products; None: that of the parameters. Accumulation, cell and gates keep the latter."""

    recompute: int = 0
    """Backward finds the state of every so many steps and computes the rest again; 0: forward keeps it all."""

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
