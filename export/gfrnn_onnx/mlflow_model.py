"""An exported step in MLflow: logged in its onnx flavour, with signature and example, and registered under a name."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from gfrnn.cli import say
from gfrnn.config import UserError
from gfrnn.runs import RunFolder
from gfrnn_onnx.names import DECODER, ENCODER, WEIGHTS

_DTYPES: dict[int, np.dtype[Any]] = {
    onnx.TensorProto.INT64: np.dtype(np.int64),
    onnx.TensorProto.FLOAT: np.dtype(np.float32),
}


def register(model: Path, name: str, run_dir: Path) -> list[str]:
    """Logs a model to the MLflow run that follows a run folder (else to a new one) and registers it under a name.

    Of programs, both halves: NAME-encoder and NAME-decoder. Returns their addresses, models:/NAME/VERSION, and says how
    to serve them. Raises UserError if MLflow cannot be reached or does not take the name.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # its own 7 take minutes
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from mlflow.exceptions import MlflowException

    from gfrnn.training.mlflow_sender import tracking_uri, without_password

    # it tries the example, on CUDA first, and both it and ONNX Runtime say at length that there is none
    onnxruntime.set_default_logger_severity(4)
    logging.getLogger("mlflow").setLevel(logging.ERROR)

    uri = tracking_uri(run_dir)
    parts = {name: model}
    if model.is_dir():
        parts = {f"{name}-encoder": model / ENCODER, f"{name}-decoder": model / DECODER}
    try:
        mlflow.set_tracking_uri(uri)
        run_id = RunFolder(run_dir).mlflow_run_id()
        before = mlflow.get_run(run_id).info.status if run_id else "FINISHED"
        mlflow.start_run(run_id, run_name=None if run_id else run_dir.name)
        try:
            found = [_log(each, own) for own, each in parts.items()]
        finally:
            mlflow.end_run(before)
    except (MlflowException, OSError) as error:
        reason = without_password(" ".join(str(error).split())[:200])
        raise UserError(
            f"--register {name}: MLflow at {without_password(uri)} fails ({reason}); {model} is there"
        ) from error
    for each in found:
        store = f"MLFLOW_TRACKING_URI={shlex.quote(without_password(uri))}"
        say(f"to serve it: {store} mlflow models serve -m {shlex.quote(each)} --env-manager local")
    return found


def _log(path: Path, name: str) -> str:
    """Logs and registers one file."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    proto = onnx.load(path)

    def schema(values: Any) -> Schema:
        specs: list[ColSpec | TensorSpec] = []
        for value in values:
            kind = value.type.tensor_type
            shape = tuple(dim.dim_value or -1 for dim in kind.shape.dim)
            specs.append(TensorSpec(_DTYPES[kind.elem_type], shape, value.name))
        return Schema(specs)

    signature = ModelSignature(schema(proto.graph.input), schema(proto.graph.output))
    example = {
        spec.name: np.zeros([1 if size < 0 else size for size in spec.shape], spec.type) for spec in signature.inputs
    }
    logged = mlflow.onnx.log_model(
        proto,
        name="step",
        registered_model_name=name,
        signature=signature,
        input_example=example,
        pip_requirements=[f"{each}=={importlib.metadata.version(each)}" for each in ("mlflow", "onnx", _runtime())],
        save_as_external_data=path.with_name(path.name + WEIGHTS).exists(),
    )
    return f"models:/{name}/{logged.registered_model_version}"


def _runtime() -> str:
    """Which distribution of ONNX Runtime is installed."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    raise AssertionError("there is one, or nothing could have been checked")
