"""The layer against its equations: the plain loop that defines it, and what gates, state, rows and symbols mean."""

from __future__ import annotations

import dataclasses
import itertools

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

from gfrnn.nn import GatedFeedbackRNN, Noise


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("unit", "feedback", "gates", "skips"), KINDS)
def test_function_equals_plain_loop(unit, feedback, gates, skips, layer_norm):
    rnn = make(
        unit, feedback, gates, skips, layer_norm=layer_norm, hidden_bias=unit == "gru", dropout=0.3, weight_dropout=0.2
    )
    x, state = torch.randn(5, 2, 3, dtype=torch.float64), start(rnn, 2)
    noise = Noise(seed=3, update=4, rows_B=torch.tensor([7, 9]))
    for lengths in (None, torch.tensor([5, 3]), torch.tensor([0, 4])):
        rnn.reference = False
        outputs, gradients = run_with_gradients(rnn, x, state, noise=noise, lengths=lengths)
        rnn.reference = True
        expected, wanted = run_with_gradients(rnn, x, state, noise=noise, lengths=lengths)
        for got, want in zip([*outputs, *gradients], [*expected, *wanted], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert sum(float(g.abs().sum() > 0) for g in wanted) == len(wanted)  # nothing was left out of the comparison


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("unit", "feedback"), list(itertools.product([*UNITS, CAPPED], FEEDBACK)))
def test_watched_states_and_gates_are_the_plain_loops(unit, feedback, layer_norm, recompute):
    """Of every step once, in order; with a backward to come and without; and watching changes no bit."""
    rnn = make(unit, feedback, "all", "residual_skips", layer_norm=layer_norm, recompute=recompute)
    x, state = torch.randn(5, 2, 3, dtype=torch.float64), start(rnn, 2)
    given = {"lengths": torch.tensor([5, 3])}
    expected, wanted = run_with_gradients(rnn, x, state, **given)

    def watched(reference, backward):
        seen = []
        rnn.reference = reference
        given["watch"] = lambda hs, g: seen.append([hs.clone(), None if g is None else g.clone()])
        with torch.set_grad_enabled(backward):
            found = run_with_gradients(rnn, x, state, **given) if backward else ([rnn(x, state, **given)[0]], [])
        hs, gates = zip(*seen, strict=True)
        return found, torch.cat(hs), torch.cat(gates) if feedback == "gated" else None

    _, hs_plain, gates_plain = watched(True, False)
    assert hs_plain.shape == (5, 3, 4, 2)
    assert gates_plain is None or gates_plain.shape == (5, 3, 3, 2)
    if gates_plain is not None:  # of layer 0 at the second step, by their equation
        above = rnn.weight_ih_l0[rnn.plan.unit_rows :] @ x[1].T + rnn.bias_l0[rnn.plan.unit_rows :].unsqueeze(1)
        torch.testing.assert_close(
            gates_plain[1, 0], torch.sigmoid(above + rnn.weight_hg_l0 @ hs_plain[0].flatten(0, 1))
        )
    for reference, backward in ((True, True), (False, False), (False, True)):
        (outputs, gradients), hs, gates = watched(reference, backward)
        torch.testing.assert_close(hs, hs_plain, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gates, gates_plain, rtol=1e-12, atol=1e-12)
        if not reference:
            assert all(map(torch.equal, outputs, expected))
            assert all(map(torch.equal, gradients, wanted[: len(gradients)]))


SHAPES = [(3, 5, 1, 1, 1), (7, 13, 2, 1, 3), (4, 33, 3, 9, 1), (1, 1, 2, 3, 2), (5, 24, 4, 6, 7)]  # I, H, L, T, B


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("symbols", [False, True])
@pytest.mark.parametrize(("feedback", "gates"), [("none", "all"), ("full", "own"), ("gated", "all"), ("gated", "own")])
@pytest.mark.parametrize("unit", [*UNITS, CAPPED])
def test_function_equals_plain_loop_as_it_trains(unit, feedback, gates, symbols, ragged, shape):
    """In fp32 and bf16, which take other products than the checks in float64; sizes that no vector unit likes."""
    inputs, H, L, T, B = shape
    sizes_ = (inputs, H, L)
    rnn = make(unit, feedback, gates, "all_skips", sizes_, dropout=0.2, input_dropout=0.2).float()
    for p in rnn.parameters():  # small enough that steps do not multiply a rounding
        p.data *= min(1.0, 2 / (L * H) ** 0.5)
    x = torch.randint(inputs, (T, B)) if symbols else torch.randn(T, B, inputs)
    state = tuple(s.detach().float() for s in flat(start(rnn, B)))
    state = state if rnn.plan.has_cell else state[0]
    given = {"noise": Noise(seed=3, update=4, rows_B=torch.arange(B))}
    if ragged:
        given["lengths"] = torch.randint(T + 1, (B,))
    outputs, gradients = run_with_gradients(rnn, x, state, **given)
    plan = rnn.plan
    rnn.plan = dataclasses.replace(plan, compute_dtype=torch.bfloat16)
    rounded, rounded_gradients = run_with_gradients(rnn, x, state, **given)
    rnn.plan, rnn.reference = plan, True
    expected, wanted = run_with_gradients(rnn, x, state, **given)
    for got, want in zip([*outputs, *gradients], [*expected, *wanted], strict=True):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=0.05)
    for near, exact in ((rounded, expected), (rounded_gradients, wanted)):
        difference = torch.cat([(a - b).flatten() for a, b in zip(near, exact, strict=True)])
        assert all(t.dtype == torch.float32 for t in near)
        assert difference.norm() <= 0.03 * torch.cat([t.flatten() for t in exact]).norm()


