"""The layer against torch's own: outputs and gradients without feedback, shapes, types, and refusals."""

from __future__ import annotations

import pytest
import torch
from rnn_cases import (
    make,
    run_with_gradients,
)
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gfrnn.nn import GatedFeedbackRNN


class Packed(torch.nn.Module):
    """torch's own with the argument `lengths`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, state, lengths):
        layout = {"batch_first": self.module.batch_first}
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False, **layout)
        y, last = self.module(packed, state)
        return pad_packed_sequence(y, total_length=x.shape[int(self.module.batch_first)], **layout)[0], last


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM])
def test_no_feedback_equals_torch(kind, bias, batch_first, lengths):
    torch.manual_seed(0)
    theirs = kind(5, 7, num_layers=3, bias=bias, batch_first=batch_first, dtype=torch.float64)
    ours = GatedFeedbackRNN.from_torch(theirs)
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    h = torch.randn(3, 6 if batch_first else 2, 7, dtype=torch.float64)
    state = (h, torch.randn_like(h)) if kind is torch.nn.LSTM else h
    given = {"lengths": torch.tensor([1, 2, 1, 1, 2, 1] if batch_first else [2, 4])} if lengths else {}
    outputs, gradients = run_with_gradients(ours, x, state, **given)
    expected, their_gradients = run_with_gradients(Packed(theirs) if lengths else theirs, x, state, **given)
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)

    # gradients, in torch's arrangement: rows back in torch's order, shared biases twice
    named = dict(zip([n for n, _ in ours.named_parameters()], gradients, strict=False))
    order = {torch.nn.LSTM: (2, 0, 1, 3), torch.nn.GRU: (2, 0, 1), torch.nn.RNN: (0,)}[kind]

    def rows(t: torch.Tensor) -> torch.Tensor:
        blocks = dict(zip(order, t.split(7), strict=True))
        return torch.cat([blocks[k] for k in sorted(blocks)])

    for name, want in zip([n for n, _ in theirs.named_parameters()], their_gradients, strict=False):
        layer = name[-1]
        if name.startswith("weight_hh"):
            parts = [named[f"weight_hc_l{layer}"]]
            parts += [named[f"weight_hu_l{layer}"]] if f"weight_hu_l{layer}" in named else []
            got = rows(torch.cat(parts))
        elif name.startswith("weight_ih"):
            got = rows(named[f"weight_ih_l{layer}"])
        else:
            bias_gradient = named[f"bias_l{layer}"].clone()
            if name.startswith("bias_hh") and kind is torch.nn.GRU:
                bias_gradient[:7] = named[f"bias_hc_l{layer}"]
            got = rows(bias_gradient)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(gradients[-1], their_gradients[-1], rtol=0, atol=1e-10)  # the input's


def test_unbatched_and_batch_first():
    rnn = make("lstm", "gated", "own", "plain")
    x = torch.randn(5, 3, dtype=torch.float64)
    y, (h, c) = rnn(x)
    batched, (hb, cb) = rnn(x.unsqueeze(1))
    assert y.shape == (5, 4)
    assert h.shape == c.shape == (3, 4)
    torch.testing.assert_close(y, batched[:, 0])
    torch.testing.assert_close(c, cb[:, 0])
    torch.testing.assert_close(h, hb[:, 0])
    rnn.batch_first = True
    torch.testing.assert_close(rnn(x.unsqueeze(0))[0], batched.transpose(0, 1))
    with pytest.raises(ValueError, match="unbatched"):
        rnn(x, lengths=torch.tensor([5]))


def test_parameters_of_a_narrow_type():
    """Made so, or taken over from torch: products of bf16, everything else fp32."""
    rnn = GatedFeedbackRNN(3, 8, 2, dtype=torch.bfloat16)
    assert rnn.weight_hc_l0.dtype == torch.bfloat16
    assert rnn(torch.randn(4, 2, 3))[0].dtype == torch.float32
    lstm = torch.nn.LSTM(3, 8, 2, dropout=0.5).to(torch.bfloat16).eval()
    ours = GatedFeedbackRNN.from_torch(lstm)
    assert not ours.training
    x = torch.randn(4, 2, 3).to(torch.bfloat16)
    torch.testing.assert_close(ours(x)[0], lstm(x)[0].float(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "relu"}, "unit is 'relu'"),
        ({"feedback": "some"}, "feedback is 'some'"),
        ({"unit_gates": "none"}, "unit_gates"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"hidden_bias": True}, "unit='gru'"),
        ({"cap_input_gate": True, "unit": "gru"}, "unit='lstm'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        GatedFeedbackRNN(3, 4, 2, **change)


def test_bad_inputs():
    rnn = GatedFeedbackRNN(3, 4, 2)
    with pytest.raises(ValueError, match="input_size=3"):
        rnn(torch.zeros(2, 2, 5))
    with pytest.raises(ValueError, match="no steps"):
        rnn(torch.zeros(0, 2, 3))
    with pytest.raises(ValueError, match="no rows"):
        rnn(torch.zeros(2, 0, 3))
    with pytest.raises(ValueError, match=r"\(h, c\)"):
        rnn(torch.zeros(2, 2, 3), torch.zeros(2, 2, 4))
    with pytest.raises(ValueError, match="expected"):
        rnn(torch.zeros(2, 2, 3), (torch.zeros(2, 1, 4), torch.zeros(2, 1, 4)))
    with pytest.raises(ValueError, match="bidirectional"):
        GatedFeedbackRNN.from_torch(torch.nn.LSTM(3, 4, bidirectional=True))
