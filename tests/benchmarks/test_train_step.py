"""benchmarks/train_step.py: its peers compute what they are said to, and it runs as a user runs it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gfrnn.config import preset
from gfrnn.nn import build_language_model
from launch import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers


@pytest.mark.parametrize("gates", ["all", "own"])
def test_the_loop_over_pairs_is_our_model(gates: str) -> None:
    settings = dataclasses.replace(preset("gf-lstm-5x700").model, hidden_size=11, num_layers=3, unit_gates=gates)
    ours, theirs = (build_language_model(settings, "fp32", 0) for _ in range(2))
    for p in ours.parameters():  # biases too
        torch.nn.init.normal_(p, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    theirs.rnn = peers.PairLoop(theirs.rnn)
    symbols = torch.randint(0, 256, (6, 4))
    (got, (h, c)), (want, (wanted_h, wanted_c)) = (m(symbols, m.zero_state(4)) for m in (theirs, ours))
    for a, b in ((got, want), (h, wanted_h), (c, wanted_c)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    weights = sum(p.numel() for p in ours.parameters() if p.dim() > 1)
    assert sum(p.numel() for p in theirs.parameters() if p.dim() > 1) == weights


def test_a_stack_counts_every_weight_once() -> None:
    lstm = torch.nn.LSTM(8, 8, 3)
    peer = peers.stack("x", lstm, 2, 3, torch.device("cpu"), torch.float32)
    assert peer.flops == 6 * 3 * 8 * 8 * 8
    assert peers.stack_size(3 * 8 * 8 * 8, 3) == 8
    assert peer.loss().requires_grad


def test_as_a_user_runs_it(tmp_path: Path) -> None:
    flags = ["--preset", "demo", "--rows", "2", "--steps", "3", "--repeats", "2", "--only", "fp32"]
    files = ["--json", str(tmp_path / "step.json"), "--plot", str(tmp_path / "step.png")]
    command = [sys.executable, str(ROOT / "benchmarks/train_step.py"), *flags, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert "not measured: flashrnn: runs on CUDA only" in done.stdout or torch.cuda.is_available()
    found = json.loads((tmp_path / "step.json").read_text())
    names = list(found["results"])
    assert [name.split(",")[0] for name in names] == ["demo", "demo", "our stack", "torch.nn.LSTM", "loop over pairs"]
    for name, result in found["results"].items():
        assert name in done.stdout
        assert result["step_s"] > 0
        assert result["peak_bytes"] > 1e6
        assert result["flops"] == pytest.approx(result["share_of_peak"] * found["gemm_peak"]["fp32"])
    assert found["results"][names[2]]["parameters"] < 1.05 * found["results"][names[0]]["parameters"]
    assert (tmp_path / "step.png").stat().st_size > 10_000
