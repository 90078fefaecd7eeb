"""The gradient noise scale: from gaussians of a known one, and from real gradients part by part.

test_invariance.py has it from real training, where neither processes nor ZeRO stages change it.
"""

from __future__ import annotations

import pytest
import torch

from gfrnn.training.noise_scale import NoiseScale, PartNorms


@pytest.mark.parametrize("counts", [[16, 16], [5, 20, 7, 0], [100, 1]], ids=str)
def test_a_known_scale_is_found(counts):
    """Within 5 %, from parts of any sizes."""
    generator = torch.Generator().manual_seed(1)
    true = torch.randn(40, generator=generator, dtype=torch.float64)
    deviation = torch.rand(40, generator=generator, dtype=torch.float64) * 6
    wanted = float(deviation.square().sum() / true.square().sum())
    scale = NoiseScale(0.999)
    total = sum(counts)
    for _ in range(8000):
        parts = [(n, true + deviation * noise(generator) / n**0.5) for n in counts if n]
        mean = torch.stack([n * g for n, g in parts]).sum(0) / total
        weighted = sum(n * float(g.square().sum()) for n, g in parts)
        scale.see(weighted, len(parts), total, float(mean.norm()))
    assert scale.value == pytest.approx(wanted, rel=0.05)


def noise(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(40, generator=generator, dtype=torch.float64)


def test_nothing_is_said_before_there_is_something_to_say():
    scale = NoiseScale(0.9)
    assert scale.figures() == {}
    scale.see(weighted=10.0, parts=1, count=10, norm=1.0)
    assert scale.figures() == {}  # one part tells nothing
    scale.see(weighted=40.0, parts=2, count=10, norm=1.0)
    assert scale.figures() == {}  # S = 30, so that |G|^2 = 1 - 3: noise alone
    scale.see(weighted=15.0, parts=2, count=10, norm=10.0)
    assert NoiseScale(0.0, spread=3.0, signal=1.0).figures() == {}  # switched off since


def test_a_figure_by_hand():
    scale = NoiseScale(0.5)
    scale.see(weighted=15.0, parts=2, count=10, norm=1.0)  # S = 15 - 10, |G|^2 = 1 - 5 / 10
    assert scale.figures() == {"noise_scale": 10.0}


def test_norms_of_parts_are_those_of_their_mean_gradients():
    """Of a weight that is used twice, one that is not, and rows that do not count; gradients add up over the parts."""
    torch.manual_seed(0)
    twice, once = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(3, 4))
    data, divisor = torch.randn(7, 4), 5.0
    norms = PartNorms([twice, once])
    expected = 0.0
    for rows in (data[:4], data[4:], data[:0]):
        outputs = torch.tanh(torch.tanh(rows @ twice) @ twice) @ once.T
        grads = torch.autograd.grad(outputs.square().sum(), [twice, once], retain_graph=True)
        if len(rows):
            expected += sum(float((g / len(rows)).double().square().sum()) for g in grads) * len(rows)
        norms._squares.clear()  # autograd.grad is seen too
        (outputs.square().sum() / divisor).backward()
        norms.take(len(rows), divisor)
    weighted, parts = norms.shared(torch.device("cpu")).tolist()
    assert parts == 2
    assert weighted == pytest.approx(expected, rel=1e-5)
    assert norms.shared(torch.device("cpu")).tolist() == [0.0, 0.0]  # the next update's begin at nothing
