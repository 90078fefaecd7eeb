"""The learning rate of an update, and the guard that halves it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gfrnn.config import OptimizerSettings
from gfrnn.training.schedule import ExplosionGuard, learning_rate


def rates(total: int, **values: Any) -> list[float]:
    settings = OptimizerSettings(learning_rate=0.1, **values)
    return [learning_rate(settings, update, total) for update in range(total)]


def test_constant() -> None:
    assert rates(5) == [0.1] * 5
    assert rates(4, final_learning_rate=0.01) == [0.1] * 4  # an end is for schedules that fall


def test_warmup_rises_linearly_from_above_zero_to_the_peak() -> None:
    for schedule in ("constant", "linear", "cosine"):
        found = rates(20, warmup_updates=4, schedule=schedule)
        assert found[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
        assert found[4] == pytest.approx(0.1)
        assert max(found) == pytest.approx(0.1)


def test_linear_falls_evenly_to_its_end() -> None:
    found = rates(11, schedule="linear", final_learning_rate=0.05)
    assert found == pytest.approx([0.1 - 0.005 * i for i in range(11)])


def test_cosine_falls_to_its_end_by_half_a_wave() -> None:
    found = rates(25, schedule="cosine", final_learning_rate=0.02, warmup_updates=4)
    assert found[4:] == pytest.approx([0.02 + 0.08 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(21)])
    assert found[14] == pytest.approx(0.06)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_last_update_has_the_final_rate(schedule: str) -> None:
    for total, warmup in ((2, 0), (10, 3), (1000, 10)):
        assert rates(total, schedule=schedule, warmup_updates=warmup)[-1] == pytest.approx(0.0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_runs_shorter_than_the_warmup_or_of_one_update(schedule: str) -> None:
    assert rates(2, schedule=schedule, warmup_updates=10) == pytest.approx([0.01, 0.02])
    assert rates(1, schedule=schedule) == [0.1]


def test_a_run_continued_beyond_its_total_stays_at_the_end() -> None:
    settings = OptimizerSettings(schedule="linear", learning_rate=0.1, final_learning_rate=0.01)
    assert learning_rate(settings, 50, 10) == pytest.approx(0.01)


# ------------------------------------------------------------------------------------------------ explosions


def test_a_spike_halves_once() -> None:
    guard = ExplosionGuard(10.0)
    halved = [guard.see(norm) for norm in [1.0] * 20 + [50.0] + [1.0] * 20]
    assert halved.count(True) == 1
    assert halved[20]
    assert guard.scale == 0.5


def test_two_spikes_halve_twice() -> None:
    guard = ExplosionGuard(10.0)
    for norm in [1.0, 1.0, 50.0, 1.0, 50.0]:
        guard.see(norm)
    assert guard.scale == 0.25


def test_drift_does_not_halve() -> None:
    guard = ExplosionGuard(10.0)
    assert not any(guard.see(0.1 * 1.02**update) for update in range(500))  # to 2000 times the first
    assert not any(guard.see(2000 * 0.98**update) for update in range(500))
    assert guard.scale == 1.0


def test_norms_that_have_come_to_stay_do_not_halve_for_ever() -> None:
    guard = ExplosionGuard(10.0)
    for norm in [1.0] * 20 + [30.0] * 200:
        guard.see(norm)
    assert guard.scale >= 1 / 16


def test_factor_0_never_halves() -> None:
    guard = ExplosionGuard(0.0)
    assert not any(guard.see(norm) for norm in [1.0, 1e9, 1.0, math.inf])
    assert guard.scale == 1.0


def test_it_goes_on_from_saved_values() -> None:
    norms = [1.0, 2.0, 40.0, 1.0, 1.5, 80.0]
    whole, before = ExplosionGuard(10.0), ExplosionGuard(10.0)
    expected = [whole.see(norm) for norm in norms]
    found = [before.see(norm) for norm in norms[:3]]
    after = ExplosionGuard(10.0, before.scale, before.mean)
    assert found + [after.see(norm) for norm in norms[3:]] == expected
    assert (after.scale, after.mean) == (whole.scale, whole.mean)
    assert expected == [False, False, True, False, False, True]
