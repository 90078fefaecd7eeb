"""The language model: its shapes, and its parameters against the formula and the paper's counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gfrnn.config import ModelSettings, model_sizes, presets
from gfrnn.nn import LanguageModel


def test_language_model_shapes_and_state():
    settings = presets()["gf-lstm-3x140"].model
    model = LanguageModel(settings)
    symbols = torch.randint(0, 256, (6, 2))
    logits, (h, c) = model(symbols)
    assert logits.shape == (6, 2, 256)
    assert h.shape == c.shape == (3, 2, 140)
    torch.testing.assert_close(model(symbols, model.zero_state(2))[0], logits)


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


@pytest.mark.parametrize("feedback", ["gated", "full", "none"])
@pytest.mark.parametrize("unit_gates", ["all", "own"])
def test_scaled_feedback_begins_as_large_as_a_stack(feedback, unit_gates):
    """Before gates, from however many layers it is read; a stack is as it was."""
    settings = ModelSettings(num_layers=3, hidden_size=8, feedback=feedback, unit_gates=unit_gates)
    torch.manual_seed(0)
    usual = LanguageModel(settings)
    torch.manual_seed(0)
    scaled = LanguageModel(dataclasses.replace(settings, scale_feedback=True))
    for (name, before), after in zip(usual.named_parameters(), scaled.parameters(), strict=True):
        if "weight_hc" in name or "weight_hu" in name:
            sources = before.shape[1] // 8
            torch.testing.assert_close(after * sources**0.5, before)
            rows = after.pow(2).sum(1)  # of blocks whose rows have length 1
            torch.testing.assert_close(rows, torch.ones_like(rows))
        else:
            assert torch.equal(before, after)
    assert usual.rnn.weight_hc_l0.shape[1] == (8 if feedback == "none" else 24)  # so some were read from three layers
