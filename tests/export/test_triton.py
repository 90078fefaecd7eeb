"""Triton's configuration, parsed by its own protobuf, against the model's real inputs and outputs."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import onnxruntime
import pytest
from exported import SMALL, language_model, save_step
from google.protobuf import text_format

from gfrnn.config import ModelSettings, UserError
from gfrnn_onnx.triton import write_triton


def triton_s_protobuf() -> ModuleType:
    """tritonclient's model_config_pb2; its package would import grpc, which wants an older protobuf than MLflow has."""
    folder = importlib.util.find_spec("tritonclient")
    assert folder is not None
    assert folder.submodule_search_locations is not None
    path = Path(next(iter(folder.submodule_search_locations))) / "grpc/model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model_config_pb2 = triton_s_protobuf()
TYPES = {"tensor(int64)": model_config_pb2.TYPE_INT64, "tensor(float)": model_config_pb2.TYPE_FP32}
MODELS = {
    "lstm": SMALL,
    "gru": dataclasses.replace(SMALL, unit="gru"),
    "mrnn": ModelSettings(unit="mrnn", num_layers=1, hidden_size=24),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unroll", [1, 4])
def test_says_what_the_model_has(name: str, unroll: int, tmp_path: Path) -> None:
    gates = name != "mrnn"
    model = save_step(language_model(MODELS[name]), tmp_path / f"{name}.onnx", unroll=unroll, gates=gates)
    folder = write_triton(model, tmp_path / "repository")
    assert folder == tmp_path / "repository" / name
    assert (folder / "1/model.onnx").read_bytes() == model.read_bytes()
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.name, config.backend) == (name, "onnxruntime")
    assert config.max_batch_size > 0

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs, outputs = ({each.name: each for each in values} for values in (session.get_inputs(), session.get_outputs()))
    states = config.sequence_batching.state
    # everything the model takes and gives is said once: as an input or output of clients, or as state
    assert sorted([i.name for i in config.input] + [s.input_name for s in states]) == sorted(inputs)
    assert sorted([o.name for o in config.output] + [s.output_name for s in states]) == sorted(outputs)
    for each in config.output:
        assert (list(each.dims), each.data_type) == (outputs[each.name].shape[1:], TYPES[outputs[each.name].type])
    (token,) = config.input
    if unroll == 1:  # Triton has no input without dimensions: [batch, 1], reshaped to [batch]
        assert (list(token.dims), token.HasField("reshape"), list(token.reshape.shape)) == ([1], True, [])
    else:
        assert (list(token.dims), token.HasField("reshape")) == ([4], False)
    assert token.data_type == model_config_pb2.TYPE_INT64
    for state in states:
        assert state.output_name == f"{state.input_name}_next"
        assert list(state.dims) == inputs[state.input_name].shape[1:] == outputs[state.output_name].shape[1:]
        (initial,) = state.initial_state
        assert initial.zero_data
        assert list(initial.dims) == list(state.dims)
        assert initial.data_type == state.data_type == model_config_pb2.TYPE_FP32
    # Triton pairs states by sorted names
    assert sorted(s.output_name for s in states) == [f"{name}_next" for name in sorted(s.input_name for s in states)]
    assert config.sequence_batching.WhichOneof("strategy_choice") == "oldest"
    assert config.sequence_batching.oldest.max_candidate_sequences >= config.max_batch_size


def test_replaces_its_own_and_nothing_else(tmp_path: Path) -> None:
    model = save_step(language_model(), tmp_path / "m.onnx")
    write_triton(model, tmp_path / "r")
    (tmp_path / "r/m/1/old").touch()
    write_triton(model, tmp_path / "r")
    assert sorted(path.name for path in (tmp_path / "r/m/1").iterdir()) == ["model.onnx"]
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["m"]
    (tmp_path / "other/m").mkdir(parents=True)
    (tmp_path / "other/m/thesis.tex").touch()
    with pytest.raises(UserError, match=r"is there and is no model of Triton's"):
        write_triton(model, tmp_path / "other")
    assert (tmp_path / "other/m/thesis.tex").exists()
