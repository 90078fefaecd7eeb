"""A time step's products, timed with the operands that the recurrence has."""

from __future__ import annotations

import pytest
import torch

from gfrnn.config import preset, sizes
from gfrnn.nn import build_language_model
from gfrnn.nn.steps import left_operands
from gfrnn.scaling.products import ProductTimer

PRESETS = ("demo", "gf-lstm-3x140", "lstm-3x191", "gf-gru-3x165", "gf-tanh-3x303")


@pytest.mark.parametrize("name", PRESETS)
def test_operands_are_all_that_a_time_step_multiplies(name: str) -> None:
    settings = preset(name)
    model = build_language_model(settings.model, "fp32", 0)
    counts = sizes(settings)
    weights, _ = model.rnn.layer_weights()
    forward, backward = left_operands(model.rnn.plan, weights, torch.float32)
    wanted = counts.recurrent - counts.looked_up
    assert sum(each.numel() for each in forward) == wanted
    assert sum(each.numel() for each in backward) == wanted
    sources = {settings.model.hidden_size, settings.model.hidden_size * settings.model.num_layers}
    assert {each.shape[1] for each in forward} <= sources
    assert {each.shape[0] for each in backward} <= sources
    assert all(each.is_contiguous() for each in [*forward, *backward])


def test_own_rows_come_first_and_time_ends_it() -> None:
    timer = ProductTimer(build_language_model(preset("demo").model, "fp32", 0), torch.float32)
    assert [each.rows for each in timer.times(24, 0.0)] == [24]
    found = timer.times(8, 2.0)
    assert [each.rows for each in found][:5] == [8, 1, 2, 4, 16]
    assert found[-1].forward > found[0].forward
    assert all(each.forward > 0 < each.backward for each in found)


def test_a_multiplicative_rnn_has_none() -> None:
    assert ProductTimer(build_language_model(preset("mrnn-1x679").model, "fp32", 0), torch.float32).times(8, 1) == []


def test_bf16() -> None:
    timer = ProductTimer(build_language_model(preset("demo").model, "bf16", 0), torch.bfloat16)
    assert timer.times(16, 0.0)[0].backward > 0
