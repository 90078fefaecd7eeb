"""Runs of every kind, through the real program: what their settings do, and that they resume."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import time
from pathlib import Path

import pytest

from gfrnn.config import RunSettings, preset
from gfrnn.runs import RunFolder
from gfrnn.training.main import _finished
from launch import ROOT, SMALL, losses, metrics, script, summary, train, validations, warm_ranks, warm_script


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
    # where memory happens to lie decides the last bit of some CPUs' products; a lost moment would be 1e-3
    assert losses(again) == pytest.approx(first, rel=1e-5)


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
    config = ROOT / "ds_configs/z2.json"
    ranks = warm_ranks([ROOT / "src/train.py", *flags, "--deepspeed", config, "--output-dir", tmp_path / "run"], 2)
    said = [rank.stderr for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "2 updates traced into" in said[0]
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
    done = warm_script("train", *SMALL, *data, "--max-updates", "3", "--output-dir", tmp_path / "run")
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
    done = warm_script("train", *flags, "--output-dir", tmp_path / "run", "--deepspeed", tmp_path / "custom.json")
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


def test_a_validation_at_an_end_does_not_try_patience(tmp_path):
    """A run that is longer has none there."""
    flags = [*SMALL, "--max-updates", "25", "--valid-every", "10", "--patience", "2", "--average", "none"]
    status, _, err = train(tmp_path / "run", [*flags, "--learning-rate", "1e-30", "--final-learning-rate", "0"])
    assert status == 0, err
    assert set(validations(tmp_path / "run")) == {10, 20, 25}
    assert summary(tmp_path / "run")["best_step"] == 10
    assert summary(tmp_path / "run")["without_best"] == 1


def test_patience_that_is_raised_goes_on(tmp_path):
    run = RunFolder(tmp_path)
    ended = {"finished": True, "step": 40, "total_updates": 400, "without_best": 2}
    run.write_summary({**ended, "test_bpc": 3.0, "valid_bpc": 3.0, "best_step": 20, "sample": ""})
    for patience, max_updates, over in ((2, 0, True), (3, 0, False), (0, 0, False), (3, 40, True), (2, 50, True)):
        settings = dataclasses.replace(
            preset("demo"), run=RunSettings(patience=patience, max_updates=max_updates, max_epochs=9)
        )
        assert (_finished(run, settings) is not None) == over


def test_another_validation_counts_the_best_anew(tmp_path):
    flags = [*SMALL, "--schedule", "constant", "--valid-every", "10", "--average", "none"]
    assert train(tmp_path / "run", [*flags, "--max-updates", "20"])[0] == 0
    # as if what was validated before had been easy
    trainer = tmp_path / "run/checkpoints/step-00000020/trainer.json"
    values = json.loads(trainer.read_text())
    values["position"]["best"]["bpc"] = 0.1
    trainer.write_text(json.dumps(values))
    status, _, err = train(tmp_path / "run", [*flags, "--max-updates", "30", "--valid-bytes", "1500"])
    assert status == 0, err
    assert "note: validation is of other bytes or streams than before: the best is counted anew" in err
    assert summary(tmp_path / "run")["valid_bpc"] == validations(tmp_path / "run")[30]
    (tmp_path / "run/summary.json").unlink()  # as if it had been killed while it was tested
    status, _, err = train(tmp_path / "run", [*flags, "--max-updates", "30", "--valid-bytes", "1800"])
    assert status == 0, err
    assert summary(tmp_path / "run")["best_step"] == 30


def test_what_a_run_started_from_may_go_away(tmp_path):
    flags = [*SMALL, "--schedule", "constant", "--start-from", str(tmp_path / "first")]
    assert train(tmp_path / "first", [*flags[:-2], "--max-updates", "5"])[0] == 0
    status, _, err = train(tmp_path / "none", [*flags, "--max-updates", "5"])
    assert (status, "first is at update 5, and this run is to end at 5" in err) == (2, True), err
    assert train(tmp_path / "run", [*flags, "--max-updates", "8"])[0] == 0
    shutil.rmtree(tmp_path / "first")
    status, _, err = train(tmp_path / "run", [*flags, "--max-updates", "10"])
    assert status == 0, err
    assert sorted(losses(tmp_path / "run")) == list(range(6, 11))


def test_rmsprop_with_and_without_momentum_start_from_one_another(tmp_path):
    flags = [*SMALL, "--schedule", "constant", "--optimizer", "rmsprop", "--learning-rate", "1e-4"]
    for name, more in (("without", ["--momentum", "0"]), ("with", ["--start-from", str(tmp_path / "without")])):
        status, _, err = train(tmp_path / name, [*flags, *more, "--max-updates", "5" if name == "without" else "8"])
        assert status == 0, err
