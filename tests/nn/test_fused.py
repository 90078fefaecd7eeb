"""The fused steps against the plain loop: on a GPU if there is one, else with Triton's interpreter."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from gfrnn.nn import GatedFeedbackRNN, Noise, graphs, kernels, triton_kernels
from gfrnn.nn.fused import FusedSteps, FusedTrace, Left
from gfrnn.nn.graphs import Graphs
from gfrnn.nn.inputs import InputPart
from gfrnn.nn.lengths import zero_past_end
from gfrnn.nn.plan import LayerWeights, Plan
from gfrnn.nn.reference import recurrence_reference

UNITS = ["tanh", "gru", "lstm"]
CAPPED = "capped-lstm"
"""The LSTM with its input gate capped, where units are listed."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", autouse=True)
def _interpreted():
    """Only here: other modules' tests are of what runs without it. Nothing imports Triton before the first launch."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@dataclasses.dataclass
class Case:
    """A recurrence with numbers in it, every one a leaf, and what its gradients start from."""

    plan: Plan
    x: InputPart
    h_BLH: Tensor
    c_BLH: Tensor | None
    mask_LBH: Tensor | None
    lengths_B: Tensor | None
    weights: list[LayerWeights]
    d_y_TBY: Tensor
    d_h_BLH: Tensor
    d_c_BLH: Tensor


def make(
    unit: str,
    feedback: str,
    gates: str,
    sizes: tuple[int, int, int, int],
    *,
    skips: str = "",
    mask: bool = False,
    symbols: str = "",
    hidden_bias: bool = False,
    ragged: bool = False,
) -> Case:
    """skips: any of i(nput), o(utput), r(esidual). symbols: "" for dense input, "s"ymbols, "c" of which are scaled.
    ragged: rows have lengths, of which one is T.
    """
    L, H, T, B = sizes
    generator = torch.Generator().manual_seed(hash_of(unit, feedback, gates, *sizes, skips))
    capped = unit == CAPPED
    unit = "lstm" if capped else unit
    plan = Plan(unit, L, H, feedback, gates, "i" in skips, "o" in skips, "r" in skips, False, capped)
    K, GH, scale = plan.rows, plan.unit_rows, 1 / (L * H) ** 0.5

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(DEVICE).requires_grad_()

    weights = [
        LayerWeights(
            draw(K, H, std=scale) if j else None,
            draw(H, plan.candidate_sources * H, std=scale),
            draw(GH - H, plan.unit_sources * H, std=scale) if unit != "tanh" else None,
            draw(L, L * H, std=scale) if feedback == "gated" else None,
            draw(K),
            draw(H) if hidden_bias else None,
            None,
            None,
            None,
        )
        for j in range(L)
    ]
    N, num_symbols = K * (L if plan.input_skips else 1), 6
    x = InputPart(draw(N, T, B))
    if symbols:
        chosen = torch.randint(num_symbols, (T, B), generator=generator).to(DEVICE)
        x = InputPart(draw(N, num_symbols), chosen, draw(T, B).detach() if symbols == "c" else None)
    lengths = torch.randint(T + 1, (B,), generator=generator)
    lengths[B // 2] = T
    return Case(
        plan,
        x,
        draw(B, L, H),
        draw(B, L, H) if plan.has_cell else None,
        (torch.rand((L - 1, B, H), generator=generator) > 0.3).to(DEVICE) / 0.7 if mask else None,
        lengths.to(DEVICE) if ragged else None,
        weights,
        draw(T, B, H * (L if plan.output_skips else 1)).detach(),
        draw(B, L, H).detach(),
        draw(B, L, H).detach(),
    )


def hash_of(*parts: object) -> int:
    return random.Random(repr(parts)).randrange(1 << 31)


def expected(case: Case) -> dict[str, Tensor]:
    """Results and gradients of the plain loop."""
    y, h, c = recurrence_reference(
        case.plan, case.x, case.h_BLH, case.c_BLH, case.mask_LBH, case.lengths_B, case.weights
    )
    loss = (y * case.d_y_TBY).sum() + (h * case.d_h_BLH).sum()
    leaves = {"x": case.x.columns, "h": case.h_BLH}
    found = {"y": y, "h_last": h}
    if c is not None and case.c_BLH is not None:
        loss = loss + (c * case.d_c_BLH).sum()
        leaves["c"], found["c_last"] = case.c_BLH, c
    for j, w in enumerate(case.weights):
        leaves |= {f"{name}{j}": part for name, part in w._asdict().items() if part is not None}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {k: v.detach() for k, v in found.items()} | {
        f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def fused(case: Case, pieces: list[range] | None = None) -> dict[str, Tensor]:
    """The same by the fused steps, a piece of them at a time."""
    plan, dtype = case.plan, torch.float32
    T = case.x.sizes[0]
    mask_LHB = case.mask_LBH.transpose(1, 2).contiguous() if case.mask_LBH is not None else None
    with torch.no_grad():
        assert kernels.usable(plan, DEVICE)
        left = Left(plan, case.weights, plan.compute_dtype or dtype)
        steps = FusedSteps(plan, left, mask_LHB, case.lengths_B, dtype)
        h_LHB = case.h_BLH.permute(1, 2, 0)
        c_LHB = case.c_BLH.permute(1, 2, 0) if case.c_BLH is not None else None
        traces = []
        for piece in pieces or [range(T)]:
            traces.append(steps.forward(case.x, piece, h_LHB, c_LHB))
            h_LHB, c_LHB = traces[-1].hs_TLHB[-1], traces[-1].cs_TLHB[-1] if plan.has_cell else None
        hs_TLHB = torch.cat([trace.hs_TLHB[1:] for trace in traces])
        passed_TLHB = hs_TLHB.cumsum(1) if plan.residual else hs_TLHB
        y_TYB = passed_TLHB.flatten(1, 2) if plan.output_skips else passed_TLHB[:, -1]
        y_TBY = y_TYB.transpose(1, 2).contiguous()
        if case.lengths_B is not None:
            zero_past_end(y_TBY, case.lengths_B)
        found = {"y": y_TBY, "h_last": h_LHB.permute(2, 0, 1)}
        d_h_LHB, d_c_LHB = case.d_h_BLH.permute(1, 2, 0), case.d_c_BLH.permute(1, 2, 0)
        d_columns = torch.zeros_like(case.x.columns)
        sums: dict[str, Tensor] = {}
        for trace in reversed(traces):
            d_y_TBY = case.d_y_TBY[trace.steps.start : trace.steps.stop]
            slopes, d_h_LHB, d_c_LHB = steps.backward(trace, d_y_TBY, d_h_LHB, d_c_LHB)
            d_LKTB, d_s_LHTB = slopes.d_LKTB, slopes.d_s_LHTB
            assert d_LKTB.dtype == d_s_LHTB.dtype == trace.before_LHTB.dtype == (plan.compute_dtype or dtype)
            d_NTB = (d_LKTB.flatten(0, 1) if plan.input_skips else d_LKTB[0]).float()
            case.x.add_gradient(d_columns, trace.steps, d_NTB)
            for name, part in weight_gradients(case, trace, mask_LHB, d_LKTB, d_s_LHTB).items():
                sums[name] = sums[name] + part if name in sums else part
    found |= {"d_x": d_columns, "d_h": d_h_LHB.permute(2, 0, 1)} | sums
    if c_LHB is not None:
        found |= {"c_last": c_LHB.permute(2, 0, 1), "d_c": d_c_LHB.permute(2, 0, 1)}
    return found


def weight_gradients(
    case: Case, trace: FusedTrace, mask_LHB: Tensor | None, d_LKTB: Tensor, d_s_LHTB: Tensor
) -> dict[str, Tensor]:
    """By their definitions, from what the steps left."""
    plan = case.plan
    H, GH = plan.hidden_size, plan.unit_rows
    before_LHTB = trace.before_LHTB[:, :, :-1].float()
    passed_LHTB = trace.before_LHTB[:-1, :, 1:] if trace.below_LHTB is None else trace.below_LHTB
    if trace.below_LHTB is not None:  # it is what it says
        whole = trace.hs_TLHB[1:].cumsum(1) if plan.residual else trace.hs_TLHB[1:]
        masked = whole[:, :-1] if mask_LHB is None else whole[:, :-1] * mask_LHB
        torch.testing.assert_close(trace.below_LHTB.float(), masked.permute(1, 2, 0, 3), rtol=0.01, atol=1e-6)
    d_K = d_LKTB.float()
    bias_LK = kernels.row_sums(d_LKTB.flatten(0, 1).flatten(1)).view(plan.num_layers, -1)
    hidden_bias_LH = kernels.row_sums(d_s_LHTB.flatten(0, 1).flatten(1)).view(plan.num_layers, -1)
    found: dict[str, Tensor] = {}
    for j, w in enumerate(case.weights):

        def product(d_MTB: Tensor, source_LHTB: Tensor) -> Tensor:
            return torch.einsum("mtb,stb->ms", d_MTB, source_LHTB.flatten(0, -3).float())

        own = slice(j, j + 1)
        source = before_LHTB[own] if plan.feedback == "none" else before_LHTB
        if trace.g_TLLB is not None:
            source = source * trace.g_TLLB[:, j].transpose(0, 1).unsqueeze(1)
        found[f"d_candidate{j}"] = product(d_s_LHTB[j].float(), source)
        found[f"d_bias{j}"] = bias_LK[j]
        if w.below is not None:
            found[f"d_below{j}"] = product(d_K[j], passed_LHTB[j - 1 : j])
        if w.unit is not None:
            found[f"d_unit{j}"] = product(d_K[j, H:GH], before_LHTB if plan.unit_sources > 1 else before_LHTB[own])
        if w.gates is not None:
            found[f"d_gates{j}"] = product(d_K[j, GH:], before_LHTB)
        if w.hidden_bias is not None:
            found[f"d_hidden_bias{j}"] = hidden_bias_LH[j]
    return found


def check(case: Case, pieces: list[range] | None = None) -> None:
    """fp32 to rounding, and bf16 as near as it is expected."""
    wanted = expected(case)
    got = fused(case, pieces)
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        assert got[name].shape == want.shape, name
        assert got[name].dtype == torch.float32
        assert (got[name] - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=0.05), name
        assert want.any(), name  # nothing was left out of the comparison


def check_rounded(case: Case) -> None:
    wanted = expected(case)
    got = fused(dataclasses.replace(case, plan=dataclasses.replace(case.plan, compute_dtype=torch.bfloat16)))
    for part in (lambda name: name.startswith("d_"), lambda name: not name.startswith("d_")):
        exact = torch.cat([want.flatten() for name, want in wanted.items() if part(name)])
        near = torch.cat([got[name].flatten() for name in wanted if part(name)])
        assert 0 < (near - exact).norm() <= 0.03 * exact.norm()


KINDS = [
    *itertools.product(UNITS, ["gated", "full", "none"], ["all", "own"]),
    (CAPPED, "gated", "own"),
    (CAPPED, "none", "all"),
]
OPTIONS = [
    {"skips": "i"},
    {"skips": "io", "mask": True, "ragged": True},
    {"skips": "r", "symbols": "s", "ragged": True},
    {"skips": "ior", "mask": True, "symbols": "c", "ragged": True},
    {"mask": True, "symbols": "c"},
    {"skips": "or"},
]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_equals_the_plain_loop(kind: tuple[str, str, str]) -> None:
    """Two sets of options a kind, so that every unit and every feedback has all of them; shapes drawn."""
    number = KINDS.index(kind)
    first = number + number // 6 * 2
    draw = random.Random(number)
    for k in (first, first + 3):
        sizes = (draw.randint(2, 3), draw.choice([3, 9, 13]), draw.randint(2, 3), draw.choice([1, 3, 5]))
        case = make(*kind, sizes, hidden_bias=kind[0] == "gru", **OPTIONS[k % len(OPTIONS)])
        check(case)
    check_rounded(case)


@pytest.mark.parametrize("unit", [*UNITS, CAPPED])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 7, 2, 3), (2, 5, 1, 1), (3, 1, 2, 2), (2, 2, 1, 70)], ids=str)
def test_odd_sizes(unit: str, sizes: tuple[int, int, int, int]) -> None:
    """One layer, one unit, one step, one row, more rows than a block."""
    for feedback in ("gated", "none"):
        check(make(unit, feedback, "all", sizes, skips="io", hidden_bias=unit == "gru"))


def test_more_units_than_a_block_of_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_GATE_BLOCK_H", 4)
    check(make("lstm", "gated", "all", (2, 11, 2, 3)))


@pytest.mark.parametrize("unit", UNITS)
def test_pieces_equal_the_whole(unit: str) -> None:
    """Of dense input and of symbols with lengths: the input's step is not the trace's."""
    for symbols in ("", "c"):
        case = make(unit, "gated", "own", (2, 3, 4, 2), skips="or", symbols=symbols, ragged=bool(symbols))
        check(case, [range(0, 1), range(1, 4)])


@pytest.mark.parametrize("feedback", ["gated", "full", "none"])
@pytest.mark.parametrize("unit", UNITS)
def test_rows_that_end_before_the_batch(unit: str, feedback: str) -> None:
    """Several, at several steps and before the first; and all lengths T change no bit."""
    case = make(unit, feedback, "all", (2, 3, 4, 5), skips="ir", symbols="s", hidden_bias=unit == "gru")
    got = fused(case)
    for name, same in fused(dataclasses.replace(case, lengths_B=torch.full((5,), 4, device=DEVICE))).items():
        assert torch.equal(same, got[name]), name
    case.lengths_B = torch.tensor([3, 0, 4, 1, 0], device=DEVICE)
    check(case)
    check_rounded(case)
    narrow = dataclasses.replace(case, plan=dataclasses.replace(case.plan, compute_dtype=torch.bfloat16))
    for ended in (fused(case), fused(narrow)):
        assert torch.equal(ended["h_last"][[1, 4]], case.h_BLH[[1, 4]])
        assert torch.equal(ended["d_h"][[1, 4]], case.d_h_BLH[[1, 4]])
        if case.c_BLH is not None:
            assert torch.equal(ended["c_last"][[1, 4]], case.c_BLH[[1, 4]])
            assert torch.equal(ended["d_c"][[1, 4]], case.d_c_BLH[[1, 4]])


def test_given_gradients_and_states_stay_as_they_are() -> None:
    case = make("lstm", "gated", "all", (2, 3, 3, 2))
    assert case.c_BLH is not None
    states = (case.h_BLH.detach(), case.c_BLH.detach(), case.d_h_BLH, case.d_c_BLH)
    h, c, d_h, d_c = (state.permute(1, 2, 0).contiguous() for state in states)
    given = [h, c, case.d_y_TBY, d_h, d_c]
    before = [tensor.clone() for tensor in given]
    with torch.no_grad():
        steps = FusedSteps(case.plan, Left(case.plan, case.weights, torch.float32), None, None, torch.float32)
        steps.backward(steps.forward(case.x, range(3), h, c), case.d_y_TBY, d_h, d_c)
    assert all(map(torch.equal, before, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1500), (2, 2048)])
def test_row_sums(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x_MR = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    torch.testing.assert_close(kernels.row_sums(x_MR), x_MR.double().sum(1).float(), rtol=1e-4, atol=1e-4)


def test_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make("gru", "gated", "all", (2, 3, 1, 1)).plan
    assert kernels.usable(plan, torch.device("cuda"))
    assert not kernels.usable(dataclasses.replace(plan, layer_norm=True), torch.device("cuda"))
    assert not kernels.usable(plan, torch.device("cuda"), torch.float64)
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert kernels.usable(plan, torch.device("cpu"))
        triton_kernels.load()  # with its interpreter, for good
        monkeypatch.delenv("TRITON_INTERPRET")
        assert not kernels.usable(plan, torch.device("cpu"))
        kernels._triton_starts.cache_clear()
        with pytest.warns(UserWarning, match="Triton cannot start here"):
            assert not kernels.usable(plan, torch.device("cuda"))
        assert not kernels.usable(plan, torch.device("cuda"))  # said once


# The layer as it is used: the Function on these steps, and on graphs of them ------------------------------------


def rerun(function: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """graphs.capture without a GPU: what it promises, by computing again and copying."""
    found = function()

    def replay() -> None:
        for old, new in zip(tensors(found), tensors(function()), strict=True):
            old.copy_(new)

    return found, replay


def tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if dataclasses.is_dataclass(found):
        return tensors(tuple(vars(found).values()))
    return [t for part in found for t in tensors(part)] if isinstance(found, tuple) else []


@pytest.fixture(params=[False, True], ids=["launches", "graphs"])
def captured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and DEVICE.type == "cpu":
        monkeypatch.setattr(graphs, "capture", rerun)
        monkeypatch.setattr(Graphs, "usable", staticmethod(lambda device: True))
    return bool(request.param)


def network(captured: bool, **options: Any) -> GatedFeedbackRNN:
    torch.manual_seed(0)
    if options.get("unit") == CAPPED:
        options |= {"unit": "lstm", "cap_input_gate": True}
    rnn = GatedFeedbackRNN(
        6, 5, 2, input_skips=True, **options, cuda="graphs" if captured else "kernels", device=DEVICE
    )
    for p in rnn.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return rnn


def trained(rnn: GatedFeedbackRNN, segments: list[Tensor], **kwargs: Any) -> list[Tensor]:
    """Outputs, and gradients summed over segments with the state carried on; all forward before any goes back."""
    rnn.zero_grad()
    state, losses, outputs = None, [], []
    for segment in segments:
        y, state = rnn(segment, state, **kwargs)
        outputs.append(y.detach())
        losses.append(y.square().sum())
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
    for loss in reversed(losses):
        loss.backward()
    return [*outputs, *(p.grad.clone() for p in rnn.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("unit", "recompute"), [("tanh", 0), ("gru", 0), ("lstm", 2), (CAPPED, 2)])
def test_the_layer(captured: bool, unit: str, recompute: int) -> None:
    """As the plain loop: segments of several lengths, new weights between calls, dropout, no gradients, twice back."""
    rnn = network(captured, unit=unit, recompute=recompute, dropout=0.3, input_dropout=0.2, weight_dropout=0.1)
    noise = Noise(seed=3, update=4, rows_B=torch.tensor([7, 9, 11], device=DEVICE))
    segments = [torch.randint(6, (T, 3), device=DEVICE) for T in (2, 3)]
    for _ in range(3):
        got = trained(rnn, segments, noise=noise)
        rnn.reference = True
        for a, b in zip(got, trained(rnn, segments, noise=noise), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
        rnn.reference = False
        with torch.no_grad():
            torch.testing.assert_close(rnn(segments[0], noise=noise)[0], got[0])
            for p in rnn.parameters():
                p.mul_(0.9)
    loss = rnn(segments[0], noise=noise)[0].square().sum()
    parameters = list(rnn.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    trained(rnn, segments, noise=noise)
    for a, b in zip(torch.autograd.grad(loss, parameters), first, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("captured", [True], indirect=True, ids=["graphs"])
@pytest.mark.parametrize(("unit", "recompute"), [("tanh", 0), ("gru", 2), ("lstm", 0)])
def test_lengths_of_the_layer(captured: bool, unit: str, recompute: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other lengths of the same shape at every call, in graphs that are captured once; and none, in others."""
    count = mock.Mock(side_effect=graphs.capture)
    monkeypatch.setattr(graphs, "capture", count)
    rnn = network(captured, unit=unit, recompute=recompute, dropout=0.3)
    noise = Noise(seed=3, update=4, rows_B=torch.arange(4, device=DEVICE))
    segments = [torch.randint(6, (3, 4), device=DEVICE) for _ in range(2)]
    given = [[2, 1, 0, 3], [3, 3, 3, 3], [0, 2, 3, 1], [1, 2, 0, 0]]
    for lengths in [None, None, *(torch.tensor(some, device=DEVICE) for some in given)]:
        got = trained(rnn, segments, noise=noise, lengths=lengths)
        rnn.reference = True
        for a, b in zip(got, trained(rnn, segments, noise=noise, lengths=lengths), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
        rnn.reference = False
    pieces = 2 if recompute else 1
    # of pieces, forward and back, for two segments that are open at once, with lengths and without
    assert count.call_count == pieces * 2 * 2 * 2


def test_dense_input_and_a_start_that_want_gradients(captured: bool) -> None:
    rnn = network(captured, unit="lstm")
    x = torch.randn(2, 3, 6, device=DEVICE, requires_grad=True)
    state = tuple(torch.randn(2, 3, 5, device=DEVICE, requires_grad=True) for _ in range(2))
    found = {}
    for reference in (True, False):
        rnn.reference = reference
        y, (h, c) = rnn(x, state)
        found[reference] = torch.autograd.grad(y.sum() + (h * c).sum(), [x, *state])
    for got, want in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_watched_states_and_gates(captured: bool) -> None:
    """As the plain loop's, whatever a graph's memory is used for next."""
    rnn = network(captured, unit="lstm", recompute=2)
    segments = [torch.randint(6, (3, 2), device=DEVICE) for _ in range(3)]
    found: dict[bool, list[Tensor]] = {}
    for reference in (False, True):
        rnn.reference, seen = reference, found.setdefault(reference, [])
        for segment in segments:
            pieces: list[tuple[Tensor, Tensor]] = []
            with torch.no_grad():
                rnn(segment, watch=lambda hs, g, pieces=pieces: pieces.append((hs.clone(), g.clone())))
            seen += [torch.cat(part) for part in zip(*pieces, strict=True)]
    assert [tuple(part.shape) for part in found[False][:2]] == [(3, 2, 5, 2), (3, 2, 2, 2)]
    for got, want in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("captured", [True], indirect=True, ids=["graphs"])
def test_graphs_are_used_again(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture a shape and direction, however many calls; memory for as many calls as are open at once."""
    count = mock.Mock(side_effect=graphs.capture)
    monkeypatch.setattr(graphs, "capture", count)
    rnn = network(captured)
    segments = [torch.randint(6, (1, 2), device=DEVICE) for _ in range(3)]
    trained(rnn, segments[:1])
    assert count.call_count == 0  # the first time may be the last
    for _ in range(3):
        trained(rnn, segments[:1])
    assert count.call_count == 2
    (free,) = rnn.graphs.free.values()
    assert len(free) == 1
    for _ in range(3):
        trained(rnn, segments)
    assert count.call_count == 6
    assert len(free) == 3
    loss = rnn(segments[0])[0].sum()  # nobody wants its gradient
    assert len(free) == 2
    del loss
    assert len(free) == 3
    again = copy.deepcopy(rnn)
    assert not again.graphs.free
    torch.testing.assert_close(again(segments[0])[0], rnn(segments[0])[0])


@pytest.mark.parametrize("captured", [True], indirect=True, ids=["graphs"])
def test_graphs_are_of_one_precision_of_products(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    count = mock.Mock(side_effect=graphs.capture)
    monkeypatch.setattr(graphs, "capture", count)
    rnn, segment = network(captured), torch.randint(6, (1, 2), device=DEVICE)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, captures in (("highest", 2), ("high", 4), ("highest", 4)):
            torch.set_float32_matmul_precision(precision)
            for _ in range(3):
                trained(rnn, [segment])
            assert count.call_count == captures
    finally:
        torch.set_float32_matmul_precision(before)


def test_one_hot_product_is_the_look_up() -> None:
    """On CUDA the input's weights get their gradient by a product."""
    x = InputPart(torch.randn(4, 3), torch.tensor([[0, 2], [1, 1], [2, 0]]))
    torch.testing.assert_close(x.columns @ x.one_hot(slice(1, 3), torch.float32), x.some(range(1, 3)).flatten(1))


def test_a_symbol_that_is_none_is_not_overlooked() -> None:
    """A kernel cannot raise."""
    rnn = network(False)
    assert rnn(torch.full((1, 2), 6, device=DEVICE))[0].isnan().all()


def test_inference_mode_comes_first(captured: bool) -> None:
    rnn = network(captured)
    x = torch.randint(6, (2, 2), device=DEVICE)
    with torch.inference_mode():
        for _ in range(3):
            y = rnn(x)[0]
    for _ in range(3):
        torch.testing.assert_close(trained(rnn, [x])[0], y.clone())
