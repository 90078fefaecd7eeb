"""The same losses whatever the number of processes, the ZeRO stage and the accumulation; also after a resume elsewhere.

60 updates of a learning rate that moves, with dropout, weight drop, resets, clipping and averaging on.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import losses, metrics, validations, warm_ranks

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


def run_workers(folder: Path, processes: int, jobs: list[str], dtype: str = "fp32", task: str = "text") -> None:
    for rank in warm_ranks([WORKER, folder, task, dtype, *jobs], processes):
        assert rank.returncode == 0, rank.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Every combination and every resume: a set of processes for each world size, and one more for what it resumes of
    more processes."""
    folder = tmp_path_factory.mktemp("invariance")

    def resumes(processes: int, *, of_more: bool) -> list[str]:
        chosen = [(saved, to) for saved, to in RESUMES if to[1] == processes and (saved[1] > processes) == of_more]
        return [f"{s}:{a}:{name_of(*saved)}" for saved, (s, _, a) in chosen]

    for processes in PROCESSES:
        combinations = [f"{stage}:{a}" for stage in STAGES for a in ACCUMULATIONS]
        run_workers(folder, processes, [*combinations, *resumes(processes, of_more=False)])
    for processes in PROCESSES:
        if jobs := resumes(processes, of_more=True):
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


def noise_scales(run: Path) -> dict[int, float]:
    return {line["step"]: line["noise_scale"] for line in metrics(run) if "noise_scale" in line}


def assert_same_noise_scales(run: Path, reference: Path, symbols: int) -> None:
    """A scale B above the batch's symbols N hangs on a difference of numbers that are 1 + B / N times as large."""
    other, expected = noise_scales(run), noise_scales(reference)
    assert len(expected) > 50
    assert set(other) == set(expected)
    for step, scale in expected.items():
        assert other[step] == pytest.approx(scale, rel=1e-5 * (1 + scale / symbols))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (2, 1)])
def test_same_noise_scale(runs, processes, accumulation, stage):
    """Whether rows 0-2 and 3-4 are micro-batches or processes."""
    other = runs / name_of(stage, processes, accumulation)
    assert_same_noise_scales(other, runs / name_of(0, 1, 2), 5 * 12)
    assert not noise_scales(runs / name_of(0, 1, 1))  # a single part


@pytest.mark.parametrize(("saved", "resumed"), RESUMES)
def test_same_losses_after_resume(runs, saved, resumed):
    whole, rest = runs / name_of(*saved), runs / f"{name_of(*resumed)}-resumed"
    assert sorted(losses(rest)) == list(range(26, 61))
    if saved == resumed:
        assert losses(rest) == {step: loss for step, loss in losses(whole).items() if step > 25}
        assert validations(rest) == {step: bpc for step, bpc in validations(whole).items() if step > 25}
        assert noise_scales(rest) == {step: scale for step, scale in noise_scales(whole).items() if step > 25}
    assert largest_difference(losses(rest), losses(whole)) <= 1e-5
    assert largest_difference(validations(rest), validations(whole)) <= 1e-5


def test_bf16_differs_by_its_roundings_alone(tmp_path):
    """A row's products are rounded to bf16 as ever, whoever computes them; sums over rows differ in their last bits."""
    jobs = ["2:1", "2:2"]
    for processes in (1, 2):
        run_workers(tmp_path, processes, jobs, "bf16")
    reference = tmp_path / name_of(2, 1, 1)
    assert losses(reference)[60] < 0.8 * losses(reference)[1]
    for other in (name_of(2, 1, 2), name_of(2, 2, 1), name_of(2, 2, 2)):
        assert largest_difference(losses(tmp_path / other), losses(reference)) <= 5e-4  # 1.2e-4 on the machine at hand
        assert largest_difference(validations(tmp_path / other), validations(reference)) <= 5e-4


# ------------------------------------------------------------------------------------------------- programs

PROGRAM_RUNS = ((0, 1, 1), (0, 1, 2), (2, 2, 1), (1, 2, 2), (3, 3, 1))
PROGRAM_RESUMES = [((0, 1, 1), (0, 1, 1)), ((2, 2, 1), (2, 2, 1)), ((0, 1, 1), (3, 2, 2)), ((2, 2, 1), (0, 3, 1))]


@pytest.fixture(scope="module")
def program_runs(tmp_path_factory) -> Path:
    """Padded batches of a curriculum whose level changes on the way."""
    folder = tmp_path_factory.mktemp("programs")
    for processes in PROCESSES:
        jobs = [f"{stage}:{a}" for stage, w, a in PROGRAM_RUNS if w == processes]
        jobs += [f"{s}:{a}:{name_of(*saved)}" for saved, (s, w, a) in PROGRAM_RESUMES if w == processes]
        run_workers(folder, processes, jobs, task="programs")
    return folder


def levels(run: Path) -> dict[int, tuple[float, float]]:
    return {x["step"]: (x["level_length"], x["level_nesting"]) for x in metrics(run) if "level_length" in x}


def test_the_level_changes_and_programs_are_learned(program_runs):
    run = program_runs / name_of(0, 1, 1)
    assert len(set(levels(run).values())) > 1
    assert losses(run)[60] < 0.9 * losses(run)[1]
    assert all(0 <= line["train_accuracy"] <= 1 for line in metrics(run) if "train_accuracy" in line)


@pytest.mark.parametrize("other", PROGRAM_RUNS[1:])
def test_same_losses_of_programs(program_runs, other):
    reference, run = program_runs / name_of(0, 1, 1), program_runs / name_of(*other)
    assert len(losses(run)) == 60
    assert levels(run) == levels(reference)
    assert largest_difference(losses(run), losses(reference)) <= 1e-5
    assert largest_difference(validations(run), validations(reference)) <= 1e-5


def test_same_noise_scale_of_programs(program_runs):
    """Of parts whose programs print more and fewer characters, at least 2 each."""
    assert_same_noise_scales(program_runs / name_of(2, 2, 1), program_runs / name_of(0, 1, 2), 5 * 2)


@pytest.mark.parametrize(("saved", "resumed"), PROGRAM_RESUMES)
def test_same_losses_of_programs_after_resume(program_runs, saved, resumed):
    whole, rest = program_runs / name_of(*saved), program_runs / f"{name_of(*resumed)}-resumed"
    assert sorted(losses(rest)) == list(range(26, 61))
    if saved == resumed:
        assert losses(rest) == {step: loss for step, loss in losses(whole).items() if step > 25}
    assert {step: level for step, level in levels(whole).items() if step > 25} == levels(rest)
    assert largest_difference(losses(rest), losses(whole)) <= 1e-5
    assert largest_difference(validations(rest), validations(whole)) <= 1e-5
