"""Rows that end before the batch does: each is as it is alone, and what comes after its end is not read."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from rnn_cases import (
    FEEDBACK,
    KINDS,
    UNITS,
    check_rows_alone,
    flat,
    make,
    nearly,
    run_with_gradients,
    start,
    symbols_or_dense,
)

from gfrnn.nn import GatedFeedbackRNN, MultiplicativeRNN, Noise


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
