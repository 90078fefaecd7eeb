"""What a run leaves on disk: whole at any instant, found again, and refused where it does not fit."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gfrnn.config import ModelSettings, Settings, UserError, preset
from gfrnn.nn import build_language_model
from gfrnn.runs import (
    Checkpoint,
    RunFolder,
    find_checkpoint,
    hidden_folder,
    load_checkpoint,
    load_model,
    load_weights,
    replace_file,
    write_json,
)
from launch import environment

MODEL = ModelSettings(num_layers=2, hidden_size=5, output_skips=True)
SETTINGS = dataclasses.replace(preset("demo"), model=MODEL)
MD5 = "0123456789abcdef" * 2


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def new_run(path: Path, settings: Settings = SETTINGS) -> RunFolder:
    run = RunFolder(path)
    run.create(settings, {"zero_optimization": {"stage": 2}}, MD5)
    return run


def checkpoint_of(seed: int, settings: Settings = SETTINGS, *, averages: bool = True) -> Checkpoint:
    """Of the model with random weights and moments."""
    weights = dict(build_language_model(settings.model, "fp32", seed).state_dict())
    torch.manual_seed(seed)

    def like() -> dict[str, torch.Tensor]:
        return {name: torch.randn_like(w) for name, w in weights.items()}

    return Checkpoint(
        weights=weights,
        optimizer={"exp_avg": like(), "exp_avg_sq": like()},
        averages=like() if averages else None,
        state={"h": torch.randn(2, 7, 5), "c": torch.randn(2, 7, 5)},
        trainer={"settings": settings.to_json(), "position": {"step": seed, "best_bpc": 0.1 + 0.2}},
    )


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bytes(a[k].numpy()) == bytes(b[k].numpy()) for k in a
    )


# ------------------------------------------------------------------------------------------ saving and loading


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = checkpoint_of(3)
    first = next(iter(saved.weights))
    saved.weights[first] = saved.weights[first].clone()
    saved.weights[first].flatten()[:4] = torch.tensor([torch.nan, torch.inf, -0.0, 1e-45])
    saved.state["h"] = torch.randn(7, 2, 5).transpose(0, 1)  # as a model gives it: not contiguous
    path = new_run(tmp_path / "run").save(saved, 3, best=False, keep_last=2)
    loaded = load_checkpoint(path)
    assert same(loaded.weights, saved.weights)
    assert saved.averages is not None
    assert loaded.averages is not None
    assert same(loaded.averages, saved.averages)
    assert same(loaded.best_weights, saved.averages)
    assert loaded.optimizer.keys() == saved.optimizer.keys()
    assert all(same(loaded.optimizer[key], saved.optimizer[key]) for key in saved.optimizer)
    assert same(loaded.state, {k: v.contiguous() for k, v in saved.state.items()})
    assert loaded.trainer == saved.trainer


def test_without_averages_the_weights_are_the_best(tmp_path: Path) -> None:
    saved = checkpoint_of(3, averages=False)
    loaded = load_checkpoint(new_run(tmp_path / "run").save(saved, 3, best=False, keep_last=2))
    assert loaded.averages is None
    assert same(loaded.best_weights, saved.weights)


def test_weights_only_leaves_the_rest(tmp_path: Path) -> None:
    saved = checkpoint_of(3)
    path = new_run(tmp_path / "run").save(saved, 3, best=False, keep_last=2)
    (path / "optimizer.safetensors").unlink()  # as someone does who passes a model on
    loaded = load_checkpoint(path, weights_only=True)
    assert same(loaded.weights, saved.weights)
    assert loaded.optimizer == {}
    assert loaded.state == {}


def test_load_model_has_the_averages(tmp_path: Path) -> None:
    run, saved = new_run(tmp_path / "run"), checkpoint_of(3)
    path = run.save(saved, 3, best=True, keep_last=2)
    model, settings, found = load_model(tmp_path / "run")
    assert saved.averages is not None
    assert same(dict(model.state_dict()), saved.averages)
    assert (settings, found, model.training) == (SETTINGS, path, False)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    for step in range(1, 8):
        run.save(checkpoint_of(step), step, best=step in (2, 3), keep_last=2)
    assert sorted(p.name for p in run.checkpoints.glob("step-*")) == ["step-00000003", "step-00000006", "step-00000007"]
    latest, best = run.named_checkpoint("latest"), run.named_checkpoint("best")
    assert latest is not None
    assert best is not None
    assert load_checkpoint(latest).trainer["position"]["step"] == 7
    assert load_checkpoint(best).trainer["position"]["step"] == 3


def test_a_users_own_copies_are_left_alone(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    copies = [run.checkpoints / "step-00000001-keep", run.checkpoints / "step-00000001.tar"]
    copies[0].mkdir()
    copies[1].write_text("of mine")
    for step in range(1, 5):
        run.save(checkpoint_of(step), step, best=False, keep_last=1)
    assert sorted(p.name for p in run.checkpoints.glob("step-*")) == [*(p.name for p in copies), "step-00000004"]


def test_a_saved_step_can_still_become_the_best(tmp_path: Path) -> None:
    run, saved = new_run(tmp_path / "run"), checkpoint_of(3)
    run.save(saved, 3, best=False, keep_last=2)
    assert run.named_checkpoint("best") is None
    saved.trainer["position"]["best_bpc"] = 1.5
    path = run.save(saved, 3, best=True, keep_last=2)
    assert run.named_checkpoint("best") == path
    assert load_checkpoint(path).trainer["position"]["best_bpc"] == 1.5
    assert same(load_checkpoint(path).weights, saved.weights)


def test_a_checkpoint_that_latest_never_named_is_written_anew(tmp_path: Path) -> None:
    """A kill came before `latest`; the run resumed from the one before, perhaps with another schedule."""
    run = new_run(tmp_path / "run")
    run.save(checkpoint_of(1), 1, best=False, keep_last=2)
    run.save(checkpoint_of(2), 2, best=False, keep_last=2)
    replace_file(run.checkpoints / "latest", b"step-00000001")
    other = checkpoint_of(99)
    path = run.save(other, 2, best=False, keep_last=2)
    assert run.named_checkpoint("latest") == path
    assert same(load_checkpoint(path).weights, other.weights)


def test_without_latest_a_run_goes_on_from_its_last_step(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    assert run.named_checkpoint("latest") is None
    run.save(checkpoint_of(1), 1, best=True, keep_last=2)
    path = run.save(checkpoint_of(2), 2, best=False, keep_last=2)
    (run.checkpoints / "latest").unlink()
    assert run.named_checkpoint("latest") == path
    (run.checkpoints / "best").unlink()
    assert run.named_checkpoint("best") is None


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    for name in (".writing-step-00000001", ".writing-old-step-00000000"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "weights.safetensors").write_bytes(b"half")
    run.save(checkpoint_of(1), 1, best=False, keep_last=2)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["latest", "step-00000001"]


def test_all_files_have_the_modes_that_the_users_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = new_run(tmp_path / "run").save(checkpoint_of(1), 1, best=False, keep_last=2)
    finally:
        os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in path.iterdir()} == {0o640}


# --------------------------------------------------------------------------------------------------- kills

STEPS_SHAPE = (64, 512)


def save_for_ever(path: str) -> None:
    """Checkpoints whose every tensor holds the step, as fast as it goes."""
    torch.set_num_threads(1)
    run = RunFolder(Path(path))
    latest = run.named_checkpoint("latest")
    step = int(latest.name.removeprefix("step-")) if latest is not None else 0
    while True:
        step += 1
        full = torch.full(STEPS_SHAPE, float(step))
        saved = Checkpoint({"w": full}, {"m": {"w": full}}, {"w": full}, {"h": full}, {"settings": {}, "step": step})
        run.save(saved, step, best=step % 3 == 0, keep_last=2)


def test_kill_9_at_any_instant_leaves_a_whole_latest_checkpoint(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    server = multiprocessing.get_context("forkserver")  # imports torch once, then forks
    server.set_forkserver_preload(["torch", "pytest", "safetensors.torch", "gfrnn.nn", "gfrnn.runs"])
    moments = random.Random(0)
    half_written, steps = 0, []
    for _ in range(40):
        writer = server.Process(target=save_for_ever, args=(str(run.path),))
        before = run.named_checkpoint("latest")
        writer.start()
        deadline = time.monotonic() + 60
        while run.named_checkpoint("latest") == before:  # it is at it
            assert writer.is_alive(), f"the writer ended with {writer.exitcode}"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        writer.kill()
        writer.join()
        half_written += any(run.checkpoints.glob(".writing-*"))

        latest = run.named_checkpoint("latest")
        assert latest is not None
        loaded = load_checkpoint(latest)
        step = loaded.trainer["step"]
        assert loaded.averages is not None
        tensors = (loaded.weights["w"], loaded.optimizer["m"]["w"], loaded.averages["w"], loaded.state["h"])
        assert all(torch.equal(tensor, torch.full(STEPS_SHAPE, float(step))) for tensor in tensors)
        assert latest.name == f"step-{step:08d}"
        steps.append(step)
        best = run.named_checkpoint("best")
        # the best of those that the latest knows of, or newer by the one just being named
        assert (best is not None) == (step >= 3) or best == run.checkpoints / f"step-{step + 1:08d}"
        if best is not None:
            assert load_checkpoint(best).trainer["step"] in (step // 3 * 3, step + 1)
    assert steps == sorted(set(steps)), "no kill may set a run back"
    assert half_written >= 5, "the kills came too early or too late to show anything"


def test_a_disk_error_while_saving_says_where_and_leaves_the_latest(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: safetensors reports both in the same way."""
    run = new_run(tmp_path / "run")
    first = run.save(checkpoint_of(1), 1, best=False, keep_last=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            run.save(checkpoint_of(2), 2, best=False, keep_last=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(run.checkpoints / ".writing-step-00000002/weights.safetensors")
    assert run.named_checkpoint("latest") == first
    second = run.save(checkpoint_of(2), 2, best=False, keep_last=2)
    assert same(load_checkpoint(second).weights, checkpoint_of(2).weights)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"finished": False})
    (tmp_path / ".summary.json.writing").symlink_to("/dev/full")  # opened and written to, never replaced
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_json(file, {"finished": True})
    assert caught.value.filename == str(file)
    assert json.loads(file.read_text()) == {"finished": False}
    assert list(tmp_path.iterdir()) == [file]  # nothing half written is left


