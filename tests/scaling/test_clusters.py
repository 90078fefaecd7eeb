"""Clusters from YAML: figures in SI units, presets that hold together, and one line for what a user gets wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gfrnn.config import UserError
from gfrnn.scaling.clusters import cluster_presets, load_cluster

GOOD: dict[str, Any] = {
    "name": "two of four",
    "gpus_per_node": 4,
    "nvlink_gbytes_per_second": 300,
    "nvlink_latency_us": 3,
    "network_gbit_per_second": 100,
    "network_latency_us": 8,
    "bf16_tflops": 312,
    "fp32_tflops": 19.5,
    "memory_gbytes": 80,
    "memory_gbytes_per_second": 2039,
}


def written(tmp_path: Path, content: Any) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(file)


def refused(file: str) -> str:
    with pytest.raises(UserError) as caught:
        load_cluster(file)
    line = str(caught.value)
    assert "\n" not in line
    assert file in line
    return line


def test_figures_are_in_seconds_bytes_and_flops(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, GOOD | {"dollars_per_gpu_hour": 2.5}))
    assert cluster.name == "two of four"
    assert cluster.gpus_per_node == 4
    assert cluster.intra.bytes_per_second == 300e9
    assert cluster.intra.latency == pytest.approx(3e-6)
    assert cluster.inter.bytes_per_second == 12.5e9
    assert cluster.inter.latency == pytest.approx(8e-6)
    assert cluster.peak_flops("bf16") == 312e12
    assert cluster.peak_flops("fp32") == 19.5e12
    assert cluster.memory_bytes == 80e9
    assert cluster.memory_bytes_per_second == 2039e9
    assert cluster.dollars_per_gpu_hour == 2.5
    assert load_cluster(written(tmp_path, GOOD)).dollars_per_gpu_hour is None


def test_whose_gpus_are_a_device(tmp_path: Path) -> None:
    l4 = load_cluster(written(tmp_path, GOOD | {"gpu": "L4"}))
    assert [l4.has(name) for name in ("NVIDIA L4", "NVIDIA L40S", "cpu")] == [True, False, False]
    assert load_cluster("dgx-a100").has("NVIDIA A100-SXM4-80GB")
    assert load_cluster("laptop").has("NVIDIA GeForce RTX 4070 Laptop GPU")
    assert not load_cluster("laptop").has("NVIDIA GeForce RTX 4070")
    assert not load_cluster(written(tmp_path, GOOD)).has("NVIDIA L4")
    assert load_cluster(written(tmp_path, GOOD | {"gpu": 4070})).has("NVIDIA GeForce RTX 4070")


def test_a_number_that_yaml_takes_for_text(tmp_path: Path) -> None:
    assert load_cluster(written(tmp_path, GOOD | {"nvlink_latency_us": "3e-1"})).intra.latency == pytest.approx(3e-7)


@pytest.mark.parametrize("name", cluster_presets())
def test_presets(name: str) -> None:
    """Hold together: links in a node are at least as good as those between, bf16 is faster, memory is read fast."""
    cluster = load_cluster(name)
    assert cluster.intra.bytes_per_second > cluster.inter.bytes_per_second
    assert cluster.intra.latency < cluster.inter.latency < 1e-3
    assert cluster.bf16_flops > cluster.fp32_flops > 1e12
    assert 0.01 < cluster.memory_bytes / cluster.memory_bytes_per_second < 0.1


def test_common_clusters_are_there() -> None:
    assert {"dgx-h100", "dgx-a100", "hgx-h200", "l4-ethernet", "laptop"} <= set(cluster_presets())


@pytest.mark.parametrize("key", GOOD)
def test_missing_figures(key: str, tmp_path: Path) -> None:
    content = {name: value for name, value in GOOD.items() if name != key}
    assert f"{key} is missing; add {key}:" in refused(written(tmp_path, content))
    assert f"{key} is missing" in refused(written(tmp_path, content | {key: None}))


@pytest.mark.parametrize("value", [-1, 0, "fast", float("nan"), float("inf"), True, [400], "400 Gbit/s", 10**400])
@pytest.mark.parametrize("key", ["network_gbit_per_second", "gpus_per_node", "dollars_per_gpu_hour"])
def test_figures_that_are_none(key: str, value: Any, tmp_path: Path) -> None:
    line = refused(written(tmp_path, GOOD | {key: value}))
    assert f"{key} is " in line
    assert "greater than 0" in line


def test_gpus_are_whole(tmp_path: Path) -> None:
    assert "gpus_per_node is 2.5; give a whole number" in refused(written(tmp_path, GOOD | {"gpus_per_node": 2.5}))


def test_unknown_keys_get_the_nearest(tmp_path: Path) -> None:
    line = refused(written(tmp_path, GOOD | {"network_gbits_per_second": 400}))
    assert "did you mean network_gbit_per_second?" in line
    assert "7 is unknown" in refused(written(tmp_path, GOOD | {7: 1}))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("gpus_per_node: [8", ":1:18: not YAML"),
        ("a\x00b: 1", "not YAML"),
        ("- 8\n- 4", "no keys with values"),
        ("", "no keys with values"),
        ("date: 2026-99-99", "not YAML"),
        ("[" * 1500, "not YAML"),
    ],
)
def test_files_that_are_no_description(text: str, problem: str, tmp_path: Path) -> None:
    assert problem in refused(written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refused(str(tmp_path / "none.yaml"))
    assert "Is a directory" in refused(str(tmp_path))
    assert "dgx-h100" in refused("dgx-h1000")
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"name: \xe9")
    assert "not UTF-8" in refused(str(file))
