"""Dropout's masks: fair, independent, and the same for a row wherever it is computed."""

from __future__ import annotations

import torch
from rnn_cases import (
    make,
)

from gfrnn.nn import Noise


def test_dropout_follows_the_global_row():
    rnn = make("lstm", "gated", "all", "plain", dropout=0.5)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    together, _ = rnn(x, noise=Noise(5, 6, torch.tensor([10, 11, 12])))
    alone, _ = rnn(x[:, 2:], noise=Noise(5, 6, torch.tensor([12])))
    torch.testing.assert_close(together[:, 2:], alone, rtol=0, atol=1e-12)
    other, _ = rnn(x[:, 2:], noise=Noise(5, 6, torch.tensor([13])))
    assert not torch.allclose(alone, other)
    assert torch.equal(rnn.eval()(x)[0], rnn.eval()(x)[0])


def test_masks_are_fair_and_independent():
    noise = Noise(1, 2, torch.arange(400))
    mask = noise.row_mask(0, 500, 0.3)
    kept = mask > 0
    assert abs(kept.double().mean().item() - 0.7) < 0.005  # 200,000 draws: standard deviation 0.001
    assert torch.allclose(mask[kept], torch.tensor(1 / 0.7))
    for other in (noise.row_mask(1, 500, 0.3), Noise(2, 2, torch.arange(400)).row_mask(0, 500, 0.3), mask.roll(1, 0)):
        both = ((other > 0) & kept).double().mean().item()
        assert abs(both - 0.49) < 0.006
    weights = noise.weight_mask(3, torch.empty(300, 400), 0.25)
    assert abs((weights > 0).double().mean().item() - 0.75) < 0.005
    assert torch.equal(weights, Noise(1, 2, torch.arange(3)).weight_mask(3, torch.empty(300, 400), 0.25))
