"""Bits a byte: held against one byte at a time, whatever the streams, chunks and processes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from gfrnn.config import ModelSettings, RunFailed, UserError, preset
from gfrnn.data import Bytes
from gfrnn.nn import LanguageModel
from gfrnn.runs import Checkpoint, RunFolder
from gfrnn.training.evaluate import EvaluateSettings, _validate, evaluate, progress_bar
from gfrnn.training.evaluation import score, score_dynamic
from launch import script

SMALL = ModelSettings(num_layers=2, hidden_size=6, output_skips=True)
MODELS = {
    "gf-lstm": SMALL,
    "gf-gru": ModelSettings(unit="gru", num_layers=2, hidden_size=6, embedding_size=3),
    "tanh": ModelSettings(unit="tanh", num_layers=2, hidden_size=6, feedback="full", input_skips=False),
    "mrnn": ModelSettings(unit="mrnn", num_layers=1, hidden_size=6, feedback="none", input_skips=False),
}


def model_of(settings: ModelSettings = SMALL, seed: int = 0) -> LanguageModel:
    """In fp64, with weights large enough for what was read long ago to matter."""
    torch.manual_seed(seed)
    model = LanguageModel(settings).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (2.0 if name.startswith("softmax") else 0.7))
    return model


def text_of(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)


def byte_by_byte(model: LanguageModel, text: Bytes) -> list[float]:
    """Bits of every byte: one step at a time, from a newline and a zero state."""
    bits, state, symbol = [], None, 10
    with torch.no_grad():
        for target in text.tolist():
            logits_11V, state = model(torch.tensor([[symbol]]), state)
            bits.append(-torch.log_softmax(logits_11V[0, 0], 0)[target].item() / math.log(2))
            symbol = target
    return bits


# --------------------------------------------------------------------------------------------------- score


@pytest.mark.parametrize("name", MODELS)
def test_one_stream_is_exact(name: str) -> None:
    model, text = model_of(MODELS[name]), text_of(150)
    found = score(model, text, streams=1, warmup=50, steps=17)
    assert found.bits == pytest.approx(sum(byte_by_byte(model, text)), rel=1e-9)
    assert (found.characters, found.streams, found.warmup, found.seam_bpc) == (150, 1, 0, None)
    assert found.bpc == found.bits / 150


def test_reading_in_chunks_changes_nothing() -> None:
    model, text = model_of(), text_of(203)
    whole = score(model, text, streams=4, warmup=13, steps=1000, seam=11)
    for steps in (1, 2, 7, 13, 50):
        found = score(model, text, streams=4, warmup=13, steps=steps, seam=11)
        assert found.bits == pytest.approx(whole.bits, rel=1e-12)
        assert found.seam_bpc == pytest.approx(whole.seam_bpc, rel=1e-9)


def test_a_stream_reads_its_warmup_and_then_its_piece() -> None:
    """Three streams by hand: the later ones start 7 bytes early, from a zero state, with the byte before as input."""
    model, text, warmup = model_of(), text_of(60), 7
    expected = sum(byte_by_byte(model, text[:20]))
    for begin in (20, 40):
        state = None
        with torch.no_grad():
            for position in range(begin - warmup, begin + 20):
                logits_11V, state = model(torch.tensor([[int(text[position - 1])]]), state)
                if position >= begin:
                    expected -= torch.log_softmax(logits_11V[0, 0], 0)[int(text[position])].item() / math.log(2)
    found = score(model, text, streams=3, warmup=warmup, steps=4)
    assert found.bits == pytest.approx(expected, rel=1e-9)
    assert found.bits != pytest.approx(score(model, text, streams=3, warmup=0).bits, rel=1e-6)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 90),
    streams=st.integers(1, 100),
    warmup=st.integers(0, 40),
    steps=st.integers(1, 20),
    world_size=st.integers(1, 5),
    seam=st.integers(0, 50),
)
def test_every_byte_is_counted_once(
    size: int, streams: int, warmup: int, steps: int, world_size: int, seam: int
) -> None:
    model = model_of()
    torch.nn.init.zeros_(model.softmax.weight)  # so that a byte costs what it costs, wherever it is read
    cost_V = -torch.log_softmax(model.softmax.bias.detach(), 0) / math.log(2)
    text = np.random.default_rng(size).permutation(256)[:size].astype(np.uint8)  # no two alike
    parts = [
        score(model, text, streams=streams, warmup=warmup, steps=steps, seam=seam, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sum(part.characters for part in parts) == size
    assert sum(part.bits for part in parts) == pytest.approx(cost_V[torch.from_numpy(text).long()].sum().item())
    assert len({part.streams for part in parts}) == 1
    assert 1 <= parts[0].streams <= min(streams, size)


def test_a_warmup_over_everything_before_is_exact() -> None:
    model, text = model_of(), text_of(80)
    found = score(model, text, streams=2, warmup=40, steps=9)
    assert found.streams == 2
    assert found.bits == pytest.approx(sum(byte_by_byte(model, text)), rel=1e-9)


@pytest.mark.parametrize(("size", "streams", "warmup"), [(30, 64, 1000), (1, 64, 0), (1, 1, 1), (39, 2, 20)])
def test_a_text_too_short_for_warmups_is_read_by_one_stream(size: int, streams: int, warmup: int) -> None:
    model, text = model_of(), text_of(size)
    found = score(model, text, streams=streams, warmup=warmup, seam=100)
    assert (found.streams, found.warmup, found.seam_bpc) == (1, 0, None)
    assert found.bits == pytest.approx(sum(byte_by_byte(model, text)), rel=1e-9)


def test_more_streams_than_bytes() -> None:
    model, text = model_of(), text_of(10)
    found = score(model, text, streams=1000, warmup=0)
    alone = [score(model, text[i : i + 1], streams=1, warmup=0).bits for i in range(10)]
    assert found.streams == 10
    assert found.bits != pytest.approx(sum(alone))  # every stream but the first starts from the byte before its own
    assert found.characters == 10


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_processes_add_up_to_the_whole(world_size: int) -> None:
    model, text = model_of(), text_of(201)
    whole = score(model, text, streams=5, warmup=11)
    parts = [score(model, text, streams=5, warmup=11, rank=r, world_size=world_size) for r in range(world_size)]
    assert sum(part.bits for part in parts) == pytest.approx(whole.bits, rel=1e-12)
    assert sum(part.characters for part in parts) == whole.characters == 201
    assert [part.characters > 0 for part in parts] == [r < 5 for r in range(world_size)]


def test_seam_of_two_streams_is_what_they_add() -> None:
    """The first stream reads on over all of the second piece, with the whole past: nothing is left out."""
    model, text = model_of(), text_of(300)
    exact = score(model, text, streams=1, warmup=0)
    for warmup in (0, 3):
        found = score(model, text, streams=2, warmup=warmup, seam=150, steps=32)
        assert abs(found.bpc - exact.bpc) > 1e-4
        assert found.seam_bpc == pytest.approx(found.bpc - exact.bpc, rel=1e-6)


def test_seam_of_many_streams_is_nearly_what_they_add() -> None:
    """A stream's past goes back over its own piece and warm-up; what lies before that hardly matters."""
    model, text = model_of(), text_of(403)
    exact = score(model, text, streams=1, warmup=0)
    found = score(model, text, streams=8, warmup=0, seam=1000)
    added = found.bpc - exact.bpc
    assert abs(added) > 1e-3
    assert found.seam_bpc == pytest.approx(added, rel=0.05)
    shared = score(model, text, streams=8, warmup=0, seam=1000, rank=0, world_size=2)
    assert shared.seam_bpc is None


