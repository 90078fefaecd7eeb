"""Models that ship: a small real run made one by the command, and found by its name in every program."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import serving

from gfrnn import shipped
from gfrnn.cli import parse
from gfrnn.config import DataSettings, Settings, UserError, preset
from gfrnn.data import load_text
from gfrnn.data.corpus import KNOWN
from gfrnn.runs import find_checkpoint, load_checkpoint, load_model
from gfrnn.training import ship
from gfrnn.training.card import command
from gfrnn.training.evaluate import EvaluateSettings, evaluate
from gfrnn_onnx import ModelError, Session, export
from launch import ROOT, SMALL, environment, losses, script, summary, train, warm_python, warm_script

UPDATES = 60
DATA = ["--corpus", "enwik8-1m"]
FLAGS = [*SMALL, *DATA, "--average", "none", "--embedding-size", "8", "--max-updates", str(UPDATES)]
SCORED = ["--streams", "64", "--warmup", "20", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/tiny, and models/ with tiny-bf16 and tiny-int8 made of it."""
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "runs").mkdir()
    (folder / "models").mkdir()
    status, _, err = train(folder / "runs/tiny", [*FLAGS, "--data-dir", str(folder / "data")])
    assert status == 0, err
    for precision in ("bf16", "int8"):
        flags = ["--precision", precision, "--notes", "On a test's machine.", *SCORED]
        done = warm_script("ship", folder / "runs/tiny", f"tiny-{precision}", *flags, env=own(folder))
        assert done.returncode == 0, done.stderr
        assert f"tiny-{precision}: 0." in done.stdout
    return folder


