"""Mean gates and timescales: held against the plain loop, against processes known in closed form, and in real runs."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gfrnn.config import ModelSettings
from gfrnn.data import Bytes
from gfrnn.nn import GatedFeedbackRNN, LanguageModel
from gfrnn.training import dynamics
from gfrnn.training.dynamics import Dynamics, lagged_products, timescale
from gfrnn.training.evaluation import score
from launch import SMALL, metrics, train, validations

NETS = {
    "gated": ModelSettings(num_layers=3, hidden_size=4),
    "full": ModelSettings(num_layers=2, hidden_size=4, feedback="full", unit="gru"),
    "mrnn": ModelSettings(unit="mrnn", num_layers=1, hidden_size=4, feedback="none", input_skips=False),
}


def model_of(settings: ModelSettings) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(settings).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.7)
    return model


def text_of(size: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)


def dynamics_of(model: LanguageModel) -> Dynamics:
    m = model.settings
    return Dynamics(
        model.rnn.num_layers, model.rnn.hidden_size, gated=m.feedback == "gated", device=torch.device("cpu")
    )


def alone(_: Tensor) -> None:
    """What there is of all processes is there already."""


def together(parts: list[Dynamics]) -> list[dict[str, Any]]:
    """Figures of several processes, each a thread."""
    barrier, given = threading.Barrier(len(parts)), {}

    def figures(rank: int) -> dict[str, Any]:
        def add_up(tensor: Tensor) -> None:
            given[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(torch.stack([given[r] for r in range(len(parts))]).sum(0))
            barrier.wait()

        return parts[rank].figures(add_up)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(figures, range(len(parts))))


# ---------------------------------------------------------------------------------------------------- mean gates


def gates_of_a_piece(model: LanguageModel, text: Bytes, begin: int, end: int, warmup: int) -> list[Tensor]:
    """[L target, L source] at each position by the plain loop, a symbol at a time; warmed up unless the text begins."""
    assert isinstance(model.rnn, GatedFeedbackRNN)
    model.rnn.reference = True
    found: list[Tensor] = []
    state = None
    with torch.no_grad():
        for position in range(begin - warmup if begin else 0, end):
            symbol = int(text[position - 1]) if position else 10
            seen: list[Tensor] = []
            _, state = model(torch.tensor([[symbol]]), state, watch=lambda hs, g, seen=seen: seen.append(g))
            if position >= begin:
                found += [seen[0][0, :, :, 0]]
    model.rnn.reference = False
    return found


def test_mean_gates_are_those_of_the_plain_loop() -> None:
    """Of every scored position of every stream, the shorter last one too; in row i, column j that of i -> j."""
    model, text = model_of(NETS["gated"]), text_of(203)
    expected = []
    for begin in range(0, 203, 51):
        expected += gates_of_a_piece(model, text, begin, min(begin + 51, 203), 13)
    assert len(expected) == 203
    mean_LL = torch.stack(expected).mean(0).T
    assert (mean_LL - mean_LL.T).abs().max() > 0.01  # or rows and columns could be mixed up
    for steps in (1000, 9):
        seen = dynamics_of(model)
        score(model, text, streams=4, warmup=13, steps=steps, seam=11, dynamics=seen)
        found = seen.figures(alone)
        torch.testing.assert_close(torch.tensor(found["mean_gates"]).double(), mean_LL, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_looking_on_changes_no_bit(net: str) -> None:
    model, text = model_of(NETS[net]), text_of(150)
    seen = dynamics_of(model)
    assert score(model, text, streams=4, warmup=5, dynamics=seen) == score(model, text, streams=4, warmup=5)
    found = seen.figures(alone)
    assert ("mean_gates" in found) == (net == "gated")
    assert len(found["timescales"]) == model.rnn.num_layers
    assert all(0 < tau < 38 // 2 for tau in found["timescales"])


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("numbers", [1 << 22, 1000])
def test_processes_find_what_one_does(world_size: int, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where not all streams' states are kept, and where a process has no stream."""
    monkeypatch.setattr(dynamics, "_NUMBERS", numbers)
    model, text = model_of(NETS["gated"]), text_of(201)
    whole = dynamics_of(model)
    score(model, text, streams=5, warmup=11, dynamics=whole)
    assert sum(states.shape[0] for states in whole.states) == 41
    assert {states.shape[3] for states in whole.states} == {4 if numbers > 1000 else 2}  # the last is shorter
    parts = []
    for rank in range(world_size):
        parts.append(dynamics_of(model))
        score(model, text, streams=5, warmup=11, rank=rank, world_size=world_size, dynamics=parts[-1])
    expected = whole.figures(alone)
    for found in together(parts):
        for name in ("mean_gates", "timescales"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-9)


