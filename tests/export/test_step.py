"""The exported step against the torch model it is made of, for every option."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported import SMALL, encoder_decoder, language_model, save_step

from gfrnn.config import PROGRAM_SYMBOLS, TARGET_SYMBOLS, ModelSettings
from gfrnn_onnx.precision import OPERATORS, PRECISIONS, Precision
from gfrnn_onnx.runner import Step
from gfrnn_onnx.state import State
from gfrnn_onnx.step import add_bpc
from gfrnn_onnx.verify import check_operators, differences, rounding

OPTIONS = {
    "unit": ("lstm", "gru", "tanh"),
    "feedback": ("gated", "full", "none"),
    "unit_gates": ("all", "own"),
    "input_skips": (False, True),
    "output_skips": (False, True),
    "residual": (False, True),
    "layer_norm": (False, True),
    "embedding_size": (0, 7),
    "hidden_bias": (False, True),
    "cap_input_gate": (False, True),
}
ONLY = {"hidden_bias": "gru", "cap_input_gate": "lstm"}
"""The unit of an option that one alone has."""


def pairs(options: dict[str, Any]) -> set[Any]:
    return set(itertools.combinations(options.items(), 2))


def every_pair() -> list[dict[str, Any]]:
    """Few combinations in which every value of an option meets every value of each other."""
    all_of_them = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
    possible = [each for each in all_of_them if all(each["unit"] == unit for key, unit in ONLY.items() if each[key])]
    to_meet = set().union(*map(pairs, possible))
    chosen = []
    while to_meet:
        chosen.append(max(possible, key=lambda each: len(pairs(each) & to_meet)))
        to_meet -= pairs(chosen[-1])
    return chosen


def name(options: dict[str, Any]) -> str:
    return "-".join(f"{key}" if value is True else str(value) for key, value in options.items() if value is not False)


@pytest.mark.parametrize("options", every_pair(), ids=name)
def test_equals_the_model_for_every_option(options: dict[str, Any], tmp_path: Path) -> None:
    model = language_model(dataclasses.replace(SMALL, **options), spread=1.3)
    step = Step(save_step(model, tmp_path / "step.onnx"), "cpu")
    found = differences(step, model)
    assert found.one_step <= 1e-5
    assert found.carried <= max(1e-4, 10 * rounding(step, model))


def test_equals_the_multiplicative_rnn(tmp_path: Path) -> None:
    for embedding_size in (0, 5):
        settings = ModelSettings(unit="mrnn", num_layers=1, hidden_size=24, embedding_size=embedding_size)
        model = language_model(settings, spread=1.0)
        step = Step(save_step(model, tmp_path / "step.onnx"), "cpu")
        assert step.shape == (1, 24)
        found = differences(step, model)
        assert found.one_step <= 1e-5
        assert found.carried <= max(1e-4, 10 * rounding(step, model))


@pytest.mark.parametrize("unit", ["lstm", "gru"])
def test_equals_both_halves_of_a_model_of_programs(unit: str, tmp_path: Path) -> None:
    model = encoder_decoder(unit=unit)
    encoder = Step(save_step(model.encoder, tmp_path / "e.onnx", kind="encoder", symbols=PROGRAM_SYMBOLS), "cpu")
    decoder = Step(save_step(model.decoder, tmp_path / "d.onnx", kind="decoder", symbols=TARGET_SYMBOLS), "cpu")
    assert encoder.outputs == ["h_next", "c_next"][: 1 + (unit == "lstm")]
    assert max(differences(encoder, model.encoder)) <= 1e-4
    assert max(differences(decoder, model.decoder)) <= 1e-4


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_unrolled_it_is_the_same_steps(precision: Precision, tmp_path: Path) -> None:
    model = language_model()
    one = Step(save_step(model, tmp_path / "1.onnx", precision=precision), "cpu")
    five = Step(save_step(model, tmp_path / "5.onnx", precision=precision, unroll=5), "cpu")
    symbols_BT = np.random.default_rng(0).integers(0, 256, (3, 10))
    state = other = None
    for begin in (0, 5):
        logits_B5V, state = five(symbols_BT[:, begin : begin + 5], state)
        for k in range(5):
            logits_BV, other = one(symbols_BT[:, begin + k], other)
            np.testing.assert_allclose(logits_B5V[:, k], logits_BV, atol=1e-5)
    for ours, theirs in zip(state.arrays(), other.arrays(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with pytest.raises(ValueError, match=r"this model reads \[batch, 5\]"):
        five(symbols_BT[:, 0])


def test_gates_are_those_of_the_equations(tmp_path: Path) -> None:
    """g^{i->j} = sigmoid(w h_t^{j-1} + u h*_{t-1}), of layer 1 from the first step's states by hand."""
    model = language_model(dataclasses.replace(SMALL, input_skips=False, unit="tanh"))
    path = save_step(model, tmp_path / "step.onnx", gates=True)
    step = Step(path, "cpu")
    assert step.has_gates
    h_BLH = np.random.default_rng(0).uniform(-1, 1, (2, 3, 24)).astype(np.float32)
    symbols = np.array([7, 200])
    gates_BLL, h_next = step.session.run(["gates", "h_next"], {"token": symbols, "h": h_BLH})
    assert gates_BLL.shape == (2, 3, 3)
    with torch.no_grad():
        rnn, L, H = model.rnn, 3, 24
        for j in (1, 2):
            below = torch.from_numpy(h_next[:, j - 1])
            a = below @ rnn.get_parameter(f"weight_ih_l{j}")[H:].T + rnn.get_parameter(f"bias_l{j}")[H:]
            a = a + torch.from_numpy(h_BLH.reshape(2, L * H)) @ rnn.get_parameter(f"weight_hg_l{j}").T
            np.testing.assert_allclose(gates_BLL[:, j], torch.sigmoid(a), atol=1e-6)


