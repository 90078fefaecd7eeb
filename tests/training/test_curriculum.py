"""The ladder: when a level is over, and what comes after the last."""

from __future__ import annotations

from gfrnn.training.curriculum import Curriculum

LAST = 2


def check(curriculum: Curriculum, update: int, train: float, valid: float) -> bool:
    for accuracy in (train - 0.1, train + 0.1):  # the mean counts
        curriculum.see(accuracy)
    return curriculum.check(update, valid, LAST)


def test_a_level_that_is_learned_is_over() -> None:
    curriculum = Curriculum()
    assert not check(curriculum, 10, 0.5, 0.95)
    assert (curriculum.level, curriculum.begun) == (0, 0)
    assert check(curriculum, 20, 0.6, 0.951)
    assert (curriculum.level, curriculum.begun, curriculum.rate_scale) == (1, 20, 1.0)


def test_a_level_on_which_training_rises_no_more_is_over_after_five_checks() -> None:
    curriculum = Curriculum()
    found = [check(curriculum, step, 0.6 - step / 1000, 0.2) for step in range(1, 7)]
    assert found == [False] * 5 + [True]  # the first was the best, then five below it
    assert (curriculum.level, curriculum.begun) == (1, 6)
    # what was best on another level does not count, and a rise begins the count anew
    rising = [check(curriculum, 10 + step, 0.1 + step / 100, 0.2) for step in range(7)]
    assert not any(rising)
    assert curriculum.level == 1


def test_after_the_last_level_the_rate_falls() -> None:
    curriculum = Curriculum(level=LAST, begun=7)
    assert check(curriculum, 30, 0.9, 0.99)
    assert (curriculum.level, curriculum.begun) == (LAST, 7)
    assert abs(curriculum.rate_scale - 0.8) < 1e-12
    assert check(curriculum, 40, 0.9, 0.99)
    assert abs(curriculum.rate_scale - 0.64) < 1e-12


def test_the_mean_is_of_what_was_seen_since_the_last_check() -> None:
    curriculum = Curriculum()
    check(curriculum, 1, 0.9, 0.0)
    check(curriculum, 2, 0.5, 0.0)
    assert (curriculum.best_accuracy, curriculum.checks_without_rise) == (0.9, 1)
    assert (curriculum.accuracy, curriculum.updates) == (0.0, 0)
