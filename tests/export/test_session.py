"""The runtime against the torch model: carried state, scores, text, predictions; and without torch."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import SMALL, encoder_decoder, language_model, save_programs, save_step
from onnxruntime import OrtValue
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from gfrnn.config import PROGRAM_SYMBOLS, ModelSettings
from gfrnn.data import generate_programs
from gfrnn.nn import LanguageModel
from gfrnn.training import sample
from gfrnn.training.evaluation import score
from gfrnn.training.program_evaluation import predict
from gfrnn_onnx import ModelError, Session, State, runner
from gfrnn_onnx.runner import Rows, Step
from launch import environment

TEXT = bytes(np.random.default_rng(0).integers(0, 256, 300, dtype=np.uint8))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model()


@pytest.fixture(scope="module")
def path(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_step(model, tmp_path_factory.mktemp("model") / "step.onnx")


@pytest.fixture(scope="module")
def session(path: Path) -> Session:
    return Session(path, "cpu", threads=1)


def test_says_what_it_is(session: Session) -> None:
    assert session.provider == "cpu"
    assert session.metadata.settings == dataclasses.asdict(SMALL)
    assert (session.metadata.kind, session.metadata.symbols, session.metadata.run_id) == ("text", "bytes", "a-run")


def test_needs_neither_torch_nor_gfrnn(path: Path, tmp_path: Path) -> None:
    programs = save_programs(encoder_decoder(), tmp_path / "programs")
    code = f"""