@pytest.fixture
def models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models, which this process looks into too."""
    monkeypatch.setenv("GFRNN_MODELS", str(folder / "models"))
    return folder / "models"


def own(folder: Path) -> dict[str, str]:
    return environment(GFRNN_MODELS=str(folder / "models"))


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in done.stderr
    return last


# ------------------------------------------------------------------------------------------- what is written


def test_a_model_s_folder_is_small_and_whole(models: Path) -> None:
    assert sorted(path.name for path in models.iterdir()) == ["tiny-bf16", "tiny-int8"]  # nothing half made is left
    names = ["card.md", "config.json", "step.onnx", "weights.safetensors"]
    assert sorted(path.name for path in (models / "tiny-int8").iterdir()) == names
    sizes = {name: (models / name / "weights.safetensors").stat().st_size for name in ("tiny-bf16", "tiny-int8")}
    assert sizes["tiny-int8"] < sizes["tiny-bf16"]


def test_nothing_of_the_machine_is_in_it(folder: Path, models: Path) -> None:
    for file in models.glob("*/*"):
        content = file.read_bytes()
        assert str(folder).encode() not in content, file


@pytest.mark.parametrize(("precision", "step"), [("bf16", 2**-8), ("int8", 0.5 / 127)])
def test_weights_are_the_run_s_within_the_rounding(folder: Path, models: Path, precision: str, step: float) -> None:
    run, found = (load_checkpoint(find_checkpoint(str(each))) for each in (folder / "runs/tiny", f"tiny-{precision}"))
    assert found.weights.keys() == run.weights.keys()
    for name, w in run.weights.items():
        if w.dim() == 1:
            assert torch.equal(found.weights[name], w)
            continue
        most = w.abs() * step if precision == "bf16" else w.abs().amax(1, keepdim=True) * step
        gap = (found.weights[name] - w).abs()
        assert (gap <= most * 1.001).all(), name
        assert gap.max() > 0, name


def test_a_row_of_zeros_stays_zero() -> None:
    w = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    assert torch.equal(shipped.unpack(shipped.pack({"w": w}, None, "int8"))[0]["w"][0], torch.zeros(2))
    weights, moments = shipped.unpack(shipped.pack({"w": w}, {"w": torch.zeros(2, 2)}, "int8"))
    assert torch.equal(moments["w"], torch.zeros(2, 2))
    assert weights["w"][1, 1] == -2


def test_second_moments_come_back_as_a_matrix_of_rank_1() -> None:
    rms = torch.outer(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.1, 2.0]))
    _, moments = shipped.unpack(shipped.pack({}, {"w": rms**2, "b": torch.tensor([4.0, 9.0])}, "bf16"))
    torch.testing.assert_close(moments["w"], rms**2)
    torch.testing.assert_close(moments["b"], torch.tensor([4.0, 9.0]))
    torch.manual_seed(0)
    moment = torch.rand(5, 7)
    back = shipped.unpack(shipped.pack({}, {"w": moment}, "bf16"))[1]["w"]
    for axis in (0, 1):  # the means of any matrix are kept
        torch.testing.assert_close(back.sqrt().mean(axis), moment.sqrt().mean(axis))


# --------------------------------------------------------------------------------------------- the card


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_card_says_what_evaluation_finds(folder: Path, models: Path, tmp_path: Path, precision: str) -> None:
    name = f"tiny-{precision}"
    card = (models / name / "card.md").read_text()
    rows = dict(re.findall(r"^\| (of the run|these) \([a-z0-9]+\) \| (.*) \|$", card, re.M))
    config = json.loads((models / name / "config.json").read_text())
    data = ["--data-dir", folder / "data", "--json", tmp_path / "found.json"]
    done = warm_script("evaluate", name, *SCORED, *data, env=own(folder))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert rows["these"] == f"{found['valid_bpc']:.4f} | {found['test_bpc']:.4f}"
    assert config["bpc"]["test"] == pytest.approx(found["test_bpc"], abs=1e-9)
    run = evaluate(EvaluateSettings(str(folder / "runs/tiny"), streams=64, warmup=20, device="cpu"))
    assert rows["of the run"] == f"{run['valid_bpc']:.4f} | {run['test_bpc']:.4f}"
    assert "CC BY-SA" in card
    assert "On a test's machine." in card
    assert f"{summary(folder / 'runs/tiny')['parameters']:,}" in card
    assert f"after update {config['step']:,}" in card


def test_the_card_s_command_trains_that(models: Path) -> None:
    settings = Settings.from_json(json.loads((models / "tiny-bf16/config.json").read_text())["settings"])
    words = shlex.split(command(settings))
    assert words[:4] == ["python", "src/train.py", "--preset", "demo"]
    again = parse(Settings, words[2:], default=preset("demo"))
    run = dataclasses.replace(again.run, mlflow=False)
    usual = dataclasses.replace(again.data, data_dir=settings.data.data_dir)
    assert dataclasses.replace(again, run=run, data=usual, output_dir=settings.output_dir) == settings
    assert f"    {command(settings)}\n" in (models / "tiny-bf16/card.md").read_text()
    assert command(dataclasses.replace(settings, deepspeed=Path("ds_configs/z2.json")), 4).startswith(
        "deepspeed --num_gpus 4 src/train.py --preset demo --deepspeed ds_configs/z2.json"
    )


# --------------------------------------------------------------------------------------------- by its name


def test_a_name_is_the_model(folder: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, settings, path = load_model("tiny-int8")
    assert path == models / "tiny-int8"
    assert settings.model.hidden_size == 16
    assert find_checkpoint(models / "tiny-int8") == path  # its path means the same
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-int8").symlink_to(folder / "runs/tiny")
    assert find_checkpoint("tiny-int8").parent.name == "checkpoints"  # what is there comes before a name
    with pytest.raises(UserError, match=r"no such folder$"):
        find_checkpoint("./tiny-bf16")
    with pytest.raises(UserError, match=r"no such folder; did you mean tiny-bf16\? models that ship: .*tiny-bf16"):
        find_checkpoint("tiny-bf61")


def test_dynamic_evaluation_by_name(folder: Path, models: Path, tmp_path: Path) -> None:
    """It learns from what is left of the run's second moments about as from all of them."""
    (tmp_path / "text").write_bytes((ROOT / "LICENSE").read_bytes()[:3000])
    usual = EvaluateSettings(str(folder / "runs/tiny"), text_file=tmp_path / "text", streams=1, device="cpu")
    learning = dataclasses.replace(usual, dynamic=True, dynamic_learning_rate=0.003)
    gain, own_gain = (
        evaluate(dataclasses.replace(usual, run=run))["bpc"] - evaluate(dataclasses.replace(learning, run=run))["bpc"]
        for run in (usual.run, "tiny-int8")
    )
    assert gain > 0.2
    assert own_gain == pytest.approx(gain, rel=0.2)
    flags = ["--dynamic", "--dynamic-learning-rate", "0.003", "--streams", "1", "--json", tmp_path / "found.json"]
    done = warm_script("evaluate", "tiny-int8", "--text-file", tmp_path / "text", *flags, env=own(folder))
    assert done.returncode == 0, done.stderr
    by_command = json.loads((tmp_path / "found.json").read_text())
    assert by_command["dynamic"]
    assert by_command["bpc"] == pytest.approx(evaluate(dataclasses.replace(learning, run="tiny-int8"))["bpc"], abs=1e-4)


