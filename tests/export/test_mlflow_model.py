"""The step in MLflow: registered by to_onnx.py, and answering behind `mlflow models serve`."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
from exported import SMALL, encoder_decoder, language_model
from test_to_onnx import TEXT, save_run, to_onnx

from gfrnn.config import PROGRAM_SYMBOLS, UserError, preset
from gfrnn_onnx import Session
from gfrnn_onnx.mlflow_model import register
from launch import BIN, as_from_a_terminal, environment, free_port


@pytest.fixture(autouse=True)
def tracking(tmp_path: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shutil.copy(mlflow_tables, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)  # where a new store puts its files
    return uri


def test_registered_it_answers_a_step(
    tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run", dataclasses.replace(preset("demo"), model=SMALL), language_model(spread=1.0))
    (tmp_path / "text").write_bytes(TEXT)
    flags = [run, "--text-file", tmp_path / "text", "--output", tmp_path / "m.onnx"]
    to_onnx(monkeypatch, *flags, "--register", "bytes", "--triton", tmp_path / "triton")
    assert (tmp_path / "triton/m/config.pbtxt").exists()
    serve = "mlflow models serve -m models:/bytes/1 --env-manager local"
    assert f"to serve it: MLFLOW_TRACKING_URI={tracking} {serve}\n" in capsys.readouterr().err
    client = mlflow.MlflowClient(tracking)
    assert client.get_model_version("bytes", "1").status == "READY"
    signature = mlflow.models.get_model_info("models:/bytes/1").signature
    assert {spec.name: spec.shape for spec in signature.inputs} == {
        "token": (-1,),
        "h": (-1, 3, 24),
        "c": (-1, 3, 24),
    }
    assert [spec.name for spec in signature.outputs] == ["logits", "h_next", "c_next"]

    port = free_port()
    command = [BIN / "mlflow", "models", "serve", "-m", "models:/bytes/1", "-p", str(port), "--env-manager", "local"]
    log = (tmp_path / "serve.log").open("w")
    server = subprocess.Popen(
        [*map(str, command)],
        env=environment(MLFLOW_TRACKING_URI=tracking, PATH=f"{BIN}:{os.environ['PATH']}"),
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=as_from_a_terminal,
    )
    try:
        session = Session(tmp_path / "m.onnx", "cpu")
        _, state = session.step([10, 10])
        expected, after = session.step([97, 98], state)
        h, c = state.arrays()
        body = {"inputs": {"token": [97, 98], "h": h.tolist(), "c": c.tolist()}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        until = time.monotonic() + 180
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    found = json.load(answer)["predictions"]
                break
            except (ConnectionError, urllib.error.URLError) as error:
                if isinstance(error, urllib.error.HTTPError) or time.monotonic() > until:
                    pytest.fail(f"{error}: {(tmp_path / 'serve.log').read_text()}")
                time.sleep(0.3)
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # mlflow's own end leaves its server alive
        server.wait(30)
    np.testing.assert_allclose(found["logits"], expected, atol=1e-5)
    for name, part in zip(("h_next", "c_next"), after.arrays(), strict=True):
        np.testing.assert_allclose(found[name], part, atol=1e-5)


def test_both_halves_of_programs_in_the_run_s_own_mlflow_run(
    tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dataclasses.replace(SMALL, vocab_size=len(PROGRAM_SYMBOLS))
    run = save_run(tmp_path / "p", dataclasses.replace(preset("programs-demo"), model=model), encoder_decoder())
    mlflow.set_tracking_uri(tracking)
    with mlflow.start_run() as own:
        pass
    (run / "mlflow.json").write_text(json.dumps({"run_id": own.info.run_id, "marks": []}))
    to_onnx(monkeypatch, run, "--output", tmp_path / "step", "--register", "sums")
    client = mlflow.MlflowClient(tracking)
    for half in ("encoder", "decoder"):
        assert client.get_model_version(f"sums-{half}", "1").run_id == own.info.run_id
    assert client.get_run(own.info.run_id).info.status == "FINISHED"


def test_a_store_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="--register x: MLflow at http://127") as caught:
        register(tmp_path / "m.onnx", "x", tmp_path)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