# ------------------------------------------------------------------------------------------------- finding


def test_find_checkpoint(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        find_checkpoint(run.path)
    assert f"{run.path} has no checkpoint yet" in one_line(caught)
    first = run.save(checkpoint_of(1), 1, best=False, keep_last=2)
    assert find_checkpoint(run.path) == first
    best = run.save(checkpoint_of(2), 2, best=True, keep_last=2)
    latest = run.save(checkpoint_of(3), 3, best=False, keep_last=2)
    assert find_checkpoint(str(run.path)) == best
    assert find_checkpoint(latest) == latest


@pytest.mark.parametrize("what", ["nothing there", "a file", "an empty folder", "somebody else's folder"])
def test_find_checkpoint_refuses_nonsense(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "a file":
        path.write_text("hello")
    elif what != "nothing there":
        path.mkdir()
    if what == "somebody else's folder":
        (path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=str(path)) as caught:
        find_checkpoint(path)
    one_line(caught)


def test_a_wrong_path_answers_before_torch_is_imported(tmp_path: Path) -> None:
    for module in ("evaluate", "sample"):
        code = (
            f"import sys; from gfrnn.training import {module}\n"
            f"sys.argv = [{module!r}, {str(tmp_path / 'nope')!r}]\n"
            f"try: {module}._main()\n"
            "except Exception as error: print(type(error).__name__, error, 'torch' in sys.modules)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
        assert found.stdout.startswith("UserError "), found.stderr
        assert found.stdout.endswith("no such folder False\n")


# --------------------------------------------------------------------------------------- damage and misfits


def test_a_model_at_its_averages_or_its_weights(tmp_path: Path) -> None:
    saved = checkpoint_of(1)
    path = new_run(tmp_path / "run").save(saved, 1, best=False, keep_last=2)
    assert saved.averages is not None
    assert same(dict(load_model(path)[0].state_dict()), saved.averages)
    assert same(dict(load_model(path, averages=False)[0].state_dict()), saved.weights)


def test_weights_that_are_not_finite_are_a_users_error(tmp_path: Path) -> None:
    saved = checkpoint_of(1, averages=False)
    next(iter(saved.weights.values())).view(-1)[3] = math.nan
    path = new_run(tmp_path / "run").save(saved, 1, best=False, keep_last=2)
    with pytest.raises(UserError, match="is not finite") as caught:
        load_model(path)
    assert str(path) in one_line(caught)
    assert load_checkpoint(path)  # for whoever looks into it


@pytest.mark.parametrize("file", ["weights.safetensors", "averages.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_damaged_tensors_are_a_users_error(tmp_path: Path, file: str, damage: str) -> None:
    path = new_run(tmp_path / "run").save(checkpoint_of(1), 1, best=False, keep_last=2)
    content = (path / file).read_bytes()
    (path / file).write_bytes({"cut": content[:-100], "empty": b"", "garbage": b"\xff" * 1000}[damage])
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert str(path / file) in one_line(caught)


@pytest.mark.parametrize("file", ["weights.safetensors", "averages.safetensors", "state.safetensors", "trainer.json"])
def test_missing_files_are_a_users_error(tmp_path: Path, file: str) -> None:
    path = new_run(tmp_path / "run").save(checkpoint_of(1), 1, best=False, keep_last=2)
    (path / file).unlink()
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert file in one_line(caught)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[1]", b"{}", b""])
def test_damaged_json_is_a_users_error(tmp_path: Path, content: bytes) -> None:
    run = new_run(tmp_path / "run")
    path = run.save(checkpoint_of(1), 1, best=False, keep_last=2)
    (path / "trainer.json").write_bytes(content)
    run.config_path.write_bytes(content)
    for act in (lambda: load_model(path), run.read_settings, lambda: run.check(SETTINGS)):
        with pytest.raises(UserError) as caught:
            act()
        one_line(caught)


def test_weights_of_another_model_name_the_first_parameter_that_differs() -> None:
    model = build_language_model(MODEL, "fp32", 0)
    before = {name: w.clone() for name, w in model.state_dict().items()}

    def refusal(**changes: Any) -> str:
        other = build_language_model(dataclasses.replace(MODEL, **changes), "fp32", 1)
        with pytest.raises(UserError) as caught:
            load_weights(model, dict(other.state_dict()), "runs/x")
        return one_line(caught)

    # parameter shapes: bias_l0 [K] with K = 4 H + L
    assert refusal(hidden_size=6) == (
        "checkpoint runs/x is of another model: rnn.bias_l0 is (26,) there and (22,) here"
    )
    assert "rnn.bias_l2 is nothing there" not in refusal(num_layers=3)
    assert "rnn.weight_xh_l1 is nothing there" in refusal(input_skips=False)
    assert "embedding.weight is (256, 9) there and nothing here" in refusal(embedding_size=9)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ resuming


def test_no_run_yet(tmp_path: Path) -> None:
    assert not RunFolder(tmp_path / "new").check(SETTINGS)
    (tmp_path / "empty").mkdir()
    assert not RunFolder(tmp_path / "empty").check(SETTINGS, MD5)
    (tmp_path / "empty/.config.json.writing").write_text("{")  # killed in create()
    assert not RunFolder(tmp_path / "empty").check(SETTINGS, MD5)


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path).check(SETTINGS)
    assert str(tmp_path) in one_line(caught)


def replaced(group: str, **values: Any) -> Settings:
    return dataclasses.replace(SETTINGS, **{group: dataclasses.replace(getattr(SETTINGS, group), **values)})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (replaced("model", hidden_size=6), "--hidden-size = 5, not 6"),
        (replaced("batch", rows=33), "--rows = 32, not 33"),
        (replaced("batch", dtype="bf16"), "--dtype = fp32, not bf16"),
        (
            replaced("optimization", learning_rate=1.0, clip=2.0),
            f"--learning-rate = {SETTINGS.optimization.learning_rate}, not 1.0 (and 1 more)",
        ),
        (replaced("data", corpus="enwik8"), "--corpus = enwik8-1m, not enwik8"),
        (dataclasses.replace(SETTINGS, seed=4), "--seed = 0, not 4"),
    ],
)
def test_a_run_of_other_settings_is_refused(tmp_path: Path, settings: Settings, said: str) -> None:
    run = new_run(tmp_path / "run")
    run.append_metrics({"step": 1})
    with pytest.raises(UserError) as caught:
        run.check(settings)
    assert said in one_line(caught)


def test_what_a_failed_start_leaves_is_nobodys(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    run.append_metrics({"step": 0, "network_bytes": 1.0})
    write_json(run.path / "mlflow.json", {"run_id": "of the start that failed"})
    run.create(SETTINGS, {}, MD5)  # by the same settings it goes on
    assert run.mlflow_run_id() == "of the start that failed"
    others = replaced("model", hidden_size=6)
    assert not run.check(others, "f" * 32)
    run.create(others, {}, "f" * 32)
    assert run.read_settings() == others
    assert run.mlflow_run_id() is None
    write_json(run.path / "mlflow.json", {"run_id": "of a start on another text"})
    run.create(others, {}, "0" * 32)
    assert run.mlflow_run_id() is None
    run.create(others, {}, "f" * 32)
    run.append_metrics({"step": 1})
    assert run.check(others, "f" * 32)


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replaced("batch", accumulation=4),
        replaced("communication", compression="local", local_updates=4),
        replaced("run", max_updates=9, keep_last=7, mlflow=False),
        replaced("data", data_dir=Path("/elsewhere"), corpus_file=Path("moved.txt")),
        dataclasses.replace(SETTINGS, deepspeed=Path("z3.json"), dry_run=True, output_dir=Path("moved")),
    ],
)
def test_what_may_differ_when_a_run_is_resumed(tmp_path: Path, settings: Settings) -> None:
    run = new_run(tmp_path / "run")
    run.append_metrics({"step": 1})
    assert run.check(settings)
    assert run.check(settings, MD5)


def test_another_text_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    run.append_metrics({"step": 1})
    with pytest.raises(UserError) as caught:
        run.check(SETTINGS, "f" * 32)
    assert "another text (MD5 01234567..., now ffffffff...)" in one_line(caught)


def test_config_json_says_what_was_run(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    config = json.loads(run.config_path.read_text())
    assert run.read_settings() == SETTINGS
    assert config["deepspeed"] == {"zero_optimization": {"stage": 2}}
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if head.returncode == 0:
        assert config["git_commit"].rstrip("+") == head.stdout.strip()


# ------------------------------------------------------------------------------------------------- metrics


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    run.truncate_metrics(5)  # nothing there yet
    assert run.read_metrics() == []
    begin = time.time()
    for step in range(1, 6):
        run.append_metrics({"step": step, "train_bpc": 1 / step})
        run.append_metrics({"step": step, "valid_bpc": 0.1 * step})
    before = run.read_metrics()
    assert [(line["step"], line.get("train_bpc"), line.get("valid_bpc")) for line in before[:3]] == [
        (1, 1.0, None),
        (1, None, 0.1),
        (2, 0.5, None),
    ]
    assert all(begin <= line["time"] <= time.time() for line in before)
    run.truncate_metrics(3)
    assert run.read_metrics() == before[:6]
    run.append_metrics({"step": 4})
    assert [line["step"] for line in run.read_metrics()] == [1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("length", [1, 10, 38])
def test_a_torn_last_line_is_dropped(tmp_path: Path, length: int) -> None:
    run = new_run(tmp_path / "run")
    run.append_metrics({"step": 1, "train_bpc": 2.0})
    whole = run.metrics_path.read_text()
    torn = '{"step": 2, "train_bpc": 1.5, "time": 1}'[:length]
    run.metrics_path.write_text(whole + torn)
    assert [line["step"] for line in run.read_metrics()] == [1]
    run.truncate_metrics(9)
    assert run.metrics_path.read_text() == whole
    run.append_metrics({"step": 2})
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


def test_what_killed_programs_left_is_removed_and_what_is_under_way_is_not(tmp_path: Path) -> None:
    target = tmp_path / "step[1].onnx"
    with hidden_folder(target) as other:
        left = tmp_path / f"{other.name}-left"
        (left / "new").mkdir(parents=True)
        (left / "lock").touch()  # nobody holds it
        with hidden_folder(target) as own:
            assert not left.exists()
            assert {path.name for path in tmp_path.iterdir()} == {other.name, own.name}
    assert list(tmp_path.iterdir()) == []