# ---------------------------------------------------------------------------------------------------- timescales


def figures_of(hs_TLHB: Tensor, calls: list[int]) -> dict[str, Any]:
    """As if a net had had these states, told in calls of so many steps, two at a time within a call."""
    T, L, H, B = hs_TLHB.shape
    seen = Dynamics(L, H, gated=False, device=torch.device("cpu"))
    seen.begin(torch.arange(B), T, T * B)
    start = 0
    for steps in calls:
        watch = seen.watch(start, torch.ones(steps, B, dtype=torch.bool))
        for t in range(start, start + steps, 2):
            watch(hs_TLHB[t : min(t + 2, start + steps)], None)
        start += steps
    assert start == T
    return seen.figures(alone)


def test_the_timescale_of_a_decaying_state_is_its_time_constant() -> None:
    """x_t = a x_{t-1} + noise has the autocorrelation a^k: 1/e at k = -1 / log a, whatever its mean and size."""
    taus = torch.tensor([2.0, 8.0, 40.0])
    keeps_L11 = torch.exp(-1 / taus)[:, None, None]
    generator = torch.Generator().manual_seed(0)
    noise_TLHB = torch.randn(1500, 3, 8, 10, generator=generator)
    h_LHB, states = noise_TLHB[0] / (1 - keeps_L11**2).sqrt(), []
    for noise_LHB in noise_TLHB:
        h_LHB = keeps_L11 * h_LHB + noise_LHB
        states.append(h_LHB)
    sizes_LH1, means_LH1 = torch.rand(3, 8, 1, generator=generator) + 0.1, torch.randn(3, 8, 1, generator=generator)
    hs_TLHB = torch.stack(states) * sizes_LH1 + 5 * means_LH1
    found = figures_of(hs_TLHB, [7, 700, 1, 792])
    assert found["timescales"] == pytest.approx(taus.tolist(), rel=0.1)
    assert "mean_gates" not in found


def test_states_that_do_not_move_and_that_forget_at_once() -> None:
    noise = torch.randn(1024, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    moving = torch.cat([torch.full_like(noise, 0.5), noise], dim=1)
    still, white = figures_of(moving, [1024])["timescales"]
    assert still == 512
    assert white == pytest.approx(1 - 1 / math.e, abs=0.02)


def test_lagged_products() -> None:
    x_NT = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [(x_NT[:, : 12 - k] * x_NT[:, k:]).sum().item() for k in range(7)]
    np.testing.assert_allclose(lagged_products(x_NT, 6).numpy(), expected, atol=1e-12)


def test_timescale() -> None:
    assert timescale([1.0, 0.9, 0.8]) == 2  # it lies beyond
    assert timescale([1.0]) == 0
    assert timescale([1.0, 0.0, 0.9]) == pytest.approx(1 - 1 / math.e)  # the first time
    assert timescale([1.0, 1 / math.e + 0.1, 1 / math.e - 0.1]) == pytest.approx(1.5)


# ----------------------------------------------------------------------------------------------------- real runs


def seen_by(output_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(output_dir) if "valid_bpc" in line]


def test_a_run_records_them_at_each_validation(tmp_path: Path) -> None:
    """And the run is the run that it is without."""
    flags = [*SMALL, "--max-updates", "20", "--valid-every", "10"]
    for name, more in (("without", []), ("with", ["--gates"])):
        status, _, err = train(tmp_path / name, [*flags, *more])
        assert status == 0, err
    assert validations(tmp_path / "with") == validations(tmp_path / "without")
    assert not [line for line in metrics(tmp_path / "without") if "mean_gates" in line or "timescales" in line]
    first, second = seen_by(tmp_path / "with")
    assert (first["step"], second["step"]) == (10, 20)
    for line in (first, second):
        assert np.shape(line["mean_gates"]) == (2, 2)
        assert 0 < np.min(line["mean_gates"]) < np.max(line["mean_gates"]) < 1
        assert np.shape(line["timescales"]) == (2,)
    assert first["mean_gates"] != second["mean_gates"]


def test_two_processes_record_what_one_does(tmp_path: Path) -> None:
    """Of weights that stay as they were: those that are learned differ in their last bits."""
    flags = [*SMALL, "--gates", "--max-updates", "1", "--warmup-updates", "0"]
    flags += ["--learning-rate", "1e-20", "--final-learning-rate", "0"]
    for processes in (1, 2):
        status, _, err = train(tmp_path / str(processes), flags, processes=processes)
        assert status == 0, err
    (one,), (two,) = seen_by(tmp_path / "1"), seen_by(tmp_path / "2")
    for name in ("valid_bpc", "mean_gates", "timescales"):
        np.testing.assert_allclose(two[name], one[name], rtol=2e-6)