def test_memory_does_not_grow_with_the_streams() -> None:
    model = model_of(ModelSettings(num_layers=1, hidden_size=2)).float()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments: sizes.append(arguments[0].numel()))
    score(model, text_of(100_000), streams=5000, warmup=5, steps=128)
    assert max(sizes) <= 1 << 15
    sizes.clear()
    score(model, text_of(2000), streams=1, warmup=0, steps=128)
    assert max(sizes) == 128


def test_progress_ends_at_one() -> None:
    parts: list[float] = []
    score(model_of(), text_of(100), streams=3, warmup=10, steps=8, seam=20, progress=parts.append)
    assert parts == sorted(set(parts))
    assert 0 < parts[0] < 0.3
    assert parts[-1] == 1.0


# ------------------------------------------------------------------------------------------ dynamic evaluation


def moments_of(model: LanguageModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(p.shape, generator=generator, dtype=p.dtype) ** 2 * 1e-4
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(("streams", "warmup"), [(1, 0), (4, 0), (4, 13)])
def test_dynamic_with_no_rate_is_score(streams: int, warmup: int) -> None:
    model, text = model_of(), text_of(203)
    still = score(model, text, streams=streams, warmup=warmup, steps=10)
    for decay in (0.0, 0.5):
        found = score_dynamic(
            model,
            text,
            learning_rate=0.0,
            decay=decay,
            second_moments=moments_of(model),
            streams=streams,
            warmup=warmup,
            steps=10,
        )
        assert found.bits == pytest.approx(still.bits, rel=1e-12)
        assert (found.characters, found.streams, found.warmup) == (203, still.streams, still.warmup)


@pytest.mark.parametrize("name", MODELS)
def test_dynamic_learns_a_repetitive_text_and_leaves_the_model(name: str) -> None:
    model, text = model_of(MODELS[name]), np.frombuffer(b"abracadabra " * 60, np.uint8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    still = score(model, text, streams=1, warmup=0)
    learned = score_dynamic(model, text, learning_rate=0.1, decay=0.0, second_moments=None, steps=10)
    assert learned.bpc < 0.6 * still.bpc
    assert learned.characters == len(text)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert score(model, text, streams=1, warmup=0) == still
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("with_moments", [False, True])
def test_dynamic_follows_the_rule(with_moments: bool) -> None:
    """Krause et al. 2018: score; w += decay * rms / mean_rms * (w0 - w) - rate * gradient / rms."""
    model, text, rate, decay, steps = model_of(), text_of(50), 1e-3, 0.1, 10
    moments = moments_of(model) if with_moments else None
    twin = model_of().eval()
    twin.load_state_dict(model.state_dict())
    weights = dict(twin.named_parameters())
    rms = {k: moments[k].sqrt() if moments is not None else torch.ones_like(w) for k, w in weights.items()}
    mean = torch.cat([r.flatten() for r in rms.values()]).mean()
    floor = 0.1 * mean if moments is not None else 0.0
    expected, state = 0.0, None
    inputs = torch.tensor([10, *text[:-1].tolist()])
    for start in range(0, 50, steps):
        logits_TBV, state = twin(inputs[start : start + steps, None], state)
        assert isinstance(state, tuple)
        state = (state[0].detach(), state[1].detach())
        target = torch.tensor(text[start : start + steps].tolist())
        loss = torch.nn.functional.cross_entropy(logits_TBV[:, 0], target) / math.log(2)
        expected += loss.item() * steps
        twin.zero_grad()
        loss.backward()
        for key, w in weights.items():
            assert w.grad is not None
            back = decay * rms[key] / mean * (model.get_parameter(key).detach() - w.detach())
            w.data += back - rate * w.grad / (rms[key] + floor)
    found = score_dynamic(model, text, learning_rate=rate, decay=decay, second_moments=moments, steps=steps)
    assert found.bits == pytest.approx(expected, rel=1e-9)
    assert found.bits != pytest.approx(score(model, text, streams=1, warmup=0).bits, rel=1e-4)


def test_dynamic_with_steps_of_nothing_is_static() -> None:
    model, text = model_of(), text_of(60)
    found = score_dynamic(model, text, learning_rate=0.0, decay=0.5, second_moments=None, steps=10)
    assert found.bits == pytest.approx(score(model, text, streams=1, warmup=0).bits, rel=1e-9)


def test_dynamic_at_too_large_a_rate_ends_and_says_where() -> None:
    model = model_of().float()
    moments = {name: torch.full_like(p, 1e-30) for name, p in model.named_parameters()}
    with pytest.raises(RunFailed, match="not finite after 10 bytes"):
        score_dynamic(model, text_of(60), learning_rate=1e30, decay=0.0, second_moments=moments, steps=10)


# ----------------------------------------------------------------------------------------- gfrnn-evaluate


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an untrained model, with second moments."""
    settings = dataclasses.replace(preset("demo"), model=SMALL)
    model = LanguageModel(SMALL)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moments = {name: torch.full_like(p, 1e-4) for name, p in weights.items()}
    run = RunFolder(tmp_path_factory.mktemp("evaluate") / "run [1]")
    run.create(settings, {}, "0" * 32)
    trainer = {"settings": settings.to_json()}
    run.save(Checkpoint(weights, {"exp_avg_sq": moments}, trainer=trainer), 5, best=True, keep_last=1)
    return run.path


def test_evaluate_a_file(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(text_of(500).tobytes())
    found = script(
        *("evaluate", run_folder, "--text-file", tmp_path / "text", "--streams", "4", "--warmup", "10"),
        *("--json", tmp_path / "out.json"),
    )
    assert (found.returncode, found.stderr) == (0, "")
    results = json.loads((tmp_path / "out.json").read_text())
    model = LanguageModel(SMALL)
    model.load_state_dict(torch_weights(run_folder))
    expected = score(model, text_of(500), streams=4, warmup=10, seam=1000)
    assert results["bpc"] == pytest.approx(expected.bpc, rel=1e-5)
    assert results["bpc_added_by_streams"] == pytest.approx(expected.seam_bpc, abs=1e-5)
    assert {key: results[key] for key in ("characters", "dynamic", "streams", "warmup", "device")} == {
        "characters": 500,
        "dynamic": False,
        "streams": 4,
        "warmup": 10,
        "device": "cpu",
    }
    assert f"{results['bpc']:.4f}" in found.stdout
    assert "step-00000005" in found.stdout
    assert "run [1]" in found.stdout
    still = script("evaluate", run_folder, "--text-file", tmp_path / "text", "--dynamic-steps", "5")
    assert still.stderr == "note: --dynamic-steps has no effect without --dynamic\n"


def test_evaluate_says_that_a_rate_spoils_the_model(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"abracadabra " * 40)
    learning = ("evaluate", run_folder, "--text-file", tmp_path / "text", "--streams", "1", "--dynamic")
    found = script(*learning, "--dynamic-learning-rate", "1")
    assert found.returncode == 0
    assert found.stderr.startswith("note: --dynamic-learning-rate 1 spoils the model: text at ")
    assert script(*learning, "--dynamic-learning-rate", "0.01").stderr == ""


def torch_weights(run_folder: Path) -> dict[str, Tensor]:
    from gfrnn.runs import find_checkpoint, load_checkpoint

    return load_checkpoint(find_checkpoint(run_folder)).weights


def test_evaluate_the_corpus_and_dynamically(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    corpus.write_bytes(b"To be, or not to be. " * 500)
    common: dict[str, Any] = {"run": str(run_folder), "corpus_file": corpus, "streams": 2, "warmup": 10}
    still = evaluate(EvaluateSettings(**common))
    learned = evaluate(EvaluateSettings(**common, dynamic=True, dynamic_learning_rate=1e-2))
    assert still["characters"] == learned["characters"] == 1050
    for key in ("valid_bpc", "test_bpc"):
        assert learned[key] < 0.9 * still[key]
    assert (still["dynamic"], learned["dynamic"]) == (False, True)
    assert "test, dynamic" in capsys.readouterr().out


def test_progress_is_a_line_now_and_then_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with progress_bar("valid") as bar:
        for part in range(1, 101):
            clock[0] += 1
            bar(part / 100)
    assert capsys.readouterr().err == "valid: 31% scored\nvalid: 62% scored\nvalid: 93% scored\n"


def test_evaluate_refuses_an_empty_file(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="is empty"):
        evaluate(EvaluateSettings(run=str(run_folder), text_file=tmp_path / "empty"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"streams": 0}, "--streams is 0"),
        ({"warmup": -1}, "--warmup is -1"),
        ({"dynamic_steps": 0}, "--dynamic-steps is 0"),
        ({"dynamic_learning_rate": math.nan}, "--dynamic-learning-rate is nan"),
        ({"dynamic_decay": 1.5}, "--dynamic-decay is 1.5"),
        ({"text_file": Path("a"), "corpus_file": Path("b")}, "--corpus-file has no effect beside --text-file"),
        ({"json": Path("/nowhere/at/all.json")}, "--json /nowhere/at/all.json: cannot be written"),
        ({"json": Path("/tmp")}, "--json /tmp: cannot be written"),
    ],
)
def test_evaluate_refuses_flags_before_it_loads_anything(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        _validate(EvaluateSettings(run="x", **flags))
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
