"""to_onnx.py: what it writes, says and refuses, and that a model which fails its check is not written."""

from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported import SMALL, encoder_decoder, language_model

from gfrnn.config import PROGRAM_SYMBOLS, Settings, UserError, preset
from gfrnn.nn import EncoderDecoder, LanguageModel
from gfrnn.runs import Checkpoint, RunFolder
from gfrnn.training.evaluation import score
from gfrnn_onnx import Session, export, verify
from gfrnn_onnx.precision import Precision
from launch import ROOT, environment

TEXT = b"It was a bright cold day in April, and the clocks were striking thirteen. " * 40


def save_run(folder: Path, settings: Settings, model: LanguageModel | EncoderDecoder) -> Path:
    run = RunFolder(folder)
    run.create(settings, {}, "0" * 32)
    run.save(Checkpoint(dict(model.state_dict()), trainer={"settings": settings.to_json()}), 5, best=True, keep_last=1)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = dataclasses.replace(preset("demo"), model=SMALL)
    return save_run(tmp_path_factory.mktemp("runs") / "some-run", settings, language_model(spread=1.0))


@pytest.fixture(scope="module")
def programs_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = dataclasses.replace(SMALL, vocab_size=len(PROGRAM_SYMBOLS))
    settings = dataclasses.replace(preset("programs-demo"), model=model)
    return save_run(tmp_path_factory.mktemp("runs") / "programs", settings, encoder_decoder())


def to_onnx(monkeypatch: pytest.MonkeyPatch, *flags: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["to_onnx.py", *map(str, flags)])
    export._main()


