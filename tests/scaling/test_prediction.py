"""Predicted steps: synthetic machines are found again, intervals hold what they say, groups held out are predicted."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import numpy as np
import pytest
from synthetic import MACHINE, NETWORK, PEAK, POINTS, PRESET, ds_config_of, measured, sweep, truth

from gfrnn.config import UserError, preset, sizes
from gfrnn.scaling.clusters import cluster_presets, load_cluster
from gfrnn.scaling.messages import Message
from gfrnn.scaling.model import Model, slowest
from gfrnn.scaling.network import Link
from gfrnn.scaling.prediction import fit, for_cluster, held_out, residuals, scaled
from gfrnn.scaling.records import PARTS, Measurement, Point
from launch import environment


@pytest.fixture(scope="module")
def fitted() -> Model:
    return fit([measured(truth(), point) for point in POINTS], sweep(), ds_config_of)


def test_measured_points_come_out(fitted: Model) -> None:
    for found in residuals(fitted, [measured(truth(), point) for point in POINTS], ds_config_of):
        assert abs(found.error) < 0.01, found.measurement.point
        assert found.inside
        assert set(found.prediction.parts) == set(PARTS)
        assert sum(found.prediction.parts.values()) == pytest.approx(found.prediction.step_seconds)
        for part, seconds in found.measurement.parts.items():
            assert found.prediction.parts[part] == pytest.approx(seconds, rel=0.02, abs=1e-4)


def test_larger_worlds_come_out(fitted: Model) -> None:
    """64 times the processes that were measured, without noise: within 3 %, and less sure than near the points."""
    far = Point(PRESET, "z2", world_size=256, nodes=64, rows=16 * 256, steps=20)
    near = dataclasses.replace(far, world_size=4, nodes=4, rows=64)
    found, known = (fitted.predict(point, ds_config_of(point)) for point in (far, near))
    expected = truth().predict(far, ds_config_of(far))
    assert found.step_seconds == pytest.approx(expected.step_seconds, rel=0.03)
    assert found.efficiency == pytest.approx(expected.efficiency, rel=0.03)
    assert found.high / found.low > 1.5 * known.high / known.low


def test_failed_points_and_other_compressions_are_left_out(fitted: Model) -> None:
    good = [measured(truth(), point) for point in POINTS]
    other = dataclasses.replace(POINTS[1], compression="topk")
    odd = dataclasses.replace(good[1], point=other, step_seconds=99.0, parts=dict.fromkeys(PARTS, 20.0))
    broken = Measurement(POINTS[0], MACHINE, failed="out of memory")
    again = fit([*good, odd, broken], sweep(), ds_config_of)
    assert again.predict(POINTS[3], ds_config_of(POINTS[3])) == fitted.predict(POINTS[3], ds_config_of(POINTS[3]))
    assert [found.measurement for found in residuals(again, [odd, broken], ds_config_of)] == [odd]
    with pytest.raises(ValueError, match="topk"):
        fitted.predict(other, ds_config_of(other))


def test_bf16_compression_halves_the_gradients(fitted: Model) -> None:
    point = POINTS[3]
    halved = dataclasses.replace(point, compression="bf16")
    whole, half = (fitted.predict(each, ds_config_of(each)).network_seconds for each in (point, halved))
    saved = 2 * sizes(preset(PRESET)).total  # bytes; of an all-reduce of four, at 0.11 GB/s
    assert whole - half == pytest.approx(2 * 3 / 4 * saved / 0.11e9, rel=0.01)


def test_messages_may_be_given(fitted: Model) -> None:
    point = POINTS[3]
    none, some = (fitted.predict(point, ds_config_of(point), sent=sent) for sent in ([], [Message("reduce", 1e8, 1)]))
    assert none.parts["communication"] == none.network_seconds == 0
    assert some.parts["communication"] == pytest.approx(NETWORK.seconds("reduce", 1e8, 4, 4), rel=0.02)


def test_what_is_hidden_is_found_by_configuration() -> None:
    hides = truth(exposed={"z0": 1.0, "z2": 0.3})
    found = fit([measured(hides, point) for point in POINTS], sweep(), ds_config_of)
    assert found.exposed["z0"] == pytest.approx(1.0, rel=0.02)
    assert found.exposed["z2"] == pytest.approx(0.3, rel=0.02)


def test_what_collectives_cost_beyond_the_network_is_found() -> None:
    """The same whatever the network: it does not grow with a slower one, as a share of its seconds would."""
    model = truth(copying={"z0": 3e-9, "z2": 8e-9})
    found = fit([measured(model, point) for point in POINTS], sweep(), ds_config_of)
    assert found.exposed == {"z0": 1.0, "z2": 1.0}
    assert found.copying["z0"] == pytest.approx(3e-9, rel=0.1)
    assert found.copying["z2"] == pytest.approx(8e-9, rel=0.1)
    point = dataclasses.replace(POINTS[3], world_size=16, nodes=16, rows=128)
    slow = dataclasses.replace(NETWORK, inter=Link(600e-6, 0.011e9))
    expected = dataclasses.replace(model, network=slow).predict(point, ds_config_of(point)).step_seconds
    predicted = dataclasses.replace(found, network=slow, layouts={}).predict(point, ds_config_of(point)).step_seconds
    assert predicted == pytest.approx(expected, rel=0.02)


def test_stragglers_are_found() -> None:
    """Processes that differ by 5 %: most of what is waited for in a node is the slowest one."""
    uneven = truth(straggling=0.05)
    points = [dataclasses.replace(point, steps=steps) for point in POINTS for steps in (20, 40, 80)]
    found = fit([measured(uneven, point) for point in points], sweep(), ds_config_of)
    assert found.straggling == pytest.approx(0.05, rel=0.3)
    assert found.exposed["z0"] == pytest.approx(1.0, rel=0.25)


def test_the_slowest_of_many() -> None:
    random = np.random.default_rng(0)
    for count in (2, 4, 32, 1024):
        largest = random.normal(size=(4000, count)).max(axis=1).mean()
        assert slowest(count) == pytest.approx(float(largest), rel=0.06)
    assert slowest(1) == 0


def test_processes_that_share_cores() -> None:
    """Four on two cores have half the peak each: their points fit with the others', and are predicted from theirs."""
    shared = {("fp32", W, N): PEAK / max(1, W / 2) for W, N in ((1, 1), (2, 1), (4, 1), (4, 4))}
    crowded = truth(peaks=shared)
    points = [measured(crowded, point) for point in POINTS]
    found = fit(points, sweep(), ds_config_of)
    assert max(abs(each.error) for each in residuals(found, points, ds_config_of)) < 0.01
    alone, four = (found.predict(point, ds_config_of(point)) for point in (POINTS[0], POINTS[2]))
    assert four.parts["forward"] == pytest.approx(2 * alone.parts["forward"], rel=0.01)
    assert four.efficiency < 0.5


