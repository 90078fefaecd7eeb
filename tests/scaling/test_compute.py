"""A process' computation: coefficients found again, what points cannot tell, and predictions from very few."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gfrnn.scaling.compute import TERMS, Load, at, fit, fit_part
from gfrnn.scaling.records import Products

WEIGHTS = 57e6
TRUE = {
    "forward": {"arithmetic": 1 / 600e9, "weights": 2e-10, "gather": 4e-3, "call": 0.1},
    "backward": {"arithmetic": 1 / 280e9, "weights": 3e-10, "gather": 6e-3, "call": 0.2},
    "optimizer": {"parameter": 4e-9, "offloaded": 2e-9, "update": 0.01},
    "other": {"update": 0.02, "character": 5e-7, "parameter": 1e-9, "gather": 1e-3},
}


def load(rows: int, steps: int = 50, *, accumulation: int = 1, share: int = 1, stage3: bool = False) -> Load:
    return Load(
        flops=6 * WEIGHTS * rows * steps,
        weights=WEIGHTS,
        steps=steps,
        rows=rows,
        micro_batches=accumulation,
        updated=WEIGHTS / share,
        gathers=20 * accumulation if stage3 else 0,
    )


def taken(at: Load, noise: float = 0.0, seed: int = 0) -> dict[str, float]:
    random = np.random.default_rng([seed, at.rows, at.steps, at.micro_batches, int(at.updated), at.gathers])
    return {
        part: float(at.terms(tuple(terms)) @ list(terms.values()) * np.exp(noise * random.normal()))
        for part, terms in TRUE.items()
    }


MANY = [
    load(rows, steps, accumulation=accumulation, share=share, stage3=stage3)
    for rows in (16, 64, 256)
    for steps in (5, 50)
    for accumulation in (1, 4)
    for share, stage3 in ((1, False), (2, False), (4, True))
]


def test_coefficients_are_found_again() -> None:
    found = fit(MANY, [taken(each) for each in MANY])
    for part in ("forward", "backward"):
        assert set(found.parts[part].terms) == {name for name in TERMS[part] if not name.endswith("_products")}
        for term, value in zip(found.parts[part].terms, found.parts[part].coefficients, strict=True):
            assert value == pytest.approx(TRUE[part][term], rel=1e-6), (part, term)
    assert found.parts["optimizer"].terms == ("parameter", "update")
    assert found.left_out["optimizer"] == ("offloaded",)
    assert found.rows == (4, 256)


def test_noise_leaves_predictions_right() -> None:
    found = fit(MANY, [taken(each, 0.05) for each in MANY])
    new = load(128, 25, share=8)
    for part, seconds in taken(new).items():
        assert found.parts[part].seconds(new) == pytest.approx(seconds, rel=0.1)
        assert found.parts[part].spread == pytest.approx(0.05, rel=0.6)


def test_coefficients_are_never_negative() -> None:
    """Where more rows cost less than in proportion, and where noise says that nothing else costs anything."""
    for seed in range(20):
        found = fit(MANY, [taken(each, 0.3, seed) for each in MANY])
        for part in found.parts.values():
            assert (part.coefficients >= 0).all()


def test_errors_of_coefficients_are_as_large_as_they_say() -> None:
    """Of forward's arithmetic in 200 noisy sets: 90 % within 1.7 standard deviations, give or take."""
    off = []
    for seed in range(200):
        part = fit_part("forward", MANY, [taken(each, 0.05, seed)["forward"] for each in MANY])
        error = part.coefficients[0] - TRUE["forward"]["arithmetic"]
        off.append(error / part.deviation(np.eye(len(part.terms))[0]))
    assert 0.82 < float(np.mean(np.abs(off) < 1.7)) < 0.97


def test_outliers_count_less() -> None:
    seconds = [taken(each, 0.01)["forward"] for each in MANY]
    seconds[5] *= 5
    found = fit_part("forward", MANY, seconds)
    new = load(128, 25)
    assert found.seconds(new) == pytest.approx(taken(new)["forward"], rel=0.05)


def test_one_point_is_a_rate() -> None:
    """Twice the rows take twice the time; what it cannot tell is named."""
    found = fit([load(64)], [taken(load(64))])
    assert found.parts["forward"].terms == ("arithmetic",)
    assert found.left_out["forward"] == ("weights", "gather", "call")
    assert found.parts["forward"].seconds(load(64)) == pytest.approx(taken(load(64))["forward"])
    assert found.parts["forward"].seconds(load(128)) == pytest.approx(2 * taken(load(64))["forward"])
    assert found.parts["forward"].deviation(load(64).terms(("arithmetic",))) > 0.05 * taken(load(64))["forward"]


def test_a_point_measured_twice_is_one() -> None:
    found = fit([load(64), load(64)], [taken(load(64), 0.05, seed) for seed in (1, 2)])
    assert found.parts["forward"].terms == ("arithmetic",)


def test_two_points_tell_rows_from_weights() -> None:
    points = [load(16), load(64)]
    found = fit(points, [taken(each) for each in points])
    assert found.parts["forward"].terms == ("arithmetic", "weights")
    new = load(32)
    assert found.parts["forward"].seconds(new) == pytest.approx(taken(new)["forward"], rel=1e-6)  # call is in weights'


