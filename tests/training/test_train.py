"""The real thing: the launcher, signals, kills and restarts, as a user meets them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
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
    metrics,
    script,
    start_ranks,
    start_training,
    summary,
    train,
    validations,
    wait_until_listening,
)

FLAGS = [*SMALL, "--max-updates", "400", "--valid-every", "150", "--checkpoint-every", "100", "--dropout", "0.2"]
FLAGS += ["--learning-rate", "4e-3"]  # at the demo's, rounding differences grow tenfold in a hundred updates


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes under a launcher, by rank."""
    found = [p for p in psutil.Process(process.pid).children(recursive=True) if "--local_rank" in " ".join(p.cmdline())]
    return sorted(
        (p for p in found if "launcher.launch" not in " ".join(p.cmdline())), key=lambda p: p.environ()["RANK"]
    )


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
    assert found["step"] == 400
    assert found["world_size"] == 2
    assert found["zero_stage"] == 2
    assert sorted(losses(whole)) == list(range(1, 401))
    assert sorted(validations(whole)) == [150, 300, 400]
    assert found["valid_bpc"] == min(validations(whole).values())
    assert found["test_bpc"] < 8
    assert len(found["sample"]) > 0
    assert (whole / "checkpoints" / "latest").read_text() == "step-00000400"


def test_data_and_logging_cost_little(tmp_path):
    """The share of an update's time that fetching its batch and writing log lines take, in the demo."""
    status, _, err = train(tmp_path / "run", ["--preset", "demo", "--max-updates", "40", "--valid-bytes", "5000"])
    assert status == 0, err
    shares = sorted(line["overhead_share"] for line in metrics(tmp_path / "run") if "overhead_share" in line)
    assert len(shares) == 4
    assert 0 < shares[2] < 0.02


