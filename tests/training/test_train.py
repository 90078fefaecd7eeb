"""The real thing: the launcher, signals, kills and restarts, as a user meets them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch import (
    ROOT,
    SMALL,
    as_from_a_terminal,
    environment,
    losses,
    script,
    start_ranks,
    start_training,
    summary,
    train,
    validations,
    wait_until_listening,
    warm_ranks,
    warm_script,
)

FLAGS = [*SMALL, "--max-updates", "200", "--valid-every", "75", "--checkpoint-every", "50", "--dropout", "0.2"]
FLAGS += ["--learning-rate", "4e-3"]  # at the demo's, rounding differences grow tenfold in a hundred updates
ENDLESS = [*FLAGS, "--max-updates", "1000000"]  # until they are stopped


def under(process: subprocess.Popen[str]) -> dict[psutil.Process, str]:
    """The processes below it, with their command lines; one that ends while they are read is left out."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # what the launcher asks of the machine is there for a moment
            found[child] = " ".join(child.cmdline())
    return found


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes under a launcher, by rank."""
    commands = under(process).items()
    found = [p for p, command in commands if "--local_rank" in command and "launcher.launch" not in command]
    return sorted(found, key=lambda p: p.environ()["RANK"])


def wait_for_update(output_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has logged that update."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (output_dir / "metrics.jsonl").exists() and len(losses_so_far(output_dir)) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"update {step} was not reached")


def losses_so_far(output_dir: Path) -> list[str]:
    return [line for line in (output_dir / "metrics.jsonl").read_text().splitlines() if "train_bpc" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two launched processes that nothing interrupts."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    status, out, err = train(output_dir, FLAGS, processes=2, stage="z2", launcher=True)
    assert status == 0, err
    assert "test " in out
    return output_dir


def test_launched_run_leaves_a_complete_folder(whole):
    found = summary(whole)
    assert found["finished"] is True
    assert found["step"] == 200
    assert found["world_size"] == 2
    assert found["zero_stage"] == 2
    assert sorted(losses(whole)) == list(range(1, 201))
    assert sorted(validations(whole)) == [75, 150, 200]
    assert found["valid_bpc"] == min(validations(whole).values())
    assert found["test_bpc"] < 8
    assert len(found["sample"]) > 0
    assert (whole / "checkpoints" / "latest").read_text() == "step-00000200"


def test_one_process_gives_the_same_losses(whole, tmp_path):
    """With the launcher; without it: below, where a signal comes on the way."""
    status, _, err = train(tmp_path / "run", FLAGS, launcher=True)
    assert status == 0, err
    alone, together = losses(tmp_path / "run"), losses(whole)
    assert max(abs(alone[step] - together[step]) / together[step] for step in range(1, 101)) < 1e-5


def test_finished_run_is_not_trained_again(whole):
    before = (whole / "metrics.jsonl").read_text()
    status, out, err = train(whole, FLAGS)
    assert status == 0
    assert "finished already" in err
    assert f"{summary(whole)['test_bpc']:.4f}" in out
    assert (whole / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_of_one_process_ends_the_other_and_resume_is_bit_identical(whole, tmp_path, victim):
    output_dir = tmp_path / "run"
    process = start_training(output_dir, FLAGS, processes=2, stage="z2", launcher=True)
    wait_for_update(output_dir, 20, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    wait_for_update(output_dir, 101, process)  # the checkpoint of 100 is there
    os.kill(ranks[victim].pid, signal.SIGKILL)
    process.communicate(timeout=120)
    psutil.wait_procs(ranks, timeout=60)
    assert not any(rank.is_running() for rank in ranks)
    assert process.returncode != 0
    assert (output_dir / "checkpoints" / "latest").read_text() in ("step-00000100", "step-00000150")
    assert not (output_dir / "summary.json").exists()

    if victim == 0:
        status, _, err = train(output_dir, FLAGS, processes=2, stage="z2", launcher=True)
    else:  # as SLURM starts them
        config = ["--deepspeed", ROOT / "ds_configs/z2.json"]
        again = warm_ranks([ROOT / "src/train.py", *config, "--output-dir", output_dir, *FLAGS], 2)
        err = again[0].stderr
        status = max(abs(rank.returncode) for rank in again)
    assert status == 0, err
    assert "resumed at update" in err
    assert losses(output_dir) == losses(whole)
    assert validations(output_dir) == validations(whole)
    assert summary(output_dir)["test_bpc"] == summary(whole)["test_bpc"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signal_checkpoints_and_ends_with_75(whole, tmp_path, number):
    output_dir = tmp_path / "run"
    process = start_training(output_dir, FLAGS if number == signal.SIGTERM else ENDLESS)
    wait_for_update(output_dir, 20, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.splitlines()[-1].startswith(f"stopped: {signal.Signals(number).name} at update")
    stopped = summary(output_dir)
    assert stopped["finished"] is False
    assert stopped["status"] == "stopped"
    assert (output_dir / "checkpoints" / "latest").read_text() == f"step-{stopped['step']:08d}"
    if number == signal.SIGTERM:  # and goes on as if nothing had happened
        status, _, err = train(output_dir, FLAGS)
        assert status == 0, err
        resumed, together = losses(output_dir), losses(whole)
        assert sorted(resumed) == list(range(1, 201))
        assert max(abs(resumed[step] - together[step]) / together[step] for step in range(1, 101)) < 1e-5


def test_a_terminal_that_closes_checkpoints(tmp_path):
    """As when a connection breaks: SIGHUP, and every write to the terminal fails from then on."""
    output_dir = tmp_path / "run"
    master, terminal = os.openpty()
    command = [sys.executable, ROOT / "src/train.py", *SMALL, "--max-updates", "100000", "--output-dir", output_dir]
    attach = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", attach, *map(str, command)],
        env=environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=as_from_a_terminal,
    )
    os.close(terminal)
    shown = b""
    while b"4/100000" not in shown:  # the bar, which goes on being drawn
        shown += os.read(master, 65536)
    os.close(master)
    assert process.wait(timeout=60) == 75
    stopped = summary(output_dir)
    assert stopped["status"] == "stopped"
    assert (output_dir / "checkpoints" / "latest").read_text() == f"step-{stopped['step']:08d}"


def test_a_signal_before_training(tmp_path):
    """To a process that waits for another one, which is never started."""
    (process,) = start_ranks([ROOT / "src/train.py", *SMALL, "--output-dir", tmp_path / "run"], 2, only=1)
    wait_until_listening(process)
    time.sleep(1)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "")
    assert err.splitlines()[-1] == "stopped: SIGTERM while no update was under way; the same command goes on"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_launcher_checkpoints(tmp_path, number):
    """Ctrl-C reaches the whole group; both ranks save the same update."""
    output_dir = tmp_path / "run"
    process = start_training(output_dir, ENDLESS, processes=2, stage="z1", launcher=True)
    wait_for_update(output_dir, 20, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    deadline = time.monotonic() + 60  # the launcher may be gone before its ranks
    while not (output_dir / "summary.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    stopped = summary(output_dir)
    assert stopped["status"] == "stopped"
    assert (output_dir / "checkpoints" / "latest").read_text() == f"step-{stopped['step']:08d}"


@pytest.mark.parametrize(
    "begun", ["launcher.launch", "--local_rank"], ids=["before its ranks", "while they load torch"]
)
def test_a_launcher_killed_early_leaves_no_ranks_that_train_on(tmp_path, begun):
    process = start_training(tmp_path / "run", [*SMALL, "--max-updates", "1000000"], processes=2, launcher=True)
    deadline = time.monotonic() + 120
    while not any(begun in command for command in under(process).values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    below = list(under(process))
    process.kill()
    _, err = process.communicate(timeout=180)  # whoever lived on would hold its output open
    assert "the launcher was killed at update" in err
    psutil.wait_procs(below, timeout=30)
    assert not any(p.is_running() for p in below)
    assert summary(tmp_path / "run")["status"] == "stopped"


def test_time_limit(tmp_path):
    status, _, err = train(tmp_path / "run", [*SMALL, "--max-updates", "100000", "--time-limit", "0.05"])
    assert status == 75, err
    assert "time limit of 0.05 minutes" in err.splitlines()[-1]


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    flags = [*SMALL, "--max-updates", "300", "--learning-rate", "1e38", "--warmup-updates", "0", "--clip", "0"]
    status, _, err = train(tmp_path / "run", [*flags, "--checkpoint-every", "1", "--optimizer", "rmsprop"])
    assert status == 3, err
    last = err.splitlines()[-1]
    assert last.startswith("failed: ")
    assert "not finite at update" in last
    assert "gradient norms before it" in last
    assert summary(tmp_path / "run")["status"] == "failed"


def test_weights_that_the_last_update_made_infinite(tmp_path):
    flags = [*SMALL, "--max-updates", "1", "--learning-rate", "1e38", "--warmup-updates", "0", "--average", "none"]
    status, _, err = train(tmp_path / "run", [*flags, "--clip", "0", "--optimizer", "rmsprop"])
    assert status == 3, err
    assert err.splitlines()[-1].startswith("failed: validation loss is not finite after update 1")


def test_a_folder_removed_in_mid_run(tmp_path):
    output_dir = tmp_path / "run"
    process = start_training(output_dir, [*SMALL, "--max-updates", "1000000", "--checkpoint-every", "0"])
    wait_for_update(output_dir, 5, process)
    output_dir.rename(tmp_path / "moved")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1] == f"error: --output-dir {output_dir} was removed while it was trained in; start again"
    assert "Traceback" not in err


def test_two_trainings_in_one_folder(tmp_path):
    output_dir = tmp_path / "run"
    first = start_training(output_dir, [*SMALL, "--max-updates", "100000"])
    wait_for_update(output_dir, 5, first)
    status, _, err = train(output_dir, [*SMALL, "--max-updates", "100000"])
    assert status == 2
    assert "is being trained in by another process" in err.splitlines()[-1]
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 75
    assert sorted(losses(output_dir)) == list(range(1, summary(output_dir)["step"] + 1))


def test_a_new_run_starts_from_anothers_checkpoint(whole, tmp_path):
    """What the message of a failed run advises: the same model goes on with other settings, in another folder."""
    start = ["--start-from", str(whole / "checkpoints" / "step-00000200")]
    changed = ["--rows", "4", "--max-updates", "220", "--learning-rate", "1e-3"]
    status, _, err = train(tmp_path / "run", [*FLAGS, *start, *changed])
    assert status == 0, err
    assert sorted(losses(tmp_path / "run")) == list(range(201, 221))
    assert losses(tmp_path / "run")[201] < 1.2 * losses(whole)[200]
    status, _, err = train(tmp_path / "other", [*FLAGS, "--start-from", str(whole), "--hidden-size", "17"])
    assert status == 2
    assert "is of another model" in err.splitlines()[-1]
    status, _, err = train(tmp_path / "other", [*FLAGS, "--start-from", str(whole), "--residual"])  # as many weights
    assert (status, err.splitlines()[-1].endswith("is another model: it takes --no-residual")) == (2, True), err


def test_evaluate_and_sample_agree_with_the_run(whole):
    done = script("evaluate", whole, "--streams", "64", "--warmup", "20", "--json", whole / "scores.json")
    assert done.returncode == 0, done.stderr
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["test_bpc"] == pytest.approx(summary(whole)["test_bpc"], abs=1e-4)
    assert scores["characters"] == 100_000
    how = ["--streams", "64", "--warmup", "20", "--dtype", "bf16"]
    narrow = warm_script("evaluate", whole, *how, "--json", whole / "b.json")
    assert narrow.returncode == 0, narrow.stderr
    rounded = json.loads((whole / "b.json").read_text())["test_bpc"]
    assert 0 < abs(rounded - scores["test_bpc"]) < 0.002 * scores["test_bpc"]
    first = warm_script("sample", whole, "--prompt", "The ", "--length", "30", "--seed", "5")
    again = warm_script("sample", whole, "--prompt", "The ", "--length", "30", "--seed", "5")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("The ")
    assert first.stdout == again.stdout
    text = whole.parent / "text"
    text.write_bytes((ROOT / "LICENSE").read_bytes()[:2000])
    dynamic = warm_script("evaluate", whole, "--text-file", text, "--dynamic", "--streams", "1")
    static = warm_script("evaluate", whole, "--text-file", text, "--streams", "1")
    assert dynamic.returncode == static.returncode == 0, dynamic.stderr
    assert "dynamic" in dynamic.stdout


def test_two_processes_without_the_launcher(tmp_path):
    """As SLURM starts them, one task a process: RANK and its like in the environment."""
    command = [ROOT / "src/train.py", *SMALL, "--max-updates", "5", "--output-dir", tmp_path / "run"]
    started = start_ranks(command, 2)
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert "test " in outputs[0][0]
    assert outputs[1][0] == ""  # one process speaks
    assert "update" not in outputs[1][1]