@pytest.mark.parametrize("unit", UNITS)
def test_pieces_with_carried_state_equal_the_whole(unit):
    rnn = make(unit, "gated", "all", "all_skips")
    x, state = torch.randn(7, 2, 3, dtype=torch.float64), start(rnn, 2)
    whole, last = rnn(x, state)
    first, middle = rnn(x[:3], state)
    second, end = rnn(x[3:], middle)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-12)
    for got, want in zip(flat(end), flat(last), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("unit", UNITS)
def test_rows_do_not_influence_each_other(unit):
    rnn = make(unit, "gated", "all", "input_skips", layer_norm=True)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    alone, _ = rnn(x[:, 1:2])
    changed = x.clone()
    changed[:, 0], changed[:, 2] = 5.0, -5.0
    among, _ = rnn(changed)
    torch.testing.assert_close(among[:, 1:2], alone, rtol=0, atol=1e-12)


def test_gates_matter_and_full_is_a_gate_of_one():
    gated = make("lstm", "gated", "all", "plain")
    full = make("lstm", "full", "all", "plain")
    GH = gated.plan.unit_rows
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        for name, p in full.named_parameters():
            source = gated.get_parameter(name)
            p.copy_(source[:GH] if name.startswith(("weight_ih", "bias")) else source)
    assert not torch.allclose(gated(x)[0], full(x)[0], atol=1e-3)
    with torch.no_grad():
        for j in range(3):
            gated.get_parameter(f"bias_l{j}")[GH:] = 1e3  # sigmoid(1000) = 1
    torch.testing.assert_close(gated(x)[0], full(x)[0], rtol=0, atol=1e-12)


def test_symbols_are_one_hot_vectors():
    rnn = make("gru", "gated", "all", "input_skips", input_dropout=0.5)
    symbols = torch.randint(0, 3, (5, 4))
    one_hot = torch.nn.functional.one_hot(symbols, 3).double()
    torch.testing.assert_close(rnn.eval()(symbols)[0], rnn.eval()(one_hot)[0], rtol=0, atol=1e-12)
    assert torch.equal(rnn(symbols.byte())[0], rnn(symbols)[0])
    noise = Noise(0, 1, torch.arange(4))
    rnn.train()
    torch.testing.assert_close(rnn(symbols, noise=noise)[0], rnn(one_hot, noise=noise)[0], rtol=0, atol=1e-12)
    assert not torch.allclose(rnn(symbols, noise=noise)[0], rnn(symbols, noise=Noise(0, 2, torch.arange(4)))[0])


def test_bf16_products_stay_near_fp32():
    torch.manual_seed(0)
    wide = GatedFeedbackRNN(8, 32, 3, input_skips=True)
    narrow = GatedFeedbackRNN(8, 32, 3, input_skips=True, compute_dtype=torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    x, h = torch.randn(10, 4, 8), torch.zeros(3, 4, 32)
    outputs, gradients = run_with_gradients(narrow, x, (h, h))
    expected, wanted = run_with_gradients(wide, x, (h, h))
    assert all(t.dtype == torch.float32 for t in [*outputs, *gradients])
    for got, want in zip([*outputs, *gradients], [*expected, *wanted], strict=True):
        assert (got - want).norm() < 0.03 * want.norm()
        assert not torch.equal(got, want)


def test_recurrent_blocks_start_orthogonal():
    rnn = GatedFeedbackRNN(3, 16, 2)
    block = rnn.weight_hu_l1.detach()[16:32, 16:]
    torch.testing.assert_close(block @ block.T, torch.eye(16), atol=1e-5, rtol=0)
    assert not rnn.bias_l0.any()


@pytest.mark.parametrize("reference", [False, True])
def test_a_capped_input_gate_and_the_forget_gate_are_one_at_most(reference):
    """By the cell alone: where f lets all through, i lets nothing in; from c = 0 and f = 0 it is i c~ as ever."""
    rnn = make(CAPPED, "none", "all", "plain", (1, 5, 1), reference=reference)
    other = make("lstm", "none", "all", "plain", (1, 5, 1), reference=reference)
    x, h, c = torch.zeros(1, 1, 1).double(), torch.zeros(1, 1, 5).double(), torch.full((1, 1, 5), 0.25).double()
    bounded, unbounded = [], []
    for forget in (-40.0, -1.0, 0.0, 1.0, 3.0, 40.0):
        for net, found in ((rnn, bounded), (other, unbounded)):
            net.set_forget_bias(forget)
            net.bias_l0.data[:10] = 40.0  # the candidate and the input gate are 1: c_next = f c + i
            f, (_, (_, c_next)) = torch.sigmoid(torch.tensor(forget)), net(x, (h, c))
            found.append((c_next - f * c).max().item() + f.item())  # i + f
    assert max(bounded) == pytest.approx(1, abs=1e-6)
    assert min(bounded) == pytest.approx(1, abs=1e-6)
    assert max(unbounded) == pytest.approx(2, abs=1e-6)
    torch.manual_seed(2)
    for net, most in ((rnn, True), (make(CAPPED, "gated", "all", "all_skips"), True), (other, False)):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=4)
        _, (_, c) = net(torch.randn(200, 3, net.input_size, dtype=torch.float64))
        assert bool(c.abs().max() <= 1) == most
