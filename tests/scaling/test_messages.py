"""Calls of an update by hand, and sizes of parameters against the modules'."""

from __future__ import annotations

import dataclasses

import pytest

from gfrnn.config import preset, presets, sizes
from gfrnn.nn import build_model
from gfrnn.scaling.messages import count_buckets, gathers, messages, parameter_elements
from gfrnn.scaling.volume import predicted

PARAMETERS = [300_000, 200_000, 1_000]


@pytest.mark.parametrize("name", presets())
def test_elements_add_up(name: str) -> None:
    assert sum(parameter_elements(preset(name))) == sizes(preset(name)).total


@pytest.mark.parametrize(
    "name", ["gf-lstm-3x140", "gru-3x228", "gf-gru-3x165", "lstm-1x456", "mrnn-1x679", "programs-lstm-3x200", "demo"]
)
def test_elements_are_the_modules(name: str) -> None:
    assert parameter_elements(preset(name)) == tuple(p.numel() for p in build_model(preset(name)).parameters())


def test_elements_of_every_option() -> None:
    settings = preset("demo")
    model = dataclasses.replace(
        settings.model,
        unit="gru",
        hidden_size=8,
        hidden_bias=True,
        layer_norm=True,
        embedding_size=5,
        output_skips=True,
    )
    settings = dataclasses.replace(settings, model=model)
    assert parameter_elements(settings) == tuple(p.numel() for p in build_model(settings).parameters())


def test_buckets_are_never_cut() -> None:
    assert count_buckets([4, 4, 4], 8) == 2
    assert count_buckets([9, 1, 9], 8) == 3
    assert count_buckets([1, 1, 1], 3) == 1
    assert count_buckets([], 3) == 0


@pytest.mark.parametrize(
    ("zero", "calls"),
    [
        ({"stage": 0}, {"all_reduce": 1 + 2}),
        ({"stage": 1}, {"all_reduce": 2 + 2, "all_gather": 1}),
        ({"stage": 2}, {"all_reduce": 6 + 2, "all_gather": 1}),
        ({"stage": 2, "use_multi_rank_bucket_allreduce": False}, {"reduce": 6 + 3, "all_gather": 1, "all_reduce": 2}),
        ({"stage": 3}, {"reduce_scatter": 6, "all_gather": 3 * 2 + 1, "all_reduce": 2}),
    ],
)
def test_calls_by_hand(zero: dict[str, int], calls: dict[str, int]) -> None:
    """Four processes, three micro-batches, buckets that hold the last two parameters; bytes are volume.py's."""
    config = {"zero_optimization": zero | {"reduce_bucket_size": 250_000}, "gradient_accumulation_steps": 3}
    found = messages(config, PARAMETERS, 4)
    counted = {kind: sum(m.calls for m in found if m.kind == kind) for kind in {m.kind for m in found}}
    assert counted == calls
    for kind, size in predicted(config, PARAMETERS).items():
        assert sum(m.calls * m.bytes for m in found if m.kind == kind) == pytest.approx(size, abs=80)
    assert messages(config, PARAMETERS, 1) == []
    assert gathers(config, PARAMETERS) == (6 if zero["stage"] == 3 else 0)