@pytest.mark.parametrize("launcher", [False, True])
def test_one_process_gives_the_same_losses(whole, tmp_path, launcher):
    status, _, err = train(tmp_path / "run", FLAGS, launcher=launcher)
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
    wait_for_update(output_dir, 230, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    killed = time.monotonic()
    os.kill(ranks[victim].pid, signal.SIGKILL)
    process.communicate(timeout=60)
    psutil.wait_procs(ranks, timeout=30)
    assert not any(rank.is_running() for rank in ranks)
    assert time.monotonic() - killed < 45
    assert process.returncode != 0
    assert (output_dir / "checkpoints" / "latest").read_text() in ("step-00000200", "step-00000300")
    assert not (output_dir / "summary.json").exists()

    status, _, err = train(output_dir, FLAGS, processes=2, stage="z2", launcher=True)
    assert status == 0, err
    assert "resumed at update" in err
    assert losses(output_dir) == losses(whole)
    assert validations(output_dir) == validations(whole)
    assert summary(output_dir)["test_bpc"] == summary(whole)["test_bpc"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signal_checkpoints_and_ends_with_75(whole, tmp_path, number):
    output_dir = tmp_path / "run"
    process = start_training(output_dir, FLAGS)
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
        assert sorted(resumed) == list(range(1, 401))
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
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (75, "")
    assert err.splitlines()[-1] == "stopped: SIGTERM while no update was under way; the same command goes on"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_launcher_checkpoints(tmp_path, number):
    """Ctrl-C reaches the whole group; both ranks save the same update."""
    output_dir = tmp_path / "run"
    process = start_training(output_dir, FLAGS, processes=2, stage="z1", launcher=True)
    wait_for_update(output_dir, 20, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    deadline = time.monotonic() + 30  # the launcher may be gone before its ranks
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
    deadline = time.monotonic() + 60
    while not any(begun in " ".join(p.cmdline()) for p in psutil.Process(process.pid).children(recursive=True)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, err = process.communicate(timeout=90)  # whoever lived on would hold its output open
    assert "the launcher was killed at update" in err
    psutil.wait_procs(below, timeout=30)
    assert not any(p.is_running() for p in below)
    assert summary(tmp_path / "run")["status"] == "stopped"


def test_time_limit(tmp_path):
    status, _, err = train(tmp_path / "run", [*SMALL, "--max-updates", "100000", "--time-limit", "0.1"])
    assert status == 75, err
    assert "time limit of 0.1 minutes" in err.splitlines()[-1]


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
    start = ["--start-from", str(whole / "checkpoints" / "step-00000400")]
    changed = ["--rows", "4", "--max-updates", "420", "--learning-rate", "1e-3"]
    status, _, err = train(tmp_path / "run", [*FLAGS, *start, *changed])
    assert status == 0, err
    assert sorted(losses(tmp_path / "run")) == list(range(401, 421))
    assert losses(tmp_path / "run")[401] < 1.2 * losses(whole)[400]
    status, _, err = train(tmp_path / "other", [*FLAGS, "--start-from", str(whole), "--hidden-size", "17"])
    assert status == 2
    assert "is of another model" in err.splitlines()[-1]


def test_bf16_learns(tmp_path):
    flags = [*SMALL, "--max-updates", "150", "--average", "none"]
    assert train(tmp_path / "wide", flags)[0] == 0
    assert train(tmp_path / "narrow", [*flags, "--dtype", "bf16"])[0] == 0
    wide, narrow = losses(tmp_path / "wide"), losses(tmp_path / "narrow")
    assert narrow[150] < 0.8 * narrow[1]
    assert wide[150] != narrow[150]
    assert abs(wide[150] - narrow[150]) < 0.02 * wide[150]


KINDS = {
    "gru": "--unit gru --forget-bias 0 --optimizer rmsprop --eps 1e-4 --average arithmetic --average-from 20",
    "tanh": "--unit tanh --forget-bias 0 --feedback none --optimizer adamw --weight-decay 0.01",
    "mrnn": "--unit mrnn --forget-bias 0 --num-layers 1 --feedback none --no-layer-norm --average none",
    "options": "--embedding-size 8 --layer-norm --residual --weight-dropout 0.1 --unit-gates own",
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_kind_trains_and_resumes(tmp_path, options):
    flags = [*SMALL, *options.split(), "--learning-rate", "3e-3", "--warmup-updates", "5", "--checkpoint-every", "30"]
    output_dir = tmp_path / "run"
    status, _, err = train(output_dir, [*flags, "--max-updates", "60", "--schedule", "constant"])
    assert status == 0, err
    first = losses(output_dir)
    assert min(first.values()) < 0.9 * first[1]
    again = killed_after_30(output_dir, tmp_path / "again")
    status, _, err = train(again, [*flags, "--max-updates", "60", "--schedule", "constant"])
    assert status == 0, err
    assert losses(again) == first


def test_a_resume_between_two_logged_lines(tmp_path):
    flags = [*SMALL, "--schedule", "constant", "--log-every", "8", "--max-updates", "60", "--checkpoint-every", "30"]
    status, _, err = train(tmp_path / "run", flags)
    assert status == 0, err
    again = killed_after_30(tmp_path / "run", tmp_path / "again")
    status, _, err = train(again, flags)
    assert status == 0, err
    assert losses(again) == losses(tmp_path / "run")
    assert sorted(losses(again)) == [*range(8, 60, 8), 60]


def killed_after_30(output_dir: Path, again: Path) -> Path:
    """A copy of a finished run as if it had been killed after update 30, where it has a checkpoint."""
    shutil.copytree(output_dir, again)
    (again / "checkpoints" / "latest").write_text("step-00000030")
    (again / "summary.json").unlink()
    return again


def test_halved_rates_survive_a_resume(tmp_path):
    flags = [*SMALL, "--max-updates", "60", "--checkpoint-every", "30", "--schedule", "constant", "--average", "none"]
    flags += ["--warmup-updates", "0", "--halve-on-explosion", "1.06"]
    status, _, err = train(tmp_path / "run", flags)
    assert status == 0, err
    assert "exploded; learning rate halved" in err

    def rates(output_dir: Path) -> list[float]:
        return [line["learning_rate"] for line in metrics(output_dir) if "train_bpc" in line]

    first = rates(tmp_path / "run")
    assert first[59] < first[30] < first[0]  # halved before the checkpoint and after it
    again = killed_after_30(tmp_path / "run", tmp_path / "again")
    status, _, err = train(again, flags)
    assert status == 0, err
    assert rates(again) == first
    assert losses(again) == losses(tmp_path / "run")


def test_a_finished_run_goes_on_with_more_updates(tmp_path):
    flags = [*SMALL, "--schedule", "constant", "--warmup-updates", "5", "--valid-every", "20"]
    for run, updates in (("whole", "60"), ("longer", "40"), ("longer", "60")):
        status, _, err = train(tmp_path / run, [*flags, "--max-updates", updates])
        assert status == 0, err
    assert "resumed at update 40" in err
    assert losses(tmp_path / "longer") == losses(tmp_path / "whole")
    assert validations(tmp_path / "longer") == validations(tmp_path / "whole")
    assert summary(tmp_path / "longer")["test_bpc"] == summary(tmp_path / "whole")["test_bpc"]


def test_profile(tmp_path):
    """A trace that Perfetto opens, of as many updates as were asked for, by each process."""
    flags = [*SMALL, "--max-updates", "9", "--profile", "2", "--accumulation", "2", "--recompute", "5"]
    status, _, err = train(tmp_path / "run", flags, processes=2, stage="z2", launcher=True)
    assert status == 0, err
    assert "2 updates traced into" in err
    files = sorted((tmp_path / "run" / "profile").iterdir())
    assert [file.name for file in files] == [f"from-00000000-rank-{rank}.json.gz" for rank in (0, 1)]
    for file in files:
        with gzip.open(file) as trace:
            events = json.load(trace)["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert [names.count(name) for name in ("fetch", "forward", "backward", "optimizer", "agree")] == [4, 4, 4, 4, 2]
        assert any("linear_pointwise" in event["name"] or event["name"] == "aten::mm" for event in events)


def test_prepare_builds_the_corpus_and_ends(tmp_path):
    """What one does on a node with a network, before the run on one without."""
    data = ["--corpus-file", ROOT / "LICENSE", "--data-dir", tmp_path / "data"]
    begin = time.time()
    done = script("train", "--prepare", *data, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    size = (ROOT / "LICENSE").stat().st_size
    assert f"LICENSE is ready: {size * 90 // 100:,} training, {size * 5 // 100:,} validation, " in done.stderr
    assert not (tmp_path / "run").exists()
    (arrow,) = (tmp_path / "data").rglob("text-train.arrow")
    built = arrow.stat().st_mtime
    assert built > begin - 1
    done = script("train", *SMALL, *data, "--max-updates", "3", "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert arrow.stat().st_mtime == built


CUSTOM = {
    "offload": ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "fp32"),
    "deepspeed-bf16-1": ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, "fp32"),
    "deepspeed-bf16-3": ({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, "bf16"),
    "wire-bf16": ({"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}, "fp32"),
    "bf16-z3": ({"zero_optimization": {"stage": 3}}, "bf16"),
    "auto": ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}, "train_batch_size": "auto"}, "fp32"),
}


@pytest.mark.parametrize(("config", "dtype"), CUSTOM.values(), ids=CUSTOM)
def test_custom_configs_train(tmp_path, config, dtype):
    """Other strategies, on one process: they learn as the plain one does, within what bf16 loses."""
    (tmp_path / "custom.json").write_text(json.dumps(config))
    flags = [*SMALL, "--max-updates", "60", "--valid-every", "0", "--warmup-updates", "5", "--dtype", dtype]
    done = script("train", *flags, "--output-dir", tmp_path / "run", "--deepspeed", tmp_path / "custom.json")
    assert done.returncode == 0, done.stderr
    found = losses(tmp_path / "run")
    assert found[60] < 0.75 * found[1]


def test_early_stopping(tmp_path):
    flags = [*SMALL, "--max-updates", "400", "--valid-every", "10", "--patience", "2", "--learning-rate", "1e-9"]
    status, _, err = train(tmp_path / "run", [*flags, "--final-learning-rate", "0", "--average", "none"])
    assert status == 0, err
    found = summary(tmp_path / "run")
    assert "no new best in 2 validations" in err
    again, _, err = train(tmp_path / "run", [*flags, "--final-learning-rate", "0", "--average", "none"])
    assert again == 0
    assert "finished already" in err
    assert summary(tmp_path / "run") == found
    assert found["step"] < 400
    assert found["step"] == max(validations(tmp_path / "run"))


def test_evaluate_and_sample_agree_with_the_run(whole):
    done = script("evaluate", whole, "--streams", "64", "--warmup", "20", "--json", whole / "scores.json")
    assert done.returncode == 0, done.stderr
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["test_bpc"] == pytest.approx(summary(whole)["test_bpc"], abs=1e-4)
    assert scores["characters"] == 100_000
    narrow = script(
        "evaluate", whole, "--streams", "64", "--warmup", "20", "--dtype", "bf16", "--json", whole / "b.json"
    )
    assert narrow.returncode == 0, narrow.stderr
    rounded = json.loads((whole / "b.json").read_text())["test_bpc"]
    assert 0 < abs(rounded - scores["test_bpc"]) < 0.002 * scores["test_bpc"]
    first = script("sample", whole, "--prompt", "The ", "--length", "30", "--seed", "5")
    again = script("sample", whole, "--prompt", "The ", "--length", "30", "--seed", "5")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("The ")
    assert first.stdout == again.stdout
    dynamic = script("evaluate", whole, "--text-file", ROOT / "LICENSE", "--dynamic", "--streams", "1")
    static = script("evaluate", whole, "--text-file", ROOT / "LICENSE", "--streams", "1")
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
