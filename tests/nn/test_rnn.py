"""The layer against torch's own, against its plain loop, and against finite differences."""

from __future__ import annotations

import dataclasses
import itertools
from unittest import mock

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gfrnn.config import ModelSettings, model_sizes, presets
from gfrnn.nn import GatedFeedbackRNN, LanguageModel, MultiplicativeRNN, Noise, gradients

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
    noise = Noise(0, 1, torch.arange(4))
    rnn.train()
    torch.testing.assert_close(rnn(symbols, noise=noise)[0], rnn(one_hot, noise=noise)[0], rtol=0, atol=1e-12)
    assert not torch.allclose(rnn(symbols, noise=noise)[0], rnn(symbols, noise=Noise(0, 2, torch.arange(4)))[0])


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


# Rows that end before the batch does ---------------------------------------------------------------------------


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


def roughly(got, wanted):
    """As near as products of bf16 are that add in another order."""
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 0.01 * b.norm() + 1e-3


@pytest.mark.parametrize(("unit", "feedback", "gates", "skips"), KINDS)
def test_a_row_is_as_it_is_alone(unit, feedback, gates, skips):
    for options in ({"layer_norm": True, "recompute": 2}, {"hidden_bias": unit == "gru", "weight_dropout": 0.2}):
        for symbols in (False, True):
            rnn = make(unit, feedback, gates, skips, (5, 4, 3), dropout=0.3, input_dropout=0.2, **options)
            x = symbols_or_dense(symbols, 5, 5)
            check_rows_alone(rnn, x, start(rnn, 5), nearly(1e-10))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("feedback", FEEDBACK)
@pytest.mark.parametrize("unit", UNITS)
def test_a_row_is_as_it_is_alone_as_it_trains(unit, feedback, narrow, reference):
    """In fp32, and with products of bf16 (which the plain loop has not)."""
    rnn = make(unit, feedback, "all", "all_skips", (5, 33, 2), dropout=0.3, reference=reference).float()
    for p in rnn.parameters():
        p.data *= 0.3
    state = tuple(s.detach().float() for s in flat(start(rnn, 5)))
    state = state if rnn.plan.has_cell else state[0]
    x = symbols_or_dense(False, 5, 5, torch.float32)
    if narrow:
        rnn.plan = dataclasses.replace(rnn.plan, compute_dtype=torch.bfloat16)
    check_rows_alone(rnn, x, state, roughly if narrow else nearly(1e-5))


@pytest.mark.parametrize("symbols", [False, True])
@pytest.mark.parametrize(("unit", "feedback"), [*itertools.product(UNITS, FEEDBACK), ("mrnn", "none")])
def test_what_comes_after_the_end_is_not_read(unit, feedback, symbols):
    """Not a bit of anything changes with it; nor if every row has all steps, and lengths say so."""
    torch.manual_seed(0)
    if unit == "mrnn":
        rnn, state = MultiplicativeRNN(5, 33), torch.randn(1, 5, 33)
    else:
        rnn = make(unit, feedback, "all", "residual_skips", (5, 33, 3), layer_norm=symbols, dropout=0.3).float()
        state = tuple(s.detach().float() for s in flat(start(rnn, 5)))
        state = state if rnn.plan.has_cell else state[0]
    lengths, noise = torch.tensor([3, 5, 0, 2, 4]), Noise(seed=3, update=4, rows_B=torch.arange(5))
    x = symbols_or_dense(symbols, 6, 5, torch.float32)
    other = symbols_or_dense(symbols, 6, 5, torch.float32) * (1 if symbols else 100)
    ended_TB = torch.arange(6).unsqueeze(1) >= lengths
    changed = torch.where(ended_TB if symbols else ended_TB.unsqueeze(2), other, x)
    assert not torch.equal(x, changed)
    found = [run_with_gradients(rnn, given, state, lengths=lengths, noise=noise) for given in (x, changed)]
    assert all(map(torch.equal, *(outputs + list(gradients) for outputs, gradients in found)))
    found = [run_with_gradients(rnn, x, state, lengths=given, noise=noise) for given in (None, torch.full((5,), 6))]
    assert all(map(torch.equal, *(outputs + list(gradients) for outputs, gradients in found)))


@pytest.mark.parametrize("kind", [GatedFeedbackRNN, MultiplicativeRNN])
def test_bad_lengths(kind):
    rnn, x = kind(3, 4), torch.zeros(4, 2, 3)
    for lengths, message in (
        ([4], r"int64 \[1\] on cpu; expected torch.int64 \[2\]"),
        ([[4, 4]], r"\[1, 2\]"),
        ([4.0, 4.0], "float32"),
        ([4, -1], "-1 .. 4; this input has 4 steps"),
        ([5, 1], r"1 .. 5"),
    ):
        with pytest.raises(ValueError, match=message):
            rnn(x, lengths=torch.tensor(lengths))
    with pytest.raises(ValueError, match="meta"):
        rnn(x, lengths=torch.tensor([4, 4], device="meta"))


