"""The kernels of a CPU's step, in float32, against the plain loop in float64."""

from __future__ import annotations

import collections
import dataclasses
import importlib.machinery
import math

import pytest
import torch
from rnn_cases import KINDS, flat, make, run_with_gradients, start

from gfrnn.nn import Noise, cpu_kernels
from gfrnn.nn.plan import LayerWeights, Plan

CPU = torch.device("cpu")
PLAN = Plan("lstm", 2, 5, "gated", "own", True, False, False, False)


def test_they_are_built_here():
    """Else every test of this file would compare torch's operators with themselves."""
    assert cpu_kernels.library() is not None
    assert cpu_kernels.usable(PLAN, CPU, torch.float32, 3)


@pytest.mark.parametrize(
    "other",
    [
        {"device": torch.device("meta")},
        {"dtype": torch.float64},
        {"rows": 2**17},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_they_do_not_know_is_left_to_torch(other, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # which are faster at many rows
    assert not cpu_kernels.usable(**({"plan": PLAN, "device": CPU, "dtype": torch.float32, "rows": 3} | other))


@pytest.mark.parametrize(("H", "B"), [(33, 2), (4, 67)])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("unit", "feedback", "gates", "skips"), KINDS)
def test_a_layer_by_kernels_equals_the_plain_loop(unit, feedback, gates, skips, layer_norm, H, B, monkeypatch):
    """Calls are counted: none went to torch's operators."""
    rnn = make(unit, feedback, gates, skips, (3, H, 3), layer_norm=layer_norm, hidden_bias=unit == "gru", dropout=0.3)
    x, state = torch.randn(4, B, 3, dtype=torch.float64), start(rnn, B)
    given = {"noise": Noise(seed=3, update=4, rows_B=torch.arange(B)), "lengths": torch.arange(B) % 4 + 1}
    rnn.reference = True
    outputs, gradients = run_with_gradients(rnn, x, state, **given)
    rnn.reference = False
    rnn.float()
    calls = collections.Counter()
    call = cpu_kernels._call
    monkeypatch.setattr(cpu_kernels, "_call", lambda name, *rest: (calls.update([name]), call(name, *rest)))
    state = tuple(each.float() for each in flat(state))
    state = state if rnn.plan.has_cell else state[0]
    found, slopes = run_with_gradients(rnn, x.float(), state, **given)
    of_gates = 12 if feedback == "gated" else 0
    kernels = {f"{rnn.plan.unit}_forward": 12, f"{rnn.plan.unit}_backward": 12}
    assert calls == collections.Counter(kernels | {"gates_forward": of_gates, "gates_backward": of_gates})
    for got, wanted in zip([*found, *slopes], [*outputs, *gradients], strict=True):
        # rounding of float32, which layer norm of few units amplifies
        torch.testing.assert_close(
            got.double(), wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.detach().abs().max()))
        )


def test_sigmoid_and_tanh_are_exact_to_a_few_units_in_the_last_place():
    """Over all that float32 can tell apart; infinities too, and what is no number stays none."""
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.logspace(-30, 1, 400), -torch.logspace(-30, 1, 400)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])]).view(1, -1)
    g, one = torch.zeros_like(x), torch.ones(1, *x.shape)
    gated = cpu_kernels.gates_forward(x, g, one)
    expected = x.double().sigmoid()
    torch.testing.assert_close(g.double(), expected, rtol=3e-7, atol=1e-37, equal_nan=True)
    assert torch.equal(gated[0].nan_to_num(7), g.nan_to_num(7))
    h = torch.empty_like(x)
    cpu_kernels.unit_forward(dataclasses.replace(PLAN, unit="tanh"), weights(), x.clone(), None, None, h, None, h)
    torch.testing.assert_close(h.double(), x.double().tanh(), rtol=3e-7, atol=0, equal_nan=True)


def weights() -> LayerWeights:
    nothing = torch.empty(0)
    return LayerWeights(None, nothing, None, None, nothing, None, None, None, None)


def test_what_is_not_contiguous_is_refused():
    x = torch.zeros(3, 4).t()
    with pytest.raises(ValueError, match="contiguous"):
        cpu_kernels.gates_forward(x, torch.zeros(4, 3), torch.zeros(4, 2, 3))


@pytest.mark.parametrize("unit", ["lstm", "gru"])
def test_under_autocast_products_are_of_another_type(unit):
    rnn = make(unit, "gated", "own", "plain", (3, 33, 3)).float()
    x = torch.randn(4, 20, 3)
    expected, _ = rnn(x)
    expected_slopes = torch.autograd.grad(expected.sum(), list(rnn.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = rnn(x)
    slopes = torch.autograd.grad(found.sum(), list(rnn.parameters()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    assert not torch.equal(found, expected)
    for slope, close in zip(slopes, expected_slopes, strict=True):
        torch.testing.assert_close(slope, close, rtol=0, atol=0.1 * close.abs().max().item())


@pytest.mark.usefixtures("fresh")
def test_a_library_of_another_version_is_not_used(monkeypatch):
    cpu_kernels.library.cache_clear()
    monkeypatch.setattr(cpu_kernels, "_VERSION", 0)
    assert cpu_kernels.missing()


@pytest.fixture
def fresh(monkeypatch):
    """They are looked for anew, then and after the test."""
    cpu_kernels.library.cache_clear()
    yield
    monkeypatch.undo()
    cpu_kernels.library.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_where_they_were_not_built_one_can_tell(monkeypatch):
    assert not cpu_kernels.missing()
    cpu_kernels.library.cache_clear()
    monkeypatch.setattr(importlib.machinery, "EXTENSION_SUFFIXES", [".of-another-python"])
    assert cpu_kernels.missing()
    cpu_kernels.library.cache_clear()
    monkeypatch.setenv("GFRNN_CPU_KERNELS", "0")
    assert not cpu_kernels.missing()


@pytest.mark.usefixtures("fresh")
def test_without_them_the_same_is_computed(monkeypatch):
    rnn = make("lstm", "gated", "own", "residual_skips", (3, 33, 3), layer_norm=True).float()
    x, state = torch.randn(4, 5, 3), tuple(each.float() for each in start(rnn, 5))
    found = run_with_gradients(rnn, x, state)
    monkeypatch.setenv("GFRNN_CPU_KERNELS", "0")
    cpu_kernels.library.cache_clear()
    assert cpu_kernels.library() is None
    without = run_with_gradients(rnn, x, state)
    for got, wanted in zip([*found[0], *found[1]], [*without[0], *without[1]], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