def test_two_points_are_enough() -> None:
    few = [measured(truth(), point) for point in (POINTS[0], POINTS[3])]
    model = fit(few, sweep(), ds_config_of)
    for found in residuals(model, few, ds_config_of):
        assert abs(found.error) < 0.02
    other = POINTS[7]
    found = model.predict(other, ds_config_of(other))
    expected = truth().predict(other, ds_config_of(other)).step_seconds
    assert found.low < expected < found.high


def test_intervals_hold_what_they_say() -> None:
    """90 %, about: of new noisy points within the range, predicted by 30 noisy studies."""
    new = [
        Point(PRESET, "z2", world_size=W, nodes=N, rows=rows * W, steps=20)
        for W, N, rows in ((1, 1, 16), (4, 1, 16), (4, 4, 24), (2, 1, 32))
    ]
    inside = []
    for seed in range(30):
        points = [measured(truth(), point, 0.05, seed) for point in POINTS]
        model = fit(points, sweep(0.05, seed), ds_config_of)
        inside += [
            found.inside
            for found in residuals(model, [measured(truth(), point, 0.05, 1000 + seed) for point in new], ds_config_of)
        ]
    assert 0.83 < float(np.mean(inside)) <= 0.98


def test_groups_held_out() -> None:
    """By world size: the largest is predicted from the smaller ones; the median and the worst are of all groups."""
    points = [measured(truth(), point, 0.03) for point in POINTS]
    found = held_out(points, sweep(0.03), ds_config_of, lambda each: each.point.world_size)
    assert set(found.groups) == {1, 2, 4}
    assert len(found.errors) == len(points)
    assert 0 < found.median < 0.06
    assert found.median < found.worst < 0.2
    assert 0.7 < found.inside <= 1


def test_groups_held_out_are_not_in_the_fit() -> None:
    """A group three times slower than all others is missed by as much: it is not fitted to."""
    points = [measured(truth(), point) for point in POINTS]
    points = [
        dataclasses.replace(each, step_seconds=3 * each.step_seconds) if each.point.world_size == 2 else each
        for each in points
    ]
    found = held_out(points, sweep(), ds_config_of, lambda each: each.point.world_size)
    assert all(each.error == pytest.approx(-2 / 3, abs=0.02) for each in found.groups[2])


def test_groups_without_which_nothing_is_known_are_skipped() -> None:
    bf16 = [measured(truth(), dataclasses.replace(point, dtype="bf16")) for point in POINTS[:4]]
    points = [measured(truth(), point) for point in POINTS]
    found = held_out([*points, *bf16], sweep(), ds_config_of, lambda each: each.point.dtype)
    assert set(found.skipped) == {"bf16", "fp32"}
    assert "nothing was measured in bf16" in found.skipped["bf16"]