import sys
from gfrnn_onnx import Session, State
session = Session({str(path)!r})
session.score(b"abc"); session.generate(b"abc", 3, top_p=0.5)
session.step([1, 2])[1].save({str(tmp_path / "state.npz")!r}); State.load({str(tmp_path / "state.npz")!r})
Session({str(programs)!r}).predict("print(1)")
loaded = {{name.split(".")[0] for name in sys.modules}}
print(sorted(loaded & {{"torch", "gfrnn", "onnx", "onnx_ir", "tyro", "fastapi"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


# Steps and states -------------------------------------------------------------------------------------------


def test_step_carries_the_state(session: Session, model: LanguageModel) -> None:
    symbols_TB = torch.randint(0, 256, (6, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_TBV, (h_LBH, c_LBH) = model(symbols_TB)
    state = None
    for t, symbols_B in enumerate(symbols_TB.numpy()):
        logits_BV, state = session.step(symbols_B, state)
        np.testing.assert_allclose(logits_BV, expected_TBV[t], atol=1e-5)
    h, c = state.arrays()
    np.testing.assert_allclose(h, h_LBH.transpose(0, 1), atol=1e-6)
    np.testing.assert_allclose(c, c_LBH.transpose(0, 1), atol=1e-5)


def test_a_state_may_be_used_again_saved_and_forked(session: Session, tmp_path: Path) -> None:
    _, state = session.step([1, 2])
    before = state.arrays()
    first, _ = session.step([3, 4], state)
    again, _ = session.step([3, 4], state)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(before, state.arrays())

    state.save(tmp_path / "state")
    buffer = io.BytesIO()
    state.save(buffer)
    for file in (tmp_path / "state", io.BytesIO(buffer.getvalue())):
        np.testing.assert_array_equal(session.step([3, 4], State.load(file))[0], first)

    forked = state.fork(3)
    assert len(forked) == 6
    found, _ = session.step([3, 9, 3, 4, 4, 7], forked)
    np.testing.assert_array_equal(found[[0, 3]], first)
    np.testing.assert_array_equal(session.step([4], state.row(1))[0], first[1:])
    stacked = State.stack([state.row(1), state.row(0)])
    np.testing.assert_array_equal(session.step([4, 3], stacked)[0], first[::-1])
    own = State.of(*before)
    before[0][:] = 0.5  # the array is its owner's, the state a value
    np.testing.assert_array_equal(own.arrays(), state.arrays())


def test_what_does_not_fit_is_refused(session: Session, tmp_path: Path) -> None:
    for symbols, message in (([256], "from 0 to 255"), ([-1], "from 0 to 255"), ([[1]], r"shape \[1, 1\]")):
        with pytest.raises(ValueError, match=message):
            session.step(symbols)
    with pytest.raises(ValueError, match=r"the state is \[2, 3, 24\]"):
        session.step([1], session.zero_state(2))
    with pytest.raises(ValueError, match="this model has 2 of"):
        session.step([1], State.of(np.zeros((1, 3, 24))))
    (tmp_path / "x.npz").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="not a saved state"):
        State.load(tmp_path / "x.npz")
    np.save(tmp_path / "z.npy", np.zeros(3))
    with pytest.raises(ModelError, match="not a saved state"):
        State.load(tmp_path / "z.npy")
    np.savez(tmp_path / "y.npz", a=np.zeros(3))
    with pytest.raises(ModelError, match="it has no h"):
        State.load(tmp_path / "y.npz")
    for options in ({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -1}, {"stop": b""}):
        with pytest.raises(ValueError, match=r"must|be empty"):
            session.generate(b"", 1, **options)
    with pytest.raises(ValueError, match="length is -1"):
        session.generate(b"", -1)
    with pytest.raises(ModelError, match="it predicts no programs"):
        session.predict("print(1)")


# Text -------------------------------------------------------------------------------------------------------


def test_scores_each_byte(session: Session, model: LanguageModel) -> None:
    found = session.score(TEXT)
    assert found.shape == (300,)
    exact = score(model, np.frombuffer(TEXT, np.uint8), streams=1, warmup=0)
    assert found.sum() == pytest.approx(exact.bits, rel=1e-6)
    # every byte's bits are of all the 256 there could have been: together their probability is 1
    assert sum(2 ** -session.score(b"ab" + bytes([last]))[2] for last in range(256)) == pytest.approx(1)
    assert session.score(b"").shape == (0,)


def test_scores_several_texts_as_it_does_each(session: Session) -> None:
    texts = [TEXT[:40], b"", TEXT, TEXT[:40], TEXT[5:6]] + [TEXT[k : 2 * k] for k in range(64)]
    for text, found in zip(texts, session.score(texts), strict=True):
        np.testing.assert_array_equal(found, session.score(text))


def test_an_unrolled_model_scores_the_same(session: Session, model: LanguageModel, tmp_path: Path) -> None:
    unrolled = Session(save_step(model, tmp_path / "8.onnx", unroll=8), "cpu", threads=1)
    texts = [TEXT[:43], b"", TEXT[:1], TEXT[:48]]
    for found, expected in zip(unrolled.score(texts), session.score(texts), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(ModelError, match="reads 8 symbols a run"):
        unrolled.generate(b"", 1)


def test_greedy_text_is_the_torch_model_s(session: Session, model: LanguageModel) -> None:
    for prompt in (b"", b"The ", b"\xff\x00"):
        expected = sample.generate(model, prompt, 40, temperature=0)
        assert session.generate(prompt, 40, temperature=0) == expected
        assert session.generate(prompt, 40, top_k=1) == expected
        assert session.generate(prompt, 40, top_p=1e-9) == expected
        with warnings.catch_warnings(action="error"):
            assert session.generate(prompt, 40, temperature=5e-324) == expected
    assert len(set(expected)) > 1


def test_a_seed_gives_the_same_text_alone_and_among_others(session: Session) -> None:
    alone = session.generate(b"abc", 50, seed=5)
    assert alone == session.generate(b"abc", 50, seed=5)
    assert alone != session.generate(b"abc", 50, seed=6)
    assert session.generate(b"abc", 50) != session.generate(b"abc", 50)
    prompts = [b"x" * k for k in range(80)]
    prompts[3] = prompts[70] = b"abc"
    texts = session.generate(prompts, 50, seed=5)
    assert texts[3] == texts[70] == alone
    assert texts[20] == session.generate(prompts[20], 50, seed=5)
    streamed = session.stream(b"abc", seed=5)
    assert bytes(next(streamed) for _ in range(50)) == alone


def test_stops_before_what_it_is_told_to(session: Session) -> None:
    whole = session.generate(b"q", 60, seed=1)
    for stop in (whole[20:22], [b"never there", whole[30:33], whole[20:22]]):
        expected = whole[: whole.index(whole[20:22])]
        assert session.generate(b"q", 60, seed=1, stop=stop) == expected
    # of several prompts each has its own end
    others = session.generate([b"q", b"r", b"q"], 60, seed=1, stop=whole[20:22])
    assert others[0] == others[2] == expected
    assert session.generate(b"q", 0) == b""


# Programs ---------------------------------------------------------------------------------------------------


def test_predicts_what_the_torch_model_does(tmp_path: Path) -> None:
    model = encoder_decoder()
    session = Session(save_programs(model, tmp_path / "programs"), "cpu", threads=1)
    found = [session.predict(each.program) for each in generate_programs(20, length=3, nesting=2)]
    assert found == [predict(model, each.program) for each in generate_programs(20, length=3, nesting=2)]
    assert len(set(found)) > 1
    with pytest.raises(ValueError, match="programs have no 'Z'"):
        session.predict("print(Z)")
    for call in (lambda: session.score(b"a"), lambda: session.generate(b"a", 1)):
        with pytest.raises(ModelError, match="it can only predict"):
            call()


def test_predictions_make_no_new_cuda_graphs(tmp_path: Path) -> None:
    session = Session(save_programs(encoder_decoder(), tmp_path / "programs"), "cpu", threads=1)
    assert session.encoder is not None
    session.encoder.graphs = True  # the CPU takes no notice
    programs = ["print(1)", "print(12)", "a=34"]
    found = [session.predict(program) for program in programs * 3]
    assert found == found[:3] * 3
    assert next(session.encoder.graph_ids) == 2


# Rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["lstm", "gru"])
def test_rows_join_move_and_leave(unit: str, tmp_path: Path) -> None:
    step = Step(
        save_step(language_model(dataclasses.replace(SMALL, unit=unit)), tmp_path / "s.onnx", gates=True), "cpu"
    )
    rows = Rows(step, 6)
    assert rows.sizes == [1, 2, 4, 6]

    def alone(text: bytes) -> np.ndarray:
        state = None
        for symbol in text:
            logits, state = step(np.array([symbol]), state)
        return logits[0]

    for k in range(3):
        rows.put(k, None)
    for symbols in zip(b"abc", b"xyz", b"mno", strict=True):
        rows.symbols[:3] = symbols
        found = rows.run(3)
    for k, text in enumerate((b"abc", b"xyz", b"mno")):
        np.testing.assert_array_equal(found["logits"][k], alone(text))
    assert found["gates"].shape == (3, 3, 3)
    kept = rows.get(1)
    rows.symbols[2] = ord("p")
    rows.move(2, 0)  # row 0 leaves, the last one takes its place with what it is to read
    rows.put(2, None)
    rows.symbols[1:3] = [*b"!q"]
    found = rows.run(3)
    for k, text in enumerate((b"mnop", b"xyz!", b"q")):
        np.testing.assert_array_equal(found["logits"][k], alone(text))
    rows.put(5, kept)
    rows.move(5, 0)
    rows.symbols[0] = ord("?")
    np.testing.assert_array_equal(rows.run(1)["logits"][0], alone(b"xyz?"))


def test_int4_runs_no_odd_row(tmp_path: Path) -> None:
    step = Step(save_step(language_model(), tmp_path / "s.onnx", precision="int4"), "cpu")
    assert Rows(step, 8).sizes == [2, 4, 8]
    assert Rows(step, 3).sizes == [2, 4]
    session = Session(tmp_path / "s.onnx", "cpu")
    three = session.generate([b"a", b"b", b"c"], 30, seed=1)
    assert three[:2] == session.generate([b"a", b"b"], 30, seed=1)
    assert three[0] == session.generate(b"a", 30, seed=1)


def test_each_cuda_graph_has_a_number_of_its_own(path: Path) -> None:
    """By which ONNX Runtime replays it, whatever rows are bound then."""
    step = Step(path, "cpu")
    step.graphs = True  # the CPU takes no notice
    numbers = []
    for rows in (Rows(step, 1), Rows(step, 1), Rows(step, 4)):
        for size in rows.sizes:
            for _ in range(4):
                rows.run(size)
        numbers += [options.get_run_config_entry("gpu_graph_id") for _, options in rows._bindings.values()]
    assert len(numbers) == 2 * (1 + 1 + 3) == len(set(numbers))


# Files ------------------------------------------------------------------------------------------------------


def test_missing_damaged_and_foreign_files(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not there"):
        Session(tmp_path / "none.onnx")
    (tmp_path / "torn.onnx").write_bytes(path.read_bytes()[:-1000])
    (tmp_path / "text.onnx").write_bytes(b"hello " * 99)
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("torn", "text", "empty"):
        with pytest.raises(ModelError, match=r"cannot be loaded|was not exported") as caught:
            Session(tmp_path / f"{name}.onnx")
        assert "\n" not in str(caught.value)
    foreign = onnx.load(path)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(ModelError, match="was not exported by gfrnn"):
        Session(tmp_path / "foreign.onnx")
    for key, value, message in (
        ("gfrnn.format", "2", "another version"),
        ("gfrnn.settings", "{", "damaged properties"),
        ("gfrnn.kind", "decoder", "half of a model of programs"),
    ):
        changed = onnx.load(path)
        next(each for each in changed.metadata_props if each.key == key).value = value
        onnx.save(changed, tmp_path / "changed.onnx")
        with pytest.raises(ModelError, match=message):
            Session(tmp_path / "changed.onnx")


def test_halves_of_two_models_are_refused(tmp_path: Path) -> None:
    save_programs(encoder_decoder(), tmp_path / "a")
    save_programs(encoder_decoder(), tmp_path / "b", run_id="another")
    (tmp_path / "b/encoder.onnx").replace(tmp_path / "a/encoder.onnx")
    with pytest.raises(ModelError, match="halves of two models"):
        Session(tmp_path / "a")
    with pytest.raises(ModelError, match=r"encoder\.onnx is not there"):
        Session(tmp_path / "b")


def test_cuda_that_is_not_here_is_said(path: Path) -> None:
    if torch.cuda.is_available():
        assert Session(path).provider == Session(path, "cuda").provider == "cuda"
        return
    with pytest.raises(ModelError, match="CUDA cannot be used here"):
        Session(path, "cuda")
    with pytest.raises(ModelError, match="provider 'tpu' is unknown"):
        Session(path, "tpu")  # type: ignore[arg-type]


class Gpu:
    """As if there were one: what is loaded on it says so, and runs on the CPU."""

    loads: list[dict[str, str]]
    """The options of each load on it."""
    full = False
    """Whether all its memory is in use."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    gpu.loads = []

    class OnIt(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: Any, providers: list[Any]):
            self.given = providers
            if len(providers) > 1:
                gpu.loads.append(providers[0][1])
                print("EP Error")
                if gpu.full:
                    raise Fail("CUDA failure 2: out of memory")
            super().__init__(path, options, providers=providers[-1:])

        def get_providers(self) -> list[str]:
            return [each if isinstance(each, str) else each[0] for each in self.given]

    monkeypatch.setattr("gfrnn_onnx.runner._has_cuda_driver", lambda: True)
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    monkeypatch.setattr("onnxruntime.InferenceSession", OnIt)
    return gpu


def test_fp32_is_fp32_on_cuda_too(path: Path, gpu: Gpu, capsys: pytest.CaptureFixture[str]) -> None:
    for graphs in (True, False):
        assert Step(path, cuda_graphs=graphs).provider == "cuda"
        assert gpu.loads[-1]["use_tf32"] == "0"
        assert ("enable_cuda_graph" in gpu.loads[-1]) == graphs
    assert capsys.readouterr().out == ""  # results go there


def test_int8_is_on_the_cpu_unless_it_is_told(path: Path, model: LanguageModel, tmp_path: Path, gpu: Gpu) -> None:
    int8 = save_step(model, tmp_path / "8.onnx", precision="int8")
    step = Step(int8)
    assert (step.provider, step.graphs) == ("cpu", False)
    assert step.session.get_providers() == ["CPUExecutionProvider"]
    assert Step(int8, "cuda").provider == "cuda"
    assert Step(path).provider == "cuda"


def test_a_gpu_whose_memory_is_full(
    path: Path, tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    # not by caplog: making MLflow's tables, as other tests do, disables all loggers
    monkeypatch.setattr(runner.log, "warning", lambda text, *values: said.append(text % values))
    gpu.full = True
    assert Step(path).provider == "cpu"
    assert "out of memory): on the CPU" in said[-1]
    with pytest.raises(ModelError, match="out of memory"):
        Step(path, "cuda")
    (tmp_path / "torn.onnx").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"torn\.onnx cannot be loaded"):
        Step(tmp_path / "torn.onnx")
    assert capsys.readouterr().out == ""


def test_idle_it_burns_nothing(path: Path) -> None:
    """Less than 0.15 core in the seconds after a burst of steps."""
    code = f"""
import time, json
from gfrnn_onnx import Session
session = Session({str(path)!r}, threads=2)
session.generate(b"", 200)
begin = time.process_time(); time.sleep(2)
print(json.dumps((time.process_time() - begin) / 2))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert json.loads(done.stdout) < 0.15


def test_a_vocabulary_of_characters(tmp_path: Path) -> None:
    settings = ModelSettings(num_layers=2, hidden_size=8, vocab_size=len(PROGRAM_SYMBOLS))
    step = Step(save_step(language_model(settings), tmp_path / "s.onnx"), "cpu")
    with pytest.raises(ValueError, match="from 0 to 38"):
        step(np.array([39]))


def test_what_cuda_does_with_rows_done_in_this_memory(
    path: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers that arrays are copied into and out of, of one size, as on a device; without the device."""

    class Copied(Rows):
        def __init__(self, step: Step, capacity: int):
            monkeypatch.setattr(step, "provider", "cuda")
            super().__init__(step, capacity)
            monkeypatch.undo()

        def _ort(self, array: np.ndarray) -> OrtValue:
            return OrtValue.ortvalue_from_numpy(array.copy(), "cpu", 0)

    other = Session(path, "cpu", threads=1)
    for capacity in (1, 4):
        other._rows[capacity] = Copied(other._step, capacity)
        assert (other._rows[capacity].on_cpu, other._rows[capacity].sizes) == (False, [capacity])
    for prompts in (b"abc", [b"abc", b"x", b"yyyyyyy"]):
        assert other.generate(prompts, 40, seed=5) == session.generate(prompts, 40, seed=5)
    for found, expected in zip(other.score([b"hello there", b"x"]), session.score([b"hello there", b"x"]), strict=True):
        np.testing.assert_array_equal(found, expected)
