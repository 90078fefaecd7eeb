"""Compressed gradients and local updates: what the compressors do on real groups, and real training with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import ROOT, SMALL, losses, metrics, script, validations, warm_ranks

HERE = Path(__file__).parent
COMPRESSED = ("powersgd", "topk")


def run_ranks(name: str, processes: int, argument: Path) -> None:
    for rank in warm_ranks([HERE / name, argument], processes):
        assert rank.returncode == 0, rank.stderr[-3000:]


# ---------------------------------------------------------------------------------- on known gradients, no engine


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory) -> dict[str, Any]:
    where = tmp_path_factory.mktemp("compression") / "found.json"
    run_ranks("compression_worker.py", request.param, where)
    return json.loads(where.read_text())


@pytest.mark.parametrize("kind", COMPRESSED)
def test_all_of_it_is_the_mean(found, kind):
    """Whole rank, or every element; while what is compressed here is far from it."""
    assert found["whole"][kind] <= 1e-6
    assert found["once"][kind] > 0.3


def test_a_mean_of_the_rank_that_is_sent_arrives_whole(found):
    assert found["low_rank"] <= 1e-5


@pytest.mark.parametrize("kind", COMPRESSED)
def test_what_was_not_sent_is_sent_later(found, kind):
    """What is applied sums up to the true gradients but for what is in memory, which does not grow."""
    fed_back = found["fed_back"][kind]
    assert fed_back["unexplained"] <= 1e-6
    assert fed_back["off"]["30"] < 0.25 * fed_back["off"]["1"]
    assert fed_back["off"]["300"] < 0.25 * fed_back["off"]["30"]


@pytest.mark.parametrize("kind", COMPRESSED)
def test_processes_get_the_same_bits(found, kind):
    assert [of[kind] for of in found["same"]] == [0.0] * len(found["same"])


@pytest.mark.parametrize("kind", COMPRESSED)
def test_the_memory_is_handed_on(found, kind):
    """Its mean for both; for powersgd, whose decisions depend on that alone, what is sent next too."""
    handed_on = found["handed_on"][kind]
    assert handed_on["left"] <= 1e-6
    assert handed_on["without"] > 0.1
    assert kind == "topk" or handed_on["next"] <= 1e-5


def test_local_updates_meet(found):
    local = found["local"]
    assert [spread == 0 for spread in local["spreads"]] == [False, False, True, False, False, True, False]
    assert local["off_the_mean"] <= 1e-7
    assert local["settled"] == 0  # weights, moments and running averages
    assert local["averages"] == [sum(range(len(found["same"]))) / len(found["same"])] * 4


# ----------------------------------------------------------------------------------------------- real training


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    run_ranks("compressed_training_worker.py", 2, folder)
    return folder


@pytest.mark.parametrize("kind", [*COMPRESSED, "local"])
def test_it_learns_nearly_as_well(runs, kind):
    """The last ten updates' loss within 1 % of whole gradients' (0.4 % at hand), after a fall of a third."""

    def last(of: dict[int, float]) -> float:
        return sum(of[step] for step in range(51, 61)) / 10

    whole, other = losses(runs / "none"), losses(runs / kind)
    assert last(other) < 0.67 * other[1]
    assert other[30] != whole[30]
    assert last(other) == pytest.approx(last(whole), rel=0.01)
    assert validations(runs / kind)[60] == pytest.approx(validations(runs / "none")[60], rel=0.01)


@pytest.mark.parametrize(("kind", "close"), [("none", 0.0), ("local", 0.0), ("powersgd", 1e-5), ("topk", 0.005)])
def test_it_resumes(runs, kind, close):
    whole, rest = losses(runs / kind), losses(runs / f"{kind}-from-{kind}")
    assert sorted(rest) == list(range(26, 61))
    assert rest == pytest.approx({step: loss for step, loss in whole.items() if step > 25}, rel=close, abs=0)


@pytest.mark.parametrize(("kind", "source"), [("local", "none"), ("powersgd", "topk"), ("none", "powersgd")])
def test_another_kind_may_go_on(runs, kind, source):
    """Local updates after whole gradients are Lin et al.'s post-local SGD."""
    rest = losses(runs / f"{kind}-from-{source}")
    assert sorted(rest) == list(range(26, 61))
    assert rest[26] == pytest.approx(losses(runs / source)[26], rel=1e-6)  # the same weights
    assert rest[60] != losses(runs / source)[60]
    assert rest[60] == pytest.approx(losses(runs / source)[60], rel=0.01)


def test_norms_are_of_what_is_applied(runs):
    """First updates start from the same weights: an approximation of the gradient is smaller, processes' own larger."""
    first = {kind: metrics(runs / kind)[0]["grad_norm"] for kind in ("none", *COMPRESSED, "local")}
    assert 0 < first["powersgd"] < first["none"] < first["local"]
    assert 0 < first["topk"] < first["local"]


def test_local_updates_clip_each_by_its_own_norm(runs):
    (short, short_moved), (long, long_moved) = json.loads((runs / "clipped.json").read_text())
    assert (short, long) == pytest.approx((0.5, 4.0))
    assert (short_moved, long_moved) == pytest.approx((0.5, 1.0), rel=1e-5)


def test_refused_where_gradients_are_not_whole(tmp_path):
    config = ROOT / "ds_configs/z2.json"
    run = script("train", *SMALL, "--compression", "topk", "--deepspeed", config, "--output-dir", tmp_path / "run")
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        f"error: {config}: --compression topk is for stage 0, where gradients are whole; this is stage 2"
    ]
    assert not (tmp_path / "run").exists()