def test_the_script_writes_a_model_and_says_how_good(run: Path, text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "export/to_onnx.py", run, "--text-file", text_file, "--json", "figures.json"]
    done = subprocess.run([*command, "--gates"], capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "step.onnx"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert f"{figures['trained_bpc']:.4f}" in done.stdout
    assert figures["bytes"] == (tmp_path / "step.onnx").stat().st_size

    session = Session(tmp_path / "step.onnx", "cpu")
    metadata = session.metadata
    assert (metadata.run_id, metadata.checkpoint, metadata.precision) == ("some-run", "step-00000005", "fp32")
    assert metadata.settings == dataclasses.asdict(SMALL)
    assert metadata.bpc == {"trained": figures["trained_bpc"], "exported": figures["exported_bpc"]}
    assert {"torch", "onnx", "onnx-ir", "gfrnn"} <= set(metadata.versions)
    # the bits are those of the pieces, by other code
    size = len(TEXT) // 32
    pieces = [np.frombuffer(TEXT[k * size : (k + 1) * size], np.uint8) for k in range(32)]
    model = language_model(spread=1.0)
    bits = sum(score(model, piece, streams=1, warmup=0).bits for piece in pieces)
    assert figures["characters"] == 32 * size
    assert figures["trained_bpc"] == pytest.approx(bits / (32 * size), abs=1e-5)
    assert figures["exported_bpc"] == pytest.approx(figures["trained_bpc"], abs=1e-5)


def test_a_model_of_programs_is_a_folder(
    programs_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, most in (([], 1e-5), (["--precision", "int8"], 5e-3), (["--unroll", "3"], 1e-4)):
        to_onnx(monkeypatch, programs_run, "--output", tmp_path / "step", "--json", tmp_path / "f.json", *flags)
        figures = json.loads((tmp_path / "f.json").read_text())
        assert figures["exported_bpc"] == pytest.approx(figures["trained_bpc"], abs=most)
        assert sorted(path.name for path in (tmp_path / "step").iterdir()) == ["decoder.onnx", "encoder.onnx"]
        assert Session(tmp_path / "step", "cpu").metadata.bpc["exported"] == figures["exported_bpc"]
    capsys.readouterr()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_what_a_precision_costs_is_measured(
    precision: str, run: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "step.onnx"
    to_onnx(
        monkeypatch, run, "--text-file", text_file, "--output", output, "--precision", precision, "--max-cost", "0.5"
    )
    metadata = Session(output, "cpu").metadata
    assert metadata.precision == precision
    assert metadata.bpc["exported"] != metadata.bpc["trained"]
    assert abs(metadata.bpc["exported"] - metadata.bpc["trained"]) < 0.05
    size = len(TEXT) // 32
    bits = Session(output, "cpu").score([TEXT[k * size : (k + 1) * size] for k in range(32)])
    assert metadata.bpc["exported"] == pytest.approx(np.mean(bits), abs=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_capped_input_gate(
    precision: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is in the file, and what it computes is what was trained: without the cap, other bits."""
    capped = dataclasses.replace(SMALL, cap_input_gate=True)
    settings = dataclasses.replace(preset("demo"), model=capped)
    run = save_run(tmp_path / "run", settings, language_model(capped, spread=1.3))
    found = {"output": tmp_path / "step.onnx", "json": tmp_path / "f.json"}
    flags = [word for name, value in found.items() for word in (f"--{name}", value)]
    to_onnx(monkeypatch, run, "--text-file", text_file, "--precision", precision, "--max-cost", "0.02", *flags)
    assert "error" not in capsys.readouterr().err
    figures = json.loads(found["json"].read_text())
    most = {"fp32": 1e-5, "int8": 0.02}[precision]
    assert figures["exported_bpc"] == pytest.approx(figures["trained_bpc"], abs=most)
    size = len(TEXT) // 32
    pieces = [np.frombuffer(TEXT[k * size : (k + 1) * size], np.uint8) for k in range(32)]
    free = language_model(spread=1.3)
    bits = sum(score(free, piece, streams=1, warmup=0).bits for piece in pieces)
    assert abs(figures["trained_bpc"] - bits / (32 * size)) > 0.02
    assert Session(found["output"], "cpu").metadata.settings["cap_input_gate"]


def test_weights_too_large_for_one_file_lie_beside_it(
    run: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gfrnn_onnx.step.LARGEST_FILE", 100_000)
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr("gfrnn.runs.sync", lambda path: synced.append((path.name, (tmp_path / path.name).exists())))
    to_onnx(monkeypatch, run, "--text-file", text_file, "--output", tmp_path / "big.onnx")
    assert synced == [("big.onnx", False), ("big.onnx.data", False)]  # before they are in place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert (tmp_path / "big.onnx").stat().st_size < 60_000
    session = Session(tmp_path / "big.onnx", "cpu")
    assert len(session.score(b"abc")) == 3
    assert set(session.metadata.bpc) == {"trained", "exported"}
    monkeypatch.undo()
    to_onnx(monkeypatch, run, "--text-file", text_file, "--output", tmp_path / "big.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["big.onnx"]


def test_the_file_is_the_one_that_was_checked(
    run: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bits added that the check has found, and nothing else."""
    check, checked = verify.check_operators, []

    def checking(path: Path, precision: Precision) -> None:
        checked.append(path.read_bytes())
        check(path, precision)

    monkeypatch.setattr("gfrnn_onnx.verify.check_operators", checking)
    to_onnx(monkeypatch, run, "--text-file", text_file, "--output", tmp_path / "step.onnx")
    found = (tmp_path / "step.onnx").read_bytes()
    assert found.startswith(checked[0])
    added = onnx.load_from_string(found[len(checked[0]) :])
    assert [field.name for field, _ in added.ListFields()] == ["metadata_props"]
    assert [each.key for each in added.metadata_props] == ["gfrnn.bpc"]


def test_long_text_is_read_in_segments() -> None:
    """Whose states go on: the bits are those of the text as a whole."""
    model, lengths = language_model(spread=1.0), []
    hook = model.register_forward_pre_hook(lambda _, given: lengths.append(len(given[0])))
    pieces = [TEXT[:1300], TEXT[7:1307]]
    found = verify.text_bpc(model, pieces)
    assert lengths == [512, 512, 276]
    hook.remove()
    bits = sum(score(model, np.frombuffer(piece, np.uint8), streams=1, warmup=0).bits for piece in pieces)
    assert found == pytest.approx(bits / 2600, abs=1e-6)


def test_the_corpus_where_it_is_now(
    run: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twentieth of it that is validation text, in 32 pieces."""
    written = ["--output", tmp_path / "step.onnx", "--json", tmp_path / "f.json"]
    to_onnx(monkeypatch, run, "--corpus-file", text_file, "--data-dir", tmp_path / "data", *written)
    assert json.loads((tmp_path / "f.json").read_text())["characters"] == len(TEXT) // 20 // 32 * 32


# A model that fails is not written ---------------------------------------------------------------------------


def refused(monkeypatch: pytest.MonkeyPatch, *flags: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        to_onnx(monkeypatch, *flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_step_that_computes_something_else(
    run: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = export.importlib.import_module("gfrnn_onnx.step")._GatedFeedback._ordered
    monkeypatch.setattr(
        "gfrnn_onnx.step._GatedFeedback._ordered", lambda self, columns: build(self, columns * np.float32(1.01))
    )
    (tmp_path / "step.onnx").write_bytes(b"what was there")
    told = refused(monkeypatch, run, "--text-file", text_file, "--output", tmp_path / "step.onnx")
    assert "differs from the trained model" in told
    assert "in a step" in told
    assert [path.name for path in tmp_path.iterdir()] == ["step.onnx"]
    assert (tmp_path / "step.onnx").read_bytes() == b"what was there"


def test_a_precision_that_costs_too_much(
    run: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [run, "--text-file", text_file, "--output", tmp_path / "s.onnx", "--precision", "int4"]
    told = refused(monkeypatch, *flags, "--max-cost", "1e-9")
    assert "int4 changes " in told
    assert "--max-cost" in told
    assert list(tmp_path.iterdir()) == []


def test_a_net_that_amplifies_rounding_passes_on_its_steps(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its carried states part from the torch model's, as that one's part from its own in fp64."""
    settings = dataclasses.replace(preset("demo"), model=dataclasses.replace(SMALL, unit="tanh", feedback="full"))
    wild = save_run(tmp_path / "run", settings, language_model(settings.model, spread=3.0))
    to_onnx(monkeypatch, wild, "--text-file", text_file, "--output", tmp_path / "s.onnx", "--max-cost", "1")
    assert "note: this net amplifies rounding" in capsys.readouterr().err
    assert (tmp_path / "s.onnx").exists()


def test_verification_sees_an_error_in_any_weight(run: Path, text_file: Path, tmp_path: Path) -> None:
    """One element of each initializer that matters, changed by a thousandth of its tensor's size."""
    model = language_model(spread=1.0)
    from exported import save_step

    from gfrnn_onnx.runner import Step

    path = save_step(model, tmp_path / "step.onnx")
    clean = verify.differences(Step(path, "cpu"), model, steps=20)
    assert clean.one_step < 1e-5
    names = [each.name for each in onnx.load(path).graph.initializer if each.data_type == onnx.TensorProto.FLOAT]
    assert len(names) >= 9
    for name in names:
        changed = onnx.load(path)
        tensor = next(each for each in changed.graph.initializer if each.name == name)
        array = onnx.numpy_helper.to_array(tensor).copy()
        array += np.float32(1e-2)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
        onnx.save(changed, tmp_path / "changed.onnx")
        assert verify.differences(Step(tmp_path / "changed.onnx", "cpu"), model, steps=20).one_step > 1e-4, name


# What a user can get wrong ----------------------------------------------------------------------------------


def test_flags(run: Path, programs_run: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "short").write_bytes(b"too short")
    (tmp_path / "folder").mkdir()
    with_text = [run, "--text-file", text_file]
    for flags, message in (
        ([tmp_path / "nope"], "neither a run folder nor a checkpoint"),
        ([run, "--unroll", "0"], "--unroll is 0; it must be from 1"),
        ([run, "--check-bytes", "3"], "--check-bytes is 3"),
        ([run, "--tolerance", "nan"], "--tolerance is nan"),
        ([run, "--max-cost", "-1"], "--max-cost is -1"),
        ([run, "--output", tmp_path / "no/folder.onnx"], "give a name in a folder that exists"),
        ([run, "--output", tmp_path / "folder"], "is a folder; give the name of a file"),
        ([run, "--output", tmp_path / "\udcff.onnx"], "its name is not UTF-8"),
        ([run, "--output", tmp_path / "step.json"], "step.json: its ending means another format"),
        ([run, "--output", tmp_path / "step.pbtxt"], "give a name that ends in .onnx"),
        ([run, "--output", tmp_path / "step.ort"], "give a name that ends in .onnx"),
        ([programs_run, "--output", text_file], "a model of programs is a folder"),
        ([run, "--text-file", tmp_path / "none"], "none"),
        ([run, "--text-file", tmp_path / "short"], "give at least 32"),
        ([*with_text, "--precision", "int5"], "int5"),
    ):
        assert message in refused(monkeypatch, *flags)
    stack = dataclasses.replace(preset("demo"), model=dataclasses.replace(SMALL, feedback="none"))
    plain = save_run(tmp_path / "stack", stack, language_model(stack.model))
    assert "--gates: this model has no gated feedback" in refused(monkeypatch, plain, "--gates")


def test_a_full_disk(run: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose error names no file."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gfrnn_onnx.step.ir.save", full)
    with pytest.raises(OSError, match="No space left") as caught:
        to_onnx(monkeypatch, run, "--text-file", text_file, "--output", tmp_path / "step.onnx")
    assert caught.value.filename == str(tmp_path / "step.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_unroll_that_no_program_fits(programs_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_PROGRAMS", 1)
    told = refused(monkeypatch, programs_run, "--output", tmp_path / "step", "--unroll", "251")
    assert "--unroll 251: no validation program has a length that 251 divides; take a smaller one" in told


def test_help_answers_before_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['to_onnx.py', '--help']\nfrom gfrnn_onnx import export\n"
        "try: export._main()\nexcept SystemExit: print('torch' in sys.modules, 'onnx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout.endswith("False False\n")
    assert "--precision" in done.stdout


def test_torch_is_the_same_after_all() -> None:
    """The export reads the model's weights and leaves them as they are."""
    model = language_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    from gfrnn_onnx.step import build_step

    build_step(model, precision="int4", unroll=2, gates=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
