"""When a run starts over, forgets, saves and ends: epochs, resets and checkpoints by the clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launch import SMALL, losses, metrics, summary, train

EPOCH = 15  # updates: 1000 bytes, 900 of them to train on, in 5 rows of 180, 12 at a time
# A model that hardly moves: the same symbols from the same state cost the same whenever they are read.
STILL = [*SMALL, "--learning-rate", "1e-30", "--final-learning-rate", "0", "--schedule", "constant"]
STILL += ["--average", "none", "--eval-warmup", "5", "--checkpoint-every", "0", "--valid-every", "0"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "text"
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    return path


@pytest.fixture(scope="module")
def three_epochs(text: Path) -> Path:
    output_dir = text.parent / "epochs"
    status, _, err = train(output_dir, [*STILL, "--corpus-file", str(text), "--max-updates", "0", "--max-epochs", "3"])
    assert status == 0, err
    return output_dir


def test_epochs_give_the_number_of_updates(three_epochs: Path) -> None:
    assert sorted(losses(three_epochs)) == list(range(1, 3 * EPOCH + 1))
    assert summary(three_epochs)["step"] == 3 * EPOCH
    assert summary(three_epochs)["characters"] == 3 * 900
    assert [line["epoch"] for line in metrics(three_epochs) if line["step"] == EPOCH] == [1.0]


def test_every_epoch_reads_the_same_from_a_zero_state(three_epochs: Path) -> None:
    found = losses(three_epochs)
    assert len({round(loss, 4) for loss in list(found.values())[:EPOCH]}) > 10  # segments do differ
    for step in range(1, 2 * EPOCH + 1):
        assert found[step + EPOCH] == pytest.approx(found[step], rel=1e-6)


@pytest.mark.parametrize("when", ["every", "by chance"])
def test_resets_forget_the_state(three_epochs: Path, text: Path, when: str, tmp_path: Path) -> None:
    flags = ["--reset-every", "4"] if when == "every" else ["--reset-probability", "0.3"]
    flags += ["--corpus-file", str(text), "--max-updates", str(EPOCH)]
    status, _, err = train(tmp_path / "run", [*STILL, *flags])
    assert status == 0, err
    carried, found = losses(three_epochs), losses(tmp_path / "run")
    same = [step for step in found if found[step] == pytest.approx(carried[step], rel=1e-7)]
    first = min(set(found) - set(same))
    assert same[: first - 1] == list(range(1, first))
    if when == "every":
        assert first == 5
    else:
        assert 1 < first <= EPOCH


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    flags = ["--checkpoint-minutes", "0.002", "--keep-last", "99", "--max-updates", "150"]
    status, _, err = train(tmp_path / "run", [*STILL, *flags])
    assert status == 0, err
    steps = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert steps[-1] == 150
    assert len(steps) > 2
