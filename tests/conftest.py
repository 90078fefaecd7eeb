"""What every test runs under, set before torch or datasets is imported; and what takes long to make, made once."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are tiny, and tests share the machine with the processes they start
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("MLFLOW_TRACKING_URI", None)

from collections.abc import Iterator
from pathlib import Path

import pytest

import launch


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    launch.end_all()


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with its tables and no run, to be copied to where one is wanted: making them takes seconds."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("tables") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path
