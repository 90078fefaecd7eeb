"""Imports point one way, and whoever wants the layer alone needs none of what training needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from launch import ROOT, environment

PACKAGE = ROOT / "src/gfrnn"
ORDER = ("config", "shipped", "cli", "nn", "data", "runs", "training", "scaling")
"""config <- nn <- data <- runs <- training <- scaling; cli and shipped are above config alone."""


def imported(path: Path) -> set[str]:
    """Parts of gfrnn that a file imports anywhere, in functions and for type checkers too."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    names = [module.split(".") for module in modules]
    return {name[1] for name in names if name[0] == "gfrnn"}


def test_every_part_has_its_place() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("part", ORDER)
def test_imports_point_one_way(part: str) -> None:
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else sorted((PACKAGE / part).rglob("*.py"))
    assert files
    allowed = {"__version__", *ORDER[: ORDER.index(part) + 1]}
    if part in ("nn", "data", "runs"):
        allowed.remove("cli")  # a library does not end programs
    for path in files:
        assert imported(path) <= allowed, path


def test_the_entry_scripts_are_a_few_lines_that_nothing_imports() -> None:
    scripts = sorted((ROOT / "src").glob("*.py"))
    assert {path.stem for path in scripts} >= {"train", "evaluate", "sample", "ship", "study"}
    for path in scripts:
        assert imported(path) == {"scaling" if path.stem == "study" else "training"}
        assert len(path.read_text().splitlines()) < 10


def loaded_by(code: str, *modules: str) -> list[str]:
    """Which of the modules a program has loaded at its end."""
    code = f"{code}\nimport sys; print(*sorted({set(modules)!r} & set(sys.modules)))"
    return subprocess.check_output([sys.executable, "-c", code], text=True, env=environment()).split()


def test_the_layer_needs_torch_alone() -> None:
    extras = ("deepspeed", "datasets", "mlflow", "tyro", "rich", "safetensors", "filelock", "psutil", "pyarrow")
    assert loaded_by("import gfrnn.nn", "torch", *extras) == ["torch"]


def test_settings_and_the_command_line_need_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "deepspeed", "datasets", "mlflow", "pyarrow", "safetensors", "rich")
    assert loaded_by("import gfrnn.config, gfrnn.cli, gfrnn.training.main", *heavy) == []
