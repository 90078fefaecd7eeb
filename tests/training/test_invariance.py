"""The same losses whatever the number of processes, the ZeRO stage and the accumulation; also after a resume elsewhere.

60 updates of a learning rate that moves, with dropout, weight drop, resets, clipping and averaging on.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import losses, metrics, start_ranks, validations

WORKER = Path(__file__).with_name("invariance_worker.py")
STAGES, ACCUMULATIONS, PROCESSES = (0, 1, 2, 3), (1, 2), (1, 2, 3)
RESUMES = [  # (saved with, resumed with): stage, processes, accumulation
    ((0, 1, 1), (0, 1, 1)),
    ((2, 2, 1), (2, 2, 1)),
    ((3, 3, 2), (3, 3, 2)),
    ((3, 2, 1), (0, 1, 2)),
    ((0, 1, 1), (3, 2, 1)),
    ((1, 3, 2), (2, 2, 2)),
    ((2, 2, 2), (1, 3, 1)),
]


def name_of(stage: int, processes: int, accumulation: int) -> str:
    return f"z{stage}-w{processes}-a{accumulation}"


def run_workers(folder: Path, processes: int, jobs: list[str]) -> None:
    for process in start_ranks([WORKER, folder, *jobs], processes):
        _, err = process.communicate(timeout=500)
        assert process.returncode == 0, err[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Every combination, then every resume, a set of processes for each world size."""
    folder = tmp_path_factory.mktemp("invariance")
    for processes in PROCESSES:
        run_workers(folder, processes, [f"{stage}:{a}" for stage in STAGES for a in ACCUMULATIONS])
    for processes in PROCESSES:
        jobs = [f"{s}:{a}:{name_of(*saved)}" for saved, (s, w, a) in RESUMES if w == processes]
        run_workers(folder, processes, jobs)
    return folder


def largest_difference(got: dict[int, float], want: dict[int, float]) -> float:
    return max(abs(got[step] - want[step]) / want[step] for step in got)


def test_settings_take_effect(runs):
    """The comparison below is of something: clipping, schedule and averaging all act, and the loss falls."""
    lines = [line for line in metrics(runs / name_of(0, 1, 1)) if "train_bpc" in line]
    assert len(lines) == 60
    assert sum(line["grad_norm"] > 0.6 for line in lines) > 10
    assert len({line["learning_rate"] for line in lines}) > 50
    assert lines[-1]["train_bpc"] < 0.8 * lines[0]["train_bpc"]
    assert len(validations(runs / name_of(0, 1, 1))) == 3


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("processes", PROCESSES)
def test_same_losses(runs, processes, stage, accumulation):
    reference, other = runs / name_of(0, 1, 1), runs / name_of(stage, processes, accumulation)
    assert len(losses(other)) == 60
    assert largest_difference(losses(other), losses(reference)) <= 1e-5
    assert largest_difference(validations(other), validations(reference)) <= 1e-5


@pytest.mark.parametrize(("saved", "resumed"), RESUMES)
def test_same_losses_after_resume(runs, saved, resumed):
    whole, rest = runs / name_of(*saved), runs / f"{name_of(*resumed)}-resumed"
    assert sorted(losses(rest)) == list(range(26, 61))
    if saved == resumed:
        assert losses(rest) == {step: loss for step, loss in losses(whole).items() if step > 25}
        assert validations(rest) == {step: bpc for step, bpc in validations(whole).items() if step > 25}
    assert largest_difference(losses(rest), losses(whole)) <= 1e-5
    assert largest_difference(validations(rest), validations(whole)) <= 1e-5
