"""What a training step of ours is compared with: the same arithmetic as others would do it.

For benchmarks to import: no program of its own.

Legend: T steps, B rows, L layers, H units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfrnn.config import ModelSettings, model_sizes
from gfrnn.nn import GatedFeedbackRNN, LanguageModel, build_language_model


@dataclass
class Peer:
    """One way to make a training step."""

    name: str
    module: nn.Module
    loss: Callable[[], Tensor]
    flops: int
    """To train, a character, by formula: 6 a multiplied weight."""

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-4)


def language_model(name: str, model: LanguageModel, rows: int, steps: int, device: torch.device) -> Peer:
    """Next-symbol prediction from one carried state, look-up and softmax included."""
    model = model.to(device)
    settings = model.settings
    symbols = torch.randint(0, settings.vocab_size, (steps + 1, rows), device=device)
    state = model.zero_state(rows, device)

    def loss() -> Tensor:
        logits, _ = model(symbols[:-1], state)
        return F.cross_entropy(logits.flatten(0, 1), symbols[1:].flatten())

    return Peer(name, model, loss, model_sizes(settings).train_flops)


def gated_feedback(
    name: str, settings: ModelSettings, dtype: str, rows: int, steps: int, device: torch.device, recompute: int = 0
) -> Peer:
    return language_model(name, build_language_model(settings, dtype, 0, recompute=recompute), rows, steps, device)


def pair_loop(settings: ModelSettings, rows: int, steps: int, device: torch.device) -> Peer:
    """The same language model, its recurrence as PairLoop."""
    model = build_language_model(settings, "fp32", 0)
    assert isinstance(model.rnn, GatedFeedbackRNN)
    model.rnn = PairLoop(model.rnn)  # type: ignore[assignment]
    return language_model("loop over pairs, autograd, fp32", model, rows, steps, device)


def stack_size(weights: int, layers: int) -> int:
    """H of an LSTM stack of about so many weights, 8 H^2 a layer, that reads input of its own width.

    A multiple of 8: in bf16 cuDNN and cuBLAS are fast where rows begin at multiples of 16 bytes.
    """
    return 8 * round(math.sqrt(weights / (8 * layers)) / 8)


def stack(name: str, rnn: nn.Module, rows: int, steps: int, device: torch.device, dtype: torch.dtype) -> Peer:
    """An LSTM stack that reads dense input of its own width."""
    rnn = rnn.to(device, dtype)
    hidden = rnn.hidden_size
    assert isinstance(hidden, int)
    x = torch.randn(steps, rows, hidden, device=device, dtype=dtype)
    weights = sum(p.numel() for p in rnn.parameters() if p.dim() > 1)
    return Peer(name, rnn, lambda: rnn(x)[0].float().square().mean(), 6 * weights)


class PairLoop(nn.Module):
    """A GF-LSTM as it is usually written: a linear layer for every pair of layers, loops over steps and pairs.

    Takes its weights from one of ours with input skips (and no dropout, layer norm or residual), whose results it has.
    """

    def __init__(self, ours: GatedFeedbackRNN):
        super().__init__()
        plan, L, H = ours.plan, ours.num_layers, ours.hidden_size
        assert plan.unit == "lstm"
        assert plan.feedback == "gated"
        assert plan.input_skips
        self.num_layers, self.hidden_size, self.output_skips = L, H, plan.output_skips
        self.unit_layers = [range(L) if plan.unit_sources > 1 else range(j, j + 1) for j in range(L)]

        def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            made.weight.data.copy_(weight)
            if bias is not None:
                made.bias.data.copy_(bias)
            return made

        def pairs(name: str) -> nn.ModuleList:
            """[j][i] for every block of H columns."""
            parameters = [ours.get_parameter(f"{name}_l{j}") for j in range(L)]
            return nn.ModuleList(nn.ModuleList(map(linear, p.split(H, dim=1))) for p in parameters)

        own = ["weight_ih_l0", *(f"weight_xh_l{j}" for j in range(1, L))]
        self.from_input = nn.ModuleList(
            linear(ours.get_parameter(name), ours.get_parameter(f"bias_l{j}")) for j, name in enumerate(own)
        )
        self.from_below = nn.ModuleList(linear(ours.get_parameter(f"weight_ih_l{j}")) for j in range(1, L))
        self.candidates, self.units = pairs("weight_hc"), pairs("weight_hu")
        self.gates = nn.ModuleList(linear(ours.get_parameter(f"weight_hg_l{j}")) for j in range(L))

    def forward(
        self,
        symbols_TB: Tensor,
        state: tuple[Tensor, Tensor],
        lengths: None = None,
        noise: None = None,
        watch: None = None,
    ) -> tuple[Tensor, object]:
        L, H = self.num_layers, self.hidden_size
        h, c = list(state[0]), list(state[1])
        vocabulary = self.from_input[0].weight.shape[1]
        outputs = []
        for symbols_B in symbols_TB:
            x_BI = F.one_hot(symbols_B, vocabulary).to(h[0].dtype)
            before = list(h)
            h_star = torch.cat(before, dim=1)
            for j in range(L):
                a = self.from_input[j](x_BI)
                if j > 0:
                    a = a + self.from_below[j - 1](h[j - 1])
                gate = torch.sigmoid(a[:, 4 * H :] + self.gates[j](h_star))
                candidate, unit = a[:, :H], a[:, H : 4 * H]
                for i in range(L):
                    candidate = candidate + gate[:, i : i + 1] * self.candidates[j][i](before[i])
                for block, i in enumerate(self.unit_layers[j]):
                    unit = unit + self.units[j][block](before[i])
                i_gate, f_gate, o_gate = torch.sigmoid(unit).chunk(3, dim=1)
                c[j] = f_gate * c[j] + i_gate * torch.tanh(candidate)
                h[j] = o_gate * torch.tanh(c[j])
            outputs.append(torch.cat(h, dim=1) if self.output_skips else h[-1])
        return torch.stack(outputs), (torch.stack(h), torch.stack(c))


class FlashLSTM(nn.Module):
    """A stack of flashrnn's LSTM layers, one head each; bf16, CUDA only."""

    def __init__(self, hidden_size: int, num_layers: int):
        super().__init__()
        from flashrnn import flashrnn

        self._run = flashrnn
        self.hidden_size = hidden_size
        self.inputs = nn.ModuleList(nn.Linear(hidden_size, 4 * hidden_size, bias=False) for _ in range(num_layers))
        bound = 1 / math.sqrt(hidden_size)
        self.recurrent = nn.Parameter(torch.empty(num_layers, 4, 1, hidden_size, hidden_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_layers, 4, 1, hidden_size))

    def forward(self, x_TBH: Tensor) -> tuple[Tensor]:
        x_BTH = x_TBH.transpose(0, 1)
        for j, linear in enumerate(self.inputs):
            x_BTG1H = linear(x_BTH).unflatten(-1, (4, 1, self.hidden_size))
            states, _ = self._run(x_BTG1H, self.recurrent[j], self.bias[j], function="lstm", backend="cuda")
            x_BTH = states[0].squeeze(2)
        return (x_BTH,)