def test_sample_by_name(folder: Path, models: Path) -> None:
    words = ["--prompt", "The ", "--length", "30", "--seed", "2"]
    by_name = script("sample", "tiny-int8", *words, env=own(folder))
    by_path = warm_script("sample", models / "tiny-int8", *words)
    assert by_name.returncode == 0, by_name.stderr
    assert by_name.stdout == by_path.stdout
    assert by_name.stdout.startswith("The ")
    unknown = warm_script("sample", "tiny-int9", *words, env=own(folder))
    assert "did you mean tiny-int8?" in refusal(unknown)


def test_a_run_begins_with_its_weights(folder: Path, tmp_path: Path) -> None:
    flags = [*FLAGS[:-1], "6", "--data-dir", folder / "data", "--start-from", "tiny-bf16", "--warmup-updates", "0"]
    for name in ("a", "b"):
        done = warm_script("train", *flags, "--output-dir", tmp_path / name, env=own(folder))
        assert done.returncode == 0, done.stderr
        flags = [flag for flag in flags if flag not in ("--start-from", "tiny-bf16")]
    begun, fresh = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert begun.keys() == fresh.keys() == set(range(1, 7))  # from its own update 1 on
    assert begun[1] < fresh[1] - 0.5


def test_export_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes((ROOT / "LICENSE").read_bytes()[:2000])
    export = [sys.executable, ROOT / "export/to_onnx.py", "tiny-int8", "--text-file", tmp_path / "text"]
    done = subprocess.run([*export, "--output", tmp_path / "s.onnx"], capture_output=True, text=True, env=own(folder))
    assert done.returncode == 0, done.stderr
    metadata = Session(tmp_path / "s.onnx", "cpu").metadata
    assert (metadata.run_id, metadata.checkpoint) == ("tiny-int8", f"step-{UPDATES:08d}")
    assert metadata.bpc["test"] == json.loads((folder / "models/tiny-int8/config.json").read_text())["bpc"]["test"]
    done = subprocess.run([*export, "--register", "x"], capture_output=True, text=True, env=own(folder))
    assert "no MLflow run is its own" in refusal(done)