def test_points_too_alike_are_one() -> None:
    points = [load(100), load(101)]
    assert fit(points, [taken(each) for each in points]).parts["forward"].terms == ("arithmetic",)


def test_few_rows_cost_more_a_character() -> None:
    found = fit(MANY, [taken(each) for each in MANY])
    a_row = [sum(found.seconds(load(rows)).values()) / rows for rows in (8, 16, 64, 256, 1024)]
    assert a_row == sorted(a_row, reverse=True)
    assert a_row[0] > 1.5 * a_row[-1]


def test_sharding_the_optimizer_saves_its_time() -> None:
    found = fit(MANY, [taken(each) for each in MANY])
    whole, shared = (found.parts["optimizer"].seconds(load(64, share=share)) for share in (1, 8))
    assert whole - shared == pytest.approx(7 / 8 * WEIGHTS * 4e-9, rel=1e-4)


def test_a_slower_machine_there_and_then() -> None:
    """Points at half the speed give the same coefficients, and are predicted at half the speed."""
    slow = [dataclasses.replace(each, slowdown=2.0) for each in MANY[::2]]
    points = [*MANY[1::2], *slow]
    found = fit(points, [taken(each) for each in points])
    assert found.parts["forward"].coefficients[0] == pytest.approx(1 / 600e9, rel=1e-6)
    assert found.parts["forward"].seconds(slow[0]) == pytest.approx(2 * found.parts["forward"].seconds(MANY[0]))


# ------------------------------------------------------------------------------------------- products that were timed

TIMED = [Products(rows, 1e-3 * seconds, 2e-3 * seconds) for rows, seconds in ((8, 7), (16, 5), (64, 14), (128, 26))]
"""Of 16 rows less than of 8, as another kernel has them."""


def with_products(at_once: Load, factor: float = 1.0) -> Load:
    found = at(TIMED, int(at_once.rows_at_once), factor)
    return dataclasses.replace(at_once, products=found)


def slow_and_fast(each: Load) -> float:
    """Forward's seconds: its products, and a little by rows."""
    assert each.products is not None
    return 1.1 * each.steps * each.products.forward + each.flops / 2e12


def test_products_between_and_beyond_those_timed() -> None:
    for each in TIMED:
        found = at(TIMED, each.rows)
        assert (found.forward, found.backward) == pytest.approx((each.forward, each.backward))
    assert at(TIMED, 32).forward == pytest.approx(1e-3 * np.sqrt(5 * 14))
    assert at(TIMED, 512).backward == pytest.approx(4 * 2e-3 * 26)
    assert at(TIMED, 4).forward == pytest.approx(7e-3)  # what reads the weights
    assert at(TIMED, 64, scale=2.0).forward == pytest.approx(28e-3)


def test_products_of_the_nearest_layout_and_of_another_model() -> None:
    points = [with_products(load(rows)) for rows in (8, 16, 64)]
    seconds = [{"forward": slow_and_fast(each), "backward": 1.0, "optimizer": 1.0, "other": 1.0} for each in points]
    slower = [dataclasses.replace(each, forward=2 * each.forward) for each in TIMED]
    found = fit(points, seconds, products={(1, 1): TIMED, (4, 1): slower})
    ours, theirs = (found.products_of(WEIGHTS, 64, world_size, 1) for world_size in (1, 16))
    larger = found.products_of(3 * WEIGHTS, 64, 1, 1)
    assert ours is not None
    assert theirs is not None
    assert larger is not None
    assert ours.forward == pytest.approx(14e-3)
    assert theirs.forward == pytest.approx(28e-3)
    assert larger.forward == pytest.approx(3 * 14e-3)
    assert fit(points, seconds).products_of(WEIGHTS, 64, 1, 1) is None


def test_what_is_no_straight_line_of_rows_is_predicted() -> None:
    """8 and 16 rows, and rows that no point has, from noisy products of each point's own."""
    random = np.random.default_rng(0)
    points = [with_products(load(rows), float(np.exp(0.1 * random.normal()))) for rows in (8, 16, 64) for _ in range(4)]
    seconds = [{"forward": slow_and_fast(each), "backward": 1.0, "optimizer": 1.0, "other": 1.0} for each in points]
    part = fit(points, seconds).parts["forward"]
    assert part.terms == ("forward_products", "arithmetic", "weights")
    for rows in (8, 16, 32, 128):
        new = with_products(load(rows))
        assert part.seconds(new) == pytest.approx(slow_and_fast(new), rel=1e-3)
    slow = dataclasses.replace(with_products(load(16), 2.0), slowdown=2.0)  # the machine, for a while
    assert part.seconds(slow) == pytest.approx(2 * part.seconds(with_products(load(16))), rel=1e-3)


def test_a_point_without_products_leaves_them_to_none() -> None:
    points = [with_products(load(16)), load(64)]
    assert fit(points, [taken(load(16)), taken(load(64))]).parts["forward"].terms == ("arithmetic", "weights")


def test_noise_of_products_tells_no_terms_apart() -> None:
    """Points of one number of rows, whose products alone differ, are one point measured again."""
    points = [with_products(load(16), factor) for factor in (0.8, 1.0, 1.3)]
    found = fit(points, [{"forward": slow_and_fast(each)} for each in points])
    assert found.parts["forward"].terms == ("forward_products",)
