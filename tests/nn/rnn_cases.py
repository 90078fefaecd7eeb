"""Layers of every kind for tests, what they compute and its gradients, and rows of a batch against themselves alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from gfrnn.nn import GatedFeedbackRNN, Noise

UNITS = ["tanh", "gru", "lstm"]
CAPPED = "capped-lstm"
"""The LSTM with its input gate capped, where units are listed."""
FEEDBACK = ["gated", "full", "none"]
SKIPS = {
    "plain": {},
    "input_skips": {"input_skips": True},
    "all_skips": {"input_skips": True, "output_skips": True},
    "residual": {"residual": True},
    "residual_skips": {"residual": True, "output_skips": True},
}
KINDS = [
    pytest.param(unit, feedback, gates, skips, id=f"{unit}-{feedback}-{gates}-{skips}")
    for unit, feedback, gates, skips in itertools.product([*UNITS, CAPPED], FEEDBACK, ["all", "own"], SKIPS)
    if unit != CAPPED or skips in ("plain", "residual_skips")  # which have nothing to do with it
    if gates == "all" or (feedback != "none" and unit != "tanh")  # else it is the same net
]


def make(unit: str, feedback: str, gates: str, skips: str, sizes_: tuple[int, int, int] = (3, 4, 3), **options):
    torch.manual_seed(0)
    if unit == CAPPED:
        unit, options = "lstm", {**options, "cap_input_gate": True}
    rnn = GatedFeedbackRNN(
        *sizes_, unit=unit, feedback=feedback, unit_gates=gates, **SKIPS[skips], **options, dtype=torch.float64
    )
    for p in rnn.parameters():  # biases too, so that nothing hides behind a zero
        torch.nn.init.normal_(p, std=0.4)
    return rnn


def start(rnn: GatedFeedbackRNN, batch: int):
    torch.manual_seed(1)
    shape = (rnn.num_layers, batch, rnn.hidden_size)
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    c = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return (h, c) if rnn.plan.has_cell else h


def flat(state) -> list[torch.Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


def run_with_gradients(rnn, x, state, weights=None, **kwargs):
    """(outputs, gradients) of a scalar that depends on every output and on the last state.

    Gradients of the parameters, the state before, and of input that is not symbols. weights: of outputs in the scalar.
    """
    for p in rnn.parameters():
        p.grad = None
    x = x.clone().requires_grad_(x.is_floating_point())
    leaves = [s.detach().clone().requires_grad_() for s in flat(state)]
    y, last = rnn(x, tuple(leaves) if len(leaves) > 1 else leaves[0], **kwargs)
    if weights is None:
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    loss = (y * weights).sum() + sum((s * s * (k + 1)).sum() for k, s in enumerate(flat(last)))
    inputs = [*rnn.parameters(), *leaves, *([x] if x.requires_grad else [])]
    return [y, *flat(last)], torch.autograd.grad(loss, inputs)


def symbols_or_dense(symbols: bool, T: int, B: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randint(5, (T, B)) if symbols else torch.randn(T, B, 5, dtype=dtype)


def check_rows_alone(rnn, x, state, near) -> None:
    """Each row as it is alone without what comes after its end; and the gradients of all of them together."""
    lengths, rows_B = torch.tensor([3, 5, 0, 2, 4]), torch.tensor([7, 9, 3, 5, 8])
    width = rnn.output_size
    weights = torch.randn(*x.shape[:2], width, dtype=flat(state)[0].dtype)
    (y, *last), gradients = run_with_gradients(
        rnn, x, state, weights, lengths=lengths, noise=Noise(seed=3, update=4, rows_B=rows_B)
    )
    num_states, parameters = len(last), list(rnn.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    d_states = gradients[len(parameters) : len(parameters) + num_states]
    for b, length in enumerate(lengths.tolist()):
        row = slice(b, b + 1)
        assert not y[length:, b].any()
        given = [s[:, row] for s in flat(state)]
        if length == 0:
            assert all(map(torch.equal, [s[:, row] for s in last], given))
            for k, (d, s) in enumerate(zip(d_states, given, strict=True)):
                assert torch.equal(d[:, row], 2 * (k + 1) * s)
            continue
        (y_alone, *last_alone), alone = run_with_gradients(
            rnn,
            x[:length, row],
            tuple(given) if num_states > 1 else given[0],
            weights[:length, row],
            noise=Noise(seed=3, update=4, rows_B=rows_B[row]),
        )
        for total, part in zip(sums, alone, strict=False):
            total += part
        near([y[:length, row], *(s[:, row] for s in last)], [y_alone, *last_alone])
        near([d[:, row] for d in d_states], alone[len(parameters) : len(parameters) + num_states])
        if x.is_floating_point():
            near([gradients[-1][:length, row]], [alone[-1]])
            assert not gradients[-1][length:, b].any()
    near(gradients[: len(parameters)], sums)


def nearly(atol: float):
    def near(got, wanted):
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=atol, atol=atol)

    return near