def test_the_runtime_needs_no_torch_for_a_name(folder: Path, models: Path) -> None:
    code = (
        "import sys\nfrom gfrnn_onnx import Session\n"
        "session = Session('tiny-int8', 'cpu')\n"
        "print(session.score(b'The text').sum(), session.metadata.precision, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own(folder))
    assert done.returncode == 0, done.stderr
    bits, precision, has_torch = done.stdout.split()
    assert (precision, has_torch) == ("int8", "False")
    model, _, _ = load_model("tiny-int8", "fp32")
    text = torch.tensor(list(b"\nThe text"))
    with torch.no_grad():
        logits_TBV, _ = model(text[:-1, None])
    nll = torch.nn.functional.cross_entropy(logits_TBV[:, 0], text[1:], reduction="sum") / np.log(2)
    assert float(bits) == pytest.approx(nll.item(), rel=0.02)
    with pytest.raises(ModelError, match=r"did you mean tiny-int8\?"):
        Session("tiny-int9")


def test_served_by_name(models: Path) -> None:
    with serving(Path("tiny-int8"), GFRNN_MODELS=str(models)) as server:
        assert server.first_line.startswith("serving tiny-int8 (2 x 16, int8) on cpu")
        assert len(server.complete(model="tiny-int8", prompt="The ", max_tokens=5)["choices"][0]["text"]) > 0


# ------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_ship(folder: Path, tmp_path: Path) -> None:
    def tried(*words: str | Path, name: str = "other") -> str:
        return refusal(warm_script("ship", words[0], name, *words[1:], *SCORED, env=own(folder)))

    run = folder / "runs/tiny"
    assert "tiny-int8 is there already" in tried(run, name="tiny-int8")
    assert "is no name for a model" in tried(run, name="../x")
    assert "config.json is missing: not a run" in tried(tmp_path)
    assert "--max-cost is -1" in tried(run, "--max-cost", "-1")
    half = tmp_path / "half"
    subprocess.run(["cp", "-r", run, half], check=True)
    (half / "summary.json").unlink()
    assert f"{half} is not finished" in tried(half)
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["tiny-bf16", "tiny-int8"]


def test_rounding_that_costs_too_much_is_refused(
    folder: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shipping(*flags: str) -> None:
        words = [str(folder / "runs/tiny"), "rough", *SCORED, "--no-onnx", "--models-dir", str(tmp_path), *flags]
        monkeypatch.setattr(sys, "argv", ["ship.py", *words])
        ship._main()

    monkeypatch.setattr(shipped, "_MOST", 1)  # a weight is -1, 0 or 1 times its row's largest
    with pytest.raises(UserError, match=r"int8 makes the valid text \+0\.\d+ bits a byte worse, more than 0.001: not"):
        shipping("--precision", "int8", "--max-cost", "0.001")
    assert list(tmp_path.iterdir()) == []
    shipping("--precision", "int8", "--max-cost", "1")
    assert not (tmp_path / "rough/step.onnx").exists()
    monkeypatch.setenv("GFRNN_MODELS", str(tmp_path))
    with pytest.raises(ModelError, match=r"ships without step\.onnx"):
        Session("rough")


def test_a_model_too_large_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "LARGEST", 20_000)
    words = [str(folder / "runs/tiny"), "large", *SCORED, "--models-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ship.py", *words])
    with pytest.raises(
        UserError, match=r"large would have 0.0\d MB .* more than a model .*: give --precision int8 or a"
    ):
        ship._main()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_says_so(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["cp", "-r", models / "tiny-int8", tmp_path / "tiny"], check=True)
    monkeypatch.setenv("GFRNN_MODELS", str(tmp_path))
    (tmp_path / "tiny/weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="missing or damaged"):
        load_model("tiny")
    (tmp_path / "tiny/config.json").write_text("{}")
    with pytest.raises(UserError, match="names are missing in it"):
        load_model("tiny")


# ------------------------------------------------------------------------------------------- what ships


def test_enwik8_small_is_small_and_its_preset_s() -> None:
    path = shipped.MODELS / "enwik8-small"
    assert sum(file.stat().st_size for file in path.iterdir()) <= ship.LARGEST
    config = json.loads((path / "config.json").read_text())
    settings, usual = Settings.from_json(config["settings"]), preset("enwik8-small")
    assert settings.data.corpus_file is None
    run = dataclasses.replace(settings.run, mlflow=usual.run.mlflow)
    data = dataclasses.replace(settings.data, data_dir=usual.data.data_dir)
    assert dataclasses.replace(settings, run=run, data=data) == usual
    assert command(settings, config["training"]["world_size"]) in (path / "card.md").read_text()
    assert config["corpus_md5"] == KNOWN["enwik8-4m"].md5


def test_enwik8_small_has_learned_its_text(tmp_path: Path) -> None:
    """With torch and without: text that it was trained on, as the one that it was not is no part of this repository."""
    known = load_text(DataSettings(corpus="enwik8-1m", data_dir=tmp_path)).test[:8000].tobytes()
    (tmp_path / "known").write_bytes(known)
    found = evaluate(EvaluateSettings("enwik8-small", text_file=tmp_path / "known", streams=4, device="cpu"))
    assert 1 < found["bpc"] < 1.8
    bits = Session("enwik8-small", "cpu").score(known).mean()
    assert bits == pytest.approx(found["bpc"], abs=0.02)


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.01), ("int4", 0.05)])
def test_enwik8_small_exported(precision: str, most: float, tmp_path: Path) -> None:
    """What a precision costs a net that is really trained; its own weights are int8's already."""
    text, output = tmp_path / "known", tmp_path / "step.onnx"
    text.write_bytes(load_text(DataSettings(corpus="enwik8-1m", data_dir=tmp_path)).test[:8000].tobytes())
    flags = ["--precision", precision, "--text-file", text, "--output", output, "--max-cost", str(most)]
    done = warm_python(ROOT / "export/to_onnx.py", "enwik8-small", *flags)
    assert done.returncode == 0, done.stderr
    bpc = Session(output, "cpu").metadata.bpc
    assert 0 < abs(bpc["exported"] - bpc["trained"]) <= most


def test_enwik8_small_exported_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gfrnn.data.corpus._BACK_OFF", ())
    monkeypatch.setenv("GFRNN_CORPUS_URL", "http://127.0.0.1:1")
    flags = ["--check-bytes", "320", "--data-dir", tmp_path / "data", "--output", tmp_path / "step.onnx"]
    monkeypatch.setattr(sys, "argv", ["to_onnx.py", "enwik8-small", *map(str, flags)])
    export._main()
    assert "note: enwik8-4m cannot be had here: checked on a part of enwik8-1m" in capsys.readouterr().err
    assert (tmp_path / "step.onnx").is_file()


def test_enwik8_small_closes_what_it_opened() -> None:
    written = Session("enwik8-small", "cpu").generate(
        b"    </revision>\n  </page>\n  <page>\n    <title>A", 60, temperature=0.0
    )
    assert b"</title>\n    <id>" in written
