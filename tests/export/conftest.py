"""A small model and a server of it, for each module that asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from exported import language_model, save_step
from serving import Server, serving

from gfrnn_onnx import Session


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_step(language_model(), tmp_path_factory.mktemp("model") / "small.onnx", gates=True)


@pytest.fixture(scope="module")
def session(model: Path) -> Session:
    return Session(model, "cpu", threads=1)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """Its limits are such that a request can take long enough for anything to happen meanwhile."""
    limits = ["--max-body-bytes", "1000000", "--max-prompt-bytes", "900000", "--max-tokens", "1000000"]
    with serving(model, *limits) as started:
        yield started
