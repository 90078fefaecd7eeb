"""A model repository for NVIDIA Triton Inference Server: one step, whose state the server itself carries.

Its sequence batcher keeps h and c of each sequence (implicit state) and steps sequences of several clients together;
clients send a symbol and get logits. Triton's dimensions leave a leading batch axis out. It pairs states by the order
of their names, so they come sorted here, and starts a sequence from garbage unless told otherwise (initial_state).
Source: Triton's model configuration (model_config.proto) and its issue 8586.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import onnx

from gfrnn.config import UserError
from gfrnn.runs import hidden_folder
from gfrnn_onnx.names import LOGITS, TOKEN, WEIGHTS

_MOST_ROWS = 64
_MOST_SEQUENCES = 1024
_IDLE_MICROSECONDS = 600_000_000
_TYPES: dict[int, str] = {onnx.TensorProto.INT64: "TYPE_INT64", onnx.TensorProto.FLOAT: "TYPE_FP32"}


def write_triton(model: Path, repository: Path) -> Path:
    """Writes REPOSITORY/NAME/config.pbtxt and NAME/1/model.onnx, NAME being the file's, and returns NAME's folder.

    model: a step.onnx of text. An earlier one of the same name is replaced as a whole. Raises UserError where something
    else is in the place.
    """
    target, name = check_target(model, repository), model.stem
    repository.mkdir(parents=True, exist_ok=True)
    with hidden_folder(target) as folder:
        made = folder / "new"
        version = made / "1"
        version.mkdir(parents=True)
        shutil.copyfile(model, version / "model.onnx")
        beside = model.with_name(model.name + WEIGHTS)  # by which name the model knows it
        if beside.exists():
            shutil.copyfile(beside, version / beside.name)
        (made / "config.pbtxt").write_text(_config(name, onnx.load(model, load_external_data=False)))
        if target.exists():
            target.rename(folder / "old")
        made.rename(target)
    return target


def check_target(model: Path, repository: Path) -> Path:
    """Where a model's folder will be. Raises UserError where something else is."""
    target = repository.resolve() / model.stem
    if target.exists() and not (target / "config.pbtxt").is_file():
        raise UserError(f"--triton {repository}: {target} is there and is no model of Triton's; give another folder")
    return target


def _config(name: str, model: onnx.ModelProto) -> str:
    inputs, outputs = ({value.name: value for value in values} for values in (model.graph.input, model.graph.output))
    unrolled = _dims(inputs[TOKEN])
    # of one symbol the model takes [batch], which has no dimension besides the batch
    token = f"dims: {unrolled}" if unrolled else "dims: [ 1 ]\n    reshape: { shape: [ ] }"
    states = sorted(each for each in inputs if each != TOKEN)
    shown = [each for each in outputs if each not in {f"{state}_next" for state in states}]
    assert LOGITS in shown
    return f"""# Written by gfrnn's to_onnx.py: one step of a recurrent model, states carried by Triton.
name: "{name}"
backend: "onnxruntime"
max_batch_size: {_MOST_ROWS}
input [
  {{
    name: "{TOKEN}"
    data_type: TYPE_INT64
    {token}
  }}
]
output [
{_joined(_tensor(outputs[each]) for each in shown)}
]
sequence_batching {{
  max_sequence_idle_microseconds: {_IDLE_MICROSECONDS}
  oldest {{
    max_candidate_sequences: {_MOST_SEQUENCES}
    max_queue_delay_microseconds: 500
  }}
  state [
{_joined(_state(inputs[each], outputs[f"{each}_next"]) for each in states)}
  ]
}}
"""


def _joined(blocks: Iterable[str]) -> str:
    return ",\n".join(blocks)


def _dims(value: onnx.ValueInfoProto) -> str:
    """A value's dimensions but the batch, as protobuf text; empty if it has none."""
    dims = [str(dim.dim_value) for dim in value.type.tensor_type.shape.dim[1:]]
    return f"[ {', '.join(dims)} ]" if dims else ""


def _tensor(value: onnx.ValueInfoProto) -> str:
    return f"""  {{
    name: "{value.name}"
    data_type: {_TYPES[value.type.tensor_type.elem_type]}
    dims: {_dims(value)}
  }}"""


def _state(before: onnx.ValueInfoProto, after: onnx.ValueInfoProto) -> str:
    kind, dims = _TYPES[before.type.tensor_type.elem_type], _dims(before)
    return f"""    {{
      input_name: "{before.name}"
      output_name: "{after.name}"
      data_type: {kind}
      dims: {dims}
      initial_state {{
        name: "zero {before.name}"
        data_type: {kind}
        dims: {dims}
        zero_data: true
      }}
    }}"""
