"""Collectives' cost: by hand, at its limits, and constants that are found again in noisy times."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from gfrnn.config import UserError
from gfrnn.scaling.messages import Message
from gfrnn.scaling.network import GLOO, KINDS, NCCL, Link, Network
from gfrnn.scaling.network_fit import errors, fit, fit_layouts
from gfrnn.scaling.records import Timed

GPUS = Network(Link(3e-6, 450e9), Link(8e-6, 50e9))
HOSTS = Network(Link(30e-6, 1.5e9), Link(600e-6, 0.11e9), call_seconds=100e-6, factors={"reduce": 1.8}, algorithms=GLOO)


def sweep(
    network: Network,
    noise: float,
    seed: int = 0,
    kinds: tuple[str, ...] = ("all_reduce", "reduce"),
    worlds: tuple[tuple[int, int], ...] = ((2, 1), (4, 1), (2, 2), (4, 4)),
) -> list[Timed]:
    random = np.random.default_rng(seed)
    return [
        Timed(kind, size, W, N, network.seconds(kind, size, W, N) * float(np.exp(noise * random.normal())))
        for kind, size, (W, N) in itertools.product(kinds, (1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 26), worlds)
    ]


def test_by_hand() -> None:
    a, b, n = 1e-3, 1e6, 1e6
    alone = Network(Link(a, b), Link(1e9, 1e-9), algorithms=GLOO)  # the link between nodes must not matter
    assert alone.seconds("all_reduce", n, 4) == pytest.approx(2 * 3 * (a + n / 4 / b))
    assert alone.seconds("all_gather", n, 4) == pytest.approx(3 * (a + n / 4 / b))
    assert alone.seconds("reduce_scatter", n, 4) == pytest.approx(3 * (a + n / 4 / b))
    assert alone.seconds("reduce", n, 4) == pytest.approx(2 * 3 * (a + n / 4 / b))
    assert alone.seconds("broadcast", n, 4) == pytest.approx(2 * 3 * (a + n / 4 / b))
    assert alone.seconds("broadcast", 1, 4) == pytest.approx(2 * a, rel=1e-2)
    tree = dataclasses.replace(alone, algorithms=("tree",))
    assert tree.seconds("all_reduce", n, 8) == pytest.approx(2 * (3 * a + n / b))
    assert tree.seconds("reduce", n, 8) == pytest.approx(3 * a + n / b)


def test_two_levels_by_hand() -> None:
    """16 processes on 2 nodes: in the node an eighth of the bytes at 450 GB/s seven times, and back; between, n / 8."""
    n = 1e9
    found = GPUS.by_algorithm("all_gather", n, 16, 2)["two levels"]
    assert found == pytest.approx(7 * (3e-6 + n / 8 / 450e9) + (8e-6 + n / 8 / 2 / 50e9))
    found = GPUS.by_algorithm("all_reduce", n, 16, 2)["two levels"]
    assert found == pytest.approx(2 * 7 * (3e-6 + n / 8 / 450e9) + 2 * (8e-6 + n / 8 / 2 / 50e9))


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_sends_nothing(kind: str) -> None:
    assert HOSTS.seconds(kind, 1e9, 1) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", [GPUS, HOSTS], ids=["gpus", "hosts"])
def test_more_bytes_and_slower_links_take_longer(kind: str, network: Network) -> None:
    sizes = [network.seconds(kind, size, 16, 2) for size in (0, 1e3, 1e6, 1e9)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    for index in range(5):  # the call and both links
        slower = network.constants
        slower[index] = 2 * slower[index] + 1e-9
        assert network.with_constants(slower).seconds(kind, 1e6, 16, 2) >= network.seconds(kind, 1e6, 16, 2)


def test_more_processes_take_longer() -> None:
    for kind in KINDS:
        by_world = [GPUS.seconds(kind, 1e6, W, max(1, W // 8)) for W in (1, 2, 4, 8, 16, 64, 512, 4096)]
        assert by_world == sorted(by_world), kind


def test_trees_are_for_small_messages_and_many_processes() -> None:
    small, large = (GPUS.by_algorithm("all_reduce", size, 512, 512) for size in (1e3, 1e12))
    assert small["tree"] < small["ring"] / 20
    assert large["ring"] < large["tree"]
    assert GPUS.seconds("all_reduce", 1e3, 512, 512) == small["tree"]


def test_two_levels_beat_a_flat_ring() -> None:
    """Fewer steps between nodes, where a step there costs: 512 nodes of 8; and never more bytes over the slow link."""
    for kind, size in itertools.product(("all_reduce", "all_gather", "reduce_scatter"), (1e3, 1e6, 1e8)):
        found = GPUS.by_algorithm(kind, size, 4096, 512)
        assert found["two levels"] < found["ring"], (kind, size)


def test_a_flat_ring_has_the_whole_nodes_bandwidth() -> None:
    """8 x 50 GB/s between nodes, 450 in them: the first limits."""
    found = GPUS.by_algorithm("all_gather", 1e12, 16, 2)["ring"]
    assert found == pytest.approx(1e12 * 15 / 16 / 400e9, rel=1e-3)


def test_each_call_costs() -> None:
    once = HOSTS.total([Message("all_reduce", 1e6, 1)], 2, 2)
    assert HOSTS.total([Message("all_reduce", 1e6, 5)], 2, 2) == pytest.approx(5 * once)
    assert HOSTS.total([Message("all_reduce", 1e5, 10)], 2, 2) > once


def test_unknown_collectives() -> None:
    with pytest.raises(ValueError, match="no theory of all_to_all"):
        GPUS.seconds("all_to_all", 1, 2)


def test_gradient_is_the_slope() -> None:
    sent = [Message("all_reduce", 1e6, 3), Message("reduce", 1e4, 7)]
    slope = HOSTS.gradient(sent, 4, 4)
    for index, value in enumerate(HOSTS.constants):
        moved = HOSTS.constants
        moved[index] = 1.01 * value
        grown = HOSTS.with_constants(moved).total(sent, 4, 4) - HOSTS.total(sent, 4, 4)
        assert grown == pytest.approx(0.01 * value * slope[index], rel=1e-2, abs=1e-12)


def test_constants_are_found_again_without_noise() -> None:
    found = fit(sweep(HOSTS, 0.0))
    assert found.constants == pytest.approx(HOSTS.constants, rel=1e-3)
    assert found.assumed == ()
    assert found.largest_world == 4


def test_constants_of_gpus_are_found_again() -> None:
    """With the cheapest of several algorithms in each time."""
    found = fit(sweep(GPUS, 0.0, kinds=("all_reduce",), worlds=((2, 1), (8, 1), (16, 2), (64, 8))), NCCL)
    assert found.intra.latency == pytest.approx(3e-6, rel=0.02)
    assert found.inter.bytes_per_second == pytest.approx(50e9, rel=0.02)


def test_errors_of_constants_are_as_large_as_they_say() -> None:
    """60 noisy sweeps: about two thirds of the constants lie within a standard deviation, nearly all within 2.5."""
    off = []
    for seed in range(60):
        found = fit(sweep(HOSTS, 0.05, seed))
        assert found.spread == pytest.approx(0.05, rel=0.5)
        off += list((found.constants - HOSTS.constants) / np.array(list(found.errors.values())))
    within = [float(np.mean(np.abs(off) < limit)) for limit in (1.0, 2.5)]
    assert 0.58 < within[0] < 0.80
    assert within[1] > 0.96


def test_outliers_count_less() -> None:
    times = sweep(HOSTS, 0.02)
    for index in (3, 17):
        times[index] = dataclasses.replace(times[index], seconds=4 * times[index].seconds)
    assert fit(times).constants == pytest.approx(HOSTS.constants, rel=0.12)


def test_what_a_sweep_does_not_show_is_named() -> None:
    """Two hosts alone: a call is not told from the latency, nothing is known of processes on one host."""
    found = fit(sweep(HOSTS, 0.01, kinds=("all_reduce",), worlds=((2, 2),)))
    assert found.assumed == ("call", "intra latency", "intra seconds a byte")
    assert found.intra == found.inter
    assert found.inter.latency == pytest.approx(650e-6, rel=0.05)  # with half a call, as two steps make one
    assert found.errors["intra latency"] == pytest.approx(found.intra.latency)
    assert found.errors["inter latency"] < 0.05 * found.inter.latency


def test_a_real_sweep() -> None:
    """gloo between two network namespaces at 1 Gbit/s: within 2 % from 1 KB to 64 MB, at nearly the link's speed."""
    times = [(1e3, 0.61e-3), (1e6, 9.1e-3), (8e6, 70e-3), (64e6, 562e-3)]
    timed = [Timed("all_reduce", int(size), 2, 2, seconds) for size, seconds in times]
    found = fit(timed)
    assert max(map(abs, errors(found, timed))) < 0.02
    assert 0.85e9 < 8 * found.inter.bytes_per_second < 1e9
    assert 2 * found.inter.latency == pytest.approx(0.6e-3, rel=0.05)