def test_recurrent_blocks_start_orthogonal():
    rnn = GatedFeedbackRNN(3, 16, 2)
    block = rnn.weight_hu_l1.detach()[16:32, 16:]
    torch.testing.assert_close(block @ block.T, torch.eye(16), atol=1e-5, rtol=0)
    assert not rnn.bias_l0.any()


# The multiplicative RNN and the language model ----------------------------------------------------------------


def test_multiplicative_equals_its_equation():
    torch.manual_seed(0)
    rnn = MultiplicativeRNN(3, 4, dtype=torch.float64)
    symbols = torch.tensor([[0, 2], [1, 1], [2, 0]])
    y, last = rnn(symbols)
    w_hx, w_mx = rnn.weight_ih.chunk(2)
    h = torch.zeros(4, dtype=torch.float64)
    for t in range(3):
        m = w_mx[:, symbols[t, 1]] * (rnn.weight_mh @ h)
        h = torch.tanh(w_hx[:, symbols[t, 1]] + rnn.weight_hm @ m + rnn.bias)
        torch.testing.assert_close(y[t, 1], h)
    torch.testing.assert_close(last[0, 1], h)
    _, middle = rnn(symbols[:1])
    torch.testing.assert_close(rnn(symbols[1:], middle)[0], y[1:])


@pytest.mark.parametrize("symbols", [False, True])
def test_a_row_of_the_multiplicative_is_as_it_is_alone(symbols):
    torch.manual_seed(0)
    rnn = MultiplicativeRNN(5, 4, input_dropout=0.2, weight_dropout=0.2, dtype=torch.float64)
    x = symbols_or_dense(symbols, 5, 5)
    check_rows_alone(rnn, x, torch.randn(1, 5, 4, dtype=torch.float64), nearly(1e-10))


@pytest.mark.parametrize("name", [n for n in presets() if n != "gf-lstm-5x700"])
def test_preset_counts_equal_the_formula(name):
    settings = presets()[name].model
    model = LanguageModel(settings)
    count = model_sizes(settings)
    counted = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(counted.values()) == count.total
    assert sum(v for n, v in counted.items() if n.startswith("rnn.weight")) == count.recurrent


@pytest.mark.parametrize("unit", ["gru", "lstm"])
def test_counts_with_every_option(unit):
    settings = ModelSettings(
        unit=unit,
        num_layers=2,
        hidden_size=6,
        unit_gates="own",
        embedding_size=5,
        layer_norm=True,
        hidden_bias=unit == "gru",
        output_skips=True,
    )
    model = LanguageModel(settings)
    assert sum(p.numel() for p in model.parameters()) == model_sizes(settings).total


# facts: recurrent part with scalar gates and input skips, no biases, no softmax, 205 symbols
PAPER_COUNTS = {
    "gf-tanh-3x303": 1_208_088,
    "gf-gru-3x165": 1_210_140,
    "gf-lstm-3x140": 1_213_265,
    "gf-gru-3x228": 2_145_501,
    "gf-lstm-3x191": 2_083_172,
}


# the paper's other models, in millions
PAPER_MILLIONS = {
    "tanh-1x1000": 1.205,
    "tanh-3x390": 1.000,
    "gru-1x540": 1.207,
    "gru-3x228": 1.200,
    "lstm-1x456": 1.206,
    "lstm-3x191": 1.199,
}


@pytest.mark.parametrize("name", PAPER_COUNTS)
def test_paper_counts(name):
    assert model_sizes(presets()[name].model, 205).recurrent == PAPER_COUNTS[name]


@pytest.mark.parametrize("name", PAPER_MILLIONS)
def test_paper_counts_of_single_layers_and_stacks(name):
    assert round(model_sizes(presets()[name].model, 205).recurrent / 1e6, 3) == PAPER_MILLIONS[name]


@pytest.mark.parametrize(
    ("change", "millions"),
    [
        ({}, 59.8),
        ({"input_skips": False}, 57.5),
        ({"unit_gates": "own"}, 30.4),
        ({"unit_gates": "own", "input_skips": False}, 28.1),
    ],
)
def test_large_model_counts(change, millions):
    count = model_sizes(dataclasses.replace(presets()["gf-lstm-5x700"].model, **change), 205)
    assert round(count.recurrent / 1e6, 1) == millions
    assert count.softmax == 5 * 700 * 205


def test_language_model_shapes_and_state():
    settings = presets()["gf-lstm-3x140"].model
    model = LanguageModel(settings)
    symbols = torch.randint(0, 256, (6, 2))
    logits, (h, c) = model(symbols)
    assert logits.shape == (6, 2, 256)
    assert h.shape == c.shape == (3, 2, 140)
    torch.testing.assert_close(model(symbols, model.zero_state(2))[0], logits)
