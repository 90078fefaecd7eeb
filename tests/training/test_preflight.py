"""What preflight says of nodes that cannot train together: real processes, one for each node."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gfrnn.training.preflight import Node, by_node, clocks_apart, compare
from launch import ROOT, start_ranks, warm_ranks

PREFLIGHT = ["-m", "gfrnn.training.preflight", "--output-dir"]


def preflight(
    folder: Path,
    *flags: str,
    extra: Callable[[int], dict[str, str]] = lambda rank: {},
    only: int | None = None,
    warm: bool = True,
) -> tuple[list[int], list[str], dict[str, Any]]:
    """Of two nodes: exit statuses, what each says, and preflight.json. PYTHONPATH in extra has no effect if warm."""

    def environment(rank: int) -> dict[str, str]:
        node = {"SLURMD_NODENAME": f"node{rank + 1}", "GFRNN_NODES": "node1 node2", "DS_ACCELERATOR": "cpu"}
        return {**node, "GFRNN_CONTROL": str(folder / "control"), "PYTHONPATH": str(ROOT / "src"), **extra(rank)}

    command = [*PREFLIGHT, folder / "run", *flags]
    if warm:
        ended = warm_ranks(command, 2, extra=environment, only=only)
        results = [(rank.returncode, rank.stderr) for rank in ended]
    else:
        ranks = start_ranks(command, 2, extra=environment, only=only)
        said = [rank.communicate(timeout=100)[1] for rank in ranks]
        results = [(rank.returncode, err) for rank, err in zip(ranks, said, strict=True)]
    found = json.loads((folder / "control/preflight.json").read_text())
    return [status for status, _ in results], [err for _, err in results], found


def test_two_nodes_that_are_alike(tmp_path: Path) -> None:
    statuses, said, found = preflight(tmp_path, warm=False)
    assert statuses == [0, 0], said
    assert "preflight: passed" in said[0]
    assert [node["name"] for node in found["nodes"]] == ["node1", "node2"]
    assert found["problems"] == []
    assert 0 < found["network"]["latency_s"] < 1
    assert found["network"]["bytes_per_second"] > 1e6


def test_another_version_of_a_package(tmp_path: Path) -> None:
    other = tmp_path / "packages/mlflow-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: mlflow\nVersion: 0.1\n")
    paths = {1: {"PYTHONPATH": f"{other.parent}:{ROOT / 'src'}"}}
    statuses, said, _ = preflight(tmp_path, extra=lambda rank: paths.get(rank, {}), warm=False)
    assert statuses == [2, 2]
    assert "preflight: error: node2: it has mlflow 0.1, node1 " in said[0]
    assert "have all nodes use one environment, GFRNN_PYTHON" in said[0]


def test_other_code(tmp_path: Path) -> None:
    """Of another commit, or not committed."""
    other = tmp_path / "checkout"
    shutil.copytree(ROOT / "src", other / "src", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "src/gfrnn/cli.py").open("a") as f:
        f.write("# a change\n")
    paths = {1: {"PYTHONPATH": str(other / "src")}}
    statuses, said, found = preflight(tmp_path, extra=lambda rank: paths.get(rank, {}), warm=False)
    assert statuses == [2, 2]
    commits = [node["commit"] for node in found["nodes"]]
    assert f"node2: its code is not that of node1 (commits None and {commits[0]}); have all nodes see one" in said[0]


def test_a_folder_that_nodes_do_not_share(tmp_path: Path) -> None:
    control = {1: {"GFRNN_CONTROL": str(tmp_path / "elsewhere")}}
    statuses, said, _ = preflight(tmp_path, extra=lambda rank: control.get(rank, {}))
    assert statuses == [2, 2]
    for node in ("node1", "node2"):
        assert f"error: {node}: {tmp_path / 'run'} is not the folder that the other nodes see there" in said[0]


def test_more_processes_than_cores(tmp_path: Path) -> None:
    statuses, said, found = preflight(tmp_path, "--per-node", "1000")
    assert statuses == [2, 2]
    assert "preflight: error: node2: 1000 processes have " in said[0]
    assert not any(problem["broken"] for problem in found["problems"])


def test_a_node_that_does_not_come(tmp_path: Path) -> None:
    """Which may be its own fault: another one may do."""
    statuses, said, found = preflight(tmp_path, "--timeout", "3", only=1)
    assert statuses == [3]
    assert "failed: node2: did not come to node1 (127.0.0.1 on lo), port " in said[0]
    assert [(problem["node"], problem["broken"]) for problem in found["problems"]] == [("node2", True)]


def test_no_node_comes_to_the_first(tmp_path: Path) -> None:
    """Then it is the first that is broken."""
    three = {"WORLD_SIZE": "3", "GFRNN_NODES": "node1 node2 node3"}
    statuses, said, found = preflight(tmp_path, "--timeout", "3", only=1, extra=lambda rank: three)
    assert statuses == [3]
    assert "failed: node1: no other node came to node1 (127.0.0.1 on lo), port " in said[0]
    assert [(problem["node"], problem["broken"]) for problem in found["problems"]] == [("node1", True)]


def test_a_process_for_each_rank(tmp_path: Path) -> None:
    """As where SLURM gives each task its own GPU: one node, and each process looks at its own."""

    def own(rank: int) -> dict[str, str]:
        return {"SLURMD_NODENAME": "node1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": str(rank)}

    statuses, said, found = preflight(tmp_path, "--per-node", "2", extra=own)
    assert statuses == [0, 0], said
    assert [(node["name"], node["visible_devices"]) for node in found["nodes"]] == [("node1", ["0", "1"])]
    assert found["network"] == {}


def test_nobody_where_the_first_should_be(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control/preflight.json").write_text("{}")
    there = {"RANK": "1", "SLURMD_NODENAME": "node2"}
    statuses, said, _ = preflight(tmp_path, "--timeout", "3", only=1, extra=lambda rank: there)
    assert statuses == [2]
    assert "error: node2 (127.0.0.1 on lo) cannot meet the others at 127.0.0.1:" in said[0]


def test_gpus_and_clocks_are_compared() -> None:
    first = Node("node1", "node1 (10.0.0.1 on eth0)", "abc", "123", {"torch": "2.13.0"}, 2, 100.0)
    second = replace(first, name="node2", clock=95.0)
    assert compare([first, second]) == []
    assert clocks_apart([first, second]) == [
        "node2: its clock is -5.0 s off that of node1; have it synchronized (chrony, NTP)"
    ]
    assert clocks_apart([first, replace(second, clock=101.0)]) == []
    (problem,) = compare([first, replace(second, gpus=["H100"], driver="580")])
    assert problem.what == "its GPUs are H100 (driver 580), those of node1 none (driver none)"
    both = by_node([replace(second, gpus=["H100"]), first, replace(second, gpus=["H200"])])
    assert [(node.name, node.gpus) for node in both] == [("node2", ["H100", "H200"]), ("node1", [])]
