"""Text drawn from a model: the right distribution, from the right state, the same for the same seed."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gfrnn.config import ModelSettings, UserError, preset
from gfrnn.nn import LanguageModel
from gfrnn.runs import Checkpoint, RunFolder
from gfrnn.training import sample
from gfrnn.training.sample import device_of, generate, generate_all
from launch import ROOT, environment, script

SMALL = ModelSettings(num_layers=2, hidden_size=6, output_skips=True)


def model_of(seed: int = 0, spread: float = 3.0) -> LanguageModel:
    """With weights large enough for its texts to wander."""
    torch.manual_seed(seed)
    model = LanguageModel(SMALL)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (spread if name.startswith("softmax") else 1.5))
    return model


def next_logits(model: LanguageModel, text: bytes) -> Tensor:
    """Of the byte after text, all of it read again, one step at a time: [V]."""
    state = None
    with torch.no_grad():
        for symbol in b"\n" + text:
            logits_11V, state = model(torch.tensor([[symbol]]), state)
    last: Tensor = logits_11V[0, 0].double()
    return last


@pytest.mark.parametrize(
    ("prompt", "length"), [(b"", 12), (b"The ", 12), (b"\xff\x00\xfe", 12), (bytes(range(256)) * 9, 2)]
)
def test_temperature_0_takes_the_most_likely_byte(prompt: bytes, length: int) -> None:
    model, expected = model_of(), b""
    for _ in range(length):
        expected += bytes([int(next_logits(model, prompt + expected).argmax())])
    assert len(set(expected)) > 1
    for seed in (0, 1):
        assert generate(model, prompt, length, temperature=0, seed=seed) == expected


def test_tiny_temperatures_and_tiny_nuclei_take_it_too() -> None:
    model = model_of()
    greedy = generate(model, b"x", 30, temperature=0)
    assert generate(model, b"x", 30, top_p=1e-9, seed=5) == greedy
    assert generate(model, b"x", 30, temperature=1e-320, seed=5) == greedy


def test_a_seed_means_one_text() -> None:
    model = model_of(spread=1.0)
    text = generate(model, b"x", 60, seed=7)
    torch.rand(5)  # whatever else is drawn meanwhile
    assert generate(model, b"x", 60, seed=7) == text
    assert generate(model, b"x", 60, seed=8) != text
    assert generate(model, b"x", 20, seed=7) == text[:20]
    assert generate(model, b"y", 60, seed=7) != text


def test_no_length_is_no_text() -> None:
    assert generate(model_of(), b"x", 0) == b""


DRAWS = 2000


def far(freedom: int) -> float:
    """Upper 0.1 % point of chi-square (Wilson and Hilferty): fixed seeds must not have to be lucky ones."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(found: Counter[int], probability_V: Tensor) -> tuple[float, int]:
    """(statistic, degrees of freedom), bytes expected fewer than ten times put together."""
    expected_V = probability_V * DRAWS
    common = [v for v in range(256) if expected_V[v] >= 10]
    cells = [(found[v], expected_V[v].item()) for v in common]
    cells.append((DRAWS - sum(n for n, _ in cells), DRAWS - sum(e for _, e in cells)))
    return sum((n - e) ** 2 / e for n, e in cells if e > 1e-9), len(cells) - 1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_bytes_are_drawn_as_softmax_says(temperature: float) -> None:
    model = model_of(seed=3)
    found = Counter(generate(model, b"ab", 1, temperature=temperature, seed=seed)[0] for seed in range(DRAWS))
    statistic, freedom = chi_square(found, torch.softmax(next_logits(model, b"ab") / temperature, 0))
    assert freedom >= 3
    assert statistic < far(freedom)
    wrong, freedom = chi_square(found, torch.softmax(next_logits(model, b"ab") / (temperature * 1.2), 0))
    assert wrong > 2 * far(freedom)  # the test can tell


def test_top_p_draws_from_the_smallest_set_that_has_it() -> None:
    model, top_p = model_of(seed=3), 0.8
    probability_V = torch.softmax(next_logits(model, b"ab"), 0)
    nucleus: list[int] = []
    for symbol in probability_V.argsort(descending=True).tolist():
        nucleus.append(symbol)
        if probability_V[nucleus].sum() >= top_p:
            break
    assert len(nucleus) >= 3
    kept_V = torch.zeros_like(probability_V)
    kept_V[nucleus] = probability_V[nucleus] / probability_V[nucleus].sum()
    found = Counter(generate(model, b"ab", 1, top_p=top_p, seed=seed)[0] for seed in range(DRAWS))
    assert set(found) == set(nucleus)
    statistic, freedom = chi_square(found, kept_V)
    assert statistic < far(freedom)


# ------------------------------------------------------------------------------------------- gfrnn-sample


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = dataclasses.replace(preset("demo"), model=SMALL)
    run = RunFolder(tmp_path_factory.mktemp("sample") / "run")
    run.create(settings, {}, "0" * 32)
    checkpoint = Checkpoint(dict(model_of().state_dict()), trainer={"settings": settings.to_json()})
    run.save(checkpoint, 5, best=True, keep_last=1)
    return run.path


def test_the_prompts_bytes_come_back_as_they_were(run_folder: Path) -> None:
    prompt = b"caf\xe9 \xff\xfe \xe2\x82\xac"  # latin-1, no encoding at all, UTF-8
    for extra in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        command: list[str | bytes | Path] = [sys.executable, ROOT / "src/sample.py", run_folder, "--prompt", prompt]
        command += ["--length", "40", "--seed", "3", "--top-p", "0.9"]
        found = subprocess.run(command, capture_output=True, env=environment(**extra))
        assert found.stderr == b""
        assert found.stdout == prompt + generate(model_of(), prompt, 40, seed=3, top_p=0.9) + b"\n"


def test_no_run_is_one_line(tmp_path: Path) -> None:
    found = script("sample", tmp_path / "nope")
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert found.stderr.startswith(f"error: {tmp_path / 'nope'} ")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--length", "-1"),
        ("--length", str(10**20)),
        ("--temperature", "-0.5"),
        ("--temperature", "nan"),
        ("--top-p", "0.0"),
        ("--top-p", "1.1"),
        ("--seed", "-1"),
        ("--seed", str(2**63)),
    ],
)
def test_flags_out_of_range(flag: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py", "runs/x", flag, value])
    with pytest.raises(UserError) as caught:
        sample._main()
    assert str(caught.value).startswith(f"{flag} is {value}; it must ")


def test_device_of() -> None:
    assert device_of("cpu") == "cpu"
    assert device_of("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "meta", "cuda:", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name} is ") as caught:
            device_of(name)
        assert "\n" not in str(caught.value)


def test_rows_side_by_side_are_what_one_alone_is() -> None:
    model = model_of()
    prompts = [b"abc", b"xyz", b"\xff\x00\xfe"]
    greedy = generate_all(model, prompts, 20, temperature=0)
    assert greedy == [generate(model, prompt, 20, temperature=0) for prompt in prompts]
    assert len(set(greedy)) > 1
    drawn = generate_all(model_of(spread=1.0), [b"x"] * 5, 40, seed=3)
    assert len(set(drawn)) == 5  # each has draws of its own
    assert drawn == generate_all(model_of(spread=1.0), [b"x"] * 5, 40, seed=3)
    long = [bytes(range(256)) * 9] * 2  # read in parts
    assert generate_all(model, long, 2, temperature=0)[1] == generate(model, long[0], 2, temperature=0)
    with pytest.raises(ValueError, match="one length"):
        generate_all(model, [b"a", b"ab"], 5)