def test_a_sweep_of_one_process_says_nothing() -> None:
    with pytest.raises(UserError, match="two or more processes"):
        fit([Timed("all_reduce", 1024, 1, 1, 1e-5)])


def test_a_crowded_layout_has_constants_of_its_own() -> None:
    """Four processes on two cores, whose steps wait to be scheduled: five times the latency of two processes."""
    crowded = dataclasses.replace(HOSTS, intra=Link(150e-6, 0.5e9))
    times = sweep(HOSTS, 0.03, worlds=((2, 1), (2, 2), (4, 4))) + sweep(crowded, 0.03, worlds=((4, 1),))
    overall = fit(times)
    found = fit_layouts(times, overall)
    assert (4, 1) in found
    own = [each for each in times if (each.world_size, each.nodes) == (4, 1)]
    assert float(np.median(np.abs(errors(found[4, 1], own)))) < 0.04
    assert float(np.median(np.abs(errors(overall, own)))) > 0.1
    sent = [Message("all_reduce", 1e6, 1)]
    assert 0 < found[4, 1].deviation(sent, 4, 1) < 0.1 * found[4, 1].total(sent, 4, 1)


def test_layouts_that_are_described_have_none() -> None:
    times = sweep(HOSTS, 0.2)
    assert fit_layouts(times, fit(times)) == {}


def test_a_mixed_layout_alone_is_as_sure_as_its_times() -> None:
    """Two nodes of two: both links in one, but no doubt about this layout."""
    times = sweep(HOSTS, 0.03, worlds=((4, 2),))
    wrong = dataclasses.replace(HOSTS, inter=Link(1e-5, 1e9))
    network = fit_layouts(times, wrong)[4, 2]
    sent = [Message("all_reduce", 1e6, 1)]
    assert network.total(sent, 4, 2) == pytest.approx(HOSTS.total(sent, 4, 2), rel=0.1)
    assert network.deviation(sent, 4, 2) < 0.1 * network.total(sent, 4, 2)
