"""The layer's gradients: against finite differences, recomputed, of a few parameters, and a layer at a time."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from rnn_cases import (
    CAPPED,
    FEEDBACK,
    KINDS,
    UNITS,
    flat,
    make,
    run_with_gradients,
    start,
)

from gfrnn.nn import Noise, gradients


@pytest.mark.parametrize(("unit", "feedback", "gates", "skips"), KINDS)
def test_gradcheck(unit, feedback, gates, skips):
    rnn = make(unit, feedback, gates, skips, sizes_=(2, 2, 2), hidden_bias=unit == "gru")
    names = [n for n, _ in rnn.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *tensors):
        state, params = tensors[: 1 + rnn.plan.has_cell], tensors[1 + rnn.plan.has_cell :]
        args = (x, tuple(state) if rnn.plan.has_cell else state[0])
        y, last = torch.func.functional_call(rnn, dict(zip(names, params, strict=True)), args)
        return y, *flat(last)

    params = [p.detach().clone().requires_grad_() for p in rnn.parameters()]
    assert torch.autograd.gradcheck(run, (x, *flat(start(rnn, 2)), *params), fast_mode=True)


@pytest.mark.parametrize("recompute", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("lengths", [None, (2, 5)])
@pytest.mark.parametrize("symbols", [False, True])
@pytest.mark.parametrize("unit", [*UNITS, CAPPED])
def test_recomputed_steps_have_the_same_gradients(unit, symbols, lengths, recompute):
    rnn = make(unit, "gated", "all", "residual_skips", (5, 4, 3), layer_norm=True, dropout=0.3, input_dropout=0.2)
    x = torch.randint(5, (7, 2)) if symbols else torch.randn(7, 2, 5, dtype=torch.float64)
    state = start(rnn, 2)
    given = {"noise": Noise(seed=3, update=4, rows_B=torch.tensor([7, 9]))}
    given["lengths"] = torch.tensor(lengths) if lengths else None
    expected, wanted = run_with_gradients(rnn, x, state, **given)
    rnn.plan = dataclasses.replace(rnn.plan, recompute=recompute)
    outputs, gradients = run_with_gradients(rnn, x, state, **given)
    assert all(map(torch.equal, outputs, expected))
    with torch.no_grad():
        y, last = rnn(x, state, **given)
    assert all(map(torch.equal, [y, *flat(last)], expected))
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("frozen", [None, "l1"])
@pytest.mark.parametrize(("feedback", "lengths"), [*((feedback, None) for feedback in FEEDBACK), ("gated", (4, 1))])
def test_gradients_of_some_and_twice(feedback, lengths, frozen, recompute):
    """A retained graph, frozen layers, gradients of a few parameters: as autograd's own of the plain loop."""
    rnn = make("gru", feedback, "all", "input_skips", layer_norm=True, recompute=recompute)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    lengths = torch.tensor(lengths) if lengths else None
    named = dict(rnn.named_parameters())
    for name, p in named.items():
        p.requires_grad_(frozen is None or not name.endswith(frozen))
    asked = [p for p in named.values() if p.requires_grad]
    for some in (asked, asked[:1], [named["weight_hu_l2"], named["bias_l0"]], [named["bias_l2"]]):
        loss = rnn(x, lengths=lengths)[0].square().sum()
        first = torch.autograd.grad(loss, some, retain_graph=True)
        again = torch.autograd.grad(loss, some, retain_graph=True)
        torch.autograd.grad(loss, asked[-1:], retain_graph=True)
        whole = torch.autograd.grad(loss, asked)
        rnn.reference = True
        wanted = torch.autograd.grad(rnn(x, lengths=lengths)[0].square().sum(), some)
        rnn.reference = False
        for one, two, want in zip(first, again, wanted, strict=True):
            torch.testing.assert_close(one, want, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(two, want, rtol=1e-10, atol=1e-10)
        found = {id(p): gradient for p, gradient in zip(asked, whole, strict=True)}
        for p, want in zip(some, wanted, strict=True):
            torch.testing.assert_close(found[id(p)], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changed", range(3))
def test_a_start_or_lengths_that_are_changed_before_backward_are_refused(changed):
    rnn = make("lstm", "gated", "all", "plain", recompute=2)
    h, c = (torch.zeros(3, 2, 4, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([3, 5])
    y, _ = rnn(torch.randn(5, 2, 3, dtype=torch.float64), (h, c), lengths=lengths)
    (h, c, lengths)[changed].fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("recompute", [0, 2])
def test_gradients_come_a_layer_at_a_time(recompute):
    """What lets an engine reduce the last layer's while the others' are computed."""
    rnn = make("lstm", "gated", "all", "all_skips", recompute=recompute)
    made: list[int] = []  # layers whose products were made, as they are
    arrived: list[tuple[int, int]] = []  # (layer of a parameter whose gradient arrived, layers made by then)
    make_layer = gradients._Products.layer

    def watched(self, j, *args):
        made.append(j)
        return make_layer(self, j, *args)

    with mock.patch.object(gradients._Products, "layer", watched):
        for name, p in rnn.named_parameters():
            if name.startswith(("weight_hc", "weight_hu", "weight_hg", "bias")):
                p.register_post_accumulate_grad_hook(lambda _, layer=int(name[-1]): arrived.append((layer, len(made))))
        rnn(torch.randn(3, 2, 3, dtype=torch.float64))[0].sum().backward()
    assert made[-3:] == [2, 1, 0]
    before = len(made) - 3
    assert arrived == [(layer, before + 3 - layer) for layer in (2, 1, 0) for _ in range(4)]
