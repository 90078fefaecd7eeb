"""Time and cost to a target against the number of GPUs."""

from __future__ import annotations

import itertools

import pytest

from gfrnn.scaling.target import Reference, knee, outlooks, updates_needed

REFERENCE = Reference(characters_per_update=10_000, updates=1000)
WORLD_SIZES = [2**n for n in range(13)]
ROWS = [2**n for n in range(4, 17)]


def test_a_run_needs_what_it_needed() -> None:
    assert updates_needed(REFERENCE, 40_000, 10_000) == pytest.approx(1000)


def test_at_the_critical_batch_both_are_twice_their_least() -> None:
    critical = 40_000
    least_updates = updates_needed(REFERENCE, critical, 1e15)
    assert updates_needed(REFERENCE, critical, critical) == pytest.approx(2 * least_updates)
    least_characters = updates_needed(REFERENCE, critical, 1e-3) * 1e-3
    assert updates_needed(REFERENCE, critical, critical) * critical == pytest.approx(2 * least_characters, rel=1e-6)


def test_small_batches_are_free_to_grow_large_ones_are_not() -> None:
    small, large = updates_needed(REFERENCE, 1e6, 100), updates_needed(REFERENCE, 1e6, 200)
    assert small / large == pytest.approx(2, rel=1e-3)
    small, large = updates_needed(REFERENCE, 100, 1e6), updates_needed(REFERENCE, 100, 2e6)
    assert small / large == pytest.approx(1, rel=1e-3)


def test_ideal_hardware_is_worth_its_number_until_statistics_say_no() -> None:
    """A step takes its rows' time alone: what is lost is what the batch loses."""
    found = outlooks(
        REFERENCE, 1e5, lambda w, rows: max(16, rows / w) * 1e-3, steps=100, world_sizes=WORLD_SIZES, rows=ROWS
    )
    assert [each.world_size for each in found] == WORLD_SIZES
    assert found[0].rows == 16
    assert [each.rows for each in found] == sorted(each.rows for each in found)
    hours = [each.hours for each in found]
    assert hours == sorted(hours, reverse=True)
    assert found[0].efficiency == 1
    assert all(a.gpu_hours <= b.gpu_hours * (1 + 1e-9) for a, b in itertools.pairwise(found))
    # 1000 rows of 100 steps are the critical batch; 16 rows a GPU: 64 GPUs have it
    assert 16 <= knee(found).world_size <= 64
    more = outlooks(
        REFERENCE, 1e6, lambda w, rows: max(16, rows / w) * 1e-3, steps=100, world_sizes=WORLD_SIZES, rows=ROWS
    )
    assert knee(more).world_size > knee(found).world_size


def test_more_processes_than_rows_are_left_out() -> None:
    found = outlooks(REFERENCE, 1e5, lambda w, rows: rows / w, steps=100, world_sizes=WORLD_SIZES, rows=[64])
    assert [each.world_size for each in found] == [1, 2, 4, 8, 16, 32, 64]


def test_where_a_step_takes_the_same_nothing_is_worth_more_than_one() -> None:
    found = outlooks(REFERENCE, 1e5, lambda w, rows: 1.0, steps=100, world_sizes=[1, 2, 4], rows=[64])
    assert knee(found).world_size == 1
    assert [each.gpu_hours / each.hours for each in found] == [1, 2, 4]