def test_names_shapes_and_opset(tmp_path: Path) -> None:
    model = onnx.load(save_step(language_model(), tmp_path / "step.onnx", gates=True))
    onnx.checker.check_model(model, full_check=True)

    def shape(value: onnx.ValueInfoProto) -> list[int | str]:
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    assert {v.name: shape(v) for v in model.graph.input} == {
        "token": ["batch"],
        "h": ["batch", 3, 24],
        "c": ["batch", 3, 24],
    }
    assert {v.name: shape(v) for v in model.graph.output} == {
        "logits": ["batch", 256],
        "h_next": ["batch", 3, 24],
        "c_next": ["batch", 3, 24],
        "gates": ["batch", 3, 3],
    }
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 23)]
    # what reads all layers at t-1 ungated is one product; of each layer there are two more, the lowest has one
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == 1 + 3 + 2 + 1


def test_what_is_added_to_a_file_is_read_as_part_of_it(tmp_path: Path) -> None:
    path = save_step(language_model(), tmp_path / "step.onnx")
    before = path.read_bytes()
    assert Step(path, "cpu").metadata.bpc == {}
    assert "gfrnn.bpc" not in {each.key for each in onnx.load(path).metadata_props}
    add_bpc(path, {"valid": 2.5})
    assert path.read_bytes().startswith(before)
    onnx.checker.check_model(str(path), full_check=True)
    whole = onnx.load(path)
    onnx.checker.check_model(whole, full_check=True)
    assert whole.graph == onnx.load_from_string(before).graph
    assert [each.key for each in whole.metadata_props].count("gfrnn.bpc") == 1
    step = Step(path, "cpu")
    assert step.metadata.bpc == {"valid": 2.5}
    assert step.metadata.kind == "text"


# Precisions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_cost_what_they_may(precision: Precision, tmp_path: Path) -> None:
    model = language_model(dataclasses.replace(SMALL, hidden_size=96), spread=1.0)
    path = save_step(model, tmp_path / "step.onnx", precision=precision)
    check_operators(path, precision)
    found = differences(Step(path, "cpu"), model)
    most = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 3e-2, "int8": 0.1, "int4": 0.5}[precision]
    assert found.carried <= most
    assert (found.carried > 1e-5) == (precision != "fp32")  # it is not fp32 under another name
    exact = save_step(model, tmp_path / "fp32.onnx").stat().st_size
    part = {"fp32": 1.0, "fp16": 0.52, "bf16": 0.52, "int8": 0.37, "int4": 0.31}[precision]  # tables keep 16 bits
    assert path.stat().st_size <= part * exact + 20_000


def test_operators_are_checked(tmp_path: Path) -> None:
    path = save_step(language_model(), tmp_path / "step.onnx")
    for precision in ("int8", "int4"):
        with pytest.raises(AssertionError, match="MatMul"):
            check_operators(path, precision)
    assert len(set(OPERATORS.values())) == 3


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_row_has_the_same_bits_in_any_company(precision: Precision, tmp_path: Path) -> None:
    model = language_model(dataclasses.replace(SMALL, hidden_size=70))
    step = Step(save_step(model, tmp_path / "step.onnx", precision=precision), "cpu")
    random = np.random.default_rng(0)
    symbols = random.integers(0, 256, 64)
    states = [random.uniform(-1, 1, (64, 3, 70)).astype(np.float32) for _ in range(2)]

    def run(rows: np.ndarray) -> list[np.ndarray]:
        logits, after = step(symbols[rows], State.of(*(part[rows] for part in states)))
        return [logits, *after.arrays()]

    together = run(np.arange(64))
    for count in (1, 2, 3, 8, 13, 33):
        rows = random.permutation(64)[:count]
        for alone, beside in zip(run(rows), together, strict=True):
            np.testing.assert_array_equal(alone, beside[rows])


def test_int8_of_rows_of_very_different_size(tmp_path: Path) -> None:
    """Each row has its own scale: small states beside large ones lose nothing, and rows of zeros are right."""
    model = language_model(dataclasses.replace(SMALL, unit="gru", hidden_size=64))
    exact = Step(save_step(model, tmp_path / "a.onnx"), "cpu")
    step = Step(save_step(model, tmp_path / "b.onnx", precision="int8"), "cpu")
    h_BLH = np.random.default_rng(0).uniform(-1, 1, (3, 3, 64)).astype(np.float32) * np.array([[[1]], [[1e-3]], [[0]]])
    logits, _ = step(np.array([1, 2, 3]), State.of(h_BLH))
    expected, _ = exact(np.array([1, 2, 3]), State.of(h_BLH))
    assert np.abs(logits - expected).max(axis=1) == pytest.approx([0, 0, 0], abs=0.2)