def test_another_preset_is_less_sure(fitted: Model) -> None:
    """By its FLOP and weights: 3x191 has about twice 3x140's."""
    point, other = POINTS[1], dataclasses.replace(POINTS[1], preset="gf-lstm-3x191")
    known, guessed = (fitted.predict(each, ds_config_of(each)) for each in (point, other))
    ratio = sizes(preset("gf-lstm-3x191")).train_flops / sizes(preset(PRESET)).train_flops
    assert guessed.parts["forward"] == pytest.approx(ratio * known.parts["forward"], rel=1e-6)
    assert guessed.high / guessed.low > 1.3 * known.high / known.low


def test_what_cannot_be_predicted() -> None:
    alone = fit([measured(truth(), POINTS[0])], [], ds_config_of)
    assert alone.predict(POINTS[0], ds_config_of(POINTS[0])).efficiency == pytest.approx(1)
    with pytest.raises(UserError, match="run the sweep"):
        alone.predict(POINTS[1], ds_config_of(POINTS[1]))
    with pytest.raises(UserError, match="no point was measured"):
        fit([Measurement(POINTS[0], MACHINE, failed="memory")], sweep(), ds_config_of)
    other = dataclasses.replace(measured(truth(), POINTS[1]), machine=dataclasses.replace(MACHINE, network="10gbit"))
    with pytest.raises(ValueError, match="several kinds of machine"):
        fit([measured(truth(), POINTS[0]), other], sweep(), ds_config_of)


@pytest.mark.parametrize("name", cluster_presets())
def test_clusters_from_1_to_4096(name: str) -> None:
    """Weak scaling of the paper's largest model: full speed alone, then less, and less sure, all within reason."""
    cluster, point = load_cluster(name), Point(rows=128, dtype="bf16")
    found = scaled(for_cluster(cluster, [point]), point, ds_config_of, per_node=cluster.gpus_per_node, kind="weak")
    assert [each.point.world_size for each in found] == [2**power for power in range(13)]
    assert all(each.point.world_size == each.point.nodes * min(8, cluster.gpus_per_node) for each in found[3:])
    efficiencies = [each.efficiency for each in found]
    assert efficiencies[0] == pytest.approx(1)
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert all(0 < each.efficiency_low < each.efficiency < each.efficiency_high <= 1 for each in found[1:])
    assert found[-1].high / found[-1].low > found[0].high / found[0].low > 1.5
    alone = found[0]
    assert 0.02 < alone.flops / alone.step_seconds / cluster.peak_flops("bf16") < 0.8


def test_strong_scaling_ends_with_the_rows() -> None:
    cluster, point = load_cluster("dgx-h100"), Point(rows=100, dtype="bf16")
    found = scaled(for_cluster(cluster, [point]), point, ds_config_of, per_node=8, kind="strong")
    assert [each.point.world_size for each in found] == [1, 2, 4, 8, 16, 32, 64]
    assert all(each.point.rows == 100 for each in found)
    one, most = found[0], found[-1]
    assert most.efficiency == pytest.approx(one.step_seconds / most.step_seconds / 64)
    assert most.efficiency < 0.2


def test_nodes_of_six_are_filled() -> None:
    point = Point(rows=64, dtype="bf16")
    model = for_cluster(load_cluster("dgx-h100"), [point])
    found = scaled(model, point, ds_config_of, per_node=6, kind="weak", most=50)
    assert [(each.point.world_size, each.point.nodes) for each in found] == [
        (1, 1), (2, 1), (4, 1), (6, 1), (12, 2), (24, 4), (48, 8),
    ]  # fmt: skip


def test_a_faster_network_scales_further() -> None:
    point = Point(rows=128, dtype="bf16", world_size=64, nodes=8)
    fast = load_cluster("dgx-h100")
    slow = dataclasses.replace(fast, inter=Link(fast.inter.latency, fast.inter.bytes_per_second / 100))
    good, bad = (for_cluster(each, [point]).predict(point, ds_config_of(point)) for each in (fast, slow))
    assert good.efficiency > 1.5 * bad.efficiency


def test_a_measured_gpu_in_a_described_cluster() -> None:
    """One process' points give what it computes, the data sheet what it sends: surer than a data sheet alone."""
    alone = fit([measured(truth(), point) for point in POINTS if point.world_size == 1], [], ds_config_of)
    cluster, point = load_cluster("dgx-h100"), POINTS[3]
    mixed = for_cluster(cluster, [point], measured=alone).predict(point, ds_config_of(point))
    assumed = for_cluster(cluster, [point]).predict(point, ds_config_of(point))
    expected = truth().predict(point, ds_config_of(point))
    assert mixed.parts["forward"] == pytest.approx(expected.parts["forward"], rel=1e-3)
    assert mixed.network_seconds == assumed.network_seconds
    assert mixed.high / mixed.low < 0.8 * assumed.high / assumed.low


def test_a_prediction_is_quick_and_needs_no_torch() -> None:
    code = "import gfrnn.scaling.prediction, gfrnn.scaling.clusters, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout == "False\n"
    cluster, point = load_cluster("dgx-h100"), Point(rows=128, dtype="bf16")
    start = time.process_time()
    scaled(for_cluster(cluster, [point]), point, ds_config_of, per_node=8, kind="weak")
    assert time.process_time() - start < 2
